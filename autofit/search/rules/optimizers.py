"""Rules about optimizers under engines; those of FSDP are with FSDP's."""

from __future__ import annotations

from autofit.search.rules.rule import Rule

OPTIMIZER_RULES: tuple[Rule, ...] = (
    Rule(
        name="low-rank-optimizers-need-matrices",
        reason="they project matrices, and DeepSpeed hands an optimizer one flat partition: their step raises",
        library="deepspeed",
        releases=">=0.16",
        source='deepspeed/runtime/zero/stage_1_and_2.py 0.19, single_partition_of_fp32_groups; IndexError "tuple index '
        'out of range" in apollo-torch 1.0.3, galore-torch 1.0',
        axes=("engine", "optim"),
        breaks=lambda c, _: c.uses_deepspeed and c.optim.startswith(("apollo", "galore")),
    ),
    Rule(
        name="adagrad-makes-its-state-at-once",
        reason="torch's Adagrad makes its state for the parameters it is given, and DeepSpeed then exchanges them",
        library="deepspeed",
        releases=">=0.16",
        source='torch/optim/adagrad.py 2.13, __init__; deepspeed 0.19.8, IndexError "list index out of range"; run',
        axes=("engine", "optim"),
        breaks=lambda c, _: c.uses_deepspeed and c.offload == "none" and c.optim == "adagrad",
    ),
    Rule(
        name="layerwise-optimizers-are-for-one-process",
        reason="transformers refuses layerwise optimizers in several processes",
        library="transformers",
        releases=">=4.45",
        source='transformers/trainer_optimizer.py 5.23, "does not support DDP at this time"',
        axes=("engine", "optim"),
        breaks=lambda c, _: c.optim.endswith("layerwise") and c.sharding != "none",
    ),
    Rule(
        name="layerwise-optimizers-do-not-accumulate",
        reason="they update a weight as soon as its gradient is there, and transformers refuses to accumulate",
        library="transformers",
        releases=">=4.45",
        source='transformers/trainer_optimizer.py 5.23, "does not support gradient accumulation!"',
        axes=("optim", "split"),
        breaks=lambda c, _: c.optim.endswith("layerwise") and c.gradient_accumulation_steps > 1,
    ),
    Rule(
        name="lomo-has-its-own-backward",
        reason="LOMO updates in a backward of its own, which DeepSpeed's engine does not take",
        library="deepspeed",
        releases=">=0.16",
        source='deepspeed/runtime/engine.py 0.19, DeepSpeedEngine.backward: TypeError "unexpected keyword argument '
        "'learning_rate'\"; run with lomo-optim 0.1.1",
        axes=("engine", "optim"),
        breaks=lambda c, _: c.uses_deepspeed and c.optim in {"lomo", "adalomo"},
    ),
    Rule(
        name="lomo-reduces-no-gradients",
        reason="LOMO updates each weight before gradients are summed over processes, which then train apart",
        library="lomo-optim",
        releases=">=0.1",
        source="lomo-optim 0.1.1 lomo_optim/lomo.py, fuse_update",
        axes=("engine", "optim"),
        breaks=lambda c, _: c.optim in {"lomo", "adalomo"} and c.sharding in {"ddp", "fsdp1", "fsdp2"},
    ),
    Rule(
        name="apex-left-transformers",
        reason="transformers 5 has no optimizer of this name",
        library="transformers",
        releases=">=5",
        source='transformers/training_args.py 5.23, OptimizerNames: "is not a valid OptimizerNames"',
        axes=("optim",),
        breaks=lambda c, _: c.optim == "adamw_apex_fused",
    ),
)
