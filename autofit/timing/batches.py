"""Batches of a data set: how long they are on average, what they hold, and how many make an epoch.

Memory is planned for the longest batch that can occur, and needs none of this.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from autofit.spec.configuration import Configuration
from autofit.spec.estimate import CostEstimate, EpochEstimate, TimeEstimate
from autofit.spec.job import Workload
from autofit.spec.lengths import Cut, LengthDistribution, PackedRows

PACKED_AT_A_TIME = 1000
"""Sequences that trl packs together: rows of `datasets.Dataset.map`, whose batches have that many.

Source: trl/data_utils.py 1.16, pack_dataset; datasets/arrow_dataset.py 5.2, Dataset.map (`batch_size`)."""
MIN_CELLS, MAX_GRID = 64, 2**12
"""Of the grid that sums of lengths are counted on: cells for one length, and for a sum."""
RARELY_LONGER = (0.95, 0.99)
MAX_CUTS, SHORTEST_POWER = 10, 7
IN_STEP = frozenset({"zero2", "zero3", "fsdp1", "fsdp2"})
"""Shardings whose ranks communicate in every micro-step, so that each waits for the slowest; the others wait once a
step. Source: as in autofit.timing.collectives."""


def mean_sample_tokens(workload: Workload, configuration: Configuration) -> float:
    """Return the tokens, without padding, of what the trainer counts as one sequence; a packed row is one."""
    lengths, cut = workload.lengths, workload.sequence_tokens
    if lengths is None:
        return float(cut)
    return packed_rows(lengths, cut).mean_tokens if configuration.batching == "packed" else lengths.mean_cut(cut)


def step_tokens(workload: Workload, configuration: Configuration) -> float:
    """Return the tokens, without padding, that one optimizer step trains on average."""
    return workload.global_batch_sequences * mean_sample_tokens(workload, configuration)


def micro_batch_shape(workload: Workload, configuration: Configuration) -> tuple[float, float]:
    """Return how many sequences of how many tokens take as long as an average micro-batch of the slowest rank.

    Padded, they are as many as they are and as long as the longest of them. Without padding they are as long as makes
    both their tokens and the pairs within them what they are: the mean of squares over the mean.
    """
    num, lengths, cut = configuration.per_device_train_batch_size, workload.lengths, workload.sequence_tokens
    if lengths is None or configuration.batching == "equal":
        return num, cut
    num_ranks = configuration.num_processes // configuration.sequence_parallel_size
    num_averaged = 1 if configuration.sharding in IN_STEP else configuration.gradient_accumulation_steps
    means = lengths.means(cut)
    if configuration.batching == "padded":
        return num, expected_slowest(means, _steps(lengths.shares_up_to(num)), num_averaged, num_ranks)
    if configuration.batching == "packed":
        tokens = num * packed_rows(lengths, cut).mean_tokens
    else:
        tokens = num * expected_slowest(means, lengths.shares(), num * num_averaged, num_ranks)
    squares = math.fsum(share * mean**2 for share, mean in zip(lengths.shares(), means, strict=True))
    alike_tokens = squares / lengths.mean_cut(cut)
    return tokens / alike_tokens, alike_tokens


def padding_share(workload: Workload, configuration: Configuration) -> float:
    """Return the share of padding among the tokens that an average micro-batch computes."""
    num, tokens = micro_batch_shape(workload, configuration)
    useful = configuration.per_device_train_batch_size * mean_sample_tokens(workload, configuration)
    return max(0.0, 1 - useful / (num * tokens))


def estimate_epoch(
    time: TimeEstimate, cost: CostEstimate, workload: Workload, configuration: Configuration
) -> EpochEstimate | None:
    """Estimate an epoch; None where the lengths of the data are not known.

    Source: transformers/trainer.py 5.23, Trainer.set_initial_training_values (a last, incomplete step counts).
    """
    lengths, cut = workload.lengths, workload.sequence_tokens
    if lengths is None:
        return None
    rows = packed_rows(lengths, cut) if configuration.batching == "packed" else None
    num_samples = rows.num_rows if rows else lengths.num_sequences
    num_steps = math.ceil(num_samples / workload.global_batch_sequences)
    seconds = None if time.step_seconds is None else num_steps * time.step_seconds
    hourly = cost.dollars_per_device_hour
    return EpochEstimate(
        num_steps=num_steps,
        tokens=round(lengths.epoch_tokens(cut)),
        mean_sequences=workload.global_batch_sequences * (rows.mean_sequences if rows else 1),
        padding_fraction=padding_share(workload, configuration),
        seconds=seconds,
        dollars=None if seconds is None or hourly is None else seconds / 3600 * configuration.num_processes * hourly,
    )


def expected_slowest(values: Sequence[float], shares: Sequence[float], num_averaged: int, num_ranks: int) -> float:
    """Return the mean of the largest among ranks that each average some draws from a distribution.

    The distribution of a sum is the convolution of those of its parts, taken over a grid that keeps the mean.
    """
    mean = math.fsum(value * share for value, share in zip(values, shares, strict=True))
    if num_ranks == 1 or not mean:
        return mean
    num_cells = max(MIN_CELLS, MAX_GRID // num_averaged)
    width = max(values) / num_cells
    cells, rest = np.divmod(np.array(values) / width, 1)
    size = num_cells + 2
    one = np.bincount(cells.astype(int), np.array(shares) * (1 - rest), size)
    one += np.bincount(cells.astype(int) + 1, np.array(shares) * rest, size)
    total = 1 << (size * num_averaged - 1).bit_length()
    chances = np.clip(np.fft.irfft(np.fft.rfft(one, total) ** num_averaged, total), 0, None)
    reached = np.clip(np.cumsum(chances), 0, 1) ** num_ranks
    return float(np.diff(reached, prepend=0) @ np.arange(total)) * width / num_averaged


def _steps(reached: Sequence[float]) -> list[float]:
    return [to - low for low, to in zip([0.0, *reached[:-1]], reached, strict=True)]


@lru_cache
def packed_rows(lengths: LengthDistribution, row_tokens: int) -> PackedRows:
    """Pack sequences, cut at the length of a row, as trl's `packing_strategy="bfd"` does.

    So many at a time, with the lengths of the whole distribution among them.
    Source: trl/data_utils.py 1.16, _pack_bfd.
    """
    num_at_a_time = min(PACKED_AT_A_TIME, lengths.num_sequences)
    drawn = [min(tokens, row_tokens) for tokens in _representatives(lengths, num_at_a_time)]
    num_rows = best_fit_decreasing(drawn, row_tokens)
    num_in_row = num_at_a_time / num_rows
    return PackedRows(
        row_tokens=row_tokens,
        num_rows=math.ceil(lengths.num_sequences / num_in_row),
        mean_sequences=num_in_row,
        mean_tokens=min(float(row_tokens), lengths.mean_cut(row_tokens) * num_in_row),
    )


def usual_cuts(lengths: LengthDistribution) -> tuple[int, ...]:
    """Return lengths that are worth cutting at: where few sequences are longer, and the powers of two that are usual.

    Of too many, those are left out that lose most.
    """
    rare = {each.tokens for each in lengths.percentiles if each.fraction in RARELY_LONGER}
    powers = {2**power for power in range(SHORTEST_POWER, lengths.max_tokens.bit_length())}
    return tuple(sorted({*rare, *powers, lengths.max_tokens})[-MAX_CUTS:])


def cut_at(lengths: LengthDistribution, tokens: int) -> Cut:
    """Say what cutting at a length loses, and what packing then makes."""
    return Cut(
        sequence_tokens=tokens,
        sequences_cut_fraction=lengths.share_above(tokens),
        tokens_lost_fraction=lengths.share_lost(tokens),
        packed=packed_rows(lengths, tokens),
    )


def best_fit_decreasing(lengths: Iterable[int], row_tokens: int) -> int:
    """Return how many rows sequences fill, each put, the longest first, where the least room is left for it."""
    num_rows, rooms = 0, list[int]()
    for length in sorted(lengths, reverse=True):
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms.pop(at)
        else:
            room, num_rows = row_tokens, num_rows + 1
        insort(rooms, room - length)
    return num_rows


def _representatives(lengths: LengthDistribution, num: int) -> list[int]:
    """Return so many lengths that are distributed as all are: the middles of as many equal parts."""
    found, reached, total = list[int](), 0, lengths.num_measured_sequences
    for each in lengths.bins:
        begin, end = (math.ceil(edge * num / total - 0.5) for edge in (reached, reached + each.num_sequences))
        width = each.max_tokens - each.min_tokens
        parts = ((index + 0.5) / (end - begin) for index in range(end - begin))
        found += [round(each.min_tokens + part * width) for part in parts]
        reached += each.num_sequences
    return found
