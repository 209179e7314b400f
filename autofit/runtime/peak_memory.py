"""The most memory that this process has had, libraries included."""

from __future__ import annotations

import contextlib
from pathlib import Path


def process_peak_bytes() -> int | None:
    """Return the highest resident memory of this program; None where there is no /proc.

    Not `ru_maxrss`: a program that is started from a large one begins with the large one's peak, which `exec` hands on
    (Linux fs/exec.c, exec_mmap, `setmax_mm_hiwater_rss(&tsk->signal->maxrss, old_mm)`).
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def reset_process_peak() -> bool:
    """Let the peak of this program begin anew from what it has now; False where the system does not let it.

    Source: Linux Documentation/filesystems/proc.rst, `/proc/PID/clear_refs`: 5 resets the peak resident set size.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return True
    return False
