"""What a training process tells its launcher, one JSON object a line: the vocabulary that both sides share."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct, field

EventKind = Literal[
    "started",
    "applied",
    "verified",
    "mismatch",
    "batch",
    "step",
    "log",
    "memory",
    "saved",
    "out_of_memory",
    "failed",
    "finished",
]

MeasuredPhaseName = Literal[
    "loading",
    "preparing",
    "first_step",
    "steady_steps",
    "longest_batch",
    "between_steps",
    "evaluation",
    "saving",
]
"""Phases of a run that a rank measures: `steady_steps` are all but the first, `longest_batch` those of them on a
micro-batch of the planned length, and `between_steps` what is neither evaluation nor saving."""

RUN_FOLDER_VARIABLE = "AUTOFIT_RUN_FOLDER"
"""Environment variable that tells a rank where its plan is and where its events go."""
NO_STRICT_VARIABLE = "AUTOFIT_NO_STRICT"
"""Set to 1, a setting that is not in effect is reported and training goes on."""
PLAN_VARIABLE = "AUTOFIT_PLAN"
"""Names the plan.json of a run that was started without autofit, for scripts that ask for the current plan."""
DISCOVERING_VARIABLE = "AUTOFIT_DISCOVERING"
"""Set to 1, a script is looked at: there is no plan yet, and one that asks for it gets its words back."""
ROAD_VARIABLE = "AUTOFIT_ROAD"
"""Set to api, the runtime sets nothing: the script puts the plan into effect itself, and is verified and measured."""
PROBE_VARIABLE = "AUTOFIT_PROBE"
"""Set to 1, a rank takes two steps on the longest batch that was planned for, and ends."""
MISMATCH_EXIT_CODE = 78
"""Of a rank that found a planned setting not in effect (EX_CONFIG of sysexits.h)."""


class Event(Struct, frozen=True, kw_only=True):
    """Something that happened in one rank."""

    kind: EventKind
    rank: int
    seconds: float
    """Time since the epoch."""
    detail: dict[str, Any] = field(default_factory=dict)
    """What the kind calls for: bytes, settings, an error."""


def events_file_name(rank: int) -> str:
    """Name the file, in the run folder, that one rank appends to."""
    return f"events-rank{rank}.jsonl"
