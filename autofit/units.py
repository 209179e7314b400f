"""Bytes, seconds and tokens as people write and read them; inside, everything is in base units."""

from __future__ import annotations

import math
import re

from autofit.errors import InputError

KIB = 2**10
MIB = 2**20
GIB = 2**30

_BYTES_PER_UNIT = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": KIB,
    "MIB": MIB,
    "GIB": GIB,
    "TIB": 2**40,
}
_AMOUNT = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]+)\s*")

BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1, "int8": 1}


def parse_bytes(text: str) -> int:
    """Read an amount of memory such as `24GiB` (2^30) or `24GB` (10^9).

    Raises:
        InputError: the text has no number, or no unit that says which of the two it means.
    """
    match = _AMOUNT.fullmatch(text)
    if match is None or match["unit"].upper() not in _BYTES_PER_UNIT:
        raise InputError(
            f"{text!r} is not an amount of memory.",
            to_fix="write a number and a unit: 24GiB is 24 x 2^30 bytes, 24GB is 24 x 10^9. Known units: "
            "B, KB, MB, GB, TB, KiB, MiB, GiB, TiB",
        )
    return int(float(match["number"]) * _BYTES_PER_UNIT[match["unit"].upper()])


def format_bytes(num_bytes: float) -> str:
    """Write an amount of memory in GiB to two places, as PyTorch's own messages do."""
    return f"{num_bytes / GIB:.2f} GiB"


def format_seconds(seconds: float) -> str:
    """Write a duration with the unit a reader would choose."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 120:
        return f"{seconds:.2f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def format_count(count: float) -> str:
    """Write a count of parameters or tokens with the suffix the field uses (134.5M, 8.03B)."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{suffix}" if count / size < 1000 else f"{count / size:.0f}{suffix}"
    return f"{count:.0f}"


def format_three_digits(value: float) -> str:
    """Write what is not negative to three significant digits or in whole numbers (0.0816, 0.100, 2.10, 1,235)."""
    rounded = float(f"{value:.3g}")
    digits_before = math.floor(math.log10(rounded)) + 1 if rounded else 1
    return f"{value:,.{max(0, 3 - digits_before)}f}"
