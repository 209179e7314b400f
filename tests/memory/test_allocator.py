"""The caching allocator's policy, on cases worked out by hand from c10/cuda/CUDACachingAllocator.cpp."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autofit.memory.allocator import CachingAllocator, OutOfMemoryInSimulationError
from autofit.units import KIB, MIB


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
        assert sum(block.size for block in held) == allocator.allocated_bytes <= allocator.reserved_bytes
        assert allocator.peak_allocated_bytes <= allocator.peak_reserved_bytes
    reserved = allocator.reserved_bytes
    for block in held:
        allocator.release(block)
    assert allocator.allocated_bytes == 0
    assert sum(block.size for block in allocator.free_blocks()) == reserved
    assert all(block.previous is None and block.following is None for block in allocator.free_blocks())
