"""Fits corrections to remembered runs: as far as their residuals support, never further, and never on one run's word.

A correction is the centre of the runs' residuals, each the logarithm of measured over predicted, shrunk to zero:
the theta that minimises

    theta^2 / (2 t^2)  +  sum over runs i of  rho((r_i - theta) / s_i)

with rho(x) = x^2/2 where |x| <= c, and c|x| - c^2/2 beyond (Huber, "Robust Estimation of a Location Parameter", 1964;
c = 1.345, with which it keeps 95 % of the efficiency of a mean on normal residuals). It is the most probable theta
where the machine's own error is normal about zero with width t and a run scatters about it with width s_i.

What follows, and is tested: without runs theta is 0; one run moves it by at most c t^2 / s, whatever it measured; an
outlier moves the result of many by no more than any other run at the edge; many consistent runs move it to where they
agree; their order does not matter.

Both widths are those of published runs. For memory: t is the root of the mean square of the residuals of
`autofit/memory/data/residuals.json` (a machine may be off as any published run was), s their standard deviation about
the mean of their source. The static part and the part that grows with tokens have no published residuals of their own:
an error of the peak is taken as theirs, in the share that they have of it, so that both widths are divided by that
share. For time: `TIME_WIDTHS`.

An underestimate costs a run and an overestimate money. So a memory correction that raises a prediction is applied as
estimated, and one that lowers it only as far as 95 % of its uncertainty leaves it below zero.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from statistics import median

from msgspec import Struct
from msgspec.structs import replace

from autofit.calibrate.records import PredictedRun, RunRecord
from autofit.memory.uncertainty import Residual, shipped
from autofit.spec.calibration import Calibration, Correction

HUBER_C = 1.345
CAUTION_DEVIATIONS = 1.645
"""Standard deviations of an estimate that a prediction is not lowered by: one-sided 95 % of a normal distribution."""
NUM_BISECTIONS = 64
"""More than a double has bits: the interval ends as two neighbours."""
MIN_TOKEN_SHARE = 0.1
"""Of the predicted peak: with a smaller share of what grows with tokens, the rest's residual would decide.
Source: assumed."""


class Widths(Struct, frozen=True, kw_only=True):
    """How far off predictions are, as standard deviations of logarithms."""

    machine: float
    """Of a machine that nothing is known of (t)."""
    run: float
    """Of one run about its machine's own error (s)."""


TIME_WIDTHS = Widths(machine=0.148, run=0.148)
"""Of the time of a step. Source: docs/measurements.md, Speed: the median error of the 71 held-out published rows is
10.0 %, and a normal distribution's standard deviation is 1.483 medians. Both the same: scatter within a machine and
between machines cannot be told apart there, where most sources ran on one."""


class Observation(Struct, frozen=True, kw_only=True):
    """What one run says about one correction."""

    log_ratio: float
    """Measured over predicted, of the part that is corrected."""
    share: float = 1.0
    """Of the corrected part in the figure that was measured: of a small part a run says little."""


class Fitted(Struct, frozen=True, kw_only=True):
    """A calibration, and what it does to the runs that it comes from."""

    calibration: Calibration
    errors: dict[str, tuple[float, float] | None]
    """By figure: the median absolute error of predictions before and after, as fractions of what was measured; None
    where no run measured it."""
    num_left_out: dict[str, int]
    """Runs of this machine that say nothing about any correction, by the reason."""


def fit_all(records: Iterable[RunRecord]) -> tuple[Fitted, ...]:
    """Fit one calibration for each kind of device and set of library versions, in the order of their names."""
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[RunRecord]] = defaultdict(list)
    for record in {record.id: record for record in records}.values():
        groups[record.device, tuple(sorted(record.versions.items()))].append(record)
    return tuple(_fit(device, dict(versions), group) for (device, versions), group in sorted(groups.items()))


def _fit(device: str, versions: dict[str, str], records: Sequence[RunRecord]) -> Fitted:
    useful = [record for record in records if reason_to_leave_out(record) is None]
    left_out: dict[str, int] = defaultdict(int)
    for record in records:
        if (reason := reason_to_leave_out(record)) is not None:
            left_out[reason] += 1
    widths = memory_widths()
    static = _seen(useful, static_observation)
    per_token = _seen(useful, token_observation)
    time = _seen(useful, time_observation)
    calibration = Calibration(
        device_name=device,
        versions=versions,
        num_runs=len(static.keys() | per_token.keys() | time.keys()),
        static=cautious(estimate([*static.values()], widths)),
        per_token=cautious(estimate([*per_token.values()], widths)),
        time=estimate([*time.values()], TIME_WIDTHS),
    )
    return Fitted(calibration=calibration, errors=_errors(useful, calibration), num_left_out=dict(left_out))


def _seen(records: Iterable[RunRecord], observe: Callable[[RunRecord], Observation | None]) -> dict[str, Observation]:
    return {record.id: found for record in records if (found := observe(record)) is not None}


def reason_to_leave_out(record: RunRecord) -> str | None:
    """Say why a run says nothing; None: it says something."""
    if record.failure not in {"none", "interrupted"}:
        return f"failed: {record.failure}"
    if not record.in_effect:
        return "trained otherwise than planned (--no-strict)"
    if record.predicted.peak_allocated_bytes is None:
        return "a fallback of a calibrated plan: its prediction was not kept apart"
    if all(rank.num_steps == 0 for rank in record.ranks):
        return "no step was measured"
    return None


def static_observation(record: RunRecord) -> Observation | None:
    """Compare what is allocated between two steps, on the rank that holds most of it."""
    predicted = record.predicted.after_step_allocated_bytes
    measured = max((rank.after_step_allocated_bytes or 0 for rank in record.ranks), default=0)
    return Observation(log_ratio=math.log(measured / predicted)) if predicted and measured else None


def token_observation(record: RunRecord) -> Observation | None:
    """Compare what a step adds to that, less what of it does not grow with tokens, on the most loaded rank.

    A run whose longest batch was shorter than planned says nothing: it did not need what was planned for.
    """
    predicted = record.predicted
    peak, after, grows = predicted.peak_allocated_bytes, predicted.after_step_allocated_bytes, predicted.token_bytes
    ranks = [rank for rank in record.ranks if rank.peak_allocated_bytes and rank.after_step_allocated_bytes]
    if not ranks or not peak or after is None or not grows or grows < MIN_TOKEN_SHARE * peak:
        return None
    if max(rank.longest_batch_tokens or 0 for rank in ranks) < record.row_tokens:
        return None
    most = max(ranks, key=lambda rank: rank.peak_allocated_bytes or 0)
    added = (most.peak_allocated_bytes or 0) - (most.after_step_allocated_bytes or 0)
    measured = added - (peak - after - grows)
    return Observation(log_ratio=math.log(max(measured, 1) / grows), share=grows / peak)


def time_observation(record: RunRecord) -> Observation | None:
    """Compare the median step of the slowest rank; without lengths of the data, only where batches were as planned."""
    predicted, measured = record.predicted.step_seconds, record.step_seconds
    longest = max((rank.longest_batch_tokens or 0 for rank in record.ranks), default=0)
    if not predicted or not measured or (not record.averages_lengths and longest < record.row_tokens):
        return None
    return Observation(log_ratio=math.log(measured / predicted))


@lru_cache(maxsize=1)
def memory_widths() -> Widths:
    """Return the widths of what is allocated, from the residuals of published runs that come with the package."""
    return widths_of([each for each in shipped() if each.figure == "peak_allocated"])


def widths_of(residuals: Sequence[Residual]) -> Widths:
    """Return the root mean square of residuals, and their standard deviation about the mean of their source."""
    by_source: dict[str, list[float]] = defaultdict(list)
    for each in residuals:
        by_source[each.source].append(math.log(each.ratio))
    squares = sum(log * log for logs in by_source.values() for log in logs)
    within = sum((log - sum(logs) / len(logs)) ** 2 for logs in by_source.values() for log in logs)
    num = len(residuals)
    return Widths(machine=math.sqrt(squares / num), run=math.sqrt(within / (num - len(by_source))))


def estimate(observations: Sequence[Observation], widths: Widths) -> Correction:
    """Estimate a correction; see the module. Nothing is moved without observations."""
    if not observations:
        return Correction(uncertainty_fraction=widths.machine)
    typical_share = math.sqrt(math.fsum(each.share**2 for each in observations) / len(observations))
    machine = widths.machine / typical_share
    runs = sorted((each.log_ratio, widths.run / each.share) for each in observations)

    def slope(theta: float) -> float:
        pulls = (max(-HUBER_C, min(HUBER_C, (ratio - theta) / width)) / width for ratio, width in runs)
        return theta / machine**2 - math.fsum(pulls)

    low, high = min(0.0, runs[0][0]), max(0.0, runs[-1][0])
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    theta = (low + high) / 2
    precision = 1 / machine**2 + math.fsum(1 / width**2 for _, width in runs)
    moved = math.expm1(theta)
    return Correction(
        applied_fraction=moved,
        estimate_fraction=moved,
        uncertainty_fraction=1 / math.sqrt(precision),
        num_runs=len(runs),
    )


def cautious(correction: Correction) -> Correction:
    """Lower a prediction only as far as the evidence leaves it below; raise it as estimated."""
    if correction.estimate_fraction >= 0:
        return correction
    kept_back = CAUTION_DEVIATIONS * correction.uncertainty_fraction
    applied = min(0.0, math.expm1(math.log1p(correction.estimate_fraction) + kept_back))
    return replace(correction, applied_fraction=applied)


def corrected_peak_bytes(predicted: PredictedRun, calibration: Calibration) -> float | None:
    """Return a predicted peak with both memory corrections."""
    if predicted.peak_allocated_bytes is None:
        return None
    static = (predicted.after_step_allocated_bytes or 0) * (calibration.static.factor - 1)
    return predicted.peak_allocated_bytes + static + (predicted.token_bytes or 0) * (calibration.per_token.factor - 1)


def _errors(records: Sequence[RunRecord], calibration: Calibration) -> dict[str, tuple[float, float] | None]:
    peaks = [
        (record.predicted.peak_allocated_bytes, corrected_peak_bytes(record.predicted, calibration), measured)
        for record in records
        if (measured := record.peak_allocated_bytes) and token_observation(record) is not None
    ]
    after = [
        (predicted, predicted * calibration.static.factor, max(r.after_step_allocated_bytes or 0 for r in record.ranks))
        for record in records
        if (predicted := record.predicted.after_step_allocated_bytes) and static_observation(record) is not None
    ]
    times = [
        (seconds, seconds * calibration.time.factor, record.step_seconds)
        for record in records
        if (seconds := record.predicted.step_seconds) and time_observation(record) is not None
    ]
    figures = {"between steps": after, "peak": peaks, "a step": times}
    return {name: _median_errors(rows) for name, rows in figures.items()}  # type: ignore[arg-type]


def _median_errors(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float] | None:
    if not rows:
        return None
    before = median(abs(predicted / measured - 1) for predicted, _, measured in rows)
    after = median(abs(corrected / measured - 1) for _, corrected, measured in rows)
    return before, after
