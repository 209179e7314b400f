"""Discovery: runs a training script up to its first step in a child process, and hands back what it found."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from autofit.errors import InputError
from autofit.spec.discovered import PROGRESS_FILE, Discovered
from autofit.spec.event import DISCOVERING_VARIABLE

CHILD_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONSAFEPATH": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "WANDB_MODE": "disabled",
    "COMET_MODE": "disabled",
    "CLEARML_OFFLINE_MODE": "1",
    "NEPTUNE_MODE": "debug",
    DISCOVERING_VARIABLE: "1",
}
"""Hides GPUs, and keeps trackers from starting a run."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""A launcher's: with them, the script would wait for other ranks."""
MARK_VARIABLE = "AUTOFIT_DISCOVERY"
"""Tells the processes of one discovery from all others."""
POLL_SECONDS = 0.05
ORPHAN_SECONDS = 20.0
"""How long what a script has forked may go on after the script itself has ended well."""
NUM_LINES_SHOWN = 12
_READ = "--no-discover plans from what the script's source says, read and not run, and from the flags beside it"
_INSTEAD = "plan without running it: autofit plan --model ... --seq-len ... --global-batch ... --gpus ..."


class NotRunError(InputError):
    """A script could not be run here up to its first step; its source may still say what it trains."""


def discover(
    script: Path,
    arguments: Sequence[str] = (),
    *,
    time_limit_seconds: float = 120,
    allow_hub: bool = False,
    environment: Mapping[str, str] | None = None,
    progress: Callable[[str, int, int], None] = lambda _name, _done, _total: None,
) -> Discovered:
    """Run a script up to the point where training would begin, and return what it is about to train.

    Args:
        script: the user's training script.
        arguments: what the user passes to it.
        time_limit_seconds: how long it may take to get there.
        allow_hub: whether the script may download from the Hub meanwhile.
        environment: the script's environment; this process's own by default.
        progress: called with (the script's name, samples whose length was looked at, of how many) while they are.

    Raises:
        NotRunError: it fails, or takes too long.
        InputError: there is no such script, or it does not train in a way that a plan can be applied to.
    """
    if not script.is_file():
        raise InputError(f"there is no script {str(script)!r}.", to_fix="give the path of a Python script")
    given = dict(os.environ if environment is None else environment)
    with tempfile.TemporaryDirectory(prefix="autofit-") as folder:
        out, log = Path(folder) / "discovered.json", Path(folder) / "output.txt"
        network = ["--allow-network"] if allow_hub else []
        command = [*(sys.executable, "-m", "autofit.runtime.discover", str(out)), *network, str(script.resolve())]
        environment = {**child_environment(given, allow_hub=allow_hub), MARK_VARIABLE: folder}

        def tell() -> None:
            if (told := _progress(out)) is not None:
                progress(script.name, *told)

        exit_code = _run([*command, *arguments], out, log, environment, time_limit_seconds, tell)
        if out.is_file():
            return msgspec.json.decode(out.read_bytes(), type=Discovered)
        raise _failure(script, exit_code, log.read_text(encoding="utf-8", errors="replace"), time_limit_seconds)


def child_environment(given: Mapping[str, str], *, allow_hub: bool) -> dict[str, str]:
    """Return the environment a script is discovered in."""
    kept = {name: value for name, value in given.items() if name not in LAUNCHER_VARIABLES}
    return {**kept, **CHILD_ENVIRONMENT, **({} if allow_hub else OFFLINE)}


def _progress(out: Path) -> tuple[int, int] | None:
    """Read how many samples the child has looked at, and of how many; None: it has not come to that."""
    with contextlib.suppress(FileNotFoundError):
        return msgspec.json.decode(out.with_name(PROGRESS_FILE).read_bytes(), type=tuple[int, int])
    return None


def _run(
    command: Sequence[str],
    out: Path,
    log: Path,
    environment: Mapping[str, str],
    time_limit_seconds: float,
    tell: Callable[[], None],
) -> int | None:
    """Run the child in the user's working directory; return its exit code, None if it was out of time.

    `tell` is called again and again meanwhile.

    It is over as soon as there is something in `out`, or when the child has ended and left no other process that may
    still write it: a script may fork and let its first process go. All that it started is ended with it.
    """
    deadline, orphaned_until = time.monotonic() + time_limit_seconds, None
    with log.open("wb") as file:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=dict(environment), start_new_session=True
        )
        try:
            while time.monotonic() < deadline:
                exit_code = child.poll()
                tell()
                if out.is_file() or exit_code or (exit_code == 0 and not _marked_processes(environment)):
                    return exit_code or 0
                if exit_code == 0:
                    orphaned_until = orphaned_until or time.monotonic() + ORPHAN_SECONDS
                    deadline = min(deadline, orphaned_until)
                time.sleep(POLL_SECONDS)
            return child.poll()
        finally:
            _end_all(child, environment)


def _end_all(child: subprocess.Popen[bytes], environment: Mapping[str, str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    for process_id in _marked_processes(environment):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process_id, signal.SIGKILL)
    child.wait()


def _marked_processes(environment: Mapping[str, str]) -> list[int]:
    """Find the live processes that were started with the mark of this discovery (Linux's /proc)."""
    mark = f"{MARK_VARIABLE}={environment[MARK_VARIABLE]}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_dead = (path / "stat").read_bytes().rpartition(b")")[2].split()[0] in {b"Z", b"X"}
            if not is_dead and mark in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
    return found


def _failure(script: Path, exit_code: int | None, output: str, time_limit_seconds: float) -> InputError:
    """Say how the script ended before it began to train, with the last it printed."""
    told = [line.removeprefix("autofit: ") for line in output.splitlines() if line.startswith("autofit: the script ")]
    if told:
        return InputError(
            f"{str(script)!r} cannot be planned for: {told[-1]}", to_fix=f"change that, or {_INSTEAD}", hint=_READ
        )
    last = output.rstrip().splitlines()[-NUM_LINES_SHOWN:]
    shown = "".join(f"\n    {line}" for line in last)
    offline = "the Hub was not allowed: --allow-hub; or " if "offline" in output.casefold() else ""
    kind = InputError if exit_code == 0 else NotRunError  # what ran to its end was run
    return kind(
        f"{str(script)!r} {_ending(exit_code, output, time_limit_seconds)}."
        + (f" It printed last:{shown}" if last else ""),
        to_fix=f"{offline}correct the script, pass the arguments it needs, or {_INSTEAD}",
        hint=_READ,
    )


def _ending(exit_code: int | None, output: str, time_limit_seconds: float) -> str:
    if exit_code is None:
        return f"did not begin to train within {time_limit_seconds:g} s (--discovery-limit)"
    if exit_code == 0:
        return "ended by itself without calling Trainer.train(), and without a step of an Accelerator's loop"
    if exit_code < 0:
        return f"was ended by signal {signal.Signals(-exit_code).name} before it began to train"
    if output.rstrip().rpartition("\n")[2].startswith("EOFError"):
        return "reads standard input, which is closed while it is only looked at"
    return f"failed (exit code {exit_code}) before it began to train"
