"""Rows of measured runs: each is one configuration, exactly as it says, or is refused for what is not known of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from autofit.errors import InputError
from autofit.sources.rows import read_case
from autofit.spec.configuration import Configuration, Evaluation, Lora, Quantization

PUBLISHED = Path(__file__).resolve().parents[2] / "benchmarks" / "data" / "published_memory.jsonl"
ROWS = [json.loads(line) for line in PUBLISHED.read_text(encoding="utf-8").splitlines()]
ROW = {
    "id": "one",
    "model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "method": "qlora",
    "quantization": {"bits": 4, "type": "nf4", "double_quant": False, "skip": ["lm_head"]},
    "kbit_prepare": True,
    "lora_rank": 32,
    "lora_target_modules": ["q_proj", "v_proj"],
    "weights_dtype": "float16",
    "autocast": "no",
    "optimizer": "adamw_torch",
    "micro_batch_size": 2,
    "seq_len": 512,
    "outputs_kept": True,
    "gradient_checkpointing": True,
    "attention": "eager",
    "loss": "stock",
    "gpus": "1xT4-16G",
    "sharding": "none",
    "offload": "none",
    "peak_allocated_gib": 1.5,
}


def test_a_row_is_the_configuration_that_it_describes():
    """Every field of a row arrives, under the name that a configuration has for it; the rest is the model's."""
    case = read_case(ROW)
    assert case.configuration == Configuration(
        method="qlora",
        quantization=Quantization(double_quant=False, compute_dtype="float16", prepares_kbit=True),
        lora=Lora(r=32, target_modules=("q_proj", "v_proj")),
        optim="adamw_torch",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        num_processes=1,
        gradient_checkpointing=True,
        sharding="none",
        weights_dtype="float16",
        stored_dtype="bfloat16",
        mixed_precision="no",
        attention="eager",
        keeps_outputs=True,
        evaluation=Evaluation(per_device_eval_batch_size=8),
    )
    assert (case.workload.sequence_tokens, case.cluster.device.name) == (512, "T4-16G")
    assert case.regime.keeps_outputs


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_every_published_row_is_read(row):
    """A published row keeps its dtypes, its batch, its adapter and its number of GPUs; FSDP is FSDP."""
    case = read_case(row)
    configuration = case.configuration
    assert configuration.weights_dtype == row["weights_dtype"]
    assert configuration.mixed_precision == row["autocast"]
    assert configuration.per_device_train_batch_size == row["micro_batch_size"]
    assert case.cluster.num_devices == int(row["gpus"][0]) == configuration.num_processes
    assert configuration.sharding == {"fsdp_full_shard": "fsdp1"}.get(row["sharding"], row["sharding"])
    assert (configuration.lora is not None) == (row["lora_rank"] is not None)
    assert (configuration.quantization is not None) == (row["quantization"] is not None)


def test_a_null_is_the_default():
    """A row with nothing but a model, GPUs and a length is a plain Trainer's full fine-tuning in mixed precision."""
    case = read_case({"model": "gpt2", "gpus": "2xA100-80G", "seq_len": 8, "method": None, "outputs_kept": None})
    configuration = case.configuration
    assert (configuration.method, configuration.sharding, configuration.num_processes) == ("full", "ddp", 2)
    assert (configuration.mixed_precision, configuration.weights_dtype) == ("bf16", "float32")
    assert not configuration.keeps_outputs


@pytest.mark.parametrize(("release", "reenters"), [("4.48.1", True), ("5.0.0", False), ("5.23.0", False)])
def test_a_row_checkpoints_as_its_release_does_unasked(release, reenters, monkeypatch):
    """Trainer's checkpointing without arguments re-entered up to transformers 4; the row's own word goes before."""
    monkeypatch.setattr("autofit.sources.rows.installed_versions", lambda _names: {"transformers": release})
    assert read_case(ROW).configuration.use_reentrant is reenters
    assert read_case(ROW | {"use_reentrant": not reenters}).configuration.use_reentrant is not reenters
    assert not read_case(ROW | {"gradient_checkpointing": False}).configuration.use_reentrant


def test_what_a_scenario_leaves_to_trl_is_not_prepared_where_it_is_sharded():
    """TRL prepares for k bits and casts tables back on one GPU, and does neither under FSDP; dropout is 0.1."""
    said = {"autocast": "bf16", "weights_dtype": "bfloat16", "notes": "packed to seq_len; rank 0; baseline-peft-bnb"}
    one = read_case(ROW | said).configuration
    two = read_case(ROW | said | {"gpus": "2xA100-80G", "sharding": "fsdp_full_shard"}).configuration
    assert (one.quantization.prepares_kbit, one.quantization.recasts_tables) == (True, True)
    assert (two.quantization.prepares_kbit, two.quantization.recasts_tables) == (False, False)
    assert (one.quantization.storage_dtype, two.quantization.storage_dtype) == ("uint8", "bfloat16")
    assert one.lora.lora_dropout == two.lora.lora_dropout == 0.1
    assert read_case(ROW).configuration.lora.lora_dropout == 0.0
    assert read_case(ROW | said | {"lora_dropout": 0.0}).configuration.lora.lora_dropout == 0.0


def test_a_row_may_say_what_measured_rows_do_not():
    """Other knobs stand beside the fields of measured rows under their own names."""
    row = ROW | {"quantization": None, "method": "lora", "kbit_prepare": None}
    more = {"lora_alpha": 64, "checkpoint_every_n_layers": 3, "gradient_accumulation_steps": 4, "use_reentrant": True}
    plain, said = read_case(row).configuration, read_case(row | more).configuration
    assert said == replace(
        plain,
        lora=replace(plain.lora, lora_alpha=64),
        checkpoint_every_n_layers=3,
        gradient_accumulation_steps=4,
        use_reentrant=True,
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": None}, "no model"),
        ({"model": "no/such-model"}, "no/such-model"),
        ({"gpus": "1xH900"}, "H900"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"seq_len": "512"}, "seq_len is '512'"),
        ({"method": "dora"}, "dora"),
        ({"method": "full"}, "quantised"),
        ({"autocast": "fp8"}, "fp8"),
        ({"weights_dtype": "int4"}, "int4"),
        ({"optimizer": "sgdd"}, "sgdd"),
        ({"sharding": "tensor_parallel"}, "tensor_parallel"),
        ({"offload": "disk"}, "disk"),
        ({"loss": "mine"}, "mine"),
        ({"attention": "paged"}, "paged"),
        ({"quantization": {"bits": 3}}, "3"),
        ({"quantization": {"bits": 2, "type": "nf4"}}, "2 bits"),
        ({"quantization": {"bits": 4, "type": "int4"}}, "int4"),
        ({"quantization": {"bits": 4, "groups": 128}}, "groups"),
        ({"lora_rnak": 8}, "lora_rnak"),
        ({"lora_rank": "many"}, "Expected `int`"),
    ],
    ids=str,
)
def test_what_is_not_known_is_refused(change, words):
    """A value that no configuration can have is named in the refusal, and so is a field that nobody knows."""
    with pytest.raises(InputError) as refused:
        read_case(ROW | change)
    assert words in refused.value.message
