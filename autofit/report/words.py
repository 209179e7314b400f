"""One configuration in words, the same words wherever it is shown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import asdict

from autofit.spec.configuration import Configuration, Quantization, ZeroSettings
from autofit.spec.estimate import CostEstimate
from autofit.units import format_count, format_three_digits

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
        kind = {"lora": "", "dora": "DoRA ", "rslora": "rsLoRA "}.get(configuration.lora.kind, "rsLoRA and DoRA ")
        details.append(f"{kind}r={configuration.lora.r}")
    if configuration.quantization is not None:
        details.append(_code_words(configuration.quantization))
    return f"{words} ({', '.join(details)})" if details else words


def _code_words(quantization: Quantization) -> str:
    if quantization.comes_packed:
        return f"{quantization.quant_type.upper()}, {quantization.bits} bits"
    return "int8" if quantization.is_int8 else quantization.quant_type.upper()


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


def further_words(configuration: Configuration) -> list[str]:
    """Name every other knob that is not at its default: what a figure depends on has to be seen beside it."""
    c = configuration
    words = {
        f"{c.offload.replace('_', ' ')} on the host": c.offload != "none",
        f"{c.num_replicas} replicas": c.num_replicas > 1,
        "no resharding after forward": not c.reshard_after_forward,
        f"sequences shared by {c.sequence_parallel_size}": c.sequence_parallel_size > 1,
        **dict.fromkeys(_given(c.zero_settings), True),
        "gradients in DDP's buckets": c.gradient_as_bucket_view,
        "reentrant": c.gradient_checkpointing and c.use_reentrant,
        f"checkpoints every {c.checkpoint_every_n_layers} layers": c.checkpoint_every_n_layers > 1,
        "checkpoints on the host": c.checkpoint_offload,
        f"{c.attention} attention": c.attention != "sdpa",
        f"sdpa pinned to {c.sdpa_kernel}": c.sdpa_kernel != "auto",
        f"{c.loss} loss": c.loss != "stock",
        f"{c.batching} batches": c.batching != "equal",
        c.task: c.task != "auto",
        f"{c.image_tokens:,} image tokens a sequence": c.image_tokens > 0,
        "outputs kept through backward": c.keeps_outputs,
        "tf32": c.tf32,
        "expandable segments": c.expandable_segments,
        f"max_split_size_mb {c.max_split_size_mb}": c.max_split_size_mb is not None,
    }
    return [*_adapter_words(c), *(name for name, applies in words.items() if applies)]


def _given(settings: ZeroSettings) -> Iterator[str]:
    """Name each setting that somebody gave, as a DeepSpeed configuration does."""
    for name, value in asdict(settings).items():
        if value is not None:
            yield f"{name} {str(value).lower() if isinstance(value, bool) else f'{value:,}'}"


def _adapter_words(configuration: Configuration) -> list[str]:
    lora, quantization = configuration.lora, configuration.quantization
    words = {
        f"{', '.join(lora.modules_to_save if lora else ())} trained whole": lora is not None and lora.modules_to_save,
        "quantised once": quantization is not None and _is_four_bit(quantization) and not quantization.double_quant,
        "prepare_model_for_kbit_training": quantization is not None and quantization.prepares_kbit,
    }
    return [name for name, applies in words.items() if applies]


def _is_four_bit(quantization: Quantization) -> bool:
    return not quantization.is_int8 and not quantization.comes_packed


def tokens_words(num_tokens: float) -> str:
    """Write a rate of tokens with thousands separated, without decimals that nobody can vouch for."""
    return f"{num_tokens:,.0f}" if num_tokens >= 10 else f"{num_tokens:.2g}"


def share_words(fraction: float) -> str:
    """Write a share in per cent, with a decimal where that is all there is of it."""
    if fraction < 1e-6:
        return "0%"
    return "<0.1%" if fraction < 0.0005 else f"{fraction:.1%}" if fraction < 0.1 else f"{fraction:.0%}"


def model_words(name: str) -> str:
    """Name a model by its Hub id, or a path by its last two parts: a site-packages folder tells nobody anything."""
    path = Path(name)
    return "/".join(path.parts[-2:]) if path.is_absolute() else name


def params_words(num_params: int | None) -> str:
    """Write a parameter count, or that it is not known."""
    return "unknown" if num_params is None else format_count(num_params)


def price_words(cost: CostEstimate) -> str:
    """Write what a million tokens cost in a column of dollars: device-hours where the device has no price."""
    if cost.dollars_per_million_tokens is not None:
        return format_three_digits(cost.dollars_per_million_tokens)
    hours = cost.device_hours_per_million_tokens
    return "?" if hours is None else f"{format_three_digits(hours)} device-h"


def excess_words(excess_fraction: float) -> str:
    """Write by how much more something costs than the plan."""
    percent = round(excess_fraction * 100)
    return f"{percent:+d}%" if percent else "as much"
