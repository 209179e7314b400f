"""A sequence of allocations, written once and run under any allocator."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import numpy as np

from autofit.memory.allocator import EMPTY_CACHE, STREAM, request
from autofit.memory.unroll import Integers, Playable

_NONE = -1
"""The number in an event that empties the cache."""


class Events:
    """A written program.

    Args:
        codes: its events as `CachingAllocator.run` reads them.
        end_of_loading: how many of them come before the first step.
        repeat: a stretch that may come twice: where it begins, where it ends, and where it begins again.
    """

    def __init__(self, codes: Integers, end_of_loading: int, repeat: tuple[int, int, int] | None = None) -> None:
        self.codes = codes
        self.end_of_loading = end_of_loading
        self.allocations = np.flatnonzero(codes > EMPTY_CACHE)
        """Where the allocations are, by number."""
        releases = np.flatnonzero(codes < EMPTY_CACHE)
        numbers = ~codes[releases]
        self._changes = np.zeros_like(codes)
        self._changes[self.allocations] = codes[self.allocations] & (STREAM - 1)
        self._changes[releases] = -self._changes[self.allocations[numbers]]
        self._releases = np.full(len(self.allocations), -1)
        self._releases[numbers] = releases
        self.repeat = repeat if repeat is not None and self._comes_twice(*repeat) else None
        """A stretch that does come twice, and releases nothing but its own."""

    def _comes_twice(self, begin: int, end: int, again: int) -> bool:
        """Tell whether one stretch is another, but for the numbers of what is allocated in each."""
        first, later = np.searchsorted(self.allocations, (begin, again))
        once, twice = self.codes[begin:end], self.codes[again : again + end - begin]
        if len(once) != len(twice) or (once == EMPTY_CACHE).any():
            return False
        is_own = ~once >= first
        shifted = np.where(once < EMPTY_CACHE, once - (later - first), once)
        return bool(np.array_equal(shifted, twice) and is_own[once < EMPTY_CACHE].all())

    def is_same(self, other: Events) -> bool:
        """Whether another program is the same to the last event."""
        if self is other:
            return True
        return self.end_of_loading == other.end_of_loading and np.array_equal(self.codes, other.codes)

    def peak_allocated_bytes(self, left_over_bytes: Mapping[int, int] | None = None) -> int:
        """Return the most that is allocated at one time from the end of loading on.

        Args:
            left_over_bytes: by an allocation's number, how much larger its block is than what was asked for. None: no
                block is, which is the least that an allocator can do with.
        """
        changes = self._changes
        if left_over_bytes:
            numbers, sizes = np.array(list(left_over_bytes.items()), np.int64).T
            changes = changes.copy()
            changes[self.allocations[numbers]] += sizes
            is_released = self._releases[numbers] >= 0
            changes[self._releases[numbers[is_released]]] -= sizes[is_released]
        return int(np.max(np.cumsum(changes)[max(self.end_of_loading - 1, 0) :], initial=0))

    def kept_left_over_bytes(self, left_over_bytes: Mapping[int, int]) -> int:
        """Return how much larger the blocks are that nothing releases than what was asked for."""
        return sum(size for number, size in left_over_bytes.items() if self._releases[number] < 0)


class Program:
    """Writes down allocations and releases; each allocation has a number of its own to release it by."""

    def __init__(self) -> None:
        self._count = 0
        self._pieces: list[tuple[Integers, Integers]] = []
        """What is asked for, 0 for a release, and the numbers;"""
        self._last: list[tuple[int, int]] = []
        """after those, one by one."""
        self._length = 0
        self._end_of_loading = 0
        self._repeat: tuple[int, int, int] | None = None

    def allocate(self, num_bytes: int, stream: int = 0) -> int:
        """Allocate on a stream, 0 being the one that computes, and return the number to release it by."""
        number = self.new_numbers(1)
        self._last.append((request(num_bytes, stream), number))
        return number

    def release(self, number: int) -> None:
        """Free what was allocated under a number."""
        self._last.append((0, number))

    def hold(self, sizes: Iterable[int]) -> list[int]:
        """Allocate every size but zeros, in order, and return their numbers."""
        asked = [request(size) for size in sizes if size]
        first = self.new_numbers(len(asked))
        numbers = list(range(first, first + len(asked)))
        self._last.extend(zip(asked, numbers, strict=True))
        return numbers

    def drop(self, numbers: Iterable[int]) -> None:
        """Free several, in order."""
        self._last.extend((0, number) for number in numbers)

    def empty_cache(self) -> None:
        """Let the allocator return what it has cached."""
        self._last.append((0, _NONE))

    def copy(self) -> Program:
        """Return one that goes on from here by itself."""
        other = copy.copy(self)
        vars(other).update(_pieces=self._pieces.copy(), _last=self._last.copy())
        return other

    def new_numbers(self, count: int) -> int:
        """Set numbers aside for so many tensors, and return the first of them."""
        self._count += count
        return self._count - count

    def play(self, step: Playable, first_event: int, end_event: int, first_number: int) -> None:
        """Write down a stretch of a step.

        Args:
            step: what the allocator sees of it.
            first_event: of the step.
            end_event: the first one that is left out.
            first_number: of the numbers that were set aside for the step's tensors.
        """
        self._end_piece()
        stretch = slice(step.positions[first_event], step.positions[end_event])
        self._pieces.append((step.requests[stretch], step.numbers[stretch] + first_number))
        self._length += len(self._pieces[-1][0])

    def end_loading(self) -> None:
        """What follows belongs to the steps."""
        self._end_piece()
        self._end_of_loading = self._length

    def position(self) -> int:
        """Return how many events there are so far."""
        self._end_piece()
        return self._length

    def repeats(self, begin: int, end: int, again: int) -> None:
        """Say that from `again` on comes what came from `begin` to `end`; it is looked at whether that is so."""
        self._repeat = begin, end, again

    def written(self) -> Events:
        """Return the program."""
        self._end_piece()
        asked, numbers = (np.concatenate(column) for column in zip(*self._pieces, strict=True))
        is_request = asked > 0
        order = np.zeros(self._count, np.int64)
        order[numbers[is_request]] = np.arange(np.count_nonzero(is_request))
        codes = np.where(is_request, asked, np.where(numbers == _NONE, EMPTY_CACHE, ~order[numbers]))
        return Events(codes, self._end_of_loading, self._repeat)

    def _end_piece(self) -> None:
        if self._last:
            asked, numbers = np.array(self._last, np.int64).T
            self._pieces.append((asked, numbers))
            self._length += len(self._last)
            self._last = []
