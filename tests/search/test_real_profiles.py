"""The search on a traced model with the real memory model: nothing made up but the model's size."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from autofit.errors import NothingFitsError
from autofit.memory.assemble import estimate_memory
from autofit.profile.trace import trace
from autofit.search import candidates, estimate, required_regimes, solve
from autofit.search.evaluate import HEADROOM_FRACTION
from autofit.spec.regimes import regime_of
from tests.plans import TINY_LLAMA
from tests.search.worlds import CPU, a_cluster, a_job

pytestmark = pytest.mark.slow
JOB = a_job(8, sequence_tokens=64, methods=("full", "lora"), held_stages=())
PAIR = a_cluster(2, CPU)


@pytest.fixture(scope="session")
def profiles():
    """Return the tiny Llama traced under every regime that two CPU ranks need."""
    return {regime: trace("tiny-llama", TINY_LLAMA, regime) for regime in required_regimes(JOB, PAIR)}


def needed(configuration, profiles, cluster=PAIR):
    """Return what the memory model says, without the search's shortcuts."""
    profile = profiles[regime_of(configuration, CPU)]
    return estimate_memory(profile, configuration, cluster, JOB.workload).needed_bytes


def test_the_budget_decides_and_the_plan_is_the_memory_models(profiles):
    """Between the least and the most that a steady step needs, the plan fits and is what the model says."""
    amounts = sorted(needed(c, profiles) for c in candidates(JOB, PAIR) if c.optim == "adamw_torch_fused")
    for budget in (amounts[-1] * 2, (amounts[0] + amounts[-1]) // 2, int(amounts[0] / (1 - HEADROOM_FRACTION)) + 1):
        cluster = a_cluster(2, replace(CPU, memory_bytes=budget))
        plan = solve(JOB, cluster, profiles)
        assert plan.memory.needed_bytes == needed(plan.configuration, profiles, cluster)
        assert plan.memory.needed_bytes <= budget * (1 - HEADROOM_FRACTION)
        assert plan.versions["torch"]


def test_one_byte_less_than_the_least_fits_nothing(profiles):
    """Below the smallest configuration's need there is none, and the refusal names it."""
    least = min(needed(c, profiles) for c in candidates(JOB, PAIR) if c.optim == "adamw_torch_fused")
    cluster = a_cluster(2, replace(CPU, memory_bytes=int(least / (1 - HEADROOM_FRACTION)) - 1))
    with pytest.raises(NothingFitsError, match="Nearest: lora"):
        solve(JOB, cluster, profiles)


def test_every_rung_is_a_plan_of_its_own(profiles):
    """Estimated by itself, each fallback needs what the ladder says."""
    plan = solve(JOB, PAIR, profiles)
    assert plan.fallbacks
    for rung in plan.fallbacks:
        alone = estimate(JOB, PAIR, profiles, rung.configuration)
        assert alone.memory.peak_allocated_bytes == rung.peak_allocated_bytes
