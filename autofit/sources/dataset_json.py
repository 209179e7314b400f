"""Data sets in JSON: one object a line, plain or through gzip, or one array of objects."""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from msgspec import Struct

from autofit.errors import InputError
from autofit.sources.dataset_rows import Format, Integers, Row

CHUNK_LINES = 512
CHUNK_BYTES = 2**20
MAX_LINE_BYTES = 256 * 2**20
"""A longer line is no row of a data set, and each has to be in memory whole."""
MAX_ARRAY_BYTES = 512 * 2**20
"""Of a file that is one JSON array, which cannot be read in pieces."""
GZIP_RATIO = 4
"""About how much smaller gzip makes text; only the size of a sample and the progress bar depend on it. Assumed."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

T = TypeVar("T")


class JsonChunk(Struct, frozen=True, kw_only=True):
    """JSON objects, decoded when they are taken."""

    file: Path
    first_row: int
    lines: tuple[bytes, ...]

    @property
    def sizes_bytes(self) -> Integers:
        """Length of each line."""
        return np.fromiter(map(len, self.lines), dtype=np.int64, count=len(self.lines))

    def take(self, indices: Sequence[int]) -> list[Row]:
        """Decode some of the lines."""
        return [_decoded(self.lines[index], f"row {self.first_row + index} of {str(self.file)!r}") for index in indices]

    def list_lengths(self, column: str) -> Integers | None:  # noqa: ARG002 - as of every chunk
        """Nothing is known of a line before it is decoded."""
        return None


def _decoded(line: bytes, where: str) -> Row:
    try:
        value = msgspec.json.decode(line)
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8: {error.reason}.", to_fix="write the file in UTF-8") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}.", to_fix="correct it, one JSON object a line") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} is no JSON object.", to_fix="write one object with named columns for each row")
    return value


def _chunks(file: Path, _columns: Sequence[str] = ()) -> Iterator[JsonChunk]:
    rows = _array(file) if _is_array(file) else _lines(file)
    first_row, held, held_bytes = 1, list[bytes](), 0
    for line in rows:
        held.append(line)
        held_bytes += len(line)
        if len(held) == CHUNK_LINES or held_bytes >= CHUNK_BYTES:
            yield JsonChunk(file=file, first_row=first_row, lines=tuple(held))
            first_row, held, held_bytes = first_row + len(held), [], 0
    if held:
        yield JsonChunk(file=file, first_row=first_row, lines=tuple(held))


def _lines(file: Path) -> Iterator[bytes]:
    """Yield the lines that are not blank."""
    with _opened(file) as stream:
        while line := _guarded(file, lambda: bytes(stream.readline(MAX_LINE_BYTES))):
            if len(line) == MAX_LINE_BYTES:
                raise InputError(
                    f"{str(file)!r} has a line of {MAX_LINE_BYTES // 2**20} MiB or more.",
                    to_fix="write one row of the data set in each line",
                )
            if text := line.removeprefix(BYTE_ORDER_MARK).strip():
                yield text


def _is_array(file: Path) -> bool:
    with _opened(file) as stream:
        begins = _guarded(file, lambda: bytes(stream.read(64)))
    return begins.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")


def _array(file: Path) -> list[bytes]:
    with _opened(file) as stream:
        text = _guarded(file, lambda: bytes(stream.read(MAX_ARRAY_BYTES)))
    if len(text) == MAX_ARRAY_BYTES:
        raise InputError(
            f"{str(file)!r} is one JSON array of {MAX_ARRAY_BYTES // 2**20} MiB or more, to be in memory whole.",
            to_fix="write it as JSON lines, one object a line",
        )
    try:
        rows = msgspec.json.decode(text.removeprefix(BYTE_ORDER_MARK), type=list[msgspec.Raw])
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"{str(file)!r} is not JSON: {error}.", to_fix="correct it") from error
    return [bytes(row) for row in rows]


def _opened(file: Path) -> Any:
    return _guarded(file, lambda: gzip.open(file) if file.suffix.casefold() == ".gz" else file.open("rb"))


def _guarded(file: Path, read: Callable[[], T]) -> T:
    """Read from a file.

    Raises:
        InputError: it cannot be read, or ends in the middle of what gzip wrote.
    """
    try:
        return read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{str(file)!r} is damaged or cut short: {error}.", to_fix="fetch or write it anew") from error
    except OSError as error:
        raise InputError(f"cannot read {str(file)!r}: {error.strerror or error}.", to_fix="make it readable") from error


def _columns(files: Sequence[Path]) -> tuple[str, ...]:
    """Name the columns of the first row; others may have further ones."""
    first = next(itertools.chain.from_iterable(map(_chunks, files)), None)
    return () if first is None else tuple(first.take([0])[0])


def _total_bytes(files: Sequence[Path], _columns: Sequence[str]) -> int:
    return sum(file.stat().st_size * (GZIP_RATIO if file.suffix.casefold() == ".gz" else 1) for file in files)


JSON = Format(name="JSON", columns=_columns, total_bytes=_total_bytes, chunks=_chunks)
