"""Reads what a script gives its TrainingArguments, and lets them be made without the GPU that they may ask for."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from autofit.runtime.discover.observed import Observed

RECORDED_ARGUMENTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "fp16",
    "optim",
    "gradient_checkpointing",
    "activation_checkpointing",
    "learning_rate",
    "max_steps",
    "num_train_epochs",
    "output_dir",
    "deepspeed",
    "use_liger_kernel",
    "torch_compile",
    "neftune_noise_alpha",
    "group_by_length",
    "train_sampling_strategy",
    "auto_find_batch_size",
    "max_length",
    "packing",
    "packing_strategy",
    "padding_free",
    "completion_only_loss",
    "assistant_only_loss",
    "precompute_ref_log_probs",
)
"""Fields that say what is trained, and how; those after `torch_compile` are said to the user, trl's among them."""
LEFT_OUT = ("bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval", "torch_compile")
"""Arguments that need the GPU which is hidden: left out while TrainingArguments and Trainer check them."""
SWITCHED_OFF = ("report_to", "push_to_hub", "deepspeed", "fsdp", "fsdp_config")
"""Arguments that reach outside the process or belong to the plan: left at their defaults."""


def hook_training_arguments(observed: Observed, module: ModuleType) -> None:
    """Note what the script gives, and make the arguments those of a process that reaches nothing outside."""
    original = module.TrainingArguments.__post_init__

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:  # noqa: N807 - dataclasses call it by this name
        observed.mark("arguments")
        given = {name: getattr(self, name) for name in RECORDED_ARGUMENTS if hasattr(self, name)}
        observed.given.append((self, given | {"fixed_checkpointing": fixed_checkpointing(self)}))
        self.use_cpu = True
        for name in SWITCHED_OFF:
            set_default(self, name)
        self.report_to = "none"
        with left_out(self):
            original(self)

    module.TrainingArguments.__post_init__ = __post_init__


def fixed_checkpointing(arguments: Any) -> bool | None:
    """Return what the script says of activation checkpointing; None: nothing but its class's default, trl's being yes.

    The two names are one setting. Source: transformers/training_args.py 5.23.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(arguments)}
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        value = getattr(arguments, name, None)
        if name in defaults and value is not None and value != defaults[name]:
            return bool(value)
    return None


@contextlib.contextmanager
def left_out(arguments: Any) -> Iterator[None]:
    """Let the arguments that need a GPU be at their defaults for a while."""
    values = {name: getattr(arguments, name) for name in LEFT_OUT if hasattr(arguments, name)}
    for name in values:
        set_default(arguments, name)
    try:
        yield
    finally:
        for name, value in values.items():
            setattr(arguments, name, value)


def set_default(arguments: Any, name: str) -> None:
    """Set a field of a dataclass to its default, if there is such a field."""
    for field in dataclasses.fields(arguments):
        if field.name == name:
            factory = field.default_factory
            setattr(arguments, name, field.default if factory is dataclasses.MISSING else factory())
