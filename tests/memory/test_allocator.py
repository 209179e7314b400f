"""The caching allocator's policy, on cases worked out by hand from c10/cuda/CUDACachingAllocator.cpp."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofit.memory.allocator import (
    AllocatorSettings,
    CachingAllocator,
    OutOfMemoryInSimulationError,
    request,
)
from autofit.units import KIB, MIB
from tests.memory.linked_allocator import LinkedAllocator


@pytest.mark.parametrize(
    ("asked", "allocated", "reserved"),
    [
        (0, 512, 2 * MIB),
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (11 * MIB + 1, 12 * MIB, 12 * MIB),
        (100 * MIB, 100 * MIB, 100 * MIB),
        (101 * MIB, 102 * MIB, 102 * MIB),
    ],
)
def test_sizes_are_rounded_and_segments_are_whole(asked, allocated, reserved):
    """Blocks are multiples of 512; up to 1 MiB they come from 2 MiB segments, from 10 MiB on a segment is a multiple of
    2 MiB, and what is left of it is split off only if it is more than 1 MiB.
    """
    allocator = CachingAllocator()
    allocator.allocate(asked)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (allocated, reserved)


def test_between_one_and_ten_mib_blocks_share_segments_of_twenty():
    """Three blocks of 6 MiB take one segment of 20 MiB; the fourth does not fit its rest and takes another."""
    allocator = CachingAllocator()
    for reserved in (20, 20, 20, 40):
        allocator.allocate(6 * MIB)
        assert allocator.reserved_bytes == reserved * MIB


def test_small_and_large_blocks_never_share_a_segment():
    """A freed block of 2 MiB is of no use to one of 1 KiB."""
    allocator = CachingAllocator()
    allocator.release(allocator.allocate(2 * MIB))
    allocator.allocate(KIB)
    assert allocator.reserved_bytes == 22 * MIB


def test_the_smallest_block_that_fits_is_taken():
    """Of free blocks of 30 and 14 MiB a request of 13.5 takes the second, and 29.5 still fits the first."""
    allocator = CachingAllocator()
    blocks = [allocator.allocate(30 * MIB), allocator.allocate(14 * MIB)]
    for block in blocks:
        allocator.release(block)
    allocator.allocate(13 * MIB + 512 * KIB)
    allocator.allocate(29 * MIB + 512 * KIB)
    assert allocator.reserved_bytes == 44 * MIB


def test_a_rest_of_up_to_one_mib_stays_with_the_block():
    """11 of 12 MiB count as 12; 10.5 leave a block of 1.5 that the next request takes."""
    allocator = CachingAllocator()
    allocator.release(allocator.allocate(12 * MIB))
    block = allocator.allocate(11 * MIB)
    assert allocator.allocated_bytes == 12 * MIB
    allocator.release(block)
    allocator.allocate(10 * MIB + 512 * KIB)
    assert allocator.allocated_bytes == 10 * MIB + 512 * KIB
    allocator.allocate(MIB + 512 * KIB)
    assert allocator.reserved_bytes == 12 * MIB


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_free_neighbours_become_one_block(order):
    """In whatever order its blocks are freed, a segment is whole again and serves a request of its full size."""
    allocator = CachingAllocator()
    blocks = [allocator.allocate(6 * MIB) for _ in range(3)]
    for index in order:
        allocator.release(blocks[index])
    allocator.allocate(20 * MIB)
    assert allocator.reserved_bytes == 20 * MIB


def test_blocks_that_are_apart_stay_apart():
    """Two freed blocks with one in use between them do not serve a request of both."""
    allocator = CachingAllocator()
    first, _, third = (allocator.allocate(6 * MIB) for _ in range(3))
    allocator.release(first)
    allocator.release(third)
    allocator.allocate(12 * MIB)
    assert allocator.reserved_bytes == 32 * MIB


def test_at_capacity_unused_segments_are_returned():
    """With 40 MiB, a freed segment of 30 goes back before one of 32 is taken; one in use cannot."""
    allocator = CachingAllocator(40 * MIB)
    allocator.release(allocator.allocate(30 * MIB))
    allocator.allocate(32 * MIB)
    assert allocator.reserved_bytes == 32 * MIB
    assert allocator.peak_reserved_bytes == 32 * MIB
    with pytest.raises(OutOfMemoryInSimulationError):
        allocator.allocate(12 * MIB)


def test_a_segment_partly_in_use_is_not_returned():
    """A free block beside one in use does not leave the device."""
    allocator = CachingAllocator(40 * MIB)
    first, _ = allocator.allocate(6 * MIB), allocator.allocate(6 * MIB)
    allocator.release(first)
    with pytest.raises(OutOfMemoryInSimulationError):
        allocator.allocate(32 * MIB)


@given(st.lists(st.tuples(st.integers(1, 40 * MIB), st.booleans()), max_size=60))
def test_whatever_happens_the_books_balance(requests):
    """Reserved covers allocated, peaks cover both, and all that is freed is one whole block a segment again."""
    allocator, held = CachingAllocator(), []
    for size, frees_one in requests:
        held.append(allocator.allocate(size))
        if frees_one:
            allocator.release(held.pop(len(held) // 2))
        assert sum(allocator.block(number)[1] for number in held) == allocator.allocated_bytes
        assert allocator.reserved_bytes <= allocator.peak_reserved_bytes
    reserved = allocator.reserved_bytes
    for block in held:
        allocator.release(block)
    assert allocator.allocated_bytes == 0
    assert sum(size for _, size in allocator.free_blocks()) == reserved
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


GROWS = AllocatorSettings(expandable_segments=True)


def test_segments_that_grow_reserve_whole_pages():
    """With expandable segments small blocks take pages of 2 MiB and large ones of 20, and everything is split exactly:
    five blocks of 11 MiB take three pages, where they would take five segments of 12 MiB.
    """
    allocator = CachingAllocator(settings=GROWS)
    allocator.allocate(KIB)
    assert allocator.reserved_bytes == 2 * MIB
    for _ in range(5):
        allocator.allocate(11 * MIB)
    assert allocator.reserved_bytes == 2 * MIB + 60 * MIB
    assert allocator.allocated_bytes == KIB + 55 * MIB


def test_a_segment_grows_from_its_free_end():
    """30 MiB are freed at the segment's end (40 mapped, 10 of them never used): 70 MiB need 30 more, two pages."""
    allocator = CachingAllocator(settings=GROWS)
    allocator.allocate(10 * MIB)
    allocator.release(allocator.allocate(30 * MIB))
    assert allocator.reserved_bytes == 40 * MIB
    allocator.allocate(70 * MIB)
    assert allocator.reserved_bytes == 80 * MIB


def test_a_longer_sequence_does_not_leave_slivers():
    """The case that expandable segments were made for: blocks that grow from step to step.

    Plain segments of 100 MiB are of no use to a tensor of 120; pages are mapped on.
    """
    reserved = {}
    for name, chosen in (("plain", None), ("grows", GROWS)):
        allocator = CachingAllocator(settings=chosen)
        for size in (100, 120, 140, 160):
            allocator.release(allocator.allocate(size * MIB))
        reserved[name] = allocator.reserved_bytes // MIB
    assert reserved == {"plain": 100 + 120 + 140 + 160, "grows": 160}


def test_the_block_that_cannot_grow_is_preferred():
    """A free block of 20 MiB between two in use serves a request of 18, though one of 19 at the end fits more tightly:
    that one counts as large as it could become.
    """
    allocator = CachingAllocator(settings=GROWS)
    first, _, _ = allocator.allocate(20 * MIB), allocator.allocate(20 * MIB), allocator.allocate(21 * MIB)
    allocator.release(first)
    assert sorted(size // MIB for _, size in allocator.free_blocks()) == [19, 20]
    assert allocator.block(allocator.allocate(18 * MIB))[0] == allocator.block(first)[0]


def test_under_pressure_only_unused_pages_are_returned():
    """Of 100 free MiB between blocks of 10 the four pages wholly inside go back, and are mapped again later."""
    allocator = CachingAllocator(120 * MIB, GROWS)
    _, middle, _ = allocator.allocate(10 * MIB), allocator.allocate(100 * MIB), allocator.allocate(10 * MIB)
    assert allocator.reserved_bytes == 120 * MIB
    allocator.release(middle)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 40 * MIB
    assert sorted(size // MIB for _, size in allocator.free_blocks()) == [10, 10]
    allocator.allocate(100 * MIB)
    assert allocator.reserved_bytes == 120 * MIB
    assert not list(allocator.free_blocks())


def test_pages_move_to_where_they_are_needed():
    """80 MiB are free in the middle, and 95 are asked for at the end: their pages are returned and mapped there."""
    allocator = CachingAllocator(140 * MIB, GROWS)
    _, middle, _ = allocator.allocate(20 * MIB), allocator.allocate(80 * MIB), allocator.allocate(20 * MIB)
    allocator.release(middle)
    allocator.allocate(95 * MIB)
    assert allocator.peak_reserved_bytes <= 140 * MIB
    assert allocator.num_retries == 1
    with pytest.raises(OutOfMemoryInSimulationError):
        allocator.allocate(20 * MIB)


def test_large_blocks_are_not_split_beyond_the_limit():
    """With max_split_size_mb 64: a free block of 100 MiB does not serve 10 or 70, but 90, whole."""
    allocator = CachingAllocator(settings=AllocatorSettings(max_split_size_bytes=64 * MIB))
    allocator.release(allocator.allocate(100 * MIB))
    allocator.allocate(10 * MIB)
    assert allocator.reserved_bytes == 110 * MIB
    allocator.allocate(70 * MIB)
    assert allocator.reserved_bytes == 180 * MIB
    assert allocator.block(allocator.allocate(90 * MIB))[1] == 100 * MIB
    assert allocator.reserved_bytes == 180 * MIB


def test_beyond_the_limit_only_as_much_is_returned_as_is_needed():
    """With max_split_size_mb 64 a full device gives back the smallest block that suffices, and keeps the others."""
    allocator = CachingAllocator(300 * MIB, AllocatorSettings(max_split_size_bytes=64 * MIB))
    for block in [allocator.allocate(size * MIB) for size in (70, 100, 120)]:
        allocator.release(block)
    allocator.allocate(30 * MIB)
    assert allocator.reserved_bytes == 250 * MIB
    assert sorted(size // MIB for _, size in allocator.free_blocks()) == [100, 120]
    assert allocator.num_retries == 0


def test_a_stream_keeps_its_blocks():
    """What one stream freed does not serve another."""
    allocator = CachingAllocator()
    allocator.release(allocator.allocate(40 * MIB))
    allocator.allocate(40 * MIB, stream=1)
    assert allocator.reserved_bytes == 80 * MIB


def test_what_a_repeated_stretch_leaves_can_be_released():
    """As if it had run again, although its first run's blocks were released before it is repeated."""
    allocator = CachingAllocator()
    kept = allocator.allocate(30 * MIB)
    allocator.release(allocator.allocate(40 * MIB))
    begun = allocator.state()
    first = allocator.allocate(40 * MIB)
    address, ended = allocator.block(first), allocator.state()
    allocator.release(first)
    allocator.repeat(begun, ended)
    assert allocator.block(first + 1) == address
    allocator.release(first + 1)
    allocator.release(kept)
    assert allocator.reserved_bytes == begun.reserved_bytes


def test_of_equal_blocks_the_lower_address_is_taken():
    """Two free blocks of 30 MiB: segments above 20 MiB lie lower the later they were made, smaller ones higher."""
    allocator = CachingAllocator()
    large = [allocator.allocate(30 * MIB), allocator.allocate(30 * MIB)]
    small = [allocator.allocate(KIB) for _ in range(2)]
    later_address = allocator.block(large[1])[0]
    for block in large:
        allocator.release(block)
    assert allocator.block(allocator.allocate(30 * MIB))[0] == later_address
    assert allocator.block(small[0])[0] < allocator.block(small[1])[0]


class NaiveAllocator:
    """The default policy once more, as lists of segments that are searched from end to end."""

    def __init__(self) -> None:
        self.segments: list[tuple[int, list[list[int]]]] = []
        self.reserved = 0

    def allocate(self, num_bytes: int, key: int) -> None:
        """Take a block under a key."""
        size = max(512, (num_bytes + 511) // 512 * 512)
        is_small = size <= MIB
        fits = [
            (piece[1], order, n, pieces, piece)
            for order, (small, pieces) in self.segments
            for n, piece in enumerate(pieces)
            if small == is_small and piece[0] == 0 and piece[1] >= size
        ]
        if fits:
            found, _, n, pieces, piece = min(fits, key=lambda fit: fit[:3])
        else:
            found = (
                2 * MIB if is_small else 20 * MIB if size < 10 * MIB else (size + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
            )
            self.reserved += found
            order = -self.reserved if found > 20 * MIB else self.reserved
            n, piece = 0, [0, found]
            pieces = [piece]
            self.segments.append((order, (is_small, pieces)))
        piece[0] = key
        if found - size >= 512 and (is_small or found - size > MIB):
            piece[1] = size
            pieces.insert(n + 1, [0, found - size])

    def release(self, key: int) -> None:
        """Free the block of a key, and merge what lies free side by side."""
        for _, (_, pieces) in self.segments:
            for piece in pieces:
                piece[0] = 0 if piece[0] == key else piece[0]
            merged: list[list[int]] = []
            for piece in pieces:
                if merged and merged[-1][0] == piece[0] == 0:
                    merged[-1][1] += piece[1]
                else:
                    merged.append(piece)
            pieces[:] = merged


SIZES = st.one_of(st.integers(1, 2 * MIB), st.integers(1, 60 * MIB))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.one_of(st.integers(1, 2 * MIB), st.integers(1, 60 * MIB)), st.integers(0, 3)), max_size=80)
)
def test_a_second_implementation_reserves_the_same(requests):
    """The policy written down twice, once with sorted pools and once by searching everything, agrees at every step."""
    allocator, naive, held = CachingAllocator(), NaiveAllocator(), {}
    for key, (size, num_freed) in enumerate(requests, 1):
        held[key] = allocator.allocate(size)
        naive.allocate(size, key)
        for _ in range(min(num_freed, len(held)) if key % 3 == 0 else 0):
            freed = sorted(held)[len(held) // 2]
            allocator.release(held.pop(freed))
            naive.release(freed)
        assert allocator.reserved_bytes == naive.reserved


@given(st.lists(st.tuples(st.integers(1, 40 * MIB), st.booleans()), max_size=60))
def test_growing_segments_keep_their_books(requests):
    """With pages mapped and unmapped at random, what is free and what is in use is what is reserved."""
    allocator, held = CachingAllocator(settings=GROWS), []
    for size, frees_one in requests:
        held.append(allocator.allocate(size))
        if frees_one:
            allocator.release(held.pop(len(held) // 2))
        if len(held) % 7 == 0:
            allocator.empty_cache()
        assert sum(allocator.block(number)[1] for number in held) == allocator.allocated_bytes
    for block in held:
        allocator.release(block)
    allocator.empty_cache()
    assert allocator.reserved_bytes == 0


SETTINGS = (AllocatorSettings(), GROWS, AllocatorSettings(max_split_size_bytes=24 * MIB))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(SIZES, st.integers(0, 2), st.integers(0, 3), st.integers(0, 40)), max_size=120),
    st.sampled_from(SETTINGS),
    st.one_of(st.none(), st.integers(60, 900)),
)
def test_blocks_linked_to_their_neighbours_come_to_the_same(requests, chosen, capacity_mib):
    """On any streams, under any option and any capacity, with the cache emptied or not: what torch's way of linking
    blocks reserves, allocates and returns is the same after every event, and so is where memory runs out.
    """
    capacity = None if capacity_mib is None else capacity_mib * MIB
    allocator, linked = CachingAllocator(capacity, chosen), LinkedAllocator(capacity, chosen)
    held: list[int] = []
    for size, stream, num_freed, empties in requests:
        events = [request(size, stream)] + [0] * (empties == 0)
        held.append(allocator.num_allocations)
        events += [~held.pop(empties % len(held)) for _ in range(min(num_freed, len(held) - 1))]
        for event in events:
            failed = [_fails(each, event) for each in (allocator, linked)]
            assert failed[0] == failed[1]
            if failed[0]:
                return
            assert (allocator.reserved_bytes, allocator.allocated_bytes, allocator.num_retries) == (
                linked.reserved_bytes,
                linked.allocated_bytes,
                linked.num_retries,
            )
    assert allocator.peak_reserved_bytes == linked.peak_reserved_bytes


def _fails(allocator: CachingAllocator | LinkedAllocator, event: int) -> bool:
    try:
        allocator.run((event,))
    except OutOfMemoryInSimulationError:
        return True
    return False


def test_a_copy_goes_on_by_itself():
    """What a copy allocates and frees is not seen by the allocator that it was made of."""
    allocator = CachingAllocator()
    first, second = allocator.allocate(30 * MIB), allocator.allocate(KIB)
    other = allocator.copy()
    other.release(first)
    other.release(second)
    other.allocate(60 * MIB)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (30 * MIB + KIB, 32 * MIB)
    assert (other.allocated_bytes, other.reserved_bytes) == (60 * MIB, 92 * MIB)
