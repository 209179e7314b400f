"""The counter knows what tensors hold, wherever they are held."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from autofit.runtime.live_bytes import LiveBytes

MIB = 2**20


def floats(num_mib: int) -> torch.Tensor:
    """Allocate that many MiB."""
    return torch.zeros(num_mib * MIB // 4)


def test_what_is_allocated_and_freed_is_counted() -> None:
    """Live bytes follow births and deaths; the peak keeps the highest moment."""
    with LiveBytes() as live:
        first = floats(3)
        second = floats(2)
        del first
        assert (live.now_bytes, live.peak_bytes) == (2 * MIB, 5 * MIB)
        live.reset_peak()
        assert live.peak_bytes == 2 * MIB
        del second
        assert live.now_bytes == 0


def test_views_and_aliases_hold_their_storage_once() -> None:
    """A view counts nothing, and keeps the whole storage alive."""
    with LiveBytes() as live:
        whole = floats(4)
        part = whole.view(2, -1)[0]
        assert live.now_bytes == 4 * MIB
        del whole
        assert live.now_bytes == 4 * MIB
        del part
        assert live.now_bytes == 0


def test_tensors_made_before_are_counted_once_asked() -> None:
    """`count_existing` finds parameters and gradients, and they are forgotten when they die."""
    gc.collect()  # what earlier tests left in cycles would else be freed, and missed, below
    model = nn.Linear(512, 512, bias=False)
    model(torch.ones(1, 512)).sum().backward()
    with LiveBytes() as live:
        live.count_existing()
        held = live.now_bytes
        model.zero_grad(set_to_none=True)
        assert held - live.now_bytes == 512 * 512 * 4
        del model
        gc.collect()
        assert held - live.now_bytes == 2 * 512 * 512 * 4


def test_a_storage_freed_without_dying_is_noticed() -> None:
    """`resize_(0)`, by which sharded training frees gathered weights, gives bytes back, and `resize_` takes them."""
    with LiveBytes() as live:
        tensor = floats(4)
        tensor.untyped_storage().resize_(0)
        assert live.now_bytes == 0
        tensor.untyped_storage().resize_(2 * MIB)
        assert live.now_bytes == 2 * MIB


def test_a_sharded_tensor_holds_its_shard() -> None:
    """A DTensor's own storage claims the whole tensor's bytes; what a rank holds is the shard inside."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        with LiveBytes() as live:
            sharded = DTensor.from_local(floats(2), mesh, [Shard(0)])
            doubled = sharded + sharded
            assert doubled.numel() * 4 == 8 * MIB
            assert live.now_bytes == 4 * MIB
            del doubled
            assert live.now_bytes == 2 * MIB
    finally:
        torch.distributed.destroy_process_group()


def test_backward_is_counted() -> None:
    """Gradients made by autograd, and what autograd keeps between the passes, are seen.

    y = tanh(x) keeps its output; backward then makes one gradient as large as x.
    """
    x = floats(1).requires_grad_()
    with LiveBytes() as live:
        y = x.tanh()
        loss = y.sum()
        del y
        assert live.now_bytes == MIB + 4
        loss.backward()
        assert live.now_bytes == MIB + 4
        assert live.peak_bytes >= 2 * MIB


def test_adam_state_is_twice_the_parameters() -> None:
    """After a step of fused AdamW the state holds 8 bytes a parameter, and a 4-byte step counter each."""
    model = nn.Linear(256, 256, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with LiveBytes() as live:
        live.count_existing()
        before = live.now_bytes
        model(torch.ones(1, 256)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert live.now_bytes - before == 2 * 4 * 256 * 256 + 4


def test_the_budget_is_a_limit() -> None:
    """Beyond the limit the counter raises what a full GPU raises, and the limit itself is still allowed."""
    with LiveBytes(limit_bytes=4 * MIB):
        kept = floats(4)
        with pytest.raises(torch.OutOfMemoryError, match=r"out of memory\. Tried to allocate 1\.00 MiB"):
            floats(1)
        assert kept.numel() == MIB


def test_only_the_asked_tensors_are_counted() -> None:
    """A predicate chooses what counts; tensors without memory never do by default."""
    with LiveBytes(counts=lambda tensor: tensor.dtype == torch.uint8) as live, LiveBytes() as every:
        kept = [floats(1), torch.zeros(10, dtype=torch.uint8), torch.empty(10**9, device="meta")]
        assert live.now_bytes == 10
        assert every.now_bytes == MIB + 10
        assert len(kept) == 3


def test_the_resize_hook_is_gone_afterwards() -> None:
    """Leaving the counter leaves torch as it was."""
    before = torch.UntypedStorage.resize_
    with LiveBytes():
        assert torch.UntypedStorage.resize_ is not before
    assert torch.UntypedStorage.resize_ is before


@pytest.mark.gpu
def test_on_a_gpu_the_counter_agrees_with_the_allocator() -> None:
    """Counting CUDA tensors gives torch.cuda's own peak, to its rounding of 512 bytes a tensor."""
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    with LiveBytes(counts=lambda tensor: tensor.is_cuda) as live:
        x = torch.ones(1024, 1024, device="cuda", requires_grad=True)
        for _ in range(3):
            x.tanh().square().sum().backward()
        measured = torch.cuda.max_memory_allocated() - base
    assert abs(live.peak_bytes - measured) <= 16 * 512
