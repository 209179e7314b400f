"""The peak of a process is its own, whoever started it."""

from __future__ import annotations

import subprocess
import sys

from autofit.runtime.peak_memory import process_peak_bytes

SIZE_BYTES = 2**28


def test_the_peak_is_not_that_of_the_program_that_started_it():
    """A program started from one that holds 256 MiB says less than that, and more once it has held as much itself."""
    held = bytearray(b"x" * SIZE_BYTES)
    program = (
        "from autofit.runtime.peak_memory import process_peak_bytes\n"
        "print(process_peak_bytes())\n"
        f"held = bytearray(b'x' * {SIZE_BYTES})\n"
        "del held\n"
        "print(process_peak_bytes())"
    )
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = map(int, child.stdout.split())
    assert (process_peak_bytes() or 0) > len(held)
    assert before < SIZE_BYTES < after
