"""Reads files of published measurements: lines into rows, and fields into values, however their sources spell them."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

Row = Mapping[str, Any]


class RefusedError(Exception):
    """A row cannot be stated as a configuration; the message says why."""


class Line(Struct, frozen=True, kw_only=True):
    """One line of a file."""

    id: str
    """Its row's own, or which line it is; no two of a file are the same."""
    row: Row | None
    refused: str | None = None
    """Why there is no row."""


def read_lines(path: Path) -> list[Line]:
    """Read a file of one JSON object a line; empty lines are left out.

    Raises:
        SystemExit: the file cannot be read; the message says why.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        sys.stderr.write(f"cannot read {str(path)!r}: {error.strerror}\n")
        raise SystemExit(2) from error
    lines = [_line(number, line) for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)]
    found = [line for line in lines if line is not None]
    times = Counter(line.id for _, line in found)
    return [
        Line(id=f"{line.id} (line {number})", row=line.row, refused=line.refused) if times[line.id] > 1 else line
        for number, line in found
    ]


def _line(number: int, content: bytes) -> tuple[int, Line] | None:
    if not content.strip():
        return None
    where = f"line {number}"
    try:
        row = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        return number, Line(id=where, row=None, refused=f"the line is not JSON: {error}")
    if not isinstance(row, dict):
        return number, Line(id=where, row=None, refused="the line is not a JSON object")
    return number, Line(id=text(row, "id") or where, row=row)


def print_fields_not_read(lines: Iterable[Line], read: Iterable[str]) -> None:
    """Say which fields of rows are not read, so that none is left out in silence."""
    known = set(read)
    fields = Counter(name for line in lines for name, value in (line.row or {}).items() if value is not None)
    unread = {name: num for name, num in fields.items() if name not in known}
    if unread:
        print("\nFields that are not read:")
    for name, num in unread.items():
        print(f"- {name}: {num} rows")


def text(row: Row, name: str) -> str:
    """Return a field as text; empty where it is null, missing or says that it is not known."""
    value = row.get(name)
    if value is None or isinstance(value, dict | list):
        return "" if not value else json.dumps(value)
    said = str(value).strip()
    return "" if said.casefold() in {"null", "nan", "n/a", "na", "unknown", "not stated", "?", ""} else said


def number(row: Row, name: str) -> float | None:
    """Return a field as a number, None where it says nothing.

    Raises:
        RefusedError: it is no number.
    """
    value = row.get(name)
    if value is None or (isinstance(value, str) and not text(row, name)):
        return None
    try:
        found = math.nan if isinstance(value, bool) else float(str(value).replace(",", "").replace("_", ""))
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise RefusedError(f"{name} is {value!r}, which is no number")
    return found


def number_beside(row: Row, name: str) -> float | None:
    """Return a field that a row can do without, which may be rounded as 8B is; None where it is no number."""
    rounded = re.fullmatch(r"~? ?(\d+(?:\.\d+)?) ?([KMBT])(?:illion)?", text(row, name), re.IGNORECASE)
    if rounded:
        return float(rounded[1]) * 1000.0 ** ("KMBT".index(rounded[2].upper()) + 1)
    try:
        return number(row, name)
    except RefusedError:
        return None


def whole(row: Row, name: str) -> int | None:
    """Return a field as a whole number above zero, None where it says nothing.

    Raises:
        RefusedError: it is something else.
    """
    found = number(row, name)
    if found is None:
        return None
    if found != int(found) or found < 1:
        raise RefusedError(f"{name} is {row[name]!r}, which is no whole number above zero")
    return int(found)


YES = {"true", "yes", "on", "1", "1.0", "full", "all", "every layer", "enabled"}
NO = {"false", "no", "off", "0", "0.0", "none", "disabled"}


def flag(row: Row, name: str) -> bool | None:
    """Return a field as yes or no, None where it says nothing.

    Raises:
        RefusedError: it is neither.
    """
    said = text(row, name).casefold()
    if not said:
        return None
    if said not in YES | NO:
        raise RefusedError(f"{name} is {row[name]!r}, which is not modelled")
    return said in YES


def letters(said: str) -> str:
    """Reduce a spelling to its letters and digits."""
    return re.sub(r"[^a-z0-9]", "", said.casefold())
