"""What other estimators from PyPI say about a published row: their own code, given the same model and settings.

Each takes a row in the format of data/published_memory.jsonl, the content of the model's config.json and its number of
parameters, and returns bytes of the whole process, or raises `NotCoveredError`. `make_peers.sh` installs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autofit.units import GIB, MIB

Row = dict[str, Any]
ModelDimensions = dict[str, int]
ATTENTION_PROJECTIONS = 4


class NotCoveredError(Exception):
    """A peer cannot say anything about a row."""


def dimensions(config: dict[str, Any]) -> ModelDimensions:
    """Read the fields that all three need, as a Llama-like config.json names them.

    Raises:
        NotCoveredError: the config names them otherwise.
    """
    try:
        heads = config["num_attention_heads"]
        return {
            "hidden_size": config["hidden_size"],
            "num_layers": config["num_hidden_layers"],
            "num_attention_heads": heads,
            "num_kv_heads": config.get("num_key_value_heads") or heads,
            "intermediate_size": config["intermediate_size"],
            "vocab_size": config["vocab_size"],
        }
    except KeyError as error:
        raise NotCoveredError(f"the config has no {error}") from error


def fitcheck(row: Row, config: dict[str, Any], num_params: int) -> int:
    """Ask fitcheck-llm. Its constants were fitted to T4 runs, among them the `fitcheck` rows."""
    from fitcheck import ModelConfig, TrainingConfig, estimate, get_gpu

    sizes = dimensions(config)
    quantization = row["quantization"] or {}
    head_dim = config.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"]
    model = ModelConfig(
        name=row["model"],
        num_params=num_params,
        head_dim=head_dim,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        **sizes,
    )
    training = TrainingConfig(
        precision={"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}[row["weights_dtype"]],
        quantization={4: "nf4", 8: "int8", None: "none"}[quantization.get("bits")],
        double_quant=bool(quantization.get("double_quant")),
        batch_size=row["micro_batch_size"],
        seq_len=row["seq_len"],
        lora_rank=row["lora_rank"],
        lora_targets=row["lora_target_modules"] or [],
        grad_checkpoint=row["gradient_checkpointing"],
        flash_attn=row["attention"] != "eager",
        optimizer=_named(row["optimizer"], {"adamw_torch": "adamw", "paged_adamw_8bit": "adam8bit"}),
        optimizer_dtype="bf16" if row["method"] == "full" and row["autocast"] == "no" else "fp32",
    )
    gpu = get_gpu("t4" if "T4" in row["gpus"] else "a100-80")
    return _asked(lambda: estimate(model, training, gpu).total_mib * MIB)


def ftuneai(row: Row, config: dict[str, Any], num_params: int) -> int:
    """Ask ftuneai."""
    from ftuneai.core.memory import MemoryEstimator
    from ftuneai.core.models import (
        FineTuneMethod,
        LoRATarget,
        ModelSpec,
        OptimizerType,
        Quantization,
        ShardingStrategy,
        TrainingConfig,
    )

    model = ModelSpec(
        name=row["model"],
        parameters=num_params,
        max_seq_length=config.get("max_position_embeddings", row["seq_len"]),
        **dimensions(config),
    )
    targets = len(row["lora_target_modules"] or [])
    training = TrainingConfig(
        model=row["model"],
        method=FineTuneMethod(row["method"]),
        quantization=Quantization({4: "4bit", 8: "8bit", None: "none"}[(row["quantization"] or {}).get("bits")]),
        batch_size=row["micro_batch_size"],
        seq_length=row["seq_len"],
        gradient_checkpointing=row["gradient_checkpointing"],
        optimizer=OptimizerType(_named(row["optimizer"], {"adamw_torch": "adamw", "paged_adamw_8bit": "adam_8bit"})),
        lora_rank=row["lora_rank"] or 16,
        lora_target=LoRATarget("attention_all" if targets <= ATTENTION_PROJECTIONS else "all_linear"),
        flash_attention=row["attention"] != "eager",
        sharding=ShardingStrategy("fsdp" if row["sharding"].startswith("fsdp") else "none"),
        num_gpus=int(row["gpus"].split("x")[0]),
    )
    return _asked(lambda: MemoryEstimator(model, training).estimate().total_gb * GIB)


def hf_vram_calc(row: Row, _config: dict[str, Any], num_params: int) -> int:
    """Ask hf-vram-calc, which knows neither batch nor length for training; as installed it knows int4 and no nf4."""
    from hf_vram_calc.calculator import VRAMCalculator
    from hf_vram_calc.config import ConfigManager

    calculator = VRAMCalculator(ConfigManager())
    half = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}[row["weights_dtype"]]
    weights = calculator.calculate_model_memory(num_params, "int4" if row["quantization"] else half)
    if row["method"] == "full":
        return _asked(lambda: calculator.calculate_training_memory(weights) * GIB)
    return _asked(lambda: calculator.calculate_lora_memory(weights, num_params, row["lora_rank"]) * GIB)


def _named(name: str, names: dict[str, str]) -> str:
    if name not in names:
        raise NotCoveredError(f"it has no optimizer {name}")
    return names[name]


def _asked(question: Callable[[], float]) -> int:
    try:
        return int(question())
    except (ValueError, KeyError) as error:
        raise NotCoveredError(str(error)) from error


PEERS: dict[str, Callable[[Row, dict[str, Any], int], int]] = {
    "fitcheck-llm 0.3.1": fitcheck,
    "ftuneai 0.4.1": ftuneai,
    "hf-vram-calc 1.0.9": hf_vram_calc,
}


def ask_all(row: Row, config: dict[str, Any], num_params: int) -> dict[str, int]:
    """Ask every peer about a row; those that cannot answer are left out."""
    answers = {}
    for name, ask in PEERS.items():
        try:
            answers[name] = ask(row, config, num_params)
        except NotCoveredError:
            continue
    return answers
