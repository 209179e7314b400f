"""What one rank knows while it trains: the plan, where to report, and the objects the script has made so far."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from autofit.errors import InputError
from autofit.plan import Plan, load_plan, planned_rows
from autofit.runtime.events import EventLog
from autofit.spec.event import NO_STRICT_VARIABLE, PROBE_VARIABLE, ROAD_VARIABLE, RUN_FOLDER_VARIABLE


@dataclass(slots=True, kw_only=True)
class Session:
    """The state of the hooks in one process; the only mutable thing the runtime has."""

    plan: Plan
    run_folder: Path
    training_arguments: dict[str, Any]
    """The decided fields of `TrainingArguments`, as the run folder has them."""
    rank: int
    log: EventLog
    strict: bool
    sets_values: bool = True
    """Whether the hooks set what was planned; otherwise the script does so itself, and is only watched."""
    is_probe: bool = False
    """Whether two steps on the longest batch are all that is wanted."""
    trainer: Any = None
    """The Trainer that the script made last."""
    record: Any = None
    """What is measured of the training, a `runtime.measure.Record`; None: none has begun."""
    loading: Any = None
    """The peak of what was loaded so far, a `runtime.measure.Peak`."""
    is_measuring: bool = False
    """Whether memory is counted now: while a Trainer trains, or a loop has begun to."""
    batch_hook: Any = None
    """The handle of the hook that looks at batches; on the model only while it trains, which may be pickled later."""
    keep_alive: list[Any] = field(default_factory=list)
    """Objects that transformers holds only weakly."""

    @property
    def speaks(self) -> bool:
        """Whether this rank writes to the terminal; the others would only repeat it."""
        return self.rank == 0

    @property
    def planned_row_tokens(self) -> int:
        """Tokens of a row of the longest micro-batch that was planned for."""
        return planned_rows(self.plan)[1]


def open_session(environment: Mapping[str, str] = os.environ) -> Session:
    """Read the run folder that the launcher names.

    Raises:
        InputError: the process was not started by autofit.
    """
    if RUN_FOLDER_VARIABLE not in environment:
        raise InputError(
            f"{RUN_FOLDER_VARIABLE} is not set: this module is started by autofit, not by hand.",
            to_fix="start the script with `autofit launch`",
        )
    run_folder = Path(environment[RUN_FOLDER_VARIABLE])
    rank = int(environment.get("RANK", "0"))
    return Session(
        plan=load_plan(run_folder / "plan.json"),
        run_folder=run_folder,
        training_arguments=msgspec.json.decode((run_folder / "training_arguments.json").read_bytes()),
        rank=rank,
        log=EventLog(run_folder=run_folder, rank=rank),
        strict=environment.get(NO_STRICT_VARIABLE) != "1",
        sets_values=environment.get(ROAD_VARIABLE) != "api",
        is_probe=environment.get(PROBE_VARIABLE) == "1",
    )
