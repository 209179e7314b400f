"""Rows of a data set as they are read: in chunks that say how large each row is before any is taken.

So a sample costs no more than reading the file, and the largest rows are found without decoding the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from msgspec import Struct

Row = dict[str, Any]
Integers = np.ndarray[Any, np.dtype[np.int64]]


class Chunk(Protocol):
    """Some rows of a file, in order."""

    @property
    def file(self) -> Path:
        """Where they are."""
        ...

    @property
    def first_row(self) -> int:
        """Number of the first of them in its file, from 1."""
        ...

    @property
    def sizes_bytes(self) -> Integers:
        """What each row takes, about."""
        ...

    def take(self, indices: Sequence[int]) -> list[Row]:
        """Return some of the rows.

        Raises:
            InputError: one of them cannot be read.
        """
        ...

    def list_lengths(self, column: str) -> Integers | None:
        """Length of the list in each row of a column, if it can be told without taking the rows."""
        ...


class Format(Struct, frozen=True, kw_only=True):
    """How files of one kind are read. Each function raises InputError where a file cannot be."""

    name: str
    columns: Callable[[Sequence[Path]], tuple[str, ...]]
    """Names of the columns; none where there are no rows."""
    total_bytes: Callable[[Sequence[Path], Sequence[str]], int]
    """What some columns of all rows take, about."""
    chunks: Callable[[Path, Sequence[str]], Iterator[Chunk]]
    """Reads some columns of a file from its beginning."""
