"""One configuration in words, the same words wherever it is shown."""

from __future__ import annotations

from pathlib import Path

from autofit.spec.configuration import Configuration
from autofit.units import format_count

SHARDING_WORDS = {
    "none": "one process",
    "ddp": "DDP: every process holds everything",
    "zero1": "ZeRO-1: optimizer state is split",
    "zero2": "ZeRO-2: optimizer state and gradients are split",
    "zero3": "ZeRO-3: weights, gradients and optimizer state are split",
    "fsdp1": "FSDP: weights, gradients and optimizer state are split",
    "fsdp2": "FSDP2: weights, gradients and optimizer state are split",
}
METHOD_WORDS = {"full": "Full fine-tuning", "freeze": "Freezing", "lora": "LoRA", "qlora": "QLoRA"}


def method_words(configuration: Configuration) -> str:
    """Name the method with what makes two of its kind differ: rank and storage."""
    words = METHOD_WORDS[configuration.method]
    details = []
    if configuration.freeze is not None:
        details.append(f"all but the last {configuration.freeze.freeze_trainable_layers} layers")
    if configuration.lora is not None:
        details.append(f"r={configuration.lora.r}")
    if configuration.quantization is not None:
        bits8 = configuration.quantization.bits == 8
        details.append("int8" if bits8 else configuration.quantization.quant_type.upper())
    return f"{words} ({', '.join(details)})" if details else words


def batch_words(configuration: Configuration) -> str:
    """Write how the global batch is made up, as a product that can be checked by eye."""
    processes = configuration.num_processes
    return (
        f"micro-batch {configuration.per_device_train_batch_size}"
        f" x accumulation {configuration.gradient_accumulation_steps}"
        f" x {processes} process{'es' if processes != 1 else ''}"
        f" = global batch {configuration.global_batch_sequences}"
    )


def precision_words(configuration: Configuration) -> str:
    """Write what the weights are stored as and what is computed in."""
    mixed = configuration.mixed_precision
    return f"{configuration.weights_dtype} weights, " + (
        "no mixed precision" if mixed == "no" else f"{mixed} mixed precision"
    )


def checkpointing_words(configuration: Configuration) -> str:
    """Write whether activations are kept or computed again."""
    return "gradient checkpointing" if configuration.gradient_checkpointing else "no gradient checkpointing"


def tokens_words(num_tokens: float) -> str:
    """Write a rate of tokens with thousands separated, without decimals that nobody can vouch for."""
    return f"{num_tokens:,.0f}" if num_tokens >= 10 else f"{num_tokens:.2g}"


def model_words(name: str) -> str:
    """Name a model by its Hub id, or a path by its last two parts: a site-packages folder tells nobody anything."""
    path = Path(name)
    return "/".join(path.parts[-2:]) if path.is_absolute() else name


def params_words(num_params: int | None) -> str:
    """Write a parameter count, or that it is not known."""
    return "unknown" if num_params is None else format_count(num_params)
