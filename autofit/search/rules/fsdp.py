"""Rules about torch's FSDP, as accelerate wraps models in it."""

from __future__ import annotations

from autofit.search.rules.rule import Rule, autocast_dtype, is_from_bitsandbytes
from autofit.spec.fp32_modules import dtypes_with_fp32_modules

SHARE_ONE_TABLE = frozenset(
    {
        "bart",
        "bigbird_pegasus",
        "blenderbot",
        "blenderbot-small",
        "led",
        "longt5",
        "m2m_100",
        "mbart",
        "mt5",
        "mvp",
        "nllb-moe",
        "pegasus",
        "pegasus_x",
        "plbart",
        "seamless_m4t",
        "seamless_m4t_v2",
        "switch_transformers",
        "t5",
        "umt5",
    }
)
"""Encoder-decoders whose stacks read one table of embeddings, that of a module called `shared`, by `model_type`.

Source: transformers 5.23, each class's `_tied_weights_keys`.
"""

FSDP_RULES: tuple[Rule, ...] = (
    Rule(
        name="fsdp-needs-gpus",
        reason="accelerate shards with FSDP on accelerators only: CPU ranks silently train with DDP",
        library="accelerate",
        releases=">=0.20",
        source="accelerate/state.py 1.15, AcceleratorState.__init__ (DistributedType.MULTI_GPU and its like)",
        axes=("engine",),
        breaks=lambda c, on: c.uses_fsdp and on.is_cpu,
    ),
    Rule(
        name="fsdp2-came-with-accelerate-1.6",
        reason="accelerate knew FSDP's first version only",
        library="accelerate",
        releases="<1.6",
        source="huggingface/accelerate, notes of release 1.6.0 (FSDPv2 support)",
        axes=("engine",),
        breaks=lambda c, _: c.sharding == "fsdp2",
    ),
    Rule(
        name="fsdp2-sharded-one-dtype",
        reason='an fp32 adapter and half-precision weights in one unit raised "FSDP expects uniform original parameter '
        'dtype"',
        library="accelerate",
        releases="<1.14",
        source="huggingface/accelerate#3985 (in 1.14.0); torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py 2.13",
        axes=("path", "engine"),
        breaks=lambda c, _: (
            c.sharding == "fsdp2" and c.lora is not None and c.quantization is None and c.weights_dtype != "float32"
        ),
    ),
    Rule(
        name="fsdp2-crashed-on-uint8",
        reason="packed weights that are integers were given to fully_shard, which shards parameters with gradients",
        library="accelerate",
        releases="<1.14",
        source="huggingface/accelerate#3987 (in 1.14.0)",
        axes=("path", "engine"),
        breaks=lambda c, _: (
            c.sharding == "fsdp2" and c.quantization is not None and c.quantization.storage_dtype == "uint8"
        ),
    ),
    Rule(
        name="fsdp2-shards-no-uint8",
        reason="packed weights that are integers stay whole on every rank; bnb_4bit_quant_storage packs them in a "
        "floating dtype",
        library="accelerate",
        releases=">=1.14",
        source="accelerate/utils/fsdp_utils.py 1.15, fsdp2_prepare_model (`ignored_params`)",
        axes=("path", "engine"),
        breaks=lambda c, _: (
            c.sharding == "fsdp2"
            and c.quantization is not None
            and c.quantization.bits == 4
            and c.quantization.storage_dtype == "uint8"
        ),
        waived_by=lambda asked: any(each.storage_dtype == "uint8" for each in asked.quantizations),
    ),
    Rule(
        name="fsdp2-steps-with-dtensors",
        reason="bitsandbytes' kernels know no DTensor, and its optimizers' step raises",
        library="bitsandbytes",
        releases=">=0.43",
        source='bitsandbytes 0.50, "does not have a sharding strategy registered"; '
        "bitsandbytes-foundation/bitsandbytes#1633, #1403",
        axes=("engine", "optim"),
        breaks=lambda c, _: c.sharding == "fsdp2" and is_from_bitsandbytes(c.optim),
    ),
    Rule(
        name="fsdp2-has-no-adafactor",
        reason="transformers' Adafactor adds tensors to DTensors, and its step raises",
        library="transformers",
        releases=">=4.38",
        source='transformers/optimization.py 5.23, Adafactor.step, "got mixed torch.Tensor and DTensor"',
        axes=("engine", "optim"),
        breaks=lambda c, _: c.sharding == "fsdp2" and c.optim == "adafactor",
    ),
    Rule(
        name="fsdp-has-no-apollo",
        reason="APOLLO projects whole matrices, and a rank holds a flat shard or a DTensor: its step raises",
        library="apollo-torch",
        releases=">=1.0",
        source="apollo_torch/apollo.py 1.0.3, AdamW.step: KeyError 'seed' under FSDP2, IndexError under FSDP1; run on "
        "two ranks",
        axes=("engine", "optim"),
        breaks=lambda c, _: c.uses_fsdp and c.optim.startswith("apollo"),
    ),
    Rule(
        name="fsdp1-has-no-galore",
        reason="GaLore projects whole matrices, and a rank holds a flat shard: its step raises",
        library="galore-torch",
        releases=">=1.0",
        source='galore_torch/galore_projector.py 1.0, project: "tuple index out of range"; run on two ranks',
        axes=("engine", "optim"),
        breaks=lambda c, _: c.sharding == "fsdp1" and c.optim.startswith("galore"),
    ),
    Rule(
        name="fsdp1-cannot-save-8bit-state",
        reason="FSDP gathers an optimizer's state by the shape of its parameter, 8-bit state has other shapes, and "
        "saving a checkpoint raises",
        library="bitsandbytes",
        releases=">=0.43",
        source="bitsandbytes-foundation/bitsandbytes#89, #1840; huggingface/accelerate#1902; with 0.50.2 on two ranks "
        'FSDP.optim_state_dict raises "Boolean value of Tensor"',
        axes=("engine", "optim"),
        breaks=lambda c, _: c.sharding == "fsdp1" and is_from_bitsandbytes(c.optim),
        for_plans_only=True,
    ),
    Rule(
        name="fsdp-cannot-shard-int8",
        reason="int8 weights are integers with state beside them, which FSDP neither flattens nor wraps",
        library="torch",
        releases=">=2.0",
        source='torch/distributed/fsdp/_flat_param.py 2.13, "Cannot flatten integer dtype tensors"; '
        "bitsandbytes/nn/modules.py 0.50, Int8Params.CB",
        axes=("path", "engine"),
        breaks=lambda c, _: c.uses_fsdp and c.quantization is not None and c.quantization.is_int8,
    ),
    Rule(
        name="fsdp1-flattens-one-floating-dtype",
        reason="the packed weights of a layer and its other weights become one flat tensor, of one floating dtype",
        library="torch",
        releases=">=2.0",
        source='torch/distributed/fsdp/_flat_param.py 2.13, "Must flatten tensors with uniform dtype"',
        axes=("path", "engine"),
        breaks=lambda c, _: (
            c.sharding == "fsdp1"
            and c.quantization is not None
            and c.quantization.storage_dtype != "int32"
            and (c.quantization.storage_dtype != c.weights_dtype or c.quantization.prepares_kbit)
        ),
    ),
    Rule(
        name="fsdp1-flattens-no-fp32-modules",
        reason="transformers loads some modules of this model in fp32 beside 16-bit weights, and a unit's weights "
        "become one flat tensor, of one dtype",
        library="torch",
        releases=">=2.0",
        source='torch/distributed/fsdp/_flat_param.py 2.13, _validate_tensors_to_flatten ("Must flatten tensors with '
        'uniform dtype"); transformers/modeling_utils.py 5.23, `_get_dtype_plan`',
        axes=("path", "engine"),
        breaks=lambda c, on: c.sharding == "fsdp1" and c.weights_dtype in dtypes_with_fp32_modules(on.config),
    ),
    Rule(
        name="fsdp2-trains-no-fp32-modules",
        reason="transformers loads some modules of this model in fp32 beside 16-bit weights, and what trains in a unit "
        "has to be of one dtype; mixed precision makes all of it fp32",
        library="torch",
        releases=">=2.4",
        source="torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py 2.13, _init_mp_dtypes; "
        "transformers/modeling_utils.py 5.23, `_get_dtype_plan`",
        axes=("path", "engine"),
        breaks=lambda c, on: (
            c.sharding == "fsdp2"
            and c.lora is None
            and c.mixed_precision == "no"
            and c.weights_dtype in dtypes_with_fp32_modules(on.config)
        ),
    ),
    Rule(
        name="fsdp2-puts-a-table-in-one-group",
        reason="encoder and decoder of this model read one table of embeddings, and accelerate makes a group of each",
        library="torch",
        releases=">=2.13",
        source='torch/distributed/fsdp/_fully_shard/_fsdp_state.py 2.13, "shared with a parameter already managed by '
        'another FSDP group"; accelerate/utils/fsdp_utils.py 1.15, fsdp2_prepare_model',
        axes=("engine",),
        breaks=lambda c, on: c.sharding == "fsdp2" and on.config.get("model_type") in SHARE_ONE_TABLE,
    ),
    Rule(
        name="fsdp-would-cast-packed-weights",
        reason="floating weights are gathered in the mixed precision, and packed weights do not survive a cast",
        library="accelerate",
        releases=">=0.26",
        source="accelerate/utils/dataclasses.py 1.15, set_mixed_precision (`param_dtype`)",
        axes=("path", "engine"),
        breaks=lambda c, _: (
            c.uses_fsdp
            and c.quantization is not None
            and c.mixed_precision != "no"
            and c.quantization.storage_dtype not in {"uint8", "int32", autocast_dtype(c)}
        ),
    ),
    Rule(
        name="fsdp1-has-no-dora",
        reason="DoRA reads the shape of an adapter's weight outside its forward, where FSDP1 holds a flat shard",
        library="peft",
        releases=">=0.9",
        source="huggingface/peft#1984, hiyouga/LLaMA-Factory#3550; peft/tuners/lora/dora.py 0.21; run on two ranks",
        axes=("path", "engine"),
        breaks=lambda c, _: c.sharding == "fsdp1" and c.lora is not None and c.lora.use_dora,
    ),
    Rule(
        name="fsdp1-adapter-needs-no-checkpoint",
        reason="peft reads an adapter's stored dtype in forward and its gathered one when it is computed again, and "
        "checkpointing raises CheckpointError",
        library="peft",
        releases=">=0.10",
        source="peft/tuners/lora/layer.py 0.21, `_cast_input_dtype`; run with torch 2.13 on two ranks",
        axes=("path", "engine"),
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
        axes=("path", "engine"),
        breaks=lambda c, _: c.uses_fsdp and (c.use_reentrant or c.checkpoint_every_n_layers != 1),
        for_plans_only=True,
    ),
    Rule(
        name="fsdp1-offloads-no-checkpoints",
        reason="accelerate offloads checkpointed activations under FSDP2 alone",
        library="accelerate",
        releases=">=1.15",
        source='accelerate/utils/dataclasses.py 1.15, "`activation_checkpointing_offload=True` requires"',
        axes=("path", "engine"),
        breaks=lambda c, _: c.sharding == "fsdp1" and c.checkpoint_offload,
    ),
    Rule(
        name="fsdp-offloads-everything",
        reason="weights, gradients and state are offloaded together, and the optimizer then steps on the host",
        library="torch",
        releases=">=2.0",
        source="torch/distributed/fsdp/_fully_shard/_fsdp_api.py 2.13, CPUOffloadPolicy",
        axes=("engine", "optim"),
        breaks=lambda c, _: (
            c.uses_fsdp and (c.offload == "optimizer" or (c.offload != "none" and is_from_bitsandbytes(c.optim)))
        ),
    ),
    Rule(
        name="replicas-share-the-processes",
        reason="every replica of a hybrid shard has the same number of processes, and more than one",
        library="accelerate",
        releases=">=1.10",
        source="accelerate/parallelism_config.py 1.15, `dp_replicate_size`, `dp_shard_size`",
        axes=("engine",),
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
        axes=("engine",),
        breaks=lambda c, on: c.sharding == "fsdp1" and c.num_replicas not in {1, on.cluster.num_nodes},
    ),
)
