"""The plan of the run that a script is part of, for scripts that put it into effect themselves.

plan = autofit.current_plan()
model = plan.load_model("Qwen/Qwen2.5-7B")
trainer = Trainer(model=model, args=plan.training_arguments(output_dir="out", learning_rate=1e-4), ...)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from autofit.errors import InputError
from autofit.plan import Plan, load_plan
from autofit.spec.event import DISCOVERING_VARIABLE, PLAN_VARIABLE, RUN_FOLDER_VARIABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class CurrentPlan:
    """A plan, and what it means in the words of transformers, peft and accelerate."""

    plan: Plan
    """The whole of it: `.configuration`, `.memory`, `.time` ..."""
    run_folder: Path
    """Where its files are."""
    decided_arguments: dict[str, Any]
    """The fields of `TrainingArguments` that it decides, as training_arguments.json has them."""
    _keep_alive: list[Any] = field(default_factory=list, repr=False)

    @property
    def per_device_train_batch_size(self) -> int:
        """Sequences of a micro-batch, for a DataLoader of the script's own."""
        return self.plan.configuration.per_device_train_batch_size

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of an optimizer step."""
        return self.plan.configuration.gradient_accumulation_steps

    def training_arguments(self, arguments_class: Any = None, **others: Any) -> Any:
        """Make transformers' `TrainingArguments`, the decided fields as planned.

        Args:
            arguments_class: a class derived from it (`trl.SFTConfig`); `TrainingArguments` unless given.
            others: every field that the plan does not decide.

        Raises:
            InputError: one of the others is decided by the plan.
        """
        from transformers import TrainingArguments

        clashing = sorted(others.keys() & self.decided_arguments.keys())
        if clashing:
            raise InputError(
                f"{clashing[0]}={others[clashing[0]]!r} was given, and the plan says "
                f"{self.decided_arguments[clashing[0]]!r}.",
                to_fix="leave it out, or plan with the value you want",
            )
        return (arguments_class or TrainingArguments)(**self.decided_arguments, **others)

    def load_model(self, name: str | Path | None = None, *, model_class: Any = None, **others: Any) -> Any:
        """Load the model in the planned dtype, attention and quantisation, with checkpointing and adapter as planned.

        Args:
            name: what to load; the planned model's own name unless given.
            model_class: the transformers class to load it with; that of the planned model's config unless given.
            others: what else `from_pretrained` takes.

        Raises:
            InputError: the plan's model has no class in the installed transformers.
        """
        from autofit.runtime.model import (
            adapted,
            announce_zero3,
            load_configured,
            switch_checkpointing,
            take_own_device,
        )

        configuration, model = self.plan.configuration, self.plan.inputs.job.model
        if configuration.zero_stage == 3:
            announce_zero3(self.plan, self.run_folder, self._keep_alive)
        take_own_device()
        loader = model_class or _class_of(model.config["architectures"][0])
        loaded = load_configured(configuration, loader.from_pretrained, (str(name or model.name),), others)
        if configuration.lora is not None:
            loaded = adapted(configuration, loaded)
        switch_checkpointing(configuration, loaded)
        return loaded

    def accelerator(self, **others: Any) -> Any:
        """Make accelerate's `Accelerator` with the planned accumulation and precision; sharding is the launcher's.

        Args:
            others: what else `Accelerator` takes.
        """
        from accelerate import Accelerator

        configuration = self.plan.configuration
        return Accelerator(
            gradient_accumulation_steps=configuration.gradient_accumulation_steps,
            mixed_precision=configuration.mixed_precision,
            **others,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NoPlanYet:
    """What a script is given while it is only looked at, to be planned for: its own words, and nothing decided."""

    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 1

    @property
    def plan(self) -> Plan:
        """Refuse: there is none."""
        raise InputError(
            "there is no plan yet: the script is looked at to make one.",
            to_fix="ask for per_device_train_batch_size, gradient_accumulation_steps, training_arguments, load_model "
            "or accelerator, or launch with --plan",
        )

    def training_arguments(self, arguments_class: Any = None, **others: Any) -> Any:
        """Make the arguments as the script says them."""
        from transformers import TrainingArguments

        return (arguments_class or TrainingArguments)(**others)

    def load_model(self, name: str | Path | None = None, *, model_class: Any = None, **others: Any) -> Any:
        """Load the model as transformers would.

        Raises:
            InputError: no name is given, and there is no plan that has one.
        """
        from transformers import AutoModelForCausalLM

        if name is None:
            raise InputError("load_model() has no name, and there is no plan yet.", to_fix="give it, or --plan")
        return (model_class or AutoModelForCausalLM).from_pretrained(name, **others)

    def accelerator(self, **others: Any) -> Any:
        """Make an `Accelerator` as the script says it."""
        from accelerate import Accelerator

        return Accelerator(**others)


def current_plan(
    path: str | Path | None = None, environment: Mapping[str, str] = os.environ
) -> CurrentPlan | NoPlanYet:
    """Return the plan of this run: under `autofit launch` its own, otherwise the one that is named.

    While `autofit launch` only looks at a script, to plan for it, nothing is decided yet: see `NoPlanYet`.

    Args:
        path: a plan.json in a run folder, or the folder.
        environment: where `AUTOFIT_PLAN` may name one instead, for a run without `autofit launch`.

    Raises:
        InputError: no plan is named, or what is named is none, or its folder lacks training_arguments.json.
    """
    named = path or environment.get(RUN_FOLDER_VARIABLE) or environment.get(PLAN_VARIABLE)
    if environment.get(DISCOVERING_VARIABLE) == "1":
        return NoPlanYet()
    if not named:
        raise InputError(
            "there is no current plan: the script was not started by `autofit launch`.",
            to_fix=f"start it so, name a plan.json in {PLAN_VARIABLE}, or give current_plan its path",
        )
    file = Path(named).absolute()
    file = file / "plan.json" if file.is_dir() else file
    plan, arguments = load_plan(file), file.parent / "training_arguments.json"
    try:
        decided = msgspec.json.decode(arguments.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise InputError(
            f"{str(arguments)!r} cannot be read, which belongs to the plan: {error}",
            to_fix="give a plan in the run folder that `autofit plan -o FOLDER` wrote",
        ) from error
    return CurrentPlan(plan=plan, run_folder=file.parent, decided_arguments=decided)


def _class_of(architecture: str) -> Any:
    import transformers

    found = getattr(transformers, architecture, None)
    if found is None:
        raise InputError(f"transformers has no class {architecture}.", to_fix="give load_model a model_class")
    return found
