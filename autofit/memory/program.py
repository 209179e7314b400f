"""A sequence of allocations, written once and run under any allocator."""

from __future__ import annotations

from collections.abc import Iterable

from autofit.memory.allocator import Block, CachingAllocator

EMPTY_CACHE = -1
"""Stands in place of a size: torch.cuda.empty_cache is called."""
_STREAM = 1 << 48
"""A size beyond this is that of an allocation on another stream: so many times this is the stream's number."""


class Program:
    """Writes down allocations and releases; each allocation has a number of its own."""

    def __init__(self) -> None:
        self._events: list[tuple[int, int]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._events)

    def hold(self, sizes: Iterable[int]) -> list[int]:
        """Allocate every size but zeros, in order, and return their numbers."""
        return [self.allocate(size) for size in sizes if size]

    def allocate(self, num_bytes: int, stream: int = 0) -> int:
        """Allocate on a stream, 0 being the one that computes, and return the number to release it by."""
        self._count += 1
        self._events.append((max(1, num_bytes) + stream * _STREAM, self._count))
        return self._count

    def release(self, number: int) -> None:
        """Free what was allocated under a number."""
        self._events.append((0, number))

    def drop(self, numbers: Iterable[int]) -> None:
        """Free several, in order."""
        self._events.extend((0, number) for number in numbers)

    def empty_cache(self) -> None:
        """Let the allocator return what it has cached."""
        self._events.append((EMPTY_CACHE, 0))

    def run(self, allocator: CachingAllocator, begin: int = 0, end: int | None = None) -> None:
        """Send the events from one position to another to an allocator, which keeps what is alive between two calls.

        Raises:
            OutOfMemoryInSimulationError: the allocator has a capacity, and it does not suffice.
        """
        blocks: dict[int, Block] = allocator.blocks
        allocate, release, take = allocator.allocate, allocator.release, blocks.pop
        for size, number in self._events[begin:end]:
            if size >= _STREAM:
                blocks[number] = allocate(size % _STREAM, size // _STREAM)
            elif size > 0:
                blocks[number] = allocate(size)
            elif size == 0:
                release(take(number))
            else:
                allocator.empty_cache()
