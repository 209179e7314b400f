"""Applies what runs have taught to an estimate: one place for memory, time, and the figures as they were without."""

from __future__ import annotations

from msgspec.structs import replace

from autofit.spec.calibration import Calibration, Uncalibrated, plain_versions
from autofit.spec.estimate import MemoryEstimate, Phase, Stage, TimeEstimate
from autofit.spec.hardware import Cluster
from autofit.spec.profile import RegimeProfile

TOKEN_TERMS = frozenset({"activations", "outputs", "batch"})
"""Terms of a phase that grow with the tokens of a micro-batch."""


def calibration_for(cluster: Cluster, profile: RegimeProfile) -> Calibration | None:
    """Return the cluster's calibration if it was fitted under the libraries that the profile was traced under."""
    found = cluster.calibration
    return found if found is not None and found.versions == plain_versions(profile.versions) else None


def token_bytes(memory: MemoryEstimate) -> int | None:
    """Return what of the peak grows with the tokens of a micro-batch; None where the phases were not kept."""
    if not memory.phases:
        return None
    return _token_terms(max(memory.phases, key=lambda phase: phase.bytes))


def _token_terms(phase: Phase) -> int:
    return sum(num_bytes for term, num_bytes in phase.terms.items() if term in TOKEN_TERMS)


def calibrated_memory(memory: MemoryEstimate, calibration: Calibration) -> MemoryEstimate:
    """Correct the static part and what grows with tokens in every phase; each figure moves with the peak of tensors.

    The allocator's and the process's own share have no correction: what they add is as it was.
    """
    static = round((memory.after_step_allocated_bytes or 0) * (calibration.static.factor - 1))
    phases = tuple(_corrected(phase, static, calibration.per_token.factor) for phase in memory.phases)
    highest = max((phase.bytes for phase in phases), default=memory.peak_allocated_bytes)
    moved = highest - max((phase.bytes for phase in memory.phases), default=highest)
    stages = memory.stages
    return replace(
        memory,
        peak_allocated_bytes=memory.peak_allocated_bytes + moved,
        peak_reserved_bytes=_moved(memory.peak_reserved_bytes, moved),
        process_bytes=_moved(memory.process_bytes, moved),
        after_step_allocated_bytes=_moved(memory.after_step_allocated_bytes, static),
        needed_reserved_bytes=_moved(memory.needed_reserved_bytes, moved),
        peak_allocated_interval_bytes=_moved_both(memory.peak_allocated_interval_bytes, moved),
        peak_reserved_interval_bytes=_moved_both(memory.peak_reserved_interval_bytes, moved),
        process_interval_bytes=_moved_both(memory.process_interval_bytes, moved),
        phases=phases,
        stages=stages
        and replace(
            stages,
            first_step=_moved_stage(stages.first_step, moved),
            evaluation=_moved_stage(stages.evaluation, static),
            saving=_moved_stage(stages.saving, static),
        ),
    )


def _corrected(phase: Phase, static: int, per_token_factor: float) -> Phase:
    added = static + round(_token_terms(phase) * (per_token_factor - 1))
    if not added:
        return phase
    return replace(phase, bytes=phase.bytes + added, terms={**phase.terms, "calibration": added})


def _moved(num_bytes: int | None, by: int) -> int | None:
    return None if num_bytes is None else num_bytes + by


def _moved_both(interval: tuple[int, int] | None, by: int) -> tuple[int, int] | None:
    return None if interval is None else (interval[0] + by, interval[1] + by)


def _moved_stage(stage: Stage | None, by: int) -> Stage | None:
    return None if stage is None else replace(stage, device_bytes=stage.device_bytes + by)


def calibrated_time(time: TimeEstimate, calibration: Calibration) -> TimeEstimate:
    """Multiply every time of a step, and divide every rate."""
    factor = calibration.time.factor

    def longer(seconds: float | None) -> float | None:
        return None if seconds is None else seconds * factor

    def slower(rate: float | None) -> float | None:
        return None if rate is None else rate / factor

    return TimeEstimate(
        step_seconds=longer(time.step_seconds),
        step_seconds_lower=longer(time.step_seconds_lower),
        step_seconds_upper=longer(time.step_seconds_upper),
        tokens_per_second=slower(time.tokens_per_second),
        tokens_per_second_lower=slower(time.tokens_per_second_lower),
        tokens_per_second_upper=slower(time.tokens_per_second_upper),
        terms={name: seconds * factor for name, seconds in time.terms.items()},
        model_flops_utilization_fraction=slower(time.model_flops_utilization_fraction),
    )


def uncalibrated(memory: MemoryEstimate, time: TimeEstimate) -> Uncalibrated:
    """Keep the figures that a calibration moves, as they are before it does."""
    return Uncalibrated(
        peak_allocated_bytes=memory.peak_allocated_bytes,
        after_step_allocated_bytes=memory.after_step_allocated_bytes,
        token_bytes=token_bytes(memory),
        needed_bytes=memory.needed_bytes,
        step_seconds=time.step_seconds,
        stages=memory.stages,
    )
