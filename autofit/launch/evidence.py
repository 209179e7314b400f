"""What a finished launch leaves behind to judge it by: the ranks' events, the exit code, the end of the log."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from autofit.spec.event import Event

LOG_TAIL_BYTES = 64 * 1024
LOG_FILE = "log.txt"
RANK_EVENTS_PATTERN = "events-rank*.jsonl"


class Evidence(Struct, frozen=True, kw_only=True):
    """One launch, after it ended."""

    exit_code: int
    """Of the launcher; `accelerate launch` says 1 for every failure. Negative: the signal that killed it."""
    events: tuple[Event, ...]
    """Of all ranks, in the order of their clocks, which is one clock on one node."""
    log_tail: str
    interrupted_by: int | None = None
    """The signal by which the user stopped the launch."""
    is_watched: bool = True
    """Whether the ranks tell anything; a script that is started without hooks does not."""
    is_of_probe: bool = False
    """Whether it was a probe that ended so, and the training itself was not started."""

    @property
    def not_in_effect(self) -> tuple[tuple[str, str, str], ...]:
        """Each setting that a rank found otherwise than planned, once: its name, the plan's value, its own."""
        checks = (tuple(check) for e in self.events if e.kind == "mismatch" for check in e.detail["checks"])
        return tuple(dict.fromkeys(checks))


def gather_evidence(folder: Path, exit_code: int, interrupted_by: int | None) -> Evidence:
    """Read what a launch left in its folder."""
    return Evidence(
        exit_code=exit_code,
        events=read_events(folder),
        log_tail=read_tail(folder / LOG_FILE),
        interrupted_by=interrupted_by,
    )


def read_events(folder: Path) -> tuple[Event, ...]:
    """Merge the event files of all ranks. A line that a dying process left unfinished is skipped."""
    lines = [line for path in sorted(folder.glob(RANK_EVENTS_PATTERN)) for line in path.read_bytes().splitlines()]
    events = [event for line in lines if (event := _decode(line)) is not None]
    return tuple(sorted(events, key=lambda event: event.seconds))


def _decode(line: bytes) -> Event | None:
    try:
        return msgspec.json.decode(line, type=Event)
    except msgspec.DecodeError:
        return None


def read_tail(path: Path, num_bytes: int = LOG_TAIL_BYTES) -> str:
    """Read the end of a file, which may be missing."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - num_bytes))
        return file.read().decode(errors="replace")
