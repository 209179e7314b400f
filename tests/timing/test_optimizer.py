"""What an optimizer step moves, against the real optimizers' operators, and counted by hand."""

from __future__ import annotations

from typing import get_args

import pytest
from msgspec.structs import replace

from autofit.memory.optimizers import OPTIMIZERS
from autofit.spec.configuration import Optim
from autofit.timing.optimizer import UPDATES, host_update_seconds, num_updated, paged_bytes, update_bytes
from autofit.timing.parameters import parameter_totals
from tests.plans import a_configuration
from tests.timing.hand_profiles import a_profile, a_regime, an_adapted_profile

FULL = parameter_totals(a_profile(num_params=1000))
HALF = parameter_totals(a_profile(num_params=1000, regime=a_regime(weights_dtype="bfloat16", autocast="no")))


def moved_elements(make_optimizer):
    """Run a step of a real optimizer; return the elements that its operators read and write, for each parameter."""
    torch = pytest.importorskip("torch")
    from torch.utils import _pytree as pytree
    from torch.utils._python_dispatch import TorchDispatchMode

    class Moved(TorchDispatchMode):
        num = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if not func.is_view:
                read = {id(t): t.numel() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
                written = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
                if func._schema.is_mutable:
                    places = zip(func._schema.arguments, args, strict=False)
                    written = [
                        t
                        for argument, given in places
                        if argument.alias_info is not None and argument.alias_info.is_write
                        for t in pytree.tree_leaves(given)
                    ]
                self.num += sum(read.values()) + sum(t.numel() for t in written)
            return out

    weight = torch.nn.Parameter(torch.randn(512, 512))
    optimizer = make_optimizer([weight])
    for counted in (False, False, True):
        weight.grad = torch.randn_like(weight)
        with Moved() as moved:
            optimizer.step()
        if counted:
            return moved.num / weight.numel()
    raise AssertionError


@pytest.mark.parametrize(
    ("optim", "make"),
    [
        ("adamw_torch", lambda torch, ps: torch.optim.AdamW(ps, weight_decay=0.0, foreach=True)),
        ("sgd", lambda torch, ps: torch.optim.SGD(ps, lr=1e-3, foreach=True)),
        ("adagrad", lambda torch, ps: torch.optim.Adagrad(ps, foreach=True)),
        ("rmsprop", lambda torch, ps: torch.optim.RMSprop(ps, foreach=True)),
    ],
)
def test_a_step_moves_what_the_real_optimizers_operators_do(optim, make):
    """Every array that an operator of torch's own step reads or writes counts once."""
    torch = pytest.importorskip("torch")
    assert moved_elements(lambda ps: make(torch, ps)) == pytest.approx(UPDATES[optim].weight_accesses, rel=0.01)


def test_adafactor_moves_what_transformers_operators_do():
    """transformers' Adafactor goes over a weight 21 times, in fp32, one operator after the other."""
    optimization = pytest.importorskip("transformers.optimization")
    moved = moved_elements(lambda ps: optimization.Adafactor(ps, lr=1e-3, scale_parameter=False, relative_step=False))
    assert moved * 4 == pytest.approx(UPDATES["adafactor"].state_bytes, rel=0.06)


def test_every_modelled_optimizer_has_an_update():
    """Whatever memory knows, and every name of transformers that the configuration has, can be ordered by time."""
    assert set(OPTIMIZERS) <= set(UPDATES)
    assert set(get_args(Optim)) - set(UPDATES) == {"adamw_apex_fused"}


def test_a_fused_fp32_step_reads_four_arrays_and_writes_three():
    """Weight, gradient and two moments in, weight and moments out, and clipping's three passes: 10 x 4 bytes."""
    assert update_bytes(FULL, a_configuration(sharding="ddp")) == 1000 * (7 + 3) * 4


def test_eight_bit_state_moves_two_bytes_for_eight():
    """The moments' traffic falls from 16 bytes a parameter to 4."""
    difference = update_bytes(FULL, a_configuration()) - update_bytes(FULL, a_configuration(optim="adamw_8bit"))
    assert difference == 1000 * (16 - 4)


def test_a_rank_of_four_updates_a_quarter():
    """Under every ZeRO stage a rank updates its shard alone, in fp32, and converts gradients and weights."""
    for sharding in ("zero1", "zero2", "zero3"):
        moved = update_bytes(HALF, a_configuration(sharding=sharding, num_processes=4, weights_dtype="bfloat16"))
        assert moved == 250 * (10 * 4 + 2 + 4 + 2)


def test_fsdp_updates_its_shard_and_a_replica_of_it_all_the_same():
    """Of 4 ranks each updates a quarter, of two copies a half; under mixed precision in fp32, else as it is stored."""
    quarter, half = (a_configuration(sharding="fsdp2", num_processes=4, num_replicas=replicas) for replicas in (1, 2))
    assert (num_updated(HALF, quarter), num_updated(HALF, half)) == (250, 500)
    pure = a_configuration(sharding="fsdp2", num_processes=4, mixed_precision="no")
    assert update_bytes(HALF, quarter) == 2 * update_bytes(HALF, pure)


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ("paged_adamw_8bit", 4000),
        ("paged_adamw_32bit", 16000),
        ("paged_lion_8bit", 2000),
        ("adamw_8bit", 0),
        ("grokadamw", 24000),
    ],
)
def test_evicted_pages_cross_the_link_twice(optim, expected):
    """Paged state comes from the host and goes back, as that of GrokAdamW always does; what is not paged stays."""
    assert paged_bytes(FULL, a_configuration(optim=optim)) == expected


def test_the_ranks_of_a_node_share_its_processors():
    """A node updates all that its ranks hold, 1 ns a parameter; torch's own Adam, under FSDP, takes 1.45."""
    offloaded = a_configuration(sharding="zero2", offload="optimizer", num_processes=16)
    assert host_update_seconds(FULL, offloaded, 8) == pytest.approx(500 * 1e-9)
    by_torch = a_configuration(
        sharding="fsdp2", offload="optimizer_and_parameters", num_processes=16, optim="adamw_torch"
    )
    assert host_update_seconds(FULL, by_torch, 8) == pytest.approx(500 * 1.45e-9)
    assert host_update_seconds(FULL, a_configuration(), 8) == 0


@pytest.mark.parametrize(("num_trained", "core_seconds"), [(2**18, 1.5e-9), (2**26, 8 * 1.45e-9)])
def test_small_adapters_are_updated_in_each_ranks_own_cache(num_trained, core_seconds):
    """Of 16 ranks each updates a sixteenth. In a cache of 4 MiB (16 bytes a parameter) the ranks do not share it.

    What is larger goes through the memory that the 8 ranks of a node share; and DeepSpeed's update, of all at once.
    """
    totals = parameter_totals(an_adapted_profile(num_frozen=1000, num_trained=num_trained))
    offloaded = a_configuration(
        sharding="fsdp1", offload="optimizer_and_parameters", num_processes=16, optim="adamw_torch"
    )
    assert host_update_seconds(totals, offloaded, 8) == pytest.approx(num_trained / 16 * core_seconds)
    by_deepspeed = replace(offloaded, sharding="zero3")
    assert host_update_seconds(totals, by_deepspeed, 8) == pytest.approx(num_trained / 2 * 1e-9)
