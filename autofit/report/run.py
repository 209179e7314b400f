"""The end of a launch as a person reads it: predicted beside measured, then where everything is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autofit.report.plan import bullets, by_folder, facts_grid
from autofit.units import GIB, format_bytes, format_seconds

_SHOWN_FILES = 8


def run_report(summary: Mapping[str, Any], summary_file: Path) -> Group:
    """Lay out the content of summary.json, and say where it is."""
    return Group(
        Text(f"\n{_ending(summary)}", style="bold"),
        facts_grid(_lines(summary)),
        ranks_table(summary["memory"]),
        phases_table(summary["memory"].get("phases", ())),
        bullets("Trained", _trained(summary["trained"])),
        bullets("Files", by_folder([*map(Path, summary["files"].values()), summary_file])),
    )


def _ending(summary: Mapping[str, Any]) -> str:
    if summary["failure"] == "interrupted":
        return "Interrupted: all ranks are ended, and the files are as they were."
    if summary.get("not_in_effect"):
        return f"Trained, but not as planned (--no-strict): {'; '.join(map(_mismatch, summary['not_in_effect']))}."
    if not summary["is_verified"]:
        return "Trained. The script ran without hooks: nothing was verified or measured."
    if summary["rung"] == 0:
        return "Trained as planned."
    return f"Trained on fallback {summary['rung']}: what came before ran out of memory."


def _mismatch(check: Sequence[str]) -> str:
    setting, planned, in_effect = check
    return f"{setting} planned {planned}, in effect {in_effect}"


def _lines(summary: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "peak", peak_words(summary["memory"])
    if summary.get("probe"):
        yield "probe", peak_words(summary["probe"])
    yield "a step", step_words(summary["time"])
    if summary["final_loss"] is not None:
        yield "loss", f"{summary['final_loss']:.4g} at the last step that was logged"


def peak_words(memory: Mapping[str, Any]) -> str:
    """Put the predicted peak of tensors beside the measured one, and say by how much it was off."""
    predicted = f"predicted {format_bytes(memory['predicted_peak_allocated_bytes'])}"
    if memory["measured_peak_allocated_bytes"] is None:
        return f"{predicted}, not measured"
    measured = f"measured {format_bytes(memory['measured_peak_allocated_bytes'])} on the most loaded rank"
    return f"{predicted}, {measured} (off by {memory['prediction_error_fraction']:+.1%})"


def step_words(time: Mapping[str, Any]) -> str:
    """Put the predicted time of a step beside the measured median."""
    predicted, measured = time["predicted_step_seconds"], time["measured_step_seconds"]
    words = [
        "not predicted" if predicted is None else f"predicted {format_seconds(predicted)}",
        "not measured" if measured is None else f"measured {format_seconds(measured)}",
    ]
    return ", ".join(words)


def ranks_table(memory: Mapping[str, Any]) -> RenderableType:
    """List what each rank measured against the one figure that was predicted for all."""
    predicted = memory["predicted_peak_allocated_bytes"]
    table = Table(box=None, padding=(0, 2, 0, 2))
    for title in ("rank", "predicted GiB", "measured GiB", "error"):
        table.add_column(title, justify="right", header_style="dim")
    for rank in memory["ranks"]:
        measured = rank["peak_bytes"]
        error = "" if not measured else f"{predicted / measured - 1:+.1%}"
        table.add_row(
            str(rank["rank"]),
            f"{predicted / GIB:.3f}",
            "not measured" if measured is None else f"{measured / GIB:.3f}",
            error,
        )
    return Group("", table) if memory["ranks"] else Group()


def phases_table(phases: Sequence[Mapping[str, Any]]) -> RenderableType:
    """List each phase that the run had, on the rank that held most in it, with the micro-batch that it was on."""
    table = Table(box=None, padding=(0, 2, 0, 2))
    for title in ("phase", "predicted GiB", "measured GiB", "error", "longest batch"):
        table.add_column(title, justify="left" if title == "phase" else "right", header_style="dim")
    for each in phases:
        error, rows = each["error_fraction"], each["rows"]
        table.add_row(
            each["phase"].replace("_", " "),
            _gib(each["predicted_bytes"]),
            _gib(each["measured_bytes"]),
            "" if error is None else f"{error:+.1%}",
            "" if rows is None else f"{rows} x {each['row_tokens']}",
        )
    return Group("", table) if phases else Group()


def _gib(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / GIB:.3f}"


def _trained(folders: Iterable[Mapping[str, Any]]) -> list[str]:
    return [f"{folder['folder']} ({_shortened(folder['files'])})" for folder in folders]


def _shortened(names: list[str]) -> str:
    more = len(names) - _SHOWN_FILES
    return ", ".join(names[:_SHOWN_FILES]) + (f" and {more} more" if more > 0 else "")
