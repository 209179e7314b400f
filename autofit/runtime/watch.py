"""Follows one training run: verifies before the first step, measures every step, reports both as events."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from autofit.runtime.measure import NUM_STEPS_TOLD, Meter, Peak, Record, loading_peak, metering, metering_again
from autofit.runtime.probe import stop_when_done
from autofit.runtime.session import Session
from autofit.runtime.verify import Check, check_all, check_first_batch, check_steps, table, training_of
from autofit.spec.event import MISMATCH_EXIT_CODE, MeasuredPhaseName


def watch_trainer(session: Session, trainer: Any) -> None:
    """Have the Trainer report to the session from its next training on."""
    session.trainer = trainer
    trainer.add_callback(_callback(session))


@contextlib.contextmanager
def measured_training(session: Session) -> Iterator[None]:
    """Measure `Trainer.train` from its first line, so that buffers made while preparing are seen."""
    with metering(on_cpu=is_on_cpu(session), limit_bytes=session.plan.memory.budget_bytes) as meter:
        begin_record(session, meter)
        try:
            yield
        finally:
            if session.batch_hook is not None:
                session.batch_hook.remove()
            session.is_measuring = False
            session.log.record("memory", **session.record.figures())


def is_on_cpu(session: Session) -> bool:
    """Tell whether ranks are CPU ranks."""
    return session.plan.inputs.cluster.device.kind == "cpu"


def begin_record(session: Session, meter: Meter) -> None:
    """Begin to measure where the engine is about to be made: what was loaded is there."""
    session.record = Record(meter=meter, planned_row_tokens=session.planned_row_tokens)
    session.record.begin_preparing(session.loading or Peak())
    session.is_measuring = True


@contextlib.contextmanager
def measured_loading(session: Session) -> Iterator[None]:
    """Measure a `from_pretrained` before the training."""
    if session.record is not None:
        yield
        return
    with loading_peak(is_on_cpu(session)) as peak:
        yield
    session.loading = session.loading or Peak()
    session.loading.merge(peak)


@contextlib.contextmanager
def measured_phase(session: Session, phase: MeasuredPhaseName) -> Iterator[None]:
    """Measure an evaluation or the saving of a checkpoint, while a training runs or after it; before it, nothing is."""
    record = session.record
    if record is None or not record.has_begun:
        yield
        return
    if session.is_measuring:
        with record.during(phase):
            yield
        return
    with metering_again(record.meter), _seeing_batches(session), record.during(phase):
        session.is_measuring = True
        try:
            yield
        finally:
            session.is_measuring = False
    session.log.record("memory", **record.figures())


@contextlib.contextmanager
def _seeing_batches(session: Session) -> Iterator[None]:
    """Note the batches of an evaluation after the training."""

    def look(module: Any, args: Any, kwargs: Any) -> None:
        if (shape := shape_of(kwargs)) is not None:
            session.record.saw_batch(*shape, trains=False)

    if session.trainer is None:
        yield
        return
    hook = session.trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _callback(session: Session) -> Any:
    """Make the callback; its class needs transformers, which only the script imports."""
    from transformers import TrainerCallback

    class AutofitCallback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            session.record.begin_training()
            training = training_of(session.trainer, kwargs["train_dataloader"])
            steps = check_steps(session.plan, session.trainer, state.max_steps)
            settle(session, [*check_all(session.plan, training), *steps])
            look_at_batches(session)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            session.record.begin_step()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            wait_for_device(args.device)
            step = session.record.end_step()
            if step["step"] <= NUM_STEPS_TOLD:
                session.log.record("step", **step)
            stop_when_done(session)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if session.speaks and "loss" in (logs or {}):
                session.log.record("log", step=state.global_step, loss=float(logs["loss"]))

    return AutofitCallback()


def wait_for_device(device: Any) -> None:
    """Let a GPU finish what was queued, so that the time of a step is its own."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def look_at_batches(session: Session) -> None:
    """Compare the shape of the first micro-batch with the plan's as the model gets it, and note the longest of all."""
    is_first = True

    def look(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal is_first
        shape = shape_of(kwargs)
        if shape is None:
            return
        session.record.saw_batch(*shape, trains=module.training)
        if not module.training:  # an evaluation has batches of its own
            return
        rows, tokens = shape
        if is_first:
            is_first = False
            session.log.record("batch", rows=rows, tokens=tokens)
            settle(session, check_first_batch(session.plan, rows, tokens))

    session.batch_hook = session.trainer.model.register_forward_pre_hook(look, with_kwargs=True)


def shape_of(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return rows and tokens of what a model is called with; None where it holds no token ids."""
    ids = inputs.get("input_ids")
    return None if ids is None else (int(ids.shape[0]), int(ids.shape[-1]))


def settle(session: Session, checks: list[Check]) -> None:
    """Record checks; where one does not hold, show all of them and stop before the first step.

    Raises:
        SystemExit: a planned setting is not in effect, and the session is strict.
    """
    failing = [check for check in checks if not check.holds]
    described = [[check.setting, check.planned, check.in_effect] for check in failing or checks]
    session.log.record("mismatch" if failing else "verified", checks=described)
    if not failing:
        return
    if session.speaks:
        after = "" if session.strict else "Training goes on all the same (--no-strict).\n"
        sys.stderr.write(f"autofit: the plan is not in effect.\n{table(checks)}\n{after}")
    if session.strict:
        sys.stderr.flush()
        sys.exit(MISMATCH_EXIT_CODE)
