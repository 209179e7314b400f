"""When nothing fits: how near it was, and only ways out that were checked."""

from __future__ import annotations

import re

import pytest
from msgspec.structs import replace

from autofit.errors import NothingFitsError
from autofit.search import explaining_regimes, required_regimes, solve
from autofit.search.words import describe
from autofit.units import GIB, format_bytes
from tests.search.worlds import (
    GPU,
    PlausibleMemory,
    a_cluster,
    a_job,
    an_estimate,
    made_up_profile,
    profiles_for,
)

SMALL_GPU = replace(GPU, name="by-hand-16G", memory_bytes=16 * GIB)
MEMORY = PlausibleMemory(4 * 10**9)


def refused(job, cluster, *, explains=True, memory=MEMORY):
    """Return the refusal of a job, with or without the profiles that explain it."""
    regimes = [*required_regimes(job, cluster), *(explaining_regimes(job, cluster) if explains else ())]
    with pytest.raises(NothingFitsError) as error:
        solve(job, cluster, {regime: made_up_profile(regime) for regime in regimes}, estimate_memory=memory)
    return error.value


def test_the_nearest_configuration_is_named_with_what_it_lacks():
    """It is the one that needs least; the figure over is against what a plan may use, with the phase and term."""
    error = refused(a_job(2, methods=("full",)), a_cluster(1, SMALL_GPU))
    assert "Nearest: full" in error.message
    needed, over, usable = (float(n) for n in re.findall(r"([\d.]+) GiB", error.message)[1:4])
    assert needed - usable == pytest.approx(over, abs=0.02)
    assert "phase backward" in error.message
    assert "activations" in error.message
    assert error.exit_code == 3


def test_ways_out_are_those_that_fit():
    """Of 4e9 parameters in 16 GiB an adapter fits and a shorter sequence does not help: only the first is named."""
    error = refused(a_job(8, methods=("full",), sequence_tokens=512), a_cluster(1, SMALL_GPU))
    assert "method lora" in error.to_fix
    assert "method qlora" in error.to_fix
    assert "tokens" not in error.to_fix


class ReservedMemory(PlausibleMemory):
    """The same, and a tenth more as the allocator lays it out."""

    def __call__(self, profile, configuration, cluster, workload, *, replays=False):
        """Estimate by the rule of thumb, and more when replayed."""
        plain = super().__call__(profile, configuration, cluster, workload)
        return an_estimate(int(plain.needed_bytes * (1.1 if replays else 1)), cluster.device.memory_bytes)


def test_a_way_out_needs_what_its_own_plan_says():
    """The figure beside a change is that of a plan with it, as the allocator lays it out, and not less."""
    memory, job, cluster = ReservedMemory(4 * 10**9), a_job(1, methods=("full",)), a_cluster(1, SMALL_GPU)
    error = refused(job, cluster, memory=memory)
    lora = a_job(1, methods=("lora",))
    plan = solve(lora, cluster, profiles_for(lora, cluster), estimate_memory=memory)
    said = re.search(r"method lora \(([^:]+): ([\d.]+ GiB)\)", error.to_fix)
    assert said.group(1) == describe(plan.configuration)
    assert said.group(2) == format_bytes(plan.memory.needed_bytes)


def test_more_devices_are_used_where_a_plan_was_held_to_some():
    """What `--num-processes` says of the devices that are there is not said of those that are not."""
    job = a_job(8, methods=("full",), num_processes=(2,))
    error = refused(job, a_cluster(2, SMALL_GPU), memory=PlausibleMemory(6 * 10**9))
    assert re.search(r"8 devices \([^)]*on 8", error.to_fix)


def test_more_devices_are_named_by_the_smallest_number_that_fits():
    """Sharded over 8 the same model fits and over 4 it does not."""
    error = refused(a_job(8, methods=("full",)), a_cluster(2, SMALL_GPU), memory=PlausibleMemory(6 * 10**9))
    assert "8 devices" in error.to_fix
    assert "4 devices" not in error.to_fix


def test_a_shorter_sequence_is_named_where_it_is_enough():
    """Activations of 65536 tokens are what is too much: the longest half that fits is named."""
    job = a_job(1, methods=("lora",), sequence_tokens=2**18, optims=("adamw_torch_fused",))
    error = refused(job, a_cluster(1, SMALL_GPU), memory=PlausibleMemory(10**9))
    assert re.search(r"sequences of 131072 tokens", error.to_fix)
    assert "65536" not in error.to_fix


def test_a_restriction_that_is_in_the_way_is_named():
    """Without checkpointing it does not fit, with it it does; so with a smaller micro-batch."""
    job = a_job(64, methods=("lora",), gradient_checkpointing=False, micro_batch_sequences=(64,))
    error = refused(job, a_cluster(1, SMALL_GPU), memory=PlausibleMemory(10**9))
    assert "gradient checkpointing" in error.to_fix
    assert "a smaller micro-batch" in error.to_fix


def test_two_changes_are_tried_where_one_is_not_enough():
    """Neither an adapter nor fewer tokens alone, but both."""
    job = a_job(1, methods=("full",), sequence_tokens=2**18)
    error = refused(job, a_cluster(1, SMALL_GPU), memory=PlausibleMemory(2 * 10**9))
    assert re.search(r"method lora and sequences of \d+ tokens", error.to_fix)


def test_what_was_not_traced_is_not_promised():
    """Without profiles of other methods they are not named, whatever they might need."""
    error = refused(a_job(8, methods=("full",)), a_cluster(1, SMALL_GPU), explains=False)
    assert "lora" not in error.to_fix


def test_nothing_helps_in_a_megabyte():
    """A budget of 1 MB is refused with the figures and no false hope."""
    tiny = a_cluster(2, replace(GPU, memory_bytes=10**6))
    error = refused(a_job(8), tiny)
    assert error.to_fix.startswith("use devices with more memory")
