"""Follows a loop of the script's own that trains through accelerate: sets checkpointing, verifies, measures steps."""

from __future__ import annotations

import atexit
import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from autofit.runtime.measure import NUM_STEPS_TOLD, Record, metering
from autofit.runtime.model import switch_checkpointing
from autofit.runtime.probe import stop_when_done, stretched
from autofit.runtime.session import Session
from autofit.runtime.verify import Check, Training, check_all, check_first_batch, rows_per_rank
from autofit.runtime.watch import settle, shape_of, wait_for_device


def hook_accelerator(session: Session, module: ModuleType) -> None:
    """Watch what `Accelerator.prepare` is given, unless a Trainer calls it, and every step of a prepared optimizer."""
    loop = _Loop(session=session)
    prepare, step = module.Accelerator.prepare, module.AcceleratedOptimizer.step

    @functools.wraps(prepare)
    def prepare_watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if session.trainer is not None:
            return prepare(self, *args, **kwargs)
        loop.begin(self)
        for each in args:
            if session.sets_values and _learns(each):
                set_checkpointing(session, each)
        prepared = prepare(self, *args, **kwargs)
        loop.take(args, prepared if isinstance(prepared, (tuple, list)) else [prepared])
        return prepared

    @functools.wraps(step)
    def step_watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if session.trainer is not None or not self.gradient_state.sync_gradients:
            return step(self, *args, **kwargs)
        return loop.step(lambda: step(self, *args, **kwargs))

    module.Accelerator.prepare, module.AcceleratedOptimizer.step = prepare_watched, step_watched


def _learns(thing: Any) -> bool:
    from torch import nn

    return isinstance(thing, nn.Module) and any(parameter.requires_grad for parameter in thing.parameters())


def set_checkpointing(session: Session, model: Any) -> None:
    """Switch activation checkpointing as planned, where the script has not done so itself."""
    configuration = session.plan.configuration
    before = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if before == configuration.gradient_checkpointing and not before:
        return
    switch_checkpointing(configuration, model)
    changes = {"gradient_checkpointing": [str(before), str(configuration.gradient_checkpointing)]}
    session.log.record("applied", to="model", changes=changes if before != configuration.gradient_checkpointing else {})


@dataclass(slots=True, kw_only=True)
class _Loop:
    session: Session
    accelerator: Any = None
    model: Any = None
    engine: Any = None
    optimizer: Any = None
    num_micro_steps: int = 0
    measuring: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def begin(self, accelerator: Any) -> None:
        """Measure from the first `prepare`, so that buffers made while preparing are seen, to the script's end."""
        if self.accelerator is not None:
            return
        self.accelerator, plan = accelerator, self.session.plan
        on_cpu = plan.inputs.cluster.device.kind == "cpu"
        meter = self.measuring.enter_context(metering(on_cpu=on_cpu, limit_bytes=plan.memory.budget_bytes))
        self.session.record = Record(meter=meter)
        atexit.register(self._end)

    def take(self, given: Any, prepared: Any) -> None:
        """Remember what was prepared, and wait for the model's first batch."""
        from torch.optim import Optimizer

        for each, made in zip(given, prepared, strict=True):
            if isinstance(each, Optimizer):
                self.optimizer = made
            if _learns(each):
                self.model, self.engine = each, made
                each.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module: Any, args: Any, kwargs: Any) -> Any:
        """Count a micro-step and note its length; before the first one verify what is about to train."""
        if not module.training:
            return None
        session, shape = self.session, shape_of(kwargs)
        self.num_micro_steps += 1
        if session.record.before_training_peak_bytes is None:
            session.record.begin_training()
            settle(session, check_all(session.plan, self._training()))
            if shape is not None:
                session.log.record("batch", rows=shape[0], tokens=shape[1])
                settle(session, check_first_batch(session.plan, *shape))
            session.record.begin_step()
        given = stretched(kwargs, session.planned_row_tokens) if session.is_probe else kwargs
        if (seen := shape_of(given)) is not None:
            session.record.saw_batch(seen[1])
        return (args, given) if session.is_probe else None

    def _training(self) -> Training:
        loader = self.accelerator.gradient_state.active_dataloader
        planned = self.session.plan.configuration.per_device_train_batch_size
        return Training(
            model=self.model,
            engine=self.engine,
            optimizer=self.optimizer,
            accelerator=self.accelerator,
            rows_per_rank=rows_per_rank(loader, self.accelerator, planned),
            gradient_accumulation_steps=None,
        )

    def step(self, take: Callable[[], Any]) -> Any:
        """Take an optimizer step; before the first one compare how many micro-steps came before it."""
        session, record = self.session, self.session.record
        if record is None or record.before_training_peak_bytes is None:
            return take()
        if not record.steps_seconds:
            settle(session, self._check_accumulation())
        out = take()
        wait_for_device(self.accelerator.device)
        told = record.end_step()
        if told["step"] <= NUM_STEPS_TOLD:
            session.log.record("step", **told)
        stop_when_done(session)
        record.begin_step()
        return out

    def _check_accumulation(self) -> list[Check]:
        planned = self.session.plan.configuration.gradient_accumulation_steps
        name = "micro-steps before the first optimizer step"
        return [Check(setting=name, planned=str(planned), in_effect=str(self.num_micro_steps))]

    def _end(self) -> None:
        self.session.log.record("memory", **self.session.record.figures())
        self.measuring.close()
