"""Rules about devices: what their arithmetic and their kernels are."""

from __future__ import annotations

from autofit.search.rules.rule import Rule, autocast_dtype, is_from_bitsandbytes, trains_in_fp16

VOLTA = (7, 0)
AMPERE = (8, 0)
"""Compute capability."""
MAX_FLASH_HEAD = 256

HARDWARE_RULES: tuple[Rule, ...] = (
    Rule(
        name="bf16-needs-hardware",
        reason="the GPU does not multiply bfloat16 and transformers refuses to train in it",
        library="transformers",
        releases=">=4.20",
        source='transformers/training_args.py 5.23, "Your setup doesn\'t support bf16/gpu"',
        axes=("path", "engine"),
        breaks=lambda c, on: (
            on.device.kind == "cuda"
            and not on.device.computes_bf16
            and "bfloat16" in {c.weights_dtype, autocast_dtype(c), c.quantization and c.quantization.compute_dtype}
        ),
    ),
    Rule(
        name="tf32-needs-ampere",
        reason="tensor cores round fp32 products to TF32 from Ampere on, and transformers refuses it elsewhere",
        library="transformers",
        releases=">=4.10",
        source='transformers/training_args.py 5.23, "--tf32 requires Ampere or a newer GPU arch"',
        axes=("path",),
        breaks=lambda c, on: c.tf32 and (on.is_cpu or on.is_before(AMPERE)),
    ),
    Rule(
        name="fp16-is-not-for-cpus",
        reason="accelerate takes no fp16 on a CPU: it raises, or (1.15) trains in fp32 without a word",
        library="accelerate",
        releases=">=0.20",
        source="accelerate/accelerator.py 1.15, Accelerator.__init__ (`native_amp`)",
        axes=("path",),
        breaks=lambda c, on: c.mixed_precision == "fp16" and on.is_cpu,
    ),
    Rule(
        name="auto-gptq-needs-a-gpu",
        reason="the one layer of auto_gptq that trains is Triton's, which allocates on CUDA devices",
        library="auto-gptq",
        releases=">=0.7",
        source='auto_gptq/nn_modules/triton_utils/dequant.py 0.7, dequant248 (`device="cuda"`)',
        axes=("path",),
        breaks=lambda c, on: on.is_cpu and c.quantization is not None and c.quantization.kernel == "auto_gptq",
    ),
    Rule(
        name="fp16-weights-cannot-be-unscaled",
        reason="the gradient scaler refuses gradients that are fp16 themselves",
        library="torch",
        releases=">=1.6",
        source="torch/amp/grad_scaler.py 2.13, _unscale_grads_; huggingface/transformers#23165",
        axes=("path", "engine"),
        breaks=lambda c, _: c.mixed_precision == "fp16" and trains_in_fp16(c) and c.sharding in {"none", "ddp"},
    ),
    Rule(
        name="flex-attention-needs-volta",
        reason="flex_attention trains on CUDA GPUs of compute capability 7.0 and later only, which Triton compiles for",
        library="torch",
        releases=">=2.5",
        source='torch/nn/attention/flex_attention.py 2.13, "FlexAttention does not support backward on CPU"; '
        "torch/_inductor/exc.py, GPUTooOldForTriton",
        axes=("path",),
        breaks=lambda c, on: c.attention == "flex_attention" and (on.is_cpu or on.is_before(VOLTA)),
    ),
    Rule(
        name="flash-attention-needs-ampere",
        reason="flash-attention runs on CUDA GPUs of compute capability 8.0 and later only",
        library="flash-attn",
        releases=">=2.0",
        source="Dao-AILab/flash-attention README.md and #762",
        axes=("path",),
        breaks=lambda c, on: c.attention == "flash_attention_2" and (on.is_cpu or on.is_before(AMPERE)),
    ),
    Rule(
        name="flash-attention-needs-half",
        reason="flash-attention multiplies float16 and bfloat16 only",
        library="flash-attn",
        releases=">=2.0",
        source='transformers/modeling_utils.py 5.23, "only supports torch.float16 and torch.bfloat16 dtypes"',
        axes=("path", "engine"),
        breaks=lambda c, _: (
            c.attention == "flash_attention_2" and c.mixed_precision == "no" and c.weights_dtype == "float32"
        ),
    ),
    Rule(
        name="flash-attention-needs-small-heads",
        reason=f"flash-attention takes heads of at most {MAX_FLASH_HEAD}",
        library="flash-attn",
        releases=">=2.0",
        source='csrc/flash_attn/flash_api.cpp 2.8, "only supports head dimension at most 256"; '
        "Dao-AILab/flash-attention#2427",
        axes=("path",),
        breaks=lambda c, on: c.attention == "flash_attention_2" and _largest_head(on.config) > MAX_FLASH_HEAD,
    ),
    Rule(
        name="paged-optimizer-on-cpu",
        reason="bitsandbytes pages nothing on a CPU: it warns and keeps ordinary state",
        library="bitsandbytes",
        releases=">=0.50",
        source="bitsandbytes/optim/optimizer.py 0.50, get_state_buffer",
        axes=("optim",),
        breaks=lambda c, on: c.optim.startswith("paged") and on.is_cpu,
        waived_by=lambda asked: bool(asked.optims),
    ),
    Rule(
        name="8bit-optimizer-on-cpu",
        reason="on a CPU bitsandbytes unpacks all 8-bit state to fp32 in Python for every update",
        library="bitsandbytes",
        releases=">=0.50",
        source="bitsandbytes/backends/cpu/ops.py 0.50, _optimizer_update_8bit_blockwise_cpu",
        axes=("optim",),
        breaks=lambda c, on: is_from_bitsandbytes(c.optim) and c.optim.endswith("8bit") and on.is_cpu,
        waived_by=lambda asked: bool(asked.optims),
    ),
    Rule(
        name="bitsandbytes-optimizers-were-for-gpus",
        reason="the optimizers had no kernels for CPUs",
        library="bitsandbytes",
        releases="<0.50",
        source="bitsandbytes-foundation/bitsandbytes#1901",
        axes=("optim",),
        breaks=lambda c, on: is_from_bitsandbytes(c.optim) and on.is_cpu,
    ),
    Rule(
        name="adalomo-needs-cuda",
        reason="it moves its state to CUDA wherever the weights are",
        library="lomo-optim",
        releases=">=0.1",
        source='lomo_optim/adalomo.py 0.1.1, AdaLomo.__init__ (`.cuda()`): "Torch not compiled with CUDA enabled"',
        axes=("optim",),
        breaks=lambda c, on: c.optim == "adalomo" and on.is_cpu,
    ),
    Rule(
        name="galore-8bit-needs-cuda",
        reason="its step waits for CUDA, and raises where there is none",
        library="galore-torch",
        releases=">=1.0",
        source="galore_torch/adamw8bit.py 1.0, step (`torch.cuda.synchronize()`)",
        axes=("optim",),
        breaks=lambda c, on: c.optim == "galore_adamw_8bit" and on.is_cpu,
    ),
    Rule(
        name="checkpoints-are-offloaded-from-gpus",
        reason="offloaded checkpoints are pinned, and torch pins memory for accelerators only",
        library="torch",
        releases=">=2.0",
        source='torch 2.13, "pin_memory=True requires a CUDA or other accelerator backend"; '
        "transformers/modeling_utils.py 5.23, _activation_checkpointing_enable",
        axes=("path",),
        breaks=lambda c, on: c.checkpoint_offload and on.is_cpu,
    ),
    Rule(
        name="liger-needs-triton",
        reason="Liger's kernels are written in Triton, which has no CPU backend",
        library="liger-kernel",
        releases=">=0.1",
        source="liger-kernel 0.8.5, liger_kernel/ops/fused_linear_cross_entropy.py, `import triton`",
        axes=("path",),
        breaks=lambda c, on: c.loss == "liger" and on.is_cpu,
    ),
)


def _largest_head(config: object) -> int:
    """Return the widest head that a config names, 0 where it names none."""
    if not isinstance(config, dict):
        return 0
    inner = config.get("text_config") or config
    heads, hidden = inner.get("num_attention_heads"), inner.get("hidden_size")
    derived = hidden // heads if isinstance(heads, int) and isinstance(hidden, int) and heads else 0
    named = [inner.get("head_dim"), inner.get("global_head_dim")]
    given = [size for size in named if isinstance(size, int)]
    return max(given, default=derived)
