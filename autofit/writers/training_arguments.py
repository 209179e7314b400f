"""training_arguments.json: the fields of transformers' `TrainingArguments` that the plan decides."""

from __future__ import annotations

import re
from typing import Any

from autofit.plan import Plan, to_json
from autofit.spec.configuration import Configuration

RENAMED_CHECKPOINTING_RELEASE = (5, 23)
"""The oldest release seen with the new name; releases between that and the renaming accept both."""


def render_training_arguments(plan: Plan) -> str:
    """Write the decided fields as JSON."""
    return to_json(training_arguments(plan)) + "\n"


def training_arguments(plan: Plan) -> dict[str, Any]:
    """Return the decided fields under the names of the transformers release that the plan was made for."""
    release = _release(plan.versions.get("transformers", ""))
    return decided_arguments(
        plan.configuration,
        on_cpu=plan.inputs.cluster.device.kind == "cpu",
        checkpointing_name=(
            "activation_checkpointing" if release >= RENAMED_CHECKPOINTING_RELEASE else "gradient_checkpointing"
        ),
    )


def decided_arguments(configuration: Configuration, *, on_cpu: bool, checkpointing_name: str) -> dict[str, Any]:
    """Spell a configuration in fields of `TrainingArguments`."""
    return {
        "per_device_train_batch_size": configuration.per_device_train_batch_size,
        "gradient_accumulation_steps": configuration.gradient_accumulation_steps,
        "per_device_eval_batch_size": configuration.per_device_eval_batch_size,
        "bf16": configuration.mixed_precision == "bf16",
        "fp16": configuration.mixed_precision == "fp16",
        "optim": configuration.optim,
        "use_liger_kernel": configuration.loss == "liger",
        **_low_rank_fields(configuration),
        **_checkpointing_fields(configuration, checkpointing_name),
        **_ddp_fields(configuration),
        **(_cpu_fields(configuration) if on_cpu else {}),
    }


def _low_rank_fields(configuration: Configuration) -> dict[str, Any]:
    """Name the modules of a low-rank optimizer, which transformers asks for: every linear layer."""
    is_low_rank = configuration.optim.startswith(("apollo", "galore"))
    return {"optim_target_modules": "all-linear"} if is_low_rank else {}


def _cpu_fields(configuration: Configuration) -> dict[str, Any]:
    """Keep training on the CPU. A single process must name no backend: accelerate would ask it for its rank.

    accelerate shards with FSDP only what it does not know to be a CPU: there the precision is the launcher's alone,
    which transformers would refuse without `use_cpu`. Source: accelerate/state.py 1.15, `AcceleratorState.__init__`.
    """
    if configuration.uses_fsdp:
        return {"bf16": False, "fp16": False, "ddp_backend": "gloo"}
    joins_others = configuration.num_processes > 1 or configuration.uses_deepspeed
    return {"use_cpu": True} | ({"ddp_backend": "gloo"} if joins_others else {})


def _checkpointing_fields(configuration: Configuration, name: str) -> dict[str, Any]:
    """FSDP checkpoints by itself, inside what it gathers; asked for both, transformers raises.

    Source: transformers/trainer.py 5.23, "can't both be set to True".
    """
    if not configuration.gradient_checkpointing or configuration.uses_fsdp:
        return {name: False}
    return {name: True, f"{name}_kwargs": {"use_reentrant": configuration.use_reentrant}}


def _ddp_fields(configuration: Configuration) -> dict[str, Any]:
    """Keep DDP from looking for unused parameters around an adapter: every trainable one is used.

    Left to itself the Trainer looks for them around every peft model, which breaks reentrant checkpointing ("Expected
    to mark a variable ready only once"). A full model may have a head without use, so there the Trainer's rule stays.
    Source: transformers/trainer.py, `_build_accelerator_args`.
    """
    adapts = configuration.method != "full"
    return {"ddp_find_unused_parameters": False} if configuration.sharding == "ddp" and adapts else {}


def _release(version: str) -> tuple[int, ...]:
    """Read the leading numbers of a version; of an empty one, none."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
