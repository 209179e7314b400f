"""Combinations that libraries refuse or break, each with its reason, the releases it holds for and its source.

To add a rule, add an entry to `RULES`; nothing else knows of single rules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autofit.spec.configuration import Configuration
from autofit.spec.hardware import Cluster
from autofit.spec.job import Restrictions


def _never(_restrictions: Restrictions) -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A named reason for which configurations are left out."""

    name: str
    reason: str
    """What happens otherwise, as the end of a sentence that begins with "because"."""
    library: str
    releases: str
    """Releases of the library that the rule holds for."""
    source: str
    breaks: Callable[[Configuration, Cluster], bool]
    """Whether a configuration on a cluster is one of those."""
    waived_by: Callable[[Restrictions], bool] = _never
    """Whether the user asked for what the rule avoids: it works, but is not chosen unasked."""


RULES: tuple[Rule, ...] = (
    Rule(
        name="bf16-needs-hardware",
        reason="the GPU does not multiply bfloat16 and transformers refuses to train in it",
        library="transformers",
        releases=">=4.20",
        source='transformers/training_args.py 5.23, "Your setup doesn\'t support bf16/gpu"',
        breaks=lambda c, on: (
            on.device.kind == "cuda"
            and not on.device.computes_bf16
            and "bfloat16" in {c.weights_dtype, _autocast_dtype(c), c.quantization and c.quantization.compute_dtype}
        ),
    ),
    Rule(
        name="fp16-needs-gpu",
        reason="accelerate refuses fp16 mixed precision on a CPU",
        library="accelerate",
        releases=">=0.20",
        source='accelerate/accelerator.py 1.15, "fp16 mixed precision requires a device in"',
        breaks=lambda c, on: c.mixed_precision == "fp16" and on.device.kind == "cpu",
    ),
    Rule(
        name="fp16-weights-cannot-be-unscaled",
        reason="the gradient scaler refuses gradients that are fp16 themselves",
        library="torch",
        releases=">=1.6",
        source="torch/amp/grad_scaler.py 2.13, _unscale_grads_; huggingface/transformers#23165",
        breaks=lambda c, _: (
            c.method == "full" and c.weights_dtype == "float16" and c.mixed_precision == "fp16" and not c.uses_deepspeed
        ),
    ),
    Rule(
        name="pure-bf16-is-not-deepspeed",
        reason="DeepSpeed keeps fp32 copies of the weights and Adam's state, so nothing would be pure bf16",
        library="deepspeed",
        releases=">=0.16",
        source="deepspeed/runtime/zero/stage_1_and_2.py 0.19, single_partition_of_fp32_groups",
        breaks=lambda c, _: c.uses_deepspeed and c.mixed_precision == "no" and c.weights_dtype != "float32",
    ),
    Rule(
        name="several-processes-share-gradients",
        reason="Trainer wraps the model in DistributedDataParallel as soon as there are several processes",
        library="accelerate",
        releases=">=0.20",
        source="accelerate/accelerator.py 1.15, prepare_model",
        breaks=lambda c, _: c.sharding == "none" and c.num_processes > 1,
    ),
    Rule(
        name="quantised-needs-adapter",
        reason="transformers refuses to train a quantised model without an adapter",
        library="transformers",
        releases=">=4.30",
        source="transformers/trainer_utils.py 5.23, validate_quantization_for_training",
        breaks=lambda c, _: c.quantization is not None and c.lora is None,
    ),
    Rule(
        name="packed-weights-would-be-cast",
        reason="DeepSpeed casts floating parameters to its half dtype, and packed four-bit weights do not survive it",
        library="deepspeed",
        releases=">=0.16",
        source="deepspeed/runtime/engine.py 0.19, _cast_module_mixed_precision",
        breaks=lambda c, _: (
            c.uses_deepspeed
            and c.quantization is not None
            and c.mixed_precision != "no"
            and c.quantization.storage_dtype not in {"uint8", _autocast_dtype(c)}
        ),
    ),
    Rule(
        name="peft-zero3-needs-reentrant",
        reason="recomputed weights have other shapes under stage 3 and checkpointing raises CheckpointError",
        library="deepspeed",
        releases="<0.19.8",
        source="huggingface/transformers#47254, deepspeedai/DeepSpeed#4332 and #8130",
        breaks=lambda c, _: (
            c.zero_stage == 3 and c.lora is not None and c.gradient_checkpointing and not c.use_reentrant
        ),
    ),
    Rule(
        name="offload-replaces-the-optimizer",
        reason="DeepSpeedCPUAdam takes the optimizer's place: with fp32 state, and Adam in place of AdamW",
        library="accelerate",
        releases=">=1.0",
        source="accelerate/utils/deepspeed.py 1.15, map_pytorch_optim_to_deepspeed (`adamw_mode`)",
        breaks=lambda c, _: (
            c.uses_deepspeed and c.offload != "none" and c.optim not in {"adamw_torch", "adamw_torch_fused"}
        ),
    ),
    Rule(
        name="offloaded-weights-need-zero3",
        reason="weights are offloaded in shards, which only stage 3 makes",
        library="deepspeed",
        releases=">=0.10",
        source="deepspeed/runtime/zero/config.py 0.19, offload_param",
        breaks=lambda c, _: c.uses_deepspeed and c.offload == "optimizer_and_parameters" and c.sharding != "zero3",
    ),
    Rule(
        name="fsdp-needs-gpus",
        reason="accelerate shards with FSDP on accelerators only: CPU ranks silently train with DDP",
        library="accelerate",
        releases=">=0.20",
        source="accelerate/state.py 1.15, AcceleratorState.__init__ (DistributedType.MULTI_GPU and its like)",
        breaks=lambda c, on: c.uses_fsdp and on.device.kind == "cpu",
    ),
    Rule(
        name="fsdp2-steps-with-dtensors",
        reason="the optimizer's kernels know no DTensor, and its step raises",
        library="bitsandbytes, transformers, apollo-torch, galore-torch",
        releases=">=0.43",
        source='bitsandbytes 0.50, "does not have a sharding strategy registered", and bitsandbytes#1633; '
        'transformers/optimization.py 5.23, Adafactor, "got mixed torch.Tensor and DTensor"; apollo-torch 1.0.3',
        breaks=lambda c, _: (
            c.sharding == "fsdp2"
            and (_is_from_bitsandbytes(c.optim) or c.optim.startswith(("adafactor", "apollo", "galore")))
        ),
    ),
    Rule(
        name="fsdp-cannot-shard-int8",
        reason="int8 weights are integers with state beside them, which FSDP neither flattens nor wraps",
        library="torch",
        releases=">=2.0",
        source='torch/distributed/fsdp/_flat_param.py 2.13, "Cannot flatten integer dtype tensors"; '
        "bitsandbytes/nn/modules.py 0.50, Int8Params.CB",
        breaks=lambda c, _: c.uses_fsdp and c.quantization is not None and c.quantization.bits == 8,
    ),
    Rule(
        name="fsdp1-flattens-one-floating-dtype",
        reason="the packed weights of a layer and its other weights become one flat tensor, of one floating dtype",
        library="torch",
        releases=">=2.0",
        source='torch/distributed/fsdp/_flat_param.py 2.13, "Must flatten tensors with uniform dtype"',
        breaks=lambda c, _: (
            c.sharding == "fsdp1"
            and c.quantization is not None
            and (c.quantization.storage_dtype != c.weights_dtype or c.quantization.prepares_kbit)
        ),
    ),
    Rule(
        name="fsdp-would-cast-packed-weights",
        reason="floating weights are gathered in the mixed precision, and packed weights do not survive a cast",
        library="accelerate",
        releases=">=0.26",
        source="accelerate/utils/dataclasses.py 1.15, set_mixed_precision (`param_dtype`)",
        breaks=lambda c, _: (
            c.uses_fsdp
            and c.quantization is not None
            and c.mixed_precision != "no"
            and c.quantization.storage_dtype not in {"uint8", _autocast_dtype(c)}
        ),
    ),
    Rule(
        name="fsdp1-adapter-needs-no-checkpoint",
        reason="peft reads an adapter's stored dtype in forward and its gathered one when it is computed again, and "
        "checkpointing raises CheckpointError",
        library="peft",
        releases=">=0.10",
        source="peft/tuners/lora/layer.py 0.21, `_cast_input_dtype`; run with torch 2.13 on two ranks",
        breaks=lambda c, _: (
            c.sharding == "fsdp1"
            and c.lora is not None
            and c.mixed_precision != "no"
            and c.gradient_checkpointing
            and not c.use_reentrant
        ),
    ),
    Rule(
        name="fsdp-checkpoints-every-layer",
        reason="what FSDP checkpoints by itself is every layer, without reentry; another way gathers a layer twice",
        library="accelerate",
        releases=">=0.26",
        source="accelerate/utils/fsdp_utils.py 1.15, fsdp2_apply_ac; transformers/training_args.py 5.23",
        breaks=lambda c, _: c.uses_fsdp and (c.use_reentrant or c.checkpoint_every_n_layers != 1),
    ),
    Rule(
        name="fsdp1-offloads-no-checkpoints",
        reason="accelerate offloads checkpointed activations under FSDP2 alone",
        library="accelerate",
        releases=">=1.15",
        source='accelerate/utils/dataclasses.py 1.15, "`activation_checkpointing_offload=True` requires"',
        breaks=lambda c, _: c.sharding == "fsdp1" and c.checkpoint_offload,
    ),
    Rule(
        name="fsdp-offloads-everything",
        reason="weights, gradients and state are offloaded together, and the optimizer then steps on the host",
        library="torch",
        releases=">=2.0",
        source="torch/distributed/fsdp/_fully_shard/_fsdp_api.py 2.13, CPUOffloadPolicy",
        breaks=lambda c, _: (
            c.uses_fsdp and (c.offload == "optimizer" or (c.offload != "none" and _is_from_bitsandbytes(c.optim)))
        ),
    ),
    Rule(
        name="replicas-share-the-processes",
        reason="every replica of a hybrid shard has the same number of processes, and more than one",
        library="accelerate",
        releases=">=1.10",
        source="accelerate/parallelism_config.py 1.15, `dp_replicate_size`, `dp_shard_size`",
        breaks=lambda c, _: (
            c.uses_fsdp and (c.num_processes % c.num_replicas != 0 or c.num_processes == c.num_replicas)
        ),
    ),
    Rule(
        name="fsdp1-replicates-over-nodes",
        reason="the hybrid shard of FSDP1 splits the model within each node and copies it to every other",
        library="torch",
        releases=">=2.0",
        source="torch/distributed/fsdp/_init_utils.py 2.13, _init_intra_and_inter_node_groups",
        breaks=lambda c, on: c.sharding == "fsdp1" and c.num_replicas not in {1, on.num_nodes},
    ),
    Rule(
        name="flash-attention-needs-ampere",
        reason="flash-attention runs on CUDA GPUs of compute capability 8.0 and later only",
        library="flash-attn",
        releases=">=2.0",
        source="Dao-AILab/flash-attention README.md and #762",
        breaks=lambda c, on: (
            c.attention == "flash_attention_2"
            and (on.device.kind != "cuda" or (on.device.compute_capability or (0, 0)) < (8, 0))
        ),
    ),
    Rule(
        name="flash-attention-needs-half",
        reason="flash-attention multiplies float16 and bfloat16 only",
        library="flash-attn",
        releases=">=2.0",
        source='transformers/modeling_utils.py 5.23, "only supports torch.float16 and torch.bfloat16 dtypes"',
        breaks=lambda c, _: (
            c.attention == "flash_attention_2" and c.mixed_precision == "no" and c.weights_dtype == "float32"
        ),
    ),
    Rule(
        name="optimizer-needs-gpu",
        reason="the optimizer moves its state to a GPU, or waits for one, and raises where there is none",
        library="lomo-optim, galore-torch",
        releases=">=0.1",
        source="lomo_optim/adalomo.py 0.1.1, AdaLomo.__init__ (`.cuda()`); galore_torch/adamw8bit.py 1.0, step "
        "(`torch.cuda.synchronize()`)",
        breaks=lambda c, on: c.optim in {"adalomo", "galore_adamw_8bit"} and on.device.kind == "cpu",
    ),
    Rule(
        name="paged-optimizer-on-cpu",
        reason="bitsandbytes pages nothing on a CPU: it warns and keeps ordinary state",
        library="bitsandbytes",
        releases=">=0.49",
        source="bitsandbytes/optim/optimizer.py 0.50, get_state_buffer",
        breaks=lambda c, on: c.optim.startswith("paged") and on.device.kind == "cpu",
        waived_by=lambda asked: bool(asked.optims),
    ),
    Rule(
        name="8bit-optimizer-on-cpu",
        reason="on a CPU bitsandbytes unpacks all 8-bit state to fp32 in Python for every update",
        library="bitsandbytes",
        releases=">=0.49",
        source="bitsandbytes/backends/cpu/ops.py 0.50, _optimizer_update_8bit_blockwise_cpu",
        breaks=lambda c, on: _is_from_bitsandbytes(c.optim) and c.optim.endswith("8bit") and on.device.kind == "cpu",
        waived_by=lambda asked: bool(asked.optims),
    ),
)


def broken_rule(
    configuration: Configuration, cluster: Cluster, restrictions: Restrictions, rules: tuple[Rule, ...] = RULES
) -> Rule | None:
    """Return the first rule that leaves a configuration out, None where it may be chosen."""
    for rule in rules:
        if rule.breaks(configuration, cluster) and not rule.waived_by(restrictions):
            return rule
    return None


def _is_from_bitsandbytes(optim: str) -> bool:
    """Tell an optimizer that steps with bitsandbytes' kernels; `adamw_torch_8bit` is torchao's."""
    return optim.startswith(("paged_", "lion_", "ademamix", "rmsprop_bnb")) or optim in {"adamw_8bit", "adamw_bnb_8bit"}


def _autocast_dtype(configuration: Configuration) -> str | None:
    return {"bf16": "bfloat16", "fp16": "float16"}.get(configuration.mixed_precision)
