"""A probe: two steps on the longest batch that was planned for, and then the end, before anything is saved."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from autofit.runtime.session import Session

NUM_STEPS = 2
"""The first makes the optimizer's state, the second is a step like all later ones."""
NEVER_LABELLED = -100
"""What transformers' losses ignore."""


class ProbeDone(SystemExit):
    """Ends the script, with exit code 0, where its probe has seen enough; its own handlers let it pass."""

    def __init__(self) -> None:
        super().__init__(0)


def quiet_arguments(session: Session) -> dict[str, Any]:
    """Return training arguments that keep a probe from reporting, saving and evaluating; its folder is its own."""
    return {
        "output_dir": str(session.run_folder / "output"),
        "report_to": "none",
        "push_to_hub": False,
        "load_best_model_at_end": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "eval_on_start": False,
    }


def stop_when_done(session: Session) -> None:
    """End the process after enough steps; every rank comes here at the same step.

    Raises:
        ProbeDone: this is a probe, and it has seen enough.
    """
    if session.is_probe and session.record.num_steps >= NUM_STEPS:
        raise ProbeDone


def stretching(session: Session, training_step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Trainer.training_step` so that each micro-batch is as long as the longest one planned for."""

    @functools.wraps(training_step)
    def stretched_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return training_step(self, model, stretched(inputs, session.planned_row_tokens), *args, **kwargs)

    return stretched_step


def stretched(inputs: Any, row_tokens: int) -> Any:
    """Lengthen the rows of a batch to so many tokens by repeating their last one, which counts in mask and loss.

    What has a list of lengths beside its rows (packed sequences as flash attention takes them) is left as it is: its
    rows are full, or nobody here knows how to lengthen it.
    """
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if ids is None or ids.dim() != 2 or ids.shape[1] >= row_tokens or any("cu_seq" in name for name in inputs):
        return inputs
    out = dict(inputs)
    more = row_tokens - ids.shape[1]
    for name, value in inputs.items():
        if getattr(value, "shape", None) == ids.shape:
            out[name] = _longer(name, value, ids, more)
    return type(inputs)(out) if type(inputs) is not dict else out


def _longer(name: str, value: Any, ids: Any, more: int) -> Any:
    import torch

    last = value[:, -1:]
    if name == "labels":
        last = torch.where(last == NEVER_LABELLED, ids[:, -1:], last)
    if name in {"attention_mask", "completion_mask"}:
        last = torch.ones_like(last)
    added = last.expand(-1, more)
    if name == "position_ids":
        added = last + torch.arange(1, more + 1, device=value.device, dtype=value.dtype)
    return torch.cat([value, added], dim=1)
