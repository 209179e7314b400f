"""What the hooks have seen so far, and how the script is ended once it is enough."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import msgspec

from autofit.runtime.peak_memory import process_peak_bytes
from autofit.spec.discovered import PROGRESS_FILE, Discovered

SECONDS_BETWEEN_TELLING = 0.1


class NotUnderstood(SystemExit):
    """Ends a script that trains in a way nobody can plan for; not an Exception, so that its handlers let it pass."""

    def __init__(self, what: str, instead: str) -> None:
        super().__init__(f"autofit: the script {what}; {instead}")


@dataclasses.dataclass
class Observed:
    """What the hooks have seen so far."""

    script: Path
    out: Path
    began_seconds: float = dataclasses.field(default_factory=time.monotonic)
    where: dict[str, str] = dataclasses.field(default_factory=dict)
    loaded: list[tuple[Any, dict[str, Any]]] = dataclasses.field(default_factory=list)
    """Each model that was built without weights, and what it was asked for."""
    given: list[tuple[Any, dict[str, Any]]] = dataclasses.field(default_factory=list)
    """Each TrainingArguments object, and the values the script gave it."""
    folders: list[Path] = dataclasses.field(default_factory=list)
    """Folders that were made meanwhile, in their order."""
    files: list[Path] = dataclasses.field(default_factory=list)
    """Files that were made in them."""
    prepares_kbit: bool = False
    inside_library: bool = False
    """Whether a library's own code runs that uses what is hooked for scripts."""
    iterated: Any = None
    """The DataLoader that was iterated last."""
    told_seconds: float = 0.0
    """When it was last told how far the lengths of samples are."""

    def mark(self, fact: str) -> None:
        """Remember the line of the script that is running now."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and Path(frame.f_code.co_filename) != self.script:
            frame = frame.f_back
        if frame is not None:
            self.where[fact] = f"{self.script.name}:{frame.f_lineno}"

    @contextlib.contextmanager
    def library(self) -> Any:
        """Tell a library's own use of what is hooked from the script's."""
        before, self.inside_library = self.inside_library, True
        try:
            yield
        finally:
            self.inside_library = before

    def tell_progress(self, num_done: int, num_total: int) -> None:
        """Let whoever waits know how many samples were looked at; not by output, which is the script's."""
        if time.monotonic() - self.told_seconds >= SECONDS_BETWEEN_TELLING or num_done == num_total:
            self.told_seconds = time.monotonic()
            write_whole(self.out.with_name(PROGRESS_FILE), msgspec.json.encode((num_done, num_total)))

    def finish(self, found: Discovered) -> NoReturn:
        """Write what was found and end the process where it stands: no handler, thread or worker can hold it up."""
        seconds = time.monotonic() - self.began_seconds
        found = msgspec.structs.replace(found, seconds=seconds, peak_process_bytes=process_peak_bytes())
        self.clean_up()
        write_whole(self.out, msgspec.json.encode(found))  # last: whoever waits for it ends this process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def clean_up(self) -> None:
        """Take back the files that were made in new folders, and the folders that are empty then."""
        for path in self.files:
            with contextlib.suppress(OSError):
                path.unlink()
        for folder in reversed(self.folders):
            with contextlib.suppress(OSError):
                folder.rmdir()


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values that JSON can hold: enum members by their value, dtypes and the like by their name."""
    return msgspec.json.decode(msgspec.json.encode(values, enc_hook=lambda value: str(getattr(value, "value", value))))


def dtype_name(dtype: Any) -> str | None:
    """Write a torch dtype as a configuration does."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is either there in whole or not at all."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)
