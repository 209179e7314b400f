"""What is copied beside a step's kernels, against what torch does."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from autofit.timing.copies import copied_bytes
from autofit.timing.parameters import ParameterTotals
from tests.plans import a_configuration

COLUMNS = 64
WEIGHT_BYTES = 4 * COLUMNS**2


def the_totals(num_weights):
    """Return what so many square fp32 weights add up to."""
    return ParameterTotals(
        num_trained=num_weights * COLUMNS**2,
        trained_bytes=num_weights * WEIGHT_BYTES,
        whole_bytes=num_weights * WEIGHT_BYTES,
        num_matrices=num_weights,
        num_units=num_weights,
        num_adapters=0,
    )


class Moved(TorchDispatchMode):
    """Adds up the bytes that operators of some names read and write."""

    def __init__(self, *names):
        super().__init__()
        self.names, self.num_bytes = names, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(name in str(func) for name in self.names):
            written = (kwargs or {}).get("out", out)
            self.num_bytes += _bytes(args) + _bytes(written)
        return out


def _bytes(tensors):
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors)) if isinstance(tensors, list | tuple) else 0


@pytest.fixture
def one_of_two_ranks():
    """A process group of two ranks that moves nothing."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    distributed.destroy_process_group()


def test_gradients_of_later_micro_steps_are_added():
    """Adding the second gradient of a weight reads two and writes one; the first moves nothing."""
    layer, rows = nn.Linear(COLUMNS, COLUMNS, bias=False), torch.ones(2, COLUMNS)
    moved = []
    for _ in range(2):
        with Moved("aten.add") as mode:
            layer(rows).sum().backward()
        moved.append(mode.num_bytes)
    copied = copied_bytes(the_totals(1), a_configuration(sharding="none", num_processes=1))
    assert moved == [0, copied.later_backward_bytes]


def test_fsdp2_copies_what_it_gathers_and_what_it_sends(one_of_two_ranks):
    """Weights are copied out in forward and in backward, and gradients in once, as `fully_shard` does."""
    model = nn.Sequential(*(nn.Linear(COLUMNS, COLUMNS, bias=False) for _ in range(2)))
    mesh = distributed.init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with Moved("split_with_sizes_copy") as forward:
        out = model(torch.ones(2, COLUMNS)).sum()
    with Moved("split_with_sizes_copy", "chunk_cat") as backward:
        out.backward()
    copied = copied_bytes(the_totals(2), a_configuration(sharding="fsdp2", num_processes=2))
    print(forward.num_bytes, backward.num_bytes, copied)
    assert forward.num_bytes == copied.forward_bytes
    assert backward.num_bytes == copied.backward_bytes + copied.last_backward_bytes


def test_fsdp1_joins_gradients_and_divides_them(one_of_two_ranks):
    """A unit's gradients are joined in backward, and divided by two before they are summed, as FSDP1 does."""
    model = nn.Sequential(*(nn.Linear(COLUMNS, COLUMNS, bias=False) for _ in range(2)))
    policy = ModuleWrapPolicy({nn.Linear})
    sharded = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    out = sharded(torch.ones(2, COLUMNS)).sum()
    with Moved("aten.cat", "aten.div") as backward:
        out.backward()
    copied = copied_bytes(the_totals(2), a_configuration(sharding="fsdp1", num_processes=2))
    print(backward.num_bytes)
    assert backward.num_bytes == copied.backward_bytes + copied.last_backward_bytes
