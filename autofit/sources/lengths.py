"""Measures how long a data set's sequences are, in tokens: all of them, or of a large one a random sample."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
from msgspec import Struct

from autofit.errors import InputError
from autofit.sources.dataset_files import DatasetFiles, open_dataset
from autofit.sources.dataset_layout import Layout, Text, find_layout
from autofit.sources.dataset_rows import Chunk, Integers, Row
from autofit.sources.tokenizer import TextTokenizer, load_tokenizer
from autofit.spec.job import Model
from autofit.spec.lengths import LengthBin, LengthDistribution, LengthPercentile

SAMPLE_BYTES = 16 * 2**20
"""Of a larger data set about that much is tokenised, unless all is asked for: some 10 s on one core."""
MIN_SAMPLED = 100
"""Fewer rows say too little."""
NUM_LARGEST = 64
LARGEST_BYTES = 4 * 2**20
"""Of a sampled data set the largest rows are tokenised too, so many and of so many bytes: the longest sequence is among
them, unless it has far more tokens for its bytes than they have."""
FRACTIONS = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
CONFIDENCE = 0.95
MAX_LONE_BINS = 80
"""Up to so many different lengths each has a bin of its own."""
NUM_BODY_BINS = 32
"""Otherwise bins hold that part of the sequences each; the last is parted again and again, since the longest decide."""
TAIL_RATIO = 2**-0.5
SEED = 0

Progress = Callable[[str, int, int], None]


def read_lengths(
    path: str,
    *,
    model: Model | None,
    tokenizer: str | None = None,
    text_columns: Sequence[str] = (),
    measures_all: bool = False,
    allow_hub: bool = False,
    progress: Progress = lambda _name, _done, _total: None,
) -> LengthDistribution:
    """Measure what a path holds.

    Args:
        path: `--data`.
        model: whose tokenizer counts, unless another one is named.
        tokenizer: `--tokenizer`.
        text_columns: `--text-column`.
        measures_all: see `measure_lengths`.
        allow_hub: whether a tokenizer may be downloaded.
        progress: see `measure_lengths`.

    Raises:
        InputError: the data or the tokenizer cannot be read, or they do not go together.
    """
    data = open_dataset(path)
    layout = find_layout(data.columns, text_columns, next(data.chunks(data.columns)).take([0])[0])
    loaded = load_tokenizer(tokenizer, model, allow_hub=allow_hub) if layout.needs_tokenizer else None
    if loaded and layout.needs_chat_template and not loaded.has_chat_template:
        raise InputError(
            f"{layout.words}: the tokenizer of {loaded.name} has no chat template.",
            to_fix="give the --tokenizer that is trained with, or a --text-column whose text is whole",
        )
    return measure_lengths(data, layout, loaded, measures_all=measures_all, progress=progress)


def planned_tokens(lengths: LengthDistribution, cut_tokens: int | None, model: Model, *, packs: bool) -> int:
    """Return how long the longest sequence of a batch can be.

    The longest that occurs, or where it is cut: by the user, or where the model's positions end. Of a sample the
    longest is not known, so that a length to cut at is planned for whole; and so is a packed row.
    """
    bound = cut_tokens or model.max_positions or lengths.max_tokens
    return bound if cut_tokens and (packs or lengths.is_sample) else min(bound, lengths.max_tokens)


def measure_lengths(
    data: DatasetFiles,
    layout: Layout,
    tokenizer: TextTokenizer | None,
    *,
    measures_all: bool = False,
    progress: Progress = lambda _name, _done, _total: None,
) -> LengthDistribution:
    """Read a data set once, from beginning to end, and tokenise it or a sample of it.

    Args:
        data: the files.
        layout: how a row becomes a sequence.
        tokenizer: what counts its tokens; None where the data says how many there are.
        measures_all: whether a large data set is tokenised whole.
        progress: called with the file that is read, bytes done, and bytes in all.

    Raises:
        InputError: a row cannot be read, or there is nothing to measure.
    """
    columns = layout.present(data.columns)
    total_bytes = data.total_bytes(columns)
    share = 1.0 if measures_all else min(1.0, SAMPLE_BYTES / max(total_bytes, 1))
    counter, largest = _Counter(layout, tokenizer), _Largest()
    random = np.random.default_rng(SEED)
    lengths: list[Integers] = []
    num_rows = done_bytes = 0
    for chunk in data.chunks(columns):
        sizes = chunk.sizes_bytes
        known = chunk.list_lengths(layout.list_column) if layout.list_column else None
        if known is None:
            known = counter.count(chunk, np.flatnonzero(random.random(len(sizes)) < share).tolist())
            if share < 1:
                largest.offer(chunk, sizes)
        lengths.append(known)
        num_rows, done_bytes = num_rows + len(sizes), done_bytes + int(sizes.sum())
        progress(chunk.file.name, min(done_bytes, total_bytes), total_bytes)
    measured = np.concatenate([np.zeros(0, dtype=np.int64), *lengths])
    if len(measured) < min(num_rows, MIN_SAMPLED):
        raise InputError(
            f"a sample of {str(data.path)!r} has {len(measured)} of its {num_rows} rows, which says too little.",
            to_fix="measure all of them: --data-all",
        )
    longest = counter.lengths_of(largest.rows())
    return _distribution(data, layout, tokenizer, num_rows, measured, int(max([measured.max(), *longest])))


class _Counter(Struct, frozen=True):
    """Counts the tokens of rows."""

    layout: Layout
    tokenizer: TextTokenizer | None

    def count(self, chunk: Chunk, indices: Sequence[int]) -> Integers:
        rows = [(_where(chunk, i), row) for i, row in zip(indices, chunk.take(indices), strict=True)]
        return np.array(self.lengths_of(rows), dtype=np.int64)

    def lengths_of(self, rows: Sequence[tuple[str, Row]]) -> list[int]:
        """Return the tokens of rows, each given with the words that say where it is."""
        read = [self._read(where, row) for where, row in rows]
        lengths = [0 if isinstance(each, Text) else each for each in read]
        for adds in (False, True):
            chosen = [i for i, each in enumerate(read) if isinstance(each, Text) and each.adds_special_tokens == adds]
            texts = [each.text for i in chosen if isinstance(each := read[i], Text)]
            if texts:
                assert self.tokenizer is not None, "a layout that needs a tokenizer is read with one"
                for i, length in zip(chosen, self.tokenizer.count(texts, adds_special_tokens=adds), strict=True):
                    lengths[i] = length
        return lengths

    def _read(self, where: str, row: Row) -> Text | int:
        try:
            return self.layout.read(row, self.tokenizer)
        except InputError as error:
            raise InputError(
                f"{where}: {error.message}.", to_fix=error.to_fix or "correct that row, or name another --text-column"
            ) from error


@dataclass(slots=True)
class _Largest:
    """The largest rows that were seen."""

    _heap: list[tuple[int, int, str, Row]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)
    _held_bytes: int = 0

    def offer(self, chunk: Chunk, sizes: Integers) -> None:
        """Look at the rows of a chunk, and decode those that are among the largest."""
        for index in np.argsort(-sizes, kind="stable")[:NUM_LARGEST].tolist():
            size = int(sizes[index])
            if self._is_full and size <= self._heap[0][0]:
                return
            heapq.heappush(self._heap, (size, next(self._order), _where(chunk, index), chunk.take([index])[0]))
            self._held_bytes += size
            while len(self._heap) > NUM_LARGEST or (self._held_bytes > LARGEST_BYTES and len(self._heap) > 1):
                self._held_bytes -= heapq.heappop(self._heap)[0]

    @property
    def _is_full(self) -> bool:
        return len(self._heap) >= NUM_LARGEST or self._held_bytes >= LARGEST_BYTES

    def rows(self) -> list[tuple[str, Row]]:
        """Return the rows, each with the words that say where it is."""
        return [(where, row) for _, _, where, row in self._heap]


def _where(chunk: Chunk, index: int) -> str:
    return f"row {chunk.first_row + index} of {str(chunk.file)!r}"


def _distribution(
    data: DatasetFiles,
    layout: Layout,
    tokenizer: TextTokenizer | None,
    num_rows: int,
    measured: Integers,
    max_tokens: int,
) -> LengthDistribution:
    if not measured.any():
        raise InputError(f"no sequence of {str(data.path)!r} has a token.", to_fix="name another --text-column")
    return distribution(
        measured,
        path=str(data.path),
        read_as=layout.words,
        tokenizer=tokenizer.name if tokenizer else None,
        num_sequences=num_rows,
        max_tokens=max_tokens,
    )


def distribution(
    measured: Integers, *, path: str, read_as: str, tokenizer: str | None, num_sequences: int, max_tokens: int
) -> LengthDistribution:
    """Sum up lengths that were measured.

    Args:
        measured: of each sequence that was measured, at least one of them above zero.
        path: where the data is.
        read_as: how it becomes sequences.
        tokenizer: what counted.
        num_sequences: of the whole data set.
        max_tokens: the longest that is known of.
    """
    in_order = np.sort(measured)
    is_sample = len(measured) < num_sequences
    return LengthDistribution(
        path=path,
        read_as=read_as,
        tokenizer=tokenizer,
        num_sequences=num_sequences,
        num_measured_sequences=len(measured),
        mean_tokens=float(measured.mean()),
        mean_interval_tokens=_mean_interval(measured) if is_sample and len(measured) > 1 else None,
        max_tokens=max_tokens,
        percentiles=tuple(_percentile(in_order, fraction, is_sample=is_sample) for fraction in FRACTIONS),
        bins=length_bins(measured),
    )


def _mean_interval(measured: Integers) -> tuple[float, float]:
    """Return where the mean of all lies, by the central limit theorem."""
    error = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * float(measured.std(ddof=1)) / len(measured) ** 0.5
    return float(measured.mean()) - error, float(measured.mean()) + error


def _percentile(in_order: Integers, fraction: float, *, is_sample: bool) -> LengthPercentile:
    num = len(in_order)
    at = max(1, int(np.ceil(round(fraction * num, 9))))
    low, high = order_statistics(num, fraction)
    return LengthPercentile(
        fraction=fraction,
        tokens=int(in_order[at - 1]),
        interval_tokens=(int(in_order[low - 1]), int(in_order[high - 1])) if is_sample else None,
    )


def order_statistics(num: int, fraction: float) -> tuple[int, int]:
    """Return which of a sample's values, in order and from 1, lie below and above the percentile of all.

    How many values lie below it is binomial, whatever the distribution. Where even the extremes do not bound it they
    are returned all the same.
    Source: David and Nagaraja, Order Statistics (2003), section 7.1.
    """
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num + 1)))])
    below = np.arange(num + 1)
    log_chances = logs[num] - logs[below] - logs[num - below] + below * np.log(fraction)
    reached = np.cumsum(np.exp(log_chances + (num - below) * np.log1p(-fraction)))
    low, high = np.searchsorted(reached, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return max(1, int(low)), min(num, int(high) + 1)


def length_bins(measured: Integers) -> tuple[LengthBin, ...]:
    """Part lengths into bins: one for each, or where there are too many, narrow ones that get narrower to the top."""
    values, counts = np.unique(measured, return_counts=True)
    reached = np.cumsum(counts) / len(measured)
    if len(values) <= MAX_LONE_BINS:
        begins = np.arange(len(values))
    else:
        number = np.searchsorted(_levels(len(measured)), reached - 1e-12)
        begins = np.flatnonzero(np.diff(number, prepend=-1))
    ends = np.append(begins[1:], len(values))
    return tuple(_bin(values[begin:end], counts[begin:end]) for begin, end in zip(begins, ends, strict=True))


def _levels(num: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the shares of the sequences up to which bins reach."""
    body = np.arange(1, NUM_BODY_BINS) / NUM_BODY_BINS
    num_tail = max(0, int(np.ceil(np.log(num / NUM_BODY_BINS) / -np.log(TAIL_RATIO))))
    tail = 1 - TAIL_RATIO ** np.arange(1, num_tail + 1) / NUM_BODY_BINS
    return np.concatenate([body, tail, [1.0]])


def _bin(values: Integers, counts: Integers) -> LengthBin:
    num = int(counts.sum())
    return LengthBin(
        num_sequences=num,
        min_tokens=int(values[0]),
        max_tokens=int(values[-1]),
        mean_tokens=float((values * counts).sum() / num),
    )
