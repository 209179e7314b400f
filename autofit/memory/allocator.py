"""torch's CUDA caching allocator, as its policy is written: what it reserves for a sequence of allocations.

Source: torch v2.13 c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h; the same policy from
2.4 on. Rounding, two pools a stream, best fit, splitting, merging, and what is given back before an allocation fails;
with `expandable_segments` and `max_split_size_mb`.

torch links blocks to their neighbours; here a block is the bytes from one address to another, and a free one is looked
up by either. Tens of thousands of allocations make a step, so that `run` keeps all it needs in local names.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from msgspec import Struct

from autofit.units import MIB

MIN_BLOCK_BYTES = 512
SMALL_BYTES = MIB
SMALL_SEGMENT_BYTES = 2 * MIB
LARGE_SEGMENT_BYTES = 20 * MIB
MIN_LARGE_BYTES = 10 * MIB
ROUND_LARGE_BYTES = 2 * MIB
MAX_NON_SPLIT_ROUNDING_BYTES = LARGE_SEGMENT_BYTES
"""How much larger than the request a block beyond `max_split_size_mb` may be. Source: AllocatorConfig.h."""
ADDRESS_SPACE_BYTES = LARGE_SEGMENT_BYTES * 2**22
"""Of one segment that expands, in whole pages; torch takes 9/8 of the device's memory, which no request comes near."""
TOP_ADDRESS = 2**56
"""Where large segments begin, each below the one before.

Of two cached blocks of one size the allocator takes that at the lower address (BlockComparatorSize), and which of two
segments lies lower is the driver's choice. Seen: with large segments from the top down and those of up to 20 MiB from
the bottom up, what is reserved comes out to the MiB in all twelve LoRA rows that fitcheck-llm 0.3.1 published for a T4;
with all of them upwards four rows are 6 to 9 % too low.
"""
GUARD_BYTES = LARGE_SEGMENT_BYTES
"""Between two segments, so that blocks of different ones never touch: they do not merge."""
EMPTY_CACHE = 0
"""The event that stands for torch.cuda.empty_cache."""
STREAM = 1 << 48
"""An allocation on another stream than that which computes, 0, has so many times the stream's number added to it."""
COPY_FRACTION = 0.03
_SIZE_SHIFT = 60
"""A free block's key is its size and its address in one integer: the order of the pool's set."""
_ADDRESS_MASK = (1 << _SIZE_SHIFT) - 1


class AllocatorSettings(Struct, frozen=True, kw_only=True):
    """What PYTORCH_ALLOC_CONF says of the allocator's policy."""

    expandable_segments: bool = False
    max_split_size_bytes: int | None = None
    """Free blocks of this size or more are never split; None: no bound."""


class OutOfMemoryInSimulationError(Exception):
    """The capacity is used up, with nothing cached left to return."""


class State(NamedTuple):
    """What is free in an allocator, and how far it is."""

    keys: tuple[tuple[int, ...], ...]
    """Of the free blocks of each pool."""
    reserved_bytes: int
    num_retries: int
    num_allocations: int

    def is_like(self, other: State) -> bool:
        """Whether the two go on alike."""
        return self[:3] == other[:3]


@dataclass(slots=True)
class _Pool:
    """The cached blocks of one stream, small or large."""

    is_small: bool
    keys: list[int]
    """Of its free blocks, in order."""
    unmapped: list[int]
    """Where its expandable segments have no memory behind them: the address where each such part begins, in order."""

    @property
    def page_bytes(self) -> int:
        """What an expandable segment grows by."""
        return SMALL_SEGMENT_BYTES if self.is_small else LARGE_SEGMENT_BYTES


class CachingAllocator:
    """Hands out blocks and counts what is reserved.

    Blocks are numbered from 0 in the order in which they are handed out.

    Args:
        capacity_bytes: what can be reserved at most; None: no bound.
        settings: the policy's options.
        copies_beyond_bytes: keep a copy of the allocator from just before it reserves more than this, and again from
            before each further `COPY_FRACTION` of it.
    """

    def __init__(
        self,
        capacity_bytes: float | None = None,
        settings: AllocatorSettings | None = None,
        *,
        copies_beyond_bytes: float = math.inf,
    ) -> None:
        self.settings = settings or AllocatorSettings()
        self.capacity_bytes = math.inf if capacity_bytes is None else capacity_bytes
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.num_retries = 0
        """How often cached memory was returned because an allocation did not fit."""
        self.left_over_bytes: dict[int, int] = {}
        """By a block's number, how much larger it is than what was asked for, if it is."""
        self.copies: list[CachingAllocator] = []
        self.least_refused_bytes = math.inf
        """The least that would have been reserved where the capacity did not allow it."""
        self._copies_beyond_bytes = copies_beyond_bytes
        self._pools: list[_Pool] = []
        """The large and the small one of each stream."""
        self._first_pools: dict[int, int] = {}
        """By stream, which of the pools is its large one."""
        self._starts: list[int] = []
        """By a block's number, the address where it begins,"""
        self._ends: list[int] = []
        """where it ends,"""
        self._owners: list[int] = []
        """and which of the pools it is from."""
        self._free_from: dict[int, int] = {}
        """Keys of free blocks by the address where they begin,"""
        self._free_to: dict[int, int] = {}
        """and by that where they end."""
        self._unmapped_from: dict[int, int] = {}
        """Ends of parts of an expandable segment that have no memory, by where they begin,"""
        self._unmapped_to: dict[int, int] = {}
        """and the other way round."""
        self._segment_bytes: dict[int, int] = {}
        """Sizes of the segments that do not expand, by where they begin."""
        self._next_address, self._top_address = 0, TOP_ADDRESS
        self._pools_of(0)

    def run(self, events: Iterable[int]) -> None:  # noqa: PLR0912, PLR0915 - one loop, which calls nothing of ours
        """Allocate and release.

        Args:
            events: a positive number allocates so many bytes, a multiple of 512 (`STREAM` says how on another stream);
                `~number` releases the block of that number; 0 is `EMPTY_CACHE`.

        Raises:
            OutOfMemoryInSimulationError: something does not fit the capacity, even after all that is cached was
                returned.
        """
        pools, free_from, free_to = self._pools, self._free_from, self._free_to
        starts, ends, owners = self._starts, self._ends, self._owners
        large, small = pools[0].keys, pools[1].keys
        expands, max_split = self.settings.expandable_segments, self.settings.max_split_size_bytes
        is_split_bounded = max_split is not None and not expands
        split_below = max_split if max_split is not None and not expands else math.inf
        for event in events:
            if event < 0:
                number = ~event
                start, end, keys = starts[number], ends[number], pools[owners[number]].keys
                if end in free_from:
                    key = free_from.pop(end)
                    del keys[bisect_left(keys, key)]
                    end += key >> _SIZE_SHIFT
                if start in free_to:
                    key = free_to.pop(start)
                    del keys[bisect_left(keys, key)]
                    start -= key >> _SIZE_SHIFT
                key = end - start << _SIZE_SHIFT | start
                insort(keys, key)
                free_from[start] = free_to[end] = key
                continue
            if SMALL_BYTES < event < STREAM:
                size, owner, keys = event, 0, large
            elif EMPTY_CACHE < event <= SMALL_BYTES:
                size, owner, keys = event, 1, small
            elif event == EMPTY_CACHE:
                self.empty_cache()
                continue
            else:
                stream, size = divmod(event, STREAM)
                owner = self._pools_of(stream) + (size <= SMALL_BYTES)
                keys = pools[owner].keys
            index = bisect_left(keys, size << _SIZE_SHIFT)
            if is_split_bounded:
                index = self._splittable(keys, index, size)
            if expands and index < len(keys):
                index = self._hardly_growing(keys, index)
            try:
                key = keys.pop(index)
            except IndexError:
                start, end = self._new_block(pools[owner], size)
            else:
                start = key & _ADDRESS_MASK
                end = start + (key >> _SIZE_SHIFT)
                del free_from[start]
            rest_from = start + size
            rest = end - rest_from
            if (rest > SMALL_BYTES and size < split_below) or (rest and (expands or size <= SMALL_BYTES)):
                key = rest << _SIZE_SHIFT | rest_from
                insort(keys, key)
                free_from[rest_from] = free_to[end] = key
                end = rest_from
            else:
                free_to.pop(end, None)
                if rest:
                    self.left_over_bytes[len(starts)] = rest
            starts.append(start)
            ends.append(end)
            owners.append(owner)

    def state(self) -> State | None:
        """Return what decides how the allocator goes on; None where the policy has more to it than free blocks."""
        if self.settings != AllocatorSettings():
            return None
        keys = tuple(tuple(pool.keys) for pool in self._pools)
        return State(keys, self.reserved_bytes, self.num_retries, self.num_allocations)

    def repeat(self, begun: State, ended: State) -> None:
        """Do once more what was done between two states, the first of which is the present one but for the numbers.

        Nothing was reserved between them, and what was released was allocated between them too.
        """
        for pool, keys in zip(self._pools, ended.keys, strict=True):
            pool.keys[:] = keys
        free = [key for keys in ended.keys for key in keys]
        self._free_from.clear()
        self._free_to.clear()
        self._free_from.update((key & _ADDRESS_MASK, key) for key in free)
        self._free_to.update(((key & _ADDRESS_MASK) + (key >> _SIZE_SHIFT), key) for key in free)
        first, end, shift = begun.num_allocations, ended.num_allocations, self.num_allocations - begun.num_allocations
        left_over = {n + shift: size for n, size in self.left_over_bytes.items() if first <= n < end}
        self.left_over_bytes.update(left_over)
        for column in (self._starts, self._ends, self._owners):
            column.extend(column[first:end])

    def allocate(self, num_bytes: int, stream: int = 0) -> int:
        """Take one block and return its number; see `run`."""
        self.run((request(num_bytes, stream),))
        return self.num_allocations - 1

    def release(self, number: int) -> None:
        """Give one block back: it merges with free neighbours and stays cached."""
        self.run((~number,))

    def empty_cache(self) -> None:
        """Return all cached memory, as torch.cuda.empty_cache does: whole segments, or all unused pages."""
        for pool in self._pools:
            for key in pool.keys.copy():
                if self.settings.expandable_segments:
                    self._unmap(pool, key)
                elif self._segment_bytes.get(key & _ADDRESS_MASK) == key >> _SIZE_SHIFT:
                    self._return_segment(pool, key)

    def reset_peak(self) -> None:
        """Forget the highest figure so far, as torch.cuda.reset_peak_memory_stats does."""
        self.peak_reserved_bytes = self.reserved_bytes

    @property
    def num_allocations(self) -> int:
        """How many blocks were handed out so far."""
        return len(self._starts)

    @property
    def allocated_bytes(self) -> int:
        """What of the reserved memory is not free."""
        return self.reserved_bytes - sum(size for _, size in self.free_blocks())

    def block(self, number: int) -> tuple[int, int]:
        """Return the address and the size of a block that is in use."""
        return self._starts[number], self._ends[number] - self._starts[number]

    def free_blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the address and the size of every cached block."""
        return ((key & _ADDRESS_MASK, key >> _SIZE_SHIFT) for pool in self._pools for key in pool.keys)

    def copy(self) -> CachingAllocator:
        """Return one that goes on from here by itself, and keeps no copies."""
        other = copy.copy(self)
        changed = {name: value.copy() for name, value in vars(self).items() if isinstance(value, dict | list)}
        changed["_pools"] = [_Pool(pool.is_small, pool.keys.copy(), pool.unmapped.copy()) for pool in self._pools]
        vars(other).update(changed, copies=[], _copies_beyond_bytes=math.inf)
        return other

    def _pools_of(self, stream: int) -> int:
        """Say which pool is a stream's large one; the next is its small one."""
        if stream not in self._first_pools:
            self._first_pools[stream] = len(self._pools)
            self._pools += [_Pool(is_small, [], []) for is_small in (False, True)]
        return self._first_pools[stream]

    def _splittable(self, keys: list[int], index: int, size: int) -> int:
        """Keep blocks beyond `max_split_size_mb` for requests beyond it that nearly fill them.

        Source: CUDACachingAllocator.cpp, get_free_block.
        """
        max_split = self.settings.max_split_size_bytes
        if max_split is not None and index < len(keys):
            cached = keys[index] >> _SIZE_SHIFT
            if size < max_split <= cached or (size >= max_split and cached >= size + MAX_NON_SPLIT_ROUNDING_BYTES):
                return len(keys)
        return index

    def _hardly_growing(self, keys: list[int], index: int) -> int:
        """With expandable segments a block before a part without memory counts as large as it could become.

        It is taken only if the next larger ones could become as large. Source: CUDACachingAllocator.cpp,
        get_free_block.
        """
        if (keys[index] & _ADDRESS_MASK) + (keys[index] >> _SIZE_SHIFT) not in self._unmapped_from:
            return index
        while index + 1 < len(keys) and self._expandable_size(keys[index + 1]) < self._expandable_size(keys[index]):
            index += 1
        return index

    def _expandable_size(self, key: int) -> int:
        size = key >> _SIZE_SHIFT
        end = (key & _ADDRESS_MASK) + size
        return size + self._unmapped_from.get(end, end) - end

    def _new_block(self, pool: _Pool, size: int) -> tuple[int, int]:
        """Reserve memory; where that fails, return what is cached and try again."""
        self._keep_copy(size)
        block = self._reserve(pool, size)
        if block is None and self._return_oversize(pool, size):
            block = self._reserve(pool, size)
        if block is None:
            self.num_retries += 1
            self.empty_cache()
            block = self._reserve(pool, size)
        if block is None:
            raise OutOfMemoryInSimulationError
        return block

    def _keep_copy(self, size: int) -> None:
        grown = self.reserved_bytes + (size + LARGE_SEGMENT_BYTES) * (1 + self.settings.expandable_segments)
        if grown > self._copies_beyond_bytes:
            self.copies.append(self.copy())
            self._copies_beyond_bytes = grown * (1 + COPY_FRACTION)

    def _reserve(self, pool: _Pool, size: int) -> tuple[int, int] | None:
        if self.settings.expandable_segments:
            return self._expand(pool, size)
        segment = segment_bytes(size)
        if not self._grow(segment):
            return None
        if segment <= LARGE_SEGMENT_BYTES:
            start = self._next_address
            self._next_address += segment + GUARD_BYTES
        else:
            start = self._top_address = self._top_address - segment - GUARD_BYTES
        self._segment_bytes[start] = segment
        return start, start + segment

    def _grow(self, num_bytes: int) -> bool:
        grown = self.reserved_bytes + num_bytes
        if grown > self.capacity_bytes:
            self.least_refused_bytes = min(self.least_refused_bytes, grown)
            return False
        self.reserved_bytes = grown
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, grown)
        return True

    def _return_segment(self, pool: _Pool, key: int) -> None:
        self._take(pool, key)
        self.reserved_bytes -= self._segment_bytes.pop(key & _ADDRESS_MASK)

    def _return_oversize(self, pool: _Pool, size: int) -> bool:
        """Return cached blocks beyond `max_split_size_mb`, only as many as the request needs.

        Source: CUDACachingAllocator.cpp, release_available_cached_blocks.
        """
        max_split = self.settings.max_split_size_bytes
        if max_split is None or self.settings.expandable_segments:
            return False
        needed = max(size, max_split)
        index = bisect_left(pool.keys, needed << _SIZE_SHIFT)
        if index < len(pool.keys):
            self._return_segment(pool, pool.keys[index])
            return True
        returned = 0
        while returned < needed and pool.keys and pool.keys[-1] >> _SIZE_SHIFT >= max_split:
            returned += pool.keys[-1] >> _SIZE_SHIFT
            self._return_segment(pool, pool.keys[-1])
        return returned >= needed

    def _put(self, pool: _Pool, start: int, end: int) -> None:
        """Cache what lies between two addresses."""
        key = end - start << _SIZE_SHIFT | start
        insort(pool.keys, key)
        self._free_from[start] = self._free_to[end] = key

    def _take(self, pool: _Pool, key: int) -> tuple[int, int]:
        """Take a cached block out; return where it begins and ends."""
        start = key & _ADDRESS_MASK
        end = start + (key >> _SIZE_SHIFT)
        del pool.keys[bisect_left(pool.keys, key)], self._free_from[start], self._free_to[end]
        return start, end

    def _put_unmapped(self, pool: _Pool, start: int, end: int) -> None:
        """Note a part without memory; it joins those beside it."""
        if end in self._unmapped_from:
            end = self._take_unmapped(pool, end)
        if start in self._unmapped_to:
            start = self._unmapped_to[start]
            self._take_unmapped(pool, start)
        insort(pool.unmapped, start)
        self._unmapped_from[start], self._unmapped_to[end] = end, start

    def _take_unmapped(self, pool: _Pool, start: int) -> int:
        """Forget a part without memory; return where it ends."""
        end = self._unmapped_from.pop(start)
        del self._unmapped_to[end], pool.unmapped[bisect_left(pool.unmapped, start)]
        return end

    def _expand(self, pool: _Pool, size: int) -> tuple[int, int] | None:
        """Map pages at the lowest address with room; a free block just before the unmapped part is used too.

        Source: CUDACachingAllocator.cpp, try_allocate_expandable_block.
        """
        start = self._expandable(pool, size)
        while (mapped := self._free_from.get(start, 0) >> _SIZE_SHIFT) < size:
            begin = start + mapped
            if not self._map(pool, begin, min(size - mapped, self._unmapped_from[begin] - begin)):
                return None
        return self._take(pool, self._free_from[start])

    def _expandable(self, pool: _Pool, size: int) -> int:
        """Find the lowest address from which on so much is free or unmapped; begin a segment where there is none."""
        for unmapped in pool.unmapped:
            start = unmapped - (self._free_to.get(unmapped, 0) >> _SIZE_SHIFT)
            if self._has_room(start, size):
                return start
        start = self._next_address
        self._next_address += ADDRESS_SPACE_BYTES + GUARD_BYTES
        self._put_unmapped(pool, start, start + ADDRESS_SPACE_BYTES)
        return start

    def _has_room(self, start: int, size: int) -> bool:
        """Whether nothing is in use for so many bytes from an address on."""
        reached = start
        while reached < start + size:
            free = self._free_from.get(reached, 0) >> _SIZE_SHIFT
            following = reached + free if free else self._unmapped_from.get(reached, reached)
            if following == reached:
                return False
            reached = following
        return True

    def _map(self, pool: _Pool, start: int, size: int) -> bool:
        """Put memory behind so much of an unmapped part, in whole pages; say whether there was enough."""
        mapped = -(-size // pool.page_bytes) * pool.page_bytes
        if not self._grow(mapped):
            return False
        end, unmapped_end = start + mapped, self._take_unmapped(pool, start)
        if end < unmapped_end:
            self._put_unmapped(pool, end, unmapped_end)
        if end in self._free_from:
            end = self._take(pool, self._free_from[end])[1]
        if start in self._free_to:
            start = self._take(pool, self._free_to[start])[0]
        self._put(pool, start, end)
        return True

    def _unmap(self, pool: _Pool, key: int) -> None:
        """Give back the pages that lie wholly inside a free block. Source: CUDACachingAllocator.cpp, unmap_block."""
        start, end, page = key & _ADDRESS_MASK, (key & _ADDRESS_MASK) + (key >> _SIZE_SHIFT), pool.page_bytes
        first, last = -(-start // page) * page, end // page * page
        if first >= last:
            return
        self._take(pool, key)
        if start < first:
            self._put(pool, start, first)
        if last < end:
            self._put(pool, last, end)
        self.reserved_bytes -= last - first
        self._put_unmapped(pool, first, last)


def request(num_bytes: int, stream: int = 0) -> int:
    """Write an allocation as `CachingAllocator.run` reads it, rounded to 512 bytes; nothing takes a block too.

    Source: CUDACachingAllocator.cpp, round_size.
    """
    return max(-(-num_bytes // MIN_BLOCK_BYTES), 1) * MIN_BLOCK_BYTES + stream * STREAM


def segment_bytes(size: int) -> int:
    """What is taken from the device for a block of a rounded size. Source: get_allocation_size."""
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MIN_LARGE_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES
