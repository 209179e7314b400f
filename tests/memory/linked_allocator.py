"""The caching allocator once more, block by block: each is linked to its neighbours, as torch links them.

Slower than `autofit.memory.allocator`, and written independently of it: what one reserves, the other has to.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

from autofit.memory.allocator import (
    ADDRESS_SPACE_BYTES,
    EMPTY_CACHE,
    LARGE_SEGMENT_BYTES,
    MAX_NON_SPLIT_ROUNDING_BYTES,
    SMALL_BYTES,
    SMALL_SEGMENT_BYTES,
    STREAM,
    TOP_ADDRESS,
    AllocatorSettings,
    OutOfMemoryInSimulationError,
    segment_bytes,
)

_SIZE_SHIFT = 60


class Block:
    """A piece of a segment, linked to its neighbours so that free ones merge."""

    __slots__ = ("address", "following", "is_free", "is_mapped", "pool", "previous", "size")

    def __init__(
        self, pool: Pool, address: int, size: int, previous: Block | None = None, following: Block | None = None
    ) -> None:
        self.pool, self.address, self.size = pool, address, size
        self.previous, self.following = previous, following
        self.is_free, self.is_mapped = False, True


class Pool:
    """The cached blocks of one stream, small or large, ordered by size and then by address."""

    __slots__ = ("free", "is_small", "keys", "unmapped")

    def __init__(self, *, is_small: bool) -> None:
        self.is_small = is_small
        self.keys: list[int] = []
        self.free: dict[int, Block] = {}
        self.unmapped: list[Block] = []
        """Parts of an expandable segment without memory behind them, by address."""

    def put(self, block: Block) -> None:
        """Cache a block."""
        key = block.size << _SIZE_SHIFT | block.address
        bisect.insort(self.keys, key)
        self.free[key] = block
        block.is_free = True

    def take(self, block: Block) -> None:
        """Take a cached block out."""
        key = block.size << _SIZE_SHIFT | block.address
        del self.keys[bisect.bisect_left(self.keys, key)]
        del self.free[key]
        block.is_free = False

    def put_unmapped(self, block: Block) -> None:
        """Note a part without memory; as a neighbour it counts as free."""
        block.is_free, block.is_mapped = True, False
        bisect.insort(self.unmapped, block, key=lambda each: each.address)

    def take_unmapped(self, block: Block) -> None:
        """Forget a part without memory."""
        self.unmapped.remove(block)
        block.is_free = False


class LinkedAllocator:
    """Hands out blocks and counts what is allocated and what is reserved.

    Args:
        capacity_bytes: what can be reserved at most; None: no bound.
        settings: the policy's options.
    """

    def __init__(self, capacity_bytes: int | None = None, settings: AllocatorSettings | None = None) -> None:
        self.settings = settings or AllocatorSettings()
        self._capacity_bytes = capacity_bytes
        self._pools: dict[int, tuple[Pool, Pool]] = {}
        self._next_address, self._top_address = 0, TOP_ADDRESS
        self._expands = self.settings.expandable_segments
        self._max_split = self.settings.max_split_size_bytes
        self._is_plain = not self._expands and self._max_split is None
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.num_retries = 0
        """How often cached memory was returned because an allocation did not fit."""
        self.blocks: list[Block] = []
        """All that was handed out."""

    def run(self, events: Iterable[int]) -> None:
        """Allocate and release, as `CachingAllocator.run` does."""
        for event in events:
            if event < 0:
                self.release(self.blocks[~event])
            elif event == EMPTY_CACHE:
                self.empty_cache()
            else:
                self.blocks.append(self.allocate(event % STREAM, event // STREAM))

    def allocate(self, size: int, stream: int = 0) -> Block:
        """Take a block.

        Args:
            size: what the tensor needs, rounded.
            stream: blocks of one stream never serve another.

        Raises:
            OutOfMemoryInSimulationError: it does not fit the capacity, even after all that is cached was returned.
        """
        pools = self._pools.get(stream) or self._new_pools(stream)
        pool = pools[size <= SMALL_BYTES]
        block = self._best_fit(pool, size) or self._new_block(pool, size)
        rest = block.size - size
        if rest and self._splits(pool, size, rest):
            remainder = Block(pool, block.address + size, rest, block, block.following)
            if block.following is not None:
                block.following.previous = remainder
            block.following, block.size = remainder, size
            pool.put(remainder)
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def release(self, block: Block) -> None:
        """Give a block back; it merges with free neighbours and stays cached."""
        self.allocated_bytes -= block.size
        pool, previous, following = block.pool, block.previous, block.following
        if previous is not None and previous.is_free and previous.is_mapped:
            pool.take(previous)
            block = _merge(previous, block)
        if following is not None and following.is_free and following.is_mapped:
            pool.take(following)
            block = _merge(block, following)
        pool.put(block)

    def empty_cache(self) -> None:
        """Return all cached memory, as torch.cuda.empty_cache does: whole segments, or all unused pages."""
        for pools in self._pools.values():
            for pool in pools:
                for block in list(pool.free.values()):
                    if self._expands:
                        self._unmap(block)
                    elif block.previous is None and block.following is None:
                        self._return_segment(block)

    def reset_peaks(self) -> None:
        """Forget the highest figures so far, as torch.cuda.reset_peak_memory_stats does."""
        self.peak_allocated_bytes, self.peak_reserved_bytes = self.allocated_bytes, self.reserved_bytes

    def free_blocks(self) -> Iterable[Block]:
        """Every cached block."""
        return (block for pools in self._pools.values() for pool in pools for block in pool.free.values())

    def _new_pools(self, stream: int) -> tuple[Pool, Pool]:
        self._pools[stream] = (Pool(is_small=False), Pool(is_small=True))
        return self._pools[stream]

    def _splits(self, pool: Pool, size: int, rest: int) -> bool:
        if pool.is_small or self._expands:
            return True
        return rest > SMALL_BYTES and (self._max_split is None or size < self._max_split)

    def _best_fit(self, pool: Pool, size: int) -> Block | None:
        """The smallest cached block that is large enough, at the lowest address among equals."""
        keys = pool.keys
        index = bisect.bisect_left(keys, size << _SIZE_SHIFT)
        if index == len(keys):
            return None
        if not self._is_plain:
            if self._expands:
                index = _least_expandable(pool, index)
            elif not self._may_serve(keys[index] >> _SIZE_SHIFT, size):
                return None
        block = pool.free.pop(keys.pop(index))
        block.is_free = False
        return block

    def _may_serve(self, cached: int, size: int) -> bool:
        """Keep blocks beyond `max_split_size_mb` for requests beyond it that nearly fill them."""
        if self._max_split is None:
            return True
        if size < self._max_split:
            return cached < self._max_split
        return cached < size + MAX_NON_SPLIT_ROUNDING_BYTES

    def _new_block(self, pool: Pool, size: int) -> Block:
        """Reserve memory; where that fails, return what is cached and try again."""
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

    def _reserve(self, pool: Pool, size: int) -> Block | None:
        if self._expands:
            return self._expand(pool, size)
        segment = segment_bytes(size)
        if not self._grow(segment):
            return None
        if segment <= LARGE_SEGMENT_BYTES:
            address = self._next_address
            self._next_address += segment
        else:
            address = self._top_address = self._top_address - segment
        return Block(pool, address, segment)

    def _grow(self, num_bytes: int) -> bool:
        if self._capacity_bytes is not None and self.reserved_bytes + num_bytes > self._capacity_bytes:
            return False
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        return True

    def _return_segment(self, block: Block) -> None:
        block.pool.take(block)
        self.reserved_bytes -= block.size

    def _return_oversize(self, pool: Pool, size: int) -> bool:
        """Return cached blocks beyond `max_split_size_mb`, only as many as the request needs.

        Source: CUDACachingAllocator.cpp, release_available_cached_blocks.
        """
        if self._max_split is None or self._expands:
            return False
        needed = max(size, self._max_split)
        index = bisect.bisect_left(pool.keys, needed << _SIZE_SHIFT)
        if index < len(pool.keys):
            self._return_segment(pool.free[pool.keys[index]])
            return True
        returned = 0
        while returned < needed and pool.keys and pool.keys[-1] >> _SIZE_SHIFT >= self._max_split:
            largest = pool.free[pool.keys[-1]]
            returned += largest.size
            self._return_segment(largest)
        return returned >= needed

    def _expand(self, pool: Pool, size: int) -> Block | None:
        """Map pages at the lowest address with room; a free block just before the unmapped part is used too.

        Source: CUDACachingAllocator.cpp, try_allocate_expandable_block.
        """
        block = self._expandable(pool, size)
        if not block.is_mapped:
            mapped = self._map(block, min(block.size, size))
            if mapped is None:
                return None
            block = mapped
        while block.size < size:
            following = block.following
            assert following is not None, "the address space reaches further than any request"
            mapped = self._map(following, min(size - block.size, following.size))
            if mapped is None:
                return None
            block = mapped
        pool.take(block)
        return block

    def _expandable(self, pool: Pool, size: int) -> Block:
        for unmapped in pool.unmapped:
            previous = unmapped.previous
            first = previous if previous is not None and previous.is_free else unmapped
            if _room(first, size) >= size:
                return first
        segment = Block(pool, self._next_address, ADDRESS_SPACE_BYTES)
        self._next_address += ADDRESS_SPACE_BYTES
        pool.put_unmapped(segment)
        return segment

    def _map(self, block: Block, size: int) -> Block | None:
        """Put memory behind the first `size` bytes of an unmapped part, in whole pages; None where there is none."""
        pool = block.pool
        page = SMALL_SEGMENT_BYTES if pool.is_small else LARGE_SEGMENT_BYTES
        mapped = -(-size // page) * page
        if not self._grow(mapped):
            return None
        pool.take_unmapped(block)
        block.is_mapped = True
        if mapped < block.size:
            rest = Block(pool, block.address + mapped, block.size - mapped, block, block.following)
            if rest.following is not None:
                rest.following.previous = rest
            block.following, block.size = rest, mapped
            pool.put_unmapped(rest)
        for neighbour in (block.previous, block.following):
            if neighbour is not None and neighbour.is_free and neighbour.is_mapped:
                pool.take(neighbour)
                block = _merge(neighbour, block) if neighbour is block.previous else _merge(block, neighbour)
        pool.put(block)
        return block

    def _unmap(self, block: Block) -> None:
        """Give back the pages that lie wholly inside a free block. Source: CUDACachingAllocator.cpp, unmap_block."""
        pool = block.pool
        page = SMALL_SEGMENT_BYTES if pool.is_small else LARGE_SEGMENT_BYTES
        begin = -(-block.address // page) * page
        end = (block.address + block.size) // page * page
        if begin >= end:
            return
        pool.take(block)
        before, after = begin - block.address, block.address + block.size - end
        if before:
            first = Block(pool, block.address, before, block.previous, block)
            if first.previous is not None:
                first.previous.following = first
            block.previous = first
            pool.put(first)
        if after:
            last = Block(pool, end, after, block, block.following)
            if last.following is not None:
                last.following.previous = last
            block.following = last
            pool.put(last)
        block.address, block.size = begin, end - begin
        self.reserved_bytes -= block.size
        for neighbour in (block.previous, block.following):
            if neighbour is not None and neighbour.is_free and not neighbour.is_mapped:
                pool.take_unmapped(neighbour)
                block = _merge(neighbour, block) if neighbour is block.previous else _merge(block, neighbour)
        pool.put_unmapped(block)


def _merge(first: Block, second: Block) -> Block:
    first.size, first.following = first.size + second.size, second.following
    if second.following is not None:
        second.following.previous = first
    return first


def _least_expandable(pool: Pool, index: int) -> int:
    """Prefer a block that cannot grow: one before an unmapped part counts as large as it could become.

    Source: CUDACachingAllocator.cpp, get_free_block.
    """
    keys, free = pool.keys, pool.free
    while index + 1 < len(keys) and _expandable_size(free[keys[index + 1]]) < _expandable_size(free[keys[index]]):
        index += 1
    return index


def _expandable_size(block: Block) -> int:
    following = block.following
    return block.size + (following.size if following is not None and not following.is_mapped else 0)


def _room(block: Block | None, size: int) -> int:
    """Address space from a block on that is not in use, up to `size` bytes of it."""
    room = 0
    while room < size and block is not None and block.is_free:
        room += block.size
        block = block.following
    return room
