"""Rows of sources that nobody here has seen: each is the configuration it says, or is refused with what it lacks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from autofit.errors import InputError
from autofit.sources.models import resolve_model
from autofit.sources.rows import read_case

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import accuracy
import published_rows
import published_speed
import published_traces
import throughput

ROW = {
    "id": "one",
    "source": "somebody/benchmark README.md",
    "model": "Llama 3.1 8B",
    "method": "lora",
    "seq_len": 2048,
    "micro_batch_size": 2,
    "grad_accum": 4,
    "gpus_count": 2,
    "gpu": "A100-SXM4-80GB",
    "precision": "bf16",
    "sharding": "DDP",
    "gradient_checkpointing": True,
    "offload": "none",
    "attention": "sdpa",
    "optimizer": "adamw_torch",
    "tokens_per_second_total": 5000.0,
}
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


def stated(folder, **changes):
    """State the row with changes; a change to `...` leaves its field out."""
    row = {name: value for name, value in (ROW | changes).items() if value is not ...}
    return published_speed.state(row, folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"method": "Full finetuning"}, {"method": "full"}),
        ({"method": "QLoRA"}, {"method": "qlora"}),
        ({"quant_bits": 4}, {"method": "qlora"}),
        ({"quant_bits": 16}, {"method": "lora", "quantization": None}),
        ({"optimizer": "bitsandbytes.optim.PagedAdamW8bit"}, {"optim": "paged_adamw_8bit"}),
        ({"optimizer": "torch.optim.AdamW (fused=True)"}, {"optim": "adamw_torch_fused"}),
        ({"sharding": "DeepSpeed ZeRO stage 2"}, {"sharding": "zero2"}),
        ({"sharding": "ds_z2_offload", "offload": None}, {"sharding": "zero2", "offload": "optimizer"}),
        ({"sharding": "full_shard auto_wrap"}, {"sharding": "fsdp1", "reshard_after_forward": True}),
        ({"sharding": "FSDP2 SHARD_GRAD_OP"}, {"sharding": "fsdp2", "reshard_after_forward": False}),
        ({"sharding": "FSDP", "offload": "cpu"}, {"offload": "optimizer_and_parameters"}),
        ({"sharding": "none"}, {"sharding": "ddp"}),
        ({"gpus_count": 1, "sharding": None}, {"sharding": "none", "num_processes": 1}),
        ({"attention": "FA2"}, {"attention": "flash_attention_2"}),
        ({"attention": "xformers"}, {"attention": "sdpa", "sdpa_kernel": "efficient"}),
        ({"precision": "bf16-true"}, {"mixed_precision": "no", "weights_dtype": "bfloat16"}),
        ({"precision": "tf32"}, {"tf32": True, "weights_dtype": "float32"}),
        ({"method": "full", "precision": "16-mixed"}, {"mixed_precision": "fp16", "weights_dtype": "float32"}),
        ({"gradient_checkpointing": "False"}, {"gradient_checkpointing": False}),
        ({"gradient_checkpointing": "offloaded"}, {"gradient_checkpointing": True, "checkpoint_offload": True}),
        ({"seq_len": 2048.0, "micro_batch_size": "2"}, {"per_device_train_batch_size": 2}),
        ({"micro_batch_size": None, "global_batch_size": 16}, {"per_device_train_batch_size": 2}),
        ({"grad_accum": None}, {"gradient_accumulation_steps": 1}),
        ({"notes": "with Liger kernels"}, {"loss": "liger"}),
        ({"parallelism": "TP=1 PP=1 DP=2"}, {"num_processes": 2}),
    ],
    ids=str,
)
def test_a_spelling_means_what_its_library_means_by_it(tmp_path, change, expected):
    """What transformers, accelerate, DeepSpeed, LLaMA-Factory or Lightning call a setting is that setting."""
    configuration = stated(tmp_path, **change).case.configuration
    assert {name: getattr(configuration, name) for name in expected} == expected


def test_a_hybrid_shard_has_a_copy_in_each_node(tmp_path):
    """Two nodes of eight hold two sharded copies, and the network may be named in the notes, in bits."""
    case = stated(tmp_path, sharding="FSDP HYBRID_SHARD", gpus_count=16, notes="400 Gbps between nodes").case
    assert (case.configuration.sharding, case.configuration.num_replicas) == ("fsdp1", 2)
    assert (case.cluster.num_nodes, case.cluster.inter_node_bytes_per_second) == (2, 50e9)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("A100 (40GB)", "A100-SXM-40G"),
        ("A100 40GB SMX", "A100-SXM-40G"),
        ("A100 80GB PCIe", "A100-PCIe-80G"),
        ("H100 (PCIe)", "H100-PCIe-80G"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM-80G"),
        ("RTX 3090", "RTX3090-24G"),
        ("2x A6000 Ada 48GB", "RTX6000Ada-48G"),
        ("Tesla V100-SXM2-32GB", "V100-SXM2-32G"),
    ],
)
def test_a_gpu_is_of_the_form_and_size_that_are_said_of_it(tmp_path, name, device):
    """Words may come in any order, and what stands in brackets counts."""
    assert stated(tmp_path, gpu=name).case.cluster.device.name == device


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("Llama-2 7B", "meta-llama/Llama-2-7b-hf"),
        ("llama3-8b", "meta-llama/Meta-Llama-3-8B"),
        ("Mistral 7B", "mistralai/Mistral-7B-v0.1"),
        ("Mistral 7B v0.2", "mistralai/Mistral-7B-Instruct-v0.2"),
        ("Mistral 7B v0.3", "mistralai/Mistral-7B-v0.3"),
        ("Gemma 2B", "google/gemma-2b"),
        ("Gemma 2 2B", "google/gemma-2-2b"),
        ("phi-1.5", "microsoft/phi-1_5"),
        ("TinyLlama 1.1B", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    ],
)
def test_a_name_means_the_model_of_that_family_and_size(tmp_path, name, model):
    """The figures in names of versions and sizes are told apart."""
    assert stated(tmp_path, model=name).case.model.config == resolve_model(model).config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu": "RTX 3080 12GB"}, "the sizes there are: 3080-10G"),
        ({"gpu": "V100"}, "comes with different memory"),
        ({"gpu": "MI300X"}, "ROCM"),
        ({"gpu": "Gaudi2"}, "HPU"),
        ({"gpu": "8x H100"}, "gpu says 8 devices, and gpus_count 2"),
        ({"gpus_count": 16}, "network between its nodes"),
        ({"sharding": None}, "how the model is sharded over its devices is not stated"),
        ({"sharding": "ZeRO-2/3"}, "does not say which"),
        ({"sharding": "ds_z3_offload", "offload": None}, "whether parameters are offloaded too"),
        ({"sharding": "ZeRO-2 offload"}, "and the offload is 'none'"),
        ({"offload": "cpu"}, "does not say what is offloaded"),
        ({"attention": "ring"}, "attention 'ring' is not modelled"),
        ({"optimizer": "muon"}, "optimizer 'muon' is not modelled"),
        ({"precision": None}, "precision is not stated"),
        ({"precision": "fp8"}, "products in fp8"),
        ({"method": "dpo"}, "method 'dpo' is not modelled"),
        ({"method": "full", "quant_bits": 4}, "trains weights, and they are in 4 bits"),
        ({"quant_bits": 2}, "2 bits"),
        ({"gradient_checkpointing": "selective"}, "'selective', which is not modelled"),
        ({"gradient_checkpointing": ...}, "checkpointed is not stated"),
        ({"seq_len": "2k"}, "seq_len is '2k', which is no number"),
        ({"micro_batch_size": 0}, "no whole number above zero"),
        ({"global_batch_size": 4}, "global_batch_size is 4"),
        ({"tokens_per_second_total": None}, "tokens_per_second_total is not stated"),
        ({"tokens_per_second_per_gpu": 5000.0}, "is not tokens_per_second_per_gpu times the devices"),
        ({"parallelism": {"tp": 2}}, "tensor, pipeline or context parallelism"),
        ({"notes": "torch.compile on"}, "torch.compile"),
        ({"notes": "seq_len is only a cap"}, "how long they are is not stated"),
        ({"packing": False}, "how long they are is not stated"),
        ({"source": "unslothai/unsloth"}, "Unsloth"),
        ({"source": "NVIDIA NeMo"}, "NeMo"),
        ({"model": "no/such-model"}, "'no/such-model' is not known"),
        ({"model": "TheBloke/Llama-2-7B-GPTQ"}, "which packed layers"),
        ({"model": "some/llama-7b-GGUF"}, "GGUF"),
    ],
    ids=str,
)
def test_what_cannot_be_stated_is_refused_with_what_it_lacks(tmp_path, change, words):
    """The reason names the field and what it says."""
    with pytest.raises(published_rows.RefusedError) as refused:
        stated(tmp_path, **change)
    assert words in str(refused.value)


def test_what_a_row_says_goes_before_what_its_source_usually_does(tmp_path):
    """A row's own accumulation, optimizer and precision hold; its source's code fills what it leaves open."""
    coastline = {"source": "atlarge-research/coastline-recommender x", "model": "granite-3.1-8b-instruct"}
    open_, own = stated(tmp_path, **coastline, grad_accum=None), stated(tmp_path, **coastline, grad_accum=2)
    assert open_.case.configuration.gradient_accumulation_steps == 4
    assert own.case.configuration.gradient_accumulation_steps == 2
    tune = {"source": "pytorch/torchtune x", "notes": 'row "+ Packed Dataset"', "gpus_count": 1}
    optims = [stated(tmp_path, **tune, optimizer=name).case.configuration.optim for name in ("AdamW", "AdamW8bit")]
    assert optims == ["adamw_torch_fused", "adamw_8bit"]
    assert stated(tmp_path, **tune, precision="fp32").case.configuration.weights_dtype == "float32"


def test_what_nobody_says_is_named(tmp_path):
    """Where a row leaves open what a step depends on, it is said what that was taken to be."""
    found = stated(tmp_path, gpu="A100", attention=None, optimizer=None, grad_accum=None)
    assert {"the A100 has 80GB", "attention is sdpa", "one micro-step a step"} <= set(found.assumed)
    assert "the A6000 Ada is an RTX 6000 Ada" in stated(tmp_path, gpu="A6000 Ada 48GB").assumed
    assert "the A100 has 80GB" not in stated(tmp_path, gpu="A100", peak_gib=60).assumed
    assert "held to 280 W" in (stated(tmp_path, gpu="RTX 3090 (280W cap)").nearest or "")


@pytest.mark.parametrize(("said", "contradicts"), [(8030261248, False), (8e9, False), (3212749824, True), ("3B", True)])
def test_a_model_of_another_size_is_noticed(tmp_path, said, contradicts):
    """A number of parameters that is not that of the model of this name is; a rounded one is not."""
    assert bool(published_speed.contradicts_size(stated(tmp_path, num_params=said), None)) is contradicts


def test_attention_that_nobody_names_is_what_transformers_takes(tmp_path):
    """BLOOM has no sdpa in transformers, so a run that names nothing runs it eagerly; others take sdpa."""
    found = [stated(tmp_path, model=name, attention=None).assumed for name in ("bloom-560m", "Llama 3.1 8B")]
    assert ["attention is eager" in found[0], "attention is sdpa" in found[1]] == [True, True]


def test_a_config_that_cannot_be_read_is_refused_in_its_own_words(tmp_path):
    """A path that is there and holds no config.json is no unknown architecture."""
    (tmp_path / "config.json").write_text('{"a":', encoding="utf-8")
    with pytest.raises(published_rows.RefusedError, match="is not JSON"):
        stated(tmp_path, model=str(tmp_path / "config.json"))


def test_a_sharding_that_is_not_clear_is_the_one_of_its_sources_script(tmp_path):
    """Qwen's rows name two stages; LoRA ran with ZeRO-2 and all weights with ZeRO-3, as its scripts say."""
    row = {"source": "QwenLM/Qwen README.md", "model": "Qwen-7B", "sharding": "ZeRO-2/3 (script default)"}
    found = [stated(tmp_path, **row, method=name).case.configuration.sharding for name in ("lora", "full")]
    assert found == ["zero2", "zero3"]


def test_a_broken_line_loses_no_other(tmp_path):
    """Every line is a row or is refused, and no two have one name."""
    lines = [json.dumps(ROW), json.dumps(ROW), '{"id": ', "[1]", "", json.dumps({"model": "gpt2"})]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    found = published_rows.read_lines(path)
    assert [line.id for line in found] == ["one (line 1)", "one (line 2)", "line 3", "line 4", "line 6"]
    assert [line.refused is None for line in found] == [True, True, False, False, True]
    with pytest.raises(SystemExit):
        published_rows.read_lines(tmp_path / "none.jsonl")


def test_a_code_path_is_traced_once_whatever_comes_of_it(monkeypatch):
    """Rows that share a code path share its profile or its refusal."""
    case = read_case({"model": "openai-community/gpt2", "gpus": "1xA100-80G", "seq_len": 512, "optimizer": "sgd"})
    asked = []

    def refuse(_model, regimes, _tokens, *, progress):
        asked.extend(regimes)
        return {}, {regime: InputError("no", to_fix="none") for regime in regimes}

    monkeypatch.setattr(published_traces, "stored_profiles", lambda *_: {})
    monkeypatch.setattr(published_traces, "profiles_and_refusals", refuse)
    path = published_traces.code_path(case.model, case.regime, 512)
    assert published_traces.traces([path, path]) == {path.key: "no"}
    assert asked == [case.regime]


@pytest.mark.slow
def test_both_benchmarks_go_through_a_file_of_anything(tmp_path, capsys):
    """Lines that are broken, empty or of another kind are listed beside a row that is compared."""
    (tmp_path / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    model = str(tmp_path / "config.json")
    odd = [{}, {"id": 7, "model": []}, dict.fromkeys(ROW), {name: {"x": [1]} for name in ROW}]
    both = {
        "model": model,
        "method": "lora",
        "lora_rank": 8,
        "lora_target_modules": ["q_proj", "v_proj"],
        "micro_batch_size": 1,
        "seq_len": 64,
        "gradient_checkpointing": "true",
        "optimizer": "AdamW",
        "sharding": "none",
        "source": "x",
    }
    speed = {**ROW, **both, "gpus_count": 1, "gpu": "RTX 4090", "precision": "bf16-true", "extra": 1}
    memory = {
        **both,
        "id": "two",
        "gpus": "1xRTX 4090 24GB",
        "stack": "late-2026 transformers",
        "weights_dtype": "bf16",
        "autocast": "none",
        "outputs_kept": "false",
        "peak_allocated_gib": 1.0,
        "family": "x",
    }
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*map(json.dumps, [*odd, speed, memory]), "{"]), encoding="utf-8")
    assert throughput.main([str(path), "--json"]) == 0
    speeds = json.loads(capsys.readouterr().out)
    assert accuracy.main([str(path), "--json"]) == 0
    memories = json.loads(capsys.readouterr().out)
    assert [each["id"] for each in speeds if each["refused"] is None] == ["one"]
    assert [each["id"] for each in memories if each["refused"] is None] == ["two"]
    assert all(each["refused"] for each in (*speeds, *memories) if each["id"] not in {"one", "two"})
