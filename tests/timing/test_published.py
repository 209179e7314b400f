"""Speeds that others measured, against the time model; nothing was fitted to these rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autofit.profile.trace import trace
from autofit.sources.hardware import parse_cluster
from autofit.spec.configuration import Configuration, Lora, Quantization
from autofit.spec.job import Workload
from autofit.spec.regimes import regime_of
from autofit.timing import estimate_time

ROWS = [json.loads(line) for line in (Path(__file__).parent / "data" / "throughput.jsonl").read_text().splitlines()]
LLAMA_2_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
MISTRAL_7B = {**LLAMA_2_7B, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 32768}
CONFIGS = {"mistralai/Mistral-7B-v0.1": MISTRAL_7B, "Llama-2 7B": LLAMA_2_7B}
GPUS = {"A100-80GB": "A100-SXM-80G", "RTX 4090 24GB": "RTX4090-24G"}
SHARDINGS = {"none": "none", "FSDP FULL_SHARD (accelerate)": "zero3", "DDP (FSDP NO_SHARD)": "ddp"}


def configuration_of(row):
    """Return the configuration nearest to a row's: full shard is timed as stage 3, whose traffic is the same."""
    return Configuration(
        method=row["method"],
        quantization=Quantization() if row["method"] == "qlora" else None,
        lora=None if row["method"] == "full" else Lora(r=16, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")),
        optim="adamw_torch",
        per_device_train_batch_size=row["micro_batch_size"],
        gradient_accumulation_steps=row["grad_accum"] or 1,
        num_processes=row["gpus_count"],
        gradient_checkpointing=bool(row["gradient_checkpointing"]),
        sharding=SHARDINGS[row["sharding"]],
        weights_dtype="bfloat16",
        mixed_precision="bf16",
        attention="sdpa",
    )


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_measured_speed_is_within_a_factor_of_two(row):
    """Predicted tokens a second are between half and twice the published ones."""
    configuration = configuration_of(row)
    cluster = parse_cluster(f"{row['gpus_count']}x{GPUS[row['gpu']]}")
    workload = Workload(sequence_tokens=row["seq_len"], global_batch_sequences=configuration.global_batch_sequences)
    profile = trace(row["model"], CONFIGS[row["model"]], regime_of(configuration, cluster.device))
    time = estimate_time(profile, configuration, cluster, workload)
    assert 0.5 < time.tokens_per_second / row["tokens_per_second_total"] < 2.0
