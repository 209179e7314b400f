"""The recorder on functions small enough to count by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from autofit.profile.recorder import Recorder
from autofit.spec.profile import ACTIVATION, GRADIENT, INSIDE

MIB = 2**20
SIDE = 512
"""A square of fp32 with this side is one MiB."""


@pytest.fixture
def recording():
    """Return a recorder under fake tensors, with its first segment begun."""
    recorder = Recorder({})
    recorder.mark("embedding", "forward")
    with FakeTensorMode(), recorder:
        yield recorder


def square() -> torch.Tensor:
    """Make a square of zeros: one MiB."""
    return torch.zeros(SIDE, SIDE)


def test_births_and_deaths_are_seen_in_order(recording):
    """Of three tensors made, the one that was dropped between is the one that dies, with its own bytes."""
    first = square()
    second = torch.zeros(2 * SIDE, SIDE)
    del first
    third = second + 1
    assert recording.segments[0].events == [
        (MIB, ACTIVATION),
        (2 * MIB, ACTIVATION),
        (MIB, ACTIVATION, 0, 0),
        (2 * MIB, ACTIVATION),
    ]
    del second, third


def test_a_view_is_not_a_birth(recording):
    """A transposed, reshaped or sliced tensor shares its storage and is not counted again."""
    whole = square()
    views = whole.t(), whole.reshape(-1), whole[:10]
    assert recording.segments[0].events == [(MIB, ACTIVATION)]
    del views


def test_a_death_in_a_later_segment_names_the_birth(recording):
    """What was made as the second tensor of segment 0 and dies in segment 1 says so."""
    kept, dropped = square(), torch.zeros(2 * SIDE, SIDE)
    recording.mark("layer", "forward", 0)
    del dropped
    assert recording.segments[1].events == [(2 * MIB, ACTIVATION, 0, 1)]
    del kept


def test_autograd_keeps_what_backward_needs(recording):
    """Of sin(x) backward needs x, which stays; the gradient of a parameter is known as one."""
    x = square().requires_grad_()
    loss = torch.sin(torch.sin(x) * 2).sum()
    recording.mark("loss_backward", "backward")
    loss.backward()
    recording.call_gradients([x.grad])
    births = [event for segment in recording.segments for event in segment.events if len(event) == 2]
    assert (MIB, GRADIENT) in births
    assert sum(category == GRADIENT for _, category in births) == 1


def test_what_was_alive_at_a_restart_is_not_counted():
    """Parameters and what earlier steps left behind live outside the step."""
    recorder = Recorder({})
    recorder.mark("embedding", "forward")
    with FakeTensorMode(), recorder:
        table = square()
        recorder.restart()
        recorder.mark("embedding", "forward")
        more = table + 1
        del table
        assert recorder.segments[0].events == [(MIB, ACTIVATION)]
        del more


def test_flops_of_a_product_are_two_for_each_multiplication(recording):
    """A product of squares of side n takes 2 n^3 operations, and reads two and writes one of them."""
    a, b = square(), square()
    before = recording.segments[0].other_bytes
    product = a @ b
    assert recording.segments[0].matmul_flops == 2 * SIDE**3
    assert recording.segments[0].matmul_bytes == 3 * MIB
    assert recording.segments[0].other_bytes == before
    del product


def test_experts_products_in_one_operator_count_as_one_by_one():
    """A grouped product and its backward are as many FLOPs as torch counts for each expert's rows by themselves."""
    rows, experts, columns, splits = 48, 3, (32, 64), (16, 32, 48)
    weights = torch.randn(experts, *columns, dtype=torch.bfloat16)
    tokens = torch.randn(rows, columns[0], dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        x, w = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
        begins = (0, *splits)
        sum((x[a:b] @ w[n]).square().sum() for n, (a, b) in enumerate(itertools.pairwise(begins))).backward()
    recorder = Recorder({})
    recorder.mark("layer", "forward", 0)
    with recorder:
        x, w = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
        torch._grouped_mm(x, w, offs=torch.tensor(splits, dtype=torch.int32)).square().sum().backward()
    assert sum(segment.matmul_flops for segment in recorder.segments) == counter.get_total_flops()


def test_temporaries_inside_a_kernel_live_while_it_runs():
    """A table entry's bytes are born before the kernel's result and die after it."""
    recorder = Recorder({torch.ops.aten.sin.default: lambda x: (x.numel(), 7)})
    recorder.mark("layer", "forward", 0)
    with FakeTensorMode(), recorder:
        x = square()
        y = torch.sin(x)
    assert recorder.segments[0].events == [
        (MIB, ACTIVATION),
        (SIDE * SIDE, INSIDE),
        (7, INSIDE),
        (MIB, ACTIVATION),
        (SIDE * SIDE, INSIDE, 0, 1),
        (7, INSIDE, 0, 2),
    ]
    del y


def test_a_substitute_is_called_instead_of_an_operator():
    """What a substitute returns is what was born, and what the operator's caller gets."""
    recorder = Recorder({}, {torch.ops.aten.sin.default: lambda x: torch.cat([x, x])})
    recorder.mark("layer", "forward", 0)
    with FakeTensorMode(), recorder:
        x = square()
        y = torch.sin(x)
    assert y.shape == (2 * SIDE, SIDE)
    assert recorder.segments[0].events == [(MIB, ACTIVATION), (2 * MIB, ACTIVATION)]
    del y
