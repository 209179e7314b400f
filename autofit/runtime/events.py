"""Appends what happens in one rank to its event file, so that it is there even if the next line kills the process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from autofit.spec.event import Event, EventKind, events_file_name


class EventLog(Struct, frozen=True, kw_only=True):
    """The event file of one rank."""

    run_folder: Path
    rank: int

    def record(self, kind: EventKind, **detail: Any) -> None:
        """Append one event; a single write of a whole line, so that a reader never sees half of one."""
        event = Event(kind=kind, rank=self.rank, seconds=time.time(), detail=detail)
        with (self.run_folder / events_file_name(self.rank)).open("ab", buffering=0) as file:
            file.write(msgspec.json.encode(event) + b"\n")
