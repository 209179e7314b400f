"""Follows a loop of the script's own that trains through accelerate: sets what is planned, verifies, measures steps."""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from autofit.runtime.loop_batches import Batches, set_accumulation
from autofit.runtime.measure import NUM_STEPS_TOLD, metering
from autofit.runtime.model import join_ranks, switch_checkpointing
from autofit.runtime.probe import stop_when_done, stretched
from autofit.runtime.session import Session
from autofit.runtime.verify import Check, Training, check_all, check_first_batch, rows_per_rank
from autofit.runtime.watch import begin_record, is_on_cpu, settle, shape_of, wait_for_device


def hook_accelerator(session: Session, module: ModuleType) -> None:
    """Watch what an Accelerator is given, unless a Trainer made it, and every step of a prepared optimizer."""
    loop = _Loop(session=session, batches=Batches(session))
    make, prepare, backward = module.Accelerator.__init__, module.Accelerator.prepare, module.Accelerator.backward
    signature = inspect.signature(make)

    @functools.wraps(make)
    def make_as_planned(self: Any, *args: Any, **kwargs: Any) -> None:
        if session.plan.inputs.job.script_loop is None or not session.sets_values:
            make(self, *args, **kwargs)
            return
        if session.plan.configuration.uses_deepspeed:
            join_ranks(session.plan)
        given = signature.bind(self, *args, **kwargs)
        set_precision(session, given.arguments)
        make(*given.args, **given.kwargs)
        set_accumulation(session, self)

    @functools.wraps(prepare)
    def prepare_watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if session.trainer is not None:
            return prepare(self, *args, **kwargs)
        loop.begin(self)
        for each in args:
            if session.sets_values and _learns(each):
                set_checkpointing(session, each)
        planned, own_loaders = loop.batches.planned(args)
        prepared = prepare(self, *planned, **kwargs)
        made = prepared if isinstance(prepared, (tuple, list)) else [prepared]
        for place, own in own_loaders.items():
            loop.batches.take(own, made[place], self)
        loop.take(args, made)
        return prepared

    @functools.wraps(backward)
    def backward_watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if session.trainer is None and self.gradient_state.sync_gradients and _steps_in_backward(loop.engine):
            loop.check_first_step()
        return backward(self, *args, **kwargs)

    module.Accelerator.__init__, module.Accelerator.prepare = make_as_planned, prepare_watched
    module.Accelerator.backward = backward_watched
    _hook_step(loop, module.AcceleratedOptimizer)
    if (deepspeeds := getattr(module, "DeepSpeedOptimizerWrapper", None)) is not None:
        _hook_step(loop, deepspeeds)


def _hook_step(loop: _Loop, optimizer_class: Any) -> None:
    """Follow the steps of a kind of prepared optimizer: DeepSpeed's has a `step` of its own, which does nothing."""
    step = optimizer_class.step

    @functools.wraps(step)
    def step_watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if loop.session.trainer is not None or not self.gradient_state.sync_gradients:
            return step(self, *args, **kwargs)
        return loop.step(lambda: step(self, *args, **kwargs))

    optimizer_class.step = step_watched


def _steps_in_backward(engine: Any) -> bool:
    """Tell an engine that takes the optimizer's step inside `Accelerator.backward`.

    Source: accelerate 1.15 utils/deepspeed.py, `DeepSpeedEngineWrapper.backward`.
    """
    return hasattr(engine, "zero_optimization_stage")


def set_precision(session: Session, given: dict[str, Any]) -> None:
    """Let an Accelerator that is told a precision be told the planned one; otherwise it takes the launcher's."""
    planned, own = session.plan.configuration.mixed_precision, given.get("mixed_precision")
    if own is not None and str(getattr(own, "value", own)) != planned:
        given["mixed_precision"] = planned
        session.log.record("applied", to="Accelerator", changes={"mixed_precision": [str(own), planned]})


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
    batches: Batches
    accelerator: Any = None
    model: Any = None
    engine: Any = None
    optimizer: Any = None
    num_micro_steps: int = 0
    has_checked_step: bool = False
    has_training_mode: bool = False
    """Whether the script has ever put its model into training mode."""
    measuring: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def begin(self, accelerator: Any) -> None:
        """Measure from the first `prepare`, so that buffers made while preparing are seen, to the script's end."""
        if self.accelerator is not None:
            return
        self.accelerator, plan = accelerator, self.session.plan
        limit_bytes = plan.memory.budget_bytes
        meter = self.measuring.enter_context(metering(on_cpu=is_on_cpu(self.session), limit_bytes=limit_bytes))
        begin_record(self.session, meter)
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
        session, shape = self.session, shape_of(kwargs)
        if not self._trains(module):
            session.record.evaluates(shape)
            return None
        self.num_micro_steps += 1
        if not session.record.has_begun:
            session.record.begin_training()
            checks = [*check_all(session.plan, self._training()), *self._check_num_steps(), *self._check_mode(module)]
            settle(session, checks)
            if shape is not None:
                session.log.record("batch", rows=shape[0], tokens=shape[1])
                settle(session, check_first_batch(session.plan, *shape))
        session.record.begin_step()
        given = stretched(kwargs, session.planned_row_tokens) if session.is_probe else kwargs
        if (seen := shape_of(given)) is not None:
            session.record.saw_batch(*seen)
        return (args, given) if session.is_probe else None

    def _trains(self, module: Any) -> bool:
        """Tell a forward pass that trains: in training mode, or with gradients in a loop that never goes there.

        A model of `from_pretrained` is in evaluation mode until the script calls `train`, and learns there too.
        """
        import torch

        self.has_training_mode = self.has_training_mode or module.training
        return module.training or (not self.has_training_mode and torch.is_grad_enabled())

    def _check_mode(self, module: Any) -> Iterator[Check]:
        """transformers' layers checkpoint in training mode alone.

        Source: transformers/modeling_layers.py 5.23, GradientCheckpointingLayer.__call__.
        """
        if self.session.plan.configuration.gradient_checkpointing and not module.training:
            yield Check(setting="mode of the model, for checkpointing", planned="train", in_effect="eval")

    def _training(self) -> Training:
        loader = self.accelerator.gradient_state.active_dataloader
        planned = self.session.plan.configuration.per_device_train_batch_size
        return Training(
            model=self.model,
            engine=self.engine,
            optimizer=self.optimizer,
            accelerator=self.accelerator,
            rows_per_rank=rows_per_rank(loader, self.accelerator, planned),
            gradient_accumulation_steps=self._accumulation(),
        )

    def _accumulation(self) -> int | None:
        """Return how many micro-steps accelerate accumulates; None: code of the script's own decides it."""
        loop = self.session.plan.inputs.job.script_loop
        return None if loop is None or loop.accumulates_by_hand else int(self.accelerator.gradient_accumulation_steps)

    def _check_num_steps(self) -> list[Check]:
        """Compare the optimizer steps of an epoch with those that the script's own batch and accumulation make."""
        steps = self.batches.num_steps()
        if steps is None:
            return []
        own, in_effect = map(str, steps)
        return [Check(setting="optimizer steps of an epoch", planned=own, in_effect=in_effect)]

    def step(self, take: Callable[[], Any]) -> Any:
        """Take an optimizer step; before the first one compare how many micro-steps came before it."""
        session, record = self.session, self.session.record
        if record is None or not record.has_begun:
            return take()
        self.check_first_step()
        out = take()
        wait_for_device(self.accelerator.device)
        told = record.end_step()
        if told["step"] <= NUM_STEPS_TOLD:
            session.log.record("step", **told)
        stop_when_done(session)
        return out

    def check_first_step(self) -> None:
        """Compare how many micro-steps came before the first optimizer step, once."""
        if self.has_checked_step:
            return
        self.has_checked_step = True
        planned = self.session.plan.configuration.gradient_accumulation_steps
        name = "micro-steps before the first optimizer step"
        settle(self.session, [Check(setting=name, planned=str(planned), in_effect=str(self.num_micro_steps))])

    def _end(self) -> None:
        self.session.log.record("memory", **self.session.record.figures())
        self.measuring.close()
