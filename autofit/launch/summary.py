"""The end of a launch as one JSON object: predicted beside measured, how it ended, and where everything is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import asdict

from autofit.calibrate.records import measured_ranks, phase_outcomes
from autofit.launch.evidence import LOG_FILE
from autofit.launch.ladder import probe_folder, rung_folder
from autofit.launch.supervise import Attempt
from autofit.plan import Plan, adaptation, planned_batches, predicted_phases
from autofit.spec.event import Event

SUMMARY_FILE = "summary.json"
EVENTS_FILE = "events.jsonl"


def summarize(
    attempts: Sequence[Attempt], run_folder: Path, exit_code: int, probe: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Sum up a launch by its last attempt; a figure that was not measured is None.

    Args:
        attempts: all rungs that were started.
        run_folder: where they ran.
        exit_code: of the launch.
        probe: the memory of the last rung's probe; None: there was none.
    """
    last = attempts[-1]
    return {
        "schema_version": 1,
        "exit_code": exit_code,
        "failure": last.verdict.failure,
        "reason": last.verdict.reason,
        "rung": last.number,
        "adaptation": adaptation(last.plan),
        "is_verified": any(event.kind == "verified" for event in last.evidence.events),
        "not_in_effect": [list(check) for check in last.evidence.not_in_effect],
        "memory": memory_summary(last.plan, last.evidence.events),
        "time": time_summary(last.plan, last.evidence.events),
        "probe": probe,
        "final_loss": _last_detail(last.evidence.events, "log", "loss"),
        "trained": trained_folders(last.evidence.events),
        "files": files(rung_folder(run_folder, last.number)),
        "attempts": [_attempt_summary(attempt) for attempt in attempts],
    }


def memory_summary(plan: Plan, events: Sequence[Event]) -> dict[str, Any]:
    """Put the predicted peak beside that of every rank; the most loaded rank is the one that was predicted.

    On a GPU the peaks are of torch's allocator, on a CPU rank of live tensor storages.
    """
    ranks = {event.rank: event.detail for event in events if event.kind == "memory"}
    peaks = [detail["peak_bytes"] for detail in ranks.values() if detail["peak_bytes"] is not None]
    measured = max(peaks, default=None)
    predicted = plan.memory.peak_allocated_bytes
    return {
        "predicted_peak_allocated_bytes": predicted,
        "measured_peak_allocated_bytes": measured,
        "prediction_error_fraction": predicted / measured - 1 if measured else None,
        "predicted_peak_reserved_bytes": plan.memory.peak_reserved_bytes,
        "predicted_after_step_allocated_bytes": plan.memory.after_step_allocated_bytes,
        "budget_bytes": plan.memory.budget_bytes,
        "ranks": [{"rank": rank, **detail} for rank, detail in sorted(ranks.items())],
        "phases": [
            {**asdict(outcome), "error_fraction": outcome.error_fraction}
            for outcome in phase_outcomes(predicted_phases(plan), measured_ranks(events), planned_batches(plan))
        ],
    }


def time_summary(plan: Plan, events: Sequence[Event]) -> dict[str, Any]:
    """Put the predicted time of a step beside the median of all but the first, of the slowest rank."""
    medians = [event.detail["step_seconds"] for event in events if event.kind == "memory"]
    return {
        "predicted_step_seconds": plan.time.step_seconds,
        "predicted_step_seconds_lower": plan.time.step_seconds_lower,
        "predicted_step_seconds_upper": plan.time.step_seconds_upper,
        "measured_step_seconds": max((median for median in medians if median is not None), default=None),
    }


def trained_folders(events: Sequence[Event]) -> list[dict[str, Any]]:
    """List where rank 0 saved, newest last, with what is there now."""
    folders = dict.fromkeys(event.detail["folder"] for event in events if event.kind == "saved" and event.rank == 0)
    return [{"folder": folder, "files": _names_in(Path(folder))} for folder in folders]


def _names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def files(folder: Path) -> dict[str, str]:
    """Name the files of one rung that are there."""
    return {path.name: str(path) for path in sorted(folder.glob("*")) if path.is_file() and path.name != SUMMARY_FILE}


def _attempt_summary(attempt: Attempt) -> dict[str, Any]:
    memory = memory_summary(attempt.plan, attempt.evidence.events)
    return {
        "rung": attempt.number,
        "failure": attempt.verdict.failure,
        "reason": attempt.verdict.reason,
        "is_probe": attempt.evidence.is_of_probe,
        "predicted_peak_allocated_bytes": memory["predicted_peak_allocated_bytes"],
        "measured_peak_allocated_bytes": memory["measured_peak_allocated_bytes"],
    }


def _last_detail(events: Sequence[Event], kind: str, name: str) -> Any:
    return next((event.detail[name] for event in reversed(events) if event.kind == kind), None)


def log_excerpt(log_tail: str, num_lines: int = 20) -> str:
    """Return the last lines that the script printed, without the launcher's own report after them."""
    lines = log_tail.splitlines()
    ends = (number for number, line in enumerate(lines) if "torch/distributed/elastic/" in line)
    kept = [line for line in lines[: next(ends, len(lines))] if line.strip()]
    return "\n".join(kept[-num_lines:])


def log_path(attempt: Attempt, run_folder: Path) -> Path:
    """Return the log of an attempt: of its probe, where that was its end."""
    folder = probe_folder if attempt.evidence.is_of_probe else rung_folder
    return folder(run_folder, attempt.number) / LOG_FILE
