"""Data sets in columns: Parquet files, and the Arrow streams that `datasets` saves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from autofit.errors import InputError
from autofit.sources.dataset_rows import Format, Integers, Row

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK_ROWS = 256


class ArrowChunk(Struct, frozen=True, kw_only=True):
    """Rows of an Arrow table."""

    file: Path
    first_row: int
    batch: pa.RecordBatch

    @property
    def sizes_bytes(self) -> Integers:
        """What each row's values take."""
        return _sum(map(row_bytes, self.batch.columns), self.batch.num_rows)

    def take(self, indices: Sequence[int]) -> list[Row]:
        """Make Python objects of some of the rows."""
        import pyarrow as pa

        with _readable(self.file):
            rows: list[Row] = self.batch.take(pa.array(indices, type=pa.int64())).to_pylist()
        return rows

    def list_lengths(self, column: str) -> Integers | None:
        """Length of the list in each row of a column; None where it holds no lists, or not in every row."""
        from pyarrow import compute, types

        array = self.batch.column(column)
        if not (types.is_list(array.type) or types.is_large_list(array.type)) or array.null_count:
            return None
        return _integers(compute.list_value_length(array))


def row_bytes(array: pa.Array) -> Integers:
    """Return what the values of each row take, nested ones with all that is in them; others than text 8 bytes each."""
    from pyarrow import compute, types

    kind = array.type
    eight: Integers = np.full(len(array), 8, dtype=np.int64)
    if types.is_dictionary(kind):
        return row_bytes(array.dictionary_decode())
    if types.is_struct(kind):
        return eight + _sum(map(row_bytes, array.flatten()), len(array))
    if types.is_list(kind) or types.is_large_list(kind):
        reached = np.concatenate([[0], np.cumsum(row_bytes(array.flatten()))])
        ends = np.cumsum(_integers(compute.fill_null(compute.list_value_length(array), 0)))
        inside: Integers = np.diff(reached[np.concatenate([[0], ends])])
        return eight + inside
    if types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        return eight + _integers(compute.fill_null(compute.binary_length(array), 0))
    return eight


def _sum(sizes: Iterable[Integers], num_rows: int) -> Integers:
    total: Integers = np.zeros(num_rows, dtype=np.int64)
    for each in sizes:
        total = total + each
    return total


def _integers(array: Any) -> Integers:
    values: Integers = array.to_numpy(zero_copy_only=False).astype(np.int64)
    return values


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turn what pyarrow raises into a refusal.

    Raises:
        InputError: pyarrow is not installed, or cannot read the file.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise InputError(f"reading {str(file)!r} needs pyarrow.", to_fix="pip install pyarrow") from error
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        first_line = str(error).partition("\n")[0]
        raise InputError(f"{str(file)!r} cannot be read: {first_line}.", to_fix="fetch or write it anew") from error


def _numbered(file: Path, batches: Iterator[pa.RecordBatch], columns: Sequence[str]) -> Iterator[ArrowChunk]:
    first_row = 1
    for batch in batches:
        for begin in range(0, batch.num_rows, CHUNK_ROWS):
            piece = batch.slice(begin, CHUNK_ROWS).select(list(columns))
            yield ArrowChunk(file=file, first_row=first_row, batch=piece)
            first_row += piece.num_rows


def _parquet_chunks(file: Path, columns: Sequence[str]) -> Iterator[ArrowChunk]:
    with _readable(file):
        from pyarrow import parquet

        with parquet.ParquetFile(file) as opened:
            yield from _numbered(file, opened.iter_batches(batch_size=CHUNK_ROWS, columns=list(columns)), columns)


def _parquet_columns(files: Sequence[Path]) -> tuple[str, ...]:
    """Name the columns of the first file that has rows."""
    for file in files:
        with _readable(file):
            from pyarrow import parquet

            with parquet.ParquetFile(file) as opened:
                if opened.metadata.num_rows:
                    return tuple(opened.schema_arrow.names)
    return ()


def _parquet_bytes(files: Sequence[Path], columns: Sequence[str]) -> int:
    """Add up what the columns take uncompressed, as each file's footer says."""
    total = 0
    for file in files:
        with _readable(file):
            from pyarrow import parquet

            with parquet.ParquetFile(file) as opened:
                groups = [opened.metadata.row_group(number) for number in range(opened.metadata.num_row_groups)]
        pieces = [group.column(number) for group in groups for number in range(group.num_columns)]
        total += sum(piece.total_uncompressed_size for piece in pieces if piece.path_in_schema.split(".")[0] in columns)
    return total


@contextmanager
def _stream(file: Path) -> Iterator[Any]:
    with _readable(file):
        import pyarrow as pa

        with pa.memory_map(str(file)) as mapped, pa.ipc.open_stream(mapped) as stream:
            yield stream


def _stream_chunks(file: Path, columns: Sequence[str]) -> Iterator[ArrowChunk]:
    with _stream(file) as stream:
        yield from _numbered(file, iter(stream), columns)


def _stream_columns(files: Sequence[Path]) -> tuple[str, ...]:
    for file in files:
        with _stream(file) as stream:
            if any(batch.num_rows for batch in stream):
                return tuple(stream.schema.names)
    return ()


def _stream_bytes(files: Sequence[Path], _columns: Sequence[str]) -> int:
    return sum(file.stat().st_size for file in files)


PARQUET = Format(name="Parquet", columns=_parquet_columns, total_bytes=_parquet_bytes, chunks=_parquet_chunks)
ARROW = Format(name="Arrow", columns=_stream_columns, total_bytes=_stream_bytes, chunks=_stream_chunks)
