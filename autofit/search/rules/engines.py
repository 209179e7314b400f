"""Rules about engines that hold for any of them, and about DeepSpeed."""

from __future__ import annotations

from autofit.search.rules.rule import Rule, autocast_dtype
from autofit.spec.configuration import Configuration

FLOATING_ADAMS = ("adamw_torch", "adamw_torch_fused")

ENGINE_RULES: tuple[Rule, ...] = (
    Rule(
        name="several-processes-share-gradients",
        reason="Trainer wraps the model in DistributedDataParallel as soon as there are several processes",
        library="accelerate",
        releases=">=0.20",
        source="accelerate/accelerator.py 1.15, prepare_model",
        axes=("engine",),
        breaks=lambda c, _: c.sharding == "none" and c.num_processes > 1,
    ),
    Rule(
        name="quantised-needs-adapter",
        reason="transformers refuses to train a quantised model without an adapter",
        library="transformers",
        releases=">=4.30",
        source="transformers/trainer_utils.py 5.23, validate_quantization_for_training",
        axes=("path",),
        breaks=lambda c, _: c.quantization is not None and c.lora is None,
    ),
    Rule(
        name="int8-checkpoints-with-reentry",
        reason="bitsandbytes keeps inputs of int8 products where checkpoints that are not reentrant cannot drop them",
        library="bitsandbytes",
        releases=">=0.43",
        source="bitsandbytes/autograd/_functions.py 0.50, MatMul8bitLt.forward (`ctx.tensors`, on a CPU `ctx.A`)",
        axes=("path", "engine"),
        breaks=lambda c, _: (
            c.quantization is not None and c.quantization.is_int8 and c.gradient_checkpointing and not c.use_reentrant
        ),
        waived_by=lambda asked: asked.use_reentrant is False,
    ),
    Rule(
        name="pure-bf16-is-not-deepspeed",
        reason="DeepSpeed keeps fp32 copies of the weights and Adam's state, so nothing would be pure bf16",
        library="deepspeed",
        releases=">=0.16",
        source="deepspeed/runtime/zero/stage_1_and_2.py 0.19, single_partition_of_fp32_groups",
        axes=("path", "engine"),
        breaks=lambda c, _: c.uses_deepspeed and c.mixed_precision == "no" and c.weights_dtype != "float32",
    ),
    Rule(
        name="packed-weights-would-be-cast",
        reason="DeepSpeed casts floating parameters to its half dtype, and packed four-bit weights do not survive it",
        library="deepspeed",
        releases=">=0.16",
        source="deepspeed/runtime/engine.py 0.19, _cast_module_mixed_precision",
        axes=("path", "engine"),
        breaks=lambda c, _: (
            c.uses_deepspeed
            and _is_packed(c)
            and c.mixed_precision != "no"
            and _storage(c) not in {"uint8", autocast_dtype(c)}
        ),
    ),
    Rule(
        name="zero3-gathers-floating-weights",
        reason="weights packed in uint8 were not sharded but gathered in the model's dtype; bnb_4bit_quant_storage "
        "packs them in it",
        library="deepspeed",
        releases="<0.19.8",
        source="huggingface/peft docs/source/accelerate/deepspeed.md (bnb_4bit_quant_storage); "
        "huggingface/transformers#24395, huggingface/peft#1550; with 0.19.8 they are sharded, run on two ranks",
        axes=("path", "engine"),
        breaks=lambda c, _: c.zero_stage == 3 and _is_packed(c) and _storage(c) == "uint8",
    ),
    Rule(
        name="zero3-qlora-needs-peft-0.10",
        reason="peft could not put an adapter on quantised weights that stage 3 shards",
        library="peft",
        releases="<0.10",
        source="huggingface/peft#1550 and the notes of release 0.10.0",
        axes=("path", "engine"),
        breaks=lambda c, _: c.zero_stage == 3 and c.quantization is not None,
    ),
    Rule(
        name="zero3-shards-no-int8",
        reason="every rank keeps the whole int8 weights beside the shards: stage 3 saves nothing",
        library="bitsandbytes",
        releases=">=0.43",
        source="bitsandbytes/nn/modules.py 0.50, Linear8bitLt.forward (`state.CB`)",
        axes=("path", "engine"),
        breaks=lambda c, _: c.zero_stage == 3 and c.quantization is not None and c.quantization.is_int8,
        waived_by=lambda asked: bool(asked.shardings),
    ),
    Rule(
        name="zero3-has-no-dora-of-packed-weights",
        reason="DoRA unpacks a copy of the packed weight in backward, which stage 3 does not know as its parameter",
        library="deepspeed",
        releases=">=0.16",
        source="deepspeed/runtime/zero/partitioned_param_coordinator.py 0.19.8, "
        "\"'Params4bit' object has no attribute 'ds_status'\"; peft/tuners/lora/dora.py 0.21",
        axes=("path", "engine"),
        breaks=lambda c, _: c.zero_stage == 3 and c.quantization is not None and c.lora is not None and c.lora.use_dora,
    ),
    Rule(
        name="zero3-trains-one-dtype",
        reason="what trains is put into one buffer, where fp32 adapters and half-precision modules do not go together",
        library="deepspeed",
        releases=">=0.16",
        source="deepspeed/runtime/zero/utils.py 0.19.8, defragment",
        axes=("path", "engine"),
        breaks=lambda c, _: (
            c.zero_stage == 3
            and c.quantization is None
            and c.lora is not None
            and bool(c.lora.modules_to_save)
            and c.weights_dtype != "float32"
        ),
    ),
    Rule(
        name="peft-zero3-needs-reentrant",
        reason="recomputed weights have other shapes under stage 3 and checkpointing raises CheckpointError",
        library="deepspeed",
        releases="<0.19.8",
        source="huggingface/transformers#47254, deepspeedai/DeepSpeed#4332 and #8130",
        axes=("path", "engine"),
        breaks=lambda c, _: (
            c.zero_stage == 3 and c.lora is not None and c.gradient_checkpointing and not c.use_reentrant
        ),
    ),
    Rule(
        name="zero3-waits-for-every-expert",
        reason="ranks that route no token to an expert do not gather it, and the others wait for ever",
        library="transformers",
        releases="<5",
        source="deepspeedai/DeepSpeed#4966 (leaf modules), #5008 and #7461; since 5.0 all experts are one parameter",
        axes=("engine",),
        breaks=lambda c, on: c.zero_stage == 3 and routes(on.config),
    ),
    Rule(
        name="offload-replaces-the-optimizer",
        reason="DeepSpeedCPUAdam takes the optimizer's place: with fp32 state, and Adam in place of AdamW",
        library="accelerate",
        releases=">=1.0",
        source="accelerate/utils/deepspeed.py 1.15, map_pytorch_optim_to_deepspeed (`adamw_mode`)",
        axes=("engine", "optim"),
        breaks=lambda c, _: c.uses_deepspeed and c.offload != "none" and c.optim not in FLOATING_ADAMS,
    ),
    Rule(
        name="offloaded-weights-need-zero3",
        reason="weights are offloaded in shards, which only stage 3 makes; below it the wish is ignored",
        library="deepspeed",
        releases=">=0.16",
        source="deepspeed/runtime/zero/config.py 0.19, offload_param; engine.py, _configure_zero_optimizer",
        axes=("engine",),
        breaks=lambda c, _: c.uses_deepspeed and c.offload == "optimizer_and_parameters" and c.sharding != "zero3",
    ),
    Rule(
        name="cpu-adam-needs-a-compiler",
        reason="DeepSpeedCPUAdam is compiled at its first use, with ninja and a C++ compiler",
        library="deepspeed",
        releases=">=0.16",
        source='deepspeed/ops/op_builder/builder.py 0.19, "due to ninja not being installed"; '
        "deepspeedai/DeepSpeed#4513, #5429",
        axes=("engine",),
        breaks=lambda c, on: c.uses_deepspeed and c.offload != "none" and on.software.builds_extensions is False,
    ),
)


def _is_packed(configuration: Configuration) -> bool:
    quantization = configuration.quantization
    return quantization is not None and not quantization.is_int8 and not quantization.comes_packed


def _storage(configuration: Configuration) -> str | None:
    return configuration.quantization.storage_dtype if configuration.quantization else None


def routes(config: object) -> bool:
    """Tell a model with routed experts by the names that configs have for their number."""
    if not isinstance(config, dict):
        return False
    inner = config.get("text_config") or config
    return any(inner.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"))
