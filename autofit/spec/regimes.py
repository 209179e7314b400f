"""Which code path a configuration takes: the one place that maps knobs to a traced regime."""

from __future__ import annotations

from msgspec.structs import replace

from autofit.spec.configuration import Configuration, Dtype, Lora, MixedPrecision, Quantization
from autofit.spec.hardware import Device
from autofit.spec.profile import Regime

ZERO3 = 3
FIRST_WITH_FLASH = (8, 0)
"""Compute capability.

Source: torch v2.13 aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, check_flash_attention_hardware_support."""
_HALF: dict[MixedPrecision, Dtype] = {"bf16": "bfloat16", "fp16": "float16"}


def regime_of(configuration: Configuration, device: Device, fp32_modules: frozenset[Dtype] = frozenset()) -> Regime:
    """Return the regime a configuration's step has to be traced under.

    DeepSpeed casts the model to its 16-bit dtype whatever it was loaded in, and does not use autocast.
    Source: deepspeed/runtime/engine.py 0.19.8 (`_configure_distributed_model`); accelerate/accelerator.py 1.15
    (`_prepare_deepspeed` skips `prepare_model`'s autocast).

    FSDP gathers every parameter in its 16-bit dtype, whatever it is stored in, and autocast stays around the forward.
    FSDP1 puts adapters in units of their own, so that peft sees the stored dtype when it converts their input.
    Source: accelerate/accelerator.py 1.15 (`prepare_model`), accelerate/utils/dataclasses.py (`set_mixed_precision`);
    peft/utils/other.py 0.21 (`fsdp_auto_wrap_policy`).

    Packed rows are put one after the other like sequences that nobody packed: one row in both cases.
    Source: trl/trainer/sft_trainer.py 1.16 (`padding_free` follows from packing with "bfd").

    Stage 3 replaces torch's linear function. Where every weight trains that keeps what torch's own keeps.

    Modules that transformers loads in fp32 beside 16-bit weights stay so, unless an engine casts or gathers the weights
    in 16 bits; what FSDP gathers so, it stores in fp32. `prepare_model_for_kbit_training` makes the others fp32 too.

    Args:
        configuration: what is trained, and how.
        device: whose kernels run.
        fp32_modules: dtypes that the model may be loaded in with modules in fp32; see `dtypes_with_fp32_modules`.
    """
    half = _HALF.get(configuration.mixed_precision)
    checkpoints = configuration.gradient_checkpointing
    engine_casts = configuration.uses_deepspeed and half is not None
    gathers_half = configuration.uses_fsdp and half is not None
    quantization = _quantization(configuration.quantization, casts_rest=gathers_half)
    weights_dtype = half if (engine_casts or gathers_half) and half else configuration.weights_dtype
    quantized = configuration.quantization
    becomes_fp32 = quantized is not None and quantized.prepares_kbit
    has_fp32_modules = configuration.weights_dtype in fp32_modules and not (engine_casts or becomes_fp32)
    return Regime(
        method=configuration.method,
        quantization=quantization,
        lora=None if configuration.lora is None else _without_scale(configuration.lora),
        freeze=configuration.freeze,
        weights_dtype=weights_dtype,
        adapter_dtype=_adapter_dtype(
            configuration, half if engine_casts or (gathers_half and configuration.sharding == "fsdp2") else None
        ),
        autocast="no" if engine_casts else configuration.mixed_precision,
        gradient_checkpointing=checkpoints,
        use_reentrant=checkpoints and configuration.use_reentrant,
        checkpoint_every_n_layers=configuration.checkpoint_every_n_layers if checkpoints else 1,
        checkpoint_offload=checkpoints and configuration.checkpoint_offload,
        attention=configuration.attention,
        flash_kernel=_runs_flash(device),
        sdpa_kernel=configuration.sdpa_kernel if configuration.attention == "sdpa" else "auto",
        loss=configuration.loss,
        batching="packed" if configuration.batching == "padding_free" else configuration.batching,
        task=configuration.task,
        image_tokens=configuration.image_tokens,
        device=device.kind,
        keeps_outputs=configuration.keeps_outputs,
        zero3_linear=configuration.zero_stage == ZERO3 and configuration.method != "full",
        sequence_parallel_size=configuration.sequence_parallel_size,
        keeps_fp32=has_fp32_modules and not gathers_half,
        stores_fp32_beside=configuration.weights_dtype if has_fp32_modules and gathers_half else None,
    )


def _without_scale(lora: Lora) -> Lora:
    """What the product of the two matrices is multiplied by changes no code path.

    Source: peft/tuners/lora/layer.py 0.21, `scaling` in Linear.forward: always multiplied, by a number.
    """
    return replace(lora, lora_alpha=Lora().lora_alpha, use_rslora=False)


def _quantization(quantization: Quantization | None, *, casts_rest: bool) -> Quantization | None:
    """What is not quantised computes in the dtype it is gathered in, though it may have been prepared in fp32."""
    if quantization is None or not casts_rest:
        return quantization
    return replace(quantization, prepares_kbit=False)


def _adapter_dtype(configuration: Configuration, engine_dtype: Dtype | None) -> Dtype:
    """peft makes adapters fp32 whatever the base is, and DeepSpeed casts them with the rest of the model.

    Not where the model was built partitioned (stage 3): then nothing is cast. A quantised model never is built so.
    Source: deepspeed/runtime/engine.py 0.19.8 (`is_zero_init_model`); transformers/modeling_utils.py 5.23.
    """
    built_partitioned = configuration.zero_stage == ZERO3 and configuration.quantization is None
    return "float32" if engine_dtype is None or built_partitioned else engine_dtype


def _runs_flash(device: Device) -> bool:
    """A CPU rank always does; a GPU whose capability is not known is taken to be recent."""
    return device.kind == "cpu" or (device.compute_capability or FIRST_WITH_FLASH) >= FIRST_WITH_FLASH
