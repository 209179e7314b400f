"""Remembered runs and what was learned from them, as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from autofit.calibrate.fit import Fitted
from autofit.calibrate.records import PhaseOutcome, RunRecord
from autofit.calibrate.store import Stored
from autofit.report.plan import bullets, plain_table
from autofit.spec.calibration import Correction
from autofit.units import GIB, format_seconds


def runs_report(stored: Stored) -> RenderableType:
    """List runs, oldest first; predictions are those without a calibration."""
    if not stored.records:
        return Text(f"No runs yet: `autofit launch` adds them to {stored.path}.")
    table = plain_table(
        "Runs, predicted without calibration",
        *(
            "ended",
            "device",
            "model",
            "setup",
            "predicted GiB",
            "measured GiB",
            "off by",
            "step",
            "measured",
            "ended in",
        ),
    )
    for record in stored.records:
        table.add_row(*_cells(record))
    return Group(table, *_phases(stored.records), Text(f"\n{len(stored.records)} runs in {stored.path}", style="dim"))


def _phases(records: Sequence[RunRecord]) -> Iterable[RenderableType]:
    """List what each run held in each phase that it had, predicted beside measured."""
    names = ("loading", "preparing", "first_step", "longest_batch", "evaluation", "saving")
    titles = (name.replace("_", " ") for name in names)
    table = plain_table(
        "Phases, predicted / measured GiB; * on another micro-batch", "ended", "model", "setup", *titles
    )
    for record in records:
        had = {outcome.phase: outcome for outcome in record.phases}
        if had:
            when, _, model, setup, *_ = _cells(record)
            table.add_row(when, model, setup, *(_phase_cell(had.get(name)) for name in names))
    if table.row_count:
        yield Text()
        yield table


def _phase_cell(outcome: PhaseOutcome | None) -> str:
    if outcome is None:
        return ""
    if outcome.predicted_bytes is None:
        return f"- / {_gib(outcome.measured_bytes)}"
    mark = "" if outcome.is_comparable else "*"
    return f"{_gib(outcome.predicted_bytes)} / {_gib(outcome.measured_bytes)}{mark}"


def _cells(record: RunRecord) -> Iterable[str]:
    predicted, measured = record.predicted.peak_allocated_bytes, record.peak_allocated_bytes
    configuration = record.configuration
    yield f"{record.ended_at[:10]} {record.ended_at[11:16]}"
    yield f"{record.num_devices} x {record.device}"
    yield record.model or record.architecture
    batch = f"{configuration.per_device_train_batch_size}x{configuration.gradient_accumulation_steps}"
    yield f"{configuration.method} {configuration.sharding} {batch}{' probe' if record.is_probe else ''}"
    yield _gib(predicted)
    yield _gib(measured)
    yield "" if predicted is None or not measured else f"{predicted / measured - 1:+.2%}"
    yield _seconds(record.predicted.step_seconds)
    yield _seconds(record.step_seconds)
    yield _ending(record)


def _ending(record: RunRecord) -> str:
    if record.failure != "none":
        return record.failure.replace("_", " ")
    return "trained" if record.in_effect else "trained, not as planned"


def _gib(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / GIB:.3f}"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else format_seconds(seconds)


def calibration_report(fitted: Sequence[Fitted], *, is_kept: bool) -> RenderableType:
    """Show of each device what is corrected by how much, and how far off its runs were before and are after it."""
    parts: list[RenderableType] = []
    for each in fitted:
        parts.extend(_one(each))
    if is_kept:
        ending = (
            "Plans and estimates on these devices, under these libraries, now use it; --no-calibration leaves it out."
        )
    else:
        ending = "Nothing was kept."
    return Group(*parts, Text(f"\n{ending}", style="dim"))


def _one(fitted: Fitted) -> Iterable[RenderableType]:
    calibration = fitted.calibration
    versions = ", ".join(f"{name} {version}" for name, version in calibration.versions.items())
    table = plain_table(
        f"{calibration.device_name} with {versions}: {calibration.num_runs} runs",
        *("correction", "runs", "factor", "estimate", "+-", "figure", "median error before", "after"),
    )
    rows = (
        ("static", calibration.static, "between steps"),
        ("per token", calibration.per_token, "peak"),
        ("time", calibration.time, "a step"),
    )
    for name, correction, figure in rows:
        table.add_row(name, *_correction_cells(correction), figure, *_error_cells(fitted.errors[figure]))
    yield table
    yield bullets("Left out", (f"{num} runs: {reason}" for reason, num in fitted.num_left_out.items()))


def _correction_cells(correction: Correction) -> tuple[str, ...]:
    if not correction.num_runs:
        return ("0", "1.0000", "", "")
    estimate, uncertainty = correction.estimate_fraction, correction.uncertainty_fraction
    return (str(correction.num_runs), f"{correction.factor:.4f}", f"{estimate:+.2%}", f"{uncertainty:.2%}")


def _error_cells(errors: tuple[float, float] | None) -> tuple[str, str]:
    return ("", "") if errors is None else (f"{errors[0]:.2%}", f"{errors[1]:.2%}")
