"""The rungs of a plan: what was chosen, then each fallback as a plan of its own, in a folder of its own."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from autofit.plan import Plan, Rung
from autofit.spec.estimate import MemoryEstimate, TimeEstimate


def rung_plans(plan: Plan) -> tuple[Plan, ...]:
    """Return the plan itself and then one plan for each fallback, with what is known of it."""
    return (plan, *(_fallback_plan(plan, number) for number in range(1, len(plan.fallbacks) + 1)))


def rung_folder(run_folder: Path, number: int) -> Path:
    """Return the folder of a rung: the run folder itself for the first."""
    return run_folder / f"rung-{number}" if number else run_folder


def probe_folder(run_folder: Path, number: int) -> Path:
    """Return the folder of a rung's probe."""
    return rung_folder(run_folder, number) / "probe"


def _fallback_plan(plan: Plan, number: int) -> Plan:
    rung = plan.fallbacks[number - 1]
    return replace(
        plan,
        configuration=rung.configuration,
        memory=_memory(rung, plan.memory.budget_bytes),
        time=_time(rung),
        fallbacks=plan.fallbacks[number:],
        reasons=(f"fallback {number} of {len(plan.fallbacks)}: everything before it ran out of memory", *plan.reasons),
    )


def _memory(rung: Rung, budget_bytes: int) -> MemoryEstimate:
    """Carry over what a rung knows; its phases were not kept."""
    return MemoryEstimate(
        peak_allocated_bytes=rung.peak_allocated_bytes,
        peak_reserved_bytes=None,
        process_bytes=rung.needed_bytes if rung.needed_bytes != rung.peak_allocated_bytes else None,
        after_step_allocated_bytes=None,
        host_bytes=None,
        budget_bytes=budget_bytes,
        phases=(),
    )


def _time(rung: Rung) -> TimeEstimate:
    return TimeEstimate(
        step_seconds=rung.step_seconds,
        step_seconds_lower=None,
        step_seconds_upper=None,
        tokens_per_second=None,
        tokens_per_second_lower=None,
        tokens_per_second_upper=None,
        terms={},
    )
