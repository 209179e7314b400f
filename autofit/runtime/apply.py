"""Hooks at the libraries' public seams that set exactly what the plan decided, and record what they changed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

from autofit.runtime.import_hooks import patch_after_import
from autofit.runtime.loop import hook_accelerator
from autofit.runtime.model import build_as_planned, load_as_planned, with_adapter
from autofit.runtime.probe import quiet_arguments, stretching
from autofit.runtime.session import Session
from autofit.runtime.watch import measured_loading, measured_phase, measured_training, watch_trainer


def install_hooks(session: Session) -> None:
    """Arrange for every seam to be hooked when the script imports it."""
    patch_after_import(
        {
            "transformers.training_args": functools.partial(_hook_training_arguments, session),
            "transformers.modeling_utils": functools.partial(_hook_from_pretrained, session),
            "transformers.trainer": functools.partial(_hook_trainer, session),
            "accelerate.accelerator": functools.partial(_hook_accelerator, session),
        }
    )


def _hook_training_arguments(session: Session, module: ModuleType) -> None:
    original = module.TrainingArguments.__post_init__

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:  # noqa: N807 - dataclasses call it by this name
        changes = set_fields(self, session.training_arguments if session.sets_values else {})
        if session.is_probe:
            known = {field.name for field in dataclasses.fields(self)}
            set_fields(self, {name: value for name, value in quiet_arguments(session).items() if name in known})
        session.log.record("applied", to="TrainingArguments", changes=changes)
        original(self)

    module.TrainingArguments.__post_init__ = __post_init__


def set_fields(arguments: Any, decided: dict[str, Any]) -> dict[str, list[str]]:
    """Set the decided fields and return what the script had said instead: name, then [its value, the plan's]."""
    known = {field.name for field in dataclasses.fields(arguments)}
    changes = {}
    for name, value in decided.items():
        field, alias = field_and_alias(name, known)
        old = getattr(arguments, field)
        if alias in known:
            old = getattr(arguments, alias) if old is None else old
            setattr(arguments, alias, None)
        setattr(arguments, field, value)
        if _plain(old) != _plain(value):
            changes[field] = [_plain(old), _plain(value)]
    return changes


def field_and_alias(name: str, known: set[str]) -> tuple[str, str]:
    """Return the checkpointing field that this release obeys, and the name it also answers to; others as they are.

    Where both exist the old name is only read if the new one is unset. Source: transformers 5.23, training_args.py.
    """
    new = name.replace("gradient_checkpointing", "activation_checkpointing")
    old = new.replace("activation_checkpointing", "gradient_checkpointing")
    if new == old:
        return name, ""
    return (new, old) if new in known else (old, "")


def _plain(value: object) -> str:
    """Write a value as a user would: an enum member by its value."""
    return str(getattr(value, "value", value))


def _hook_from_pretrained(session: Session, module: ModuleType) -> None:
    original = _within(measured_loading, session, module.PreTrainedModel.from_pretrained.__func__)
    if not session.sets_values:
        module.PreTrainedModel.from_pretrained = classmethod(original)
        return

    @functools.wraps(original)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return load_as_planned(session, cls, functools.partial(original, cls), args, kwargs)

    build = module.PreTrainedModel._from_config.__func__

    def _from_config(cls: Any, config: Any, /, **kwargs: Any) -> Any:
        return build_as_planned(session, cls, functools.partial(build, cls), config, kwargs)

    module.PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    module.PreTrainedModel._from_config = classmethod(_from_config)


def _hook_trainer(session: Session, module: ModuleType) -> None:
    module.Trainer.__init__ = _with_planned_model(session, module.Trainer.__init__)
    if session.is_probe:
        module.Trainer.training_step = stretching(session, module.Trainer.training_step)
    trainer = module.Trainer
    trainer.train = _within(measured_training, session, trainer.train)
    trainer.evaluate = _within(measured_phase, session, trainer.evaluate, "evaluation")
    trainer.save_model = _within(measured_phase, session, _recorded(session, trainer.save_model), "saving")
    # A checkpoint is more than `save_model`: the optimizer's state is written after it.
    trainer._save_checkpoint = _within(measured_phase, session, trainer._save_checkpoint, "saving")


def _hook_accelerator(session: Session, module: ModuleType) -> None:
    hook_accelerator(session, module)
    for name in ("save_state", "save_model"):
        setattr(module.Accelerator, name, _within(measured_phase, session, getattr(module.Accelerator, name), "saving"))


def _with_planned_model(session: Session, original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, model: Any = None, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - as above
        if model is not None and session.sets_values:
            model = with_adapter(session, model)
        if kwargs.get("model_init") is not None and session.sets_values:
            build = kwargs["model_init"]
            kwargs["model_init"] = functools.wraps(build)(lambda *given: with_adapter(session, build(*given)))
        original(self, model, *args, **kwargs)
        watch_trainer(session, self)

    return __init__


def _within(
    block: Callable[..., AbstractContextManager[None]], session: Session, original: Callable[..., Any], *words: str
) -> Callable[..., Any]:
    """Wrap a function so that it runs within a block, which is made of the session and some words."""

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with block(session, *words):
            return original(*args, **kwargs)

    return wrapped


def _recorded(session: Session, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_model(self: Any, output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
        out = original(self, output_dir, *args, **kwargs)
        folder = Path(output_dir or self.args.output_dir).absolute()
        session.log.record("saved", folder=str(folder), checkpoint=folder.name.startswith("checkpoint-"))
        return out

    return save_model
