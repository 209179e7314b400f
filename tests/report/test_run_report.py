"""What a person reads at the end of a launch is what the summary says."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from autofit.report.run import run_report
from autofit.units import GIB


@pytest.fixture
def summary():
    """Return the summary of a launch on two ranks that ended well."""
    return {
        "exit_code": 0,
        "failure": "none",
        "reason": "every rank finished",
        "rung": 0,
        "is_verified": True,
        "memory": {
            "predicted_peak_allocated_bytes": 2 * GIB,
            "measured_peak_allocated_bytes": int(1.9 * GIB),
            "prediction_error_fraction": 2 / 1.9 - 1,
            "ranks": [{"rank": 0, "peak_bytes": int(1.9 * GIB)}, {"rank": 1, "peak_bytes": int(1.8 * GIB)}],
        },
        "time": {"predicted_step_seconds": 3.0, "measured_step_seconds": 4.0},
        "final_loss": 2.125,
        "trained": [{"folder": "/out", "files": ["adapter_config.json", "adapter_model.safetensors"]}],
        "files": {"plan.json": "/run/plan.json", "log.txt": "/run/log.txt"},
    }


def rendered(summary):
    """Return what a pipe would get."""
    console = Console(width=110, file=io.StringIO(), highlight=False)
    console.print(run_report(summary, Path("/run/summary.json")))
    return console.file.getvalue()


def test_predicted_stands_beside_measured(summary):
    """The peak that was predicted, the one that was measured, and the error between them are on one line."""
    assert "predicted 2.00 GiB, measured 1.90 GiB on the most loaded rank (off by +5.3%)" in rendered(summary)


def test_each_rank_has_its_own_figure(summary):
    """Every rank's measured peak is listed with its own error."""
    rows = [line.split() for line in rendered(summary).splitlines()]
    assert ["0", "2.000", "1.900", "+5.3%"] in rows
    assert ["1", "2.000", "1.800", "+11.1%"] in rows


def test_it_says_where_the_adapter_and_the_files_are(summary):
    """The trained folder with what is in it, and each file of the run, are named."""
    text = rendered(summary)
    assert "/out (adapter_config.json, adapter_model.safetensors)" in text
    assert "/run: log.txt, plan.json, summary.json" in text


def test_a_fallback_is_said(summary):
    """A run that ended on a fallback does not read like one that went as planned."""
    assert "Trained as planned" in rendered(summary)
    assert "Trained on fallback 2" in rendered(summary | {"rung": 2})
    assert "nothing was verified" in rendered(summary | {"is_verified": False})


def test_an_interruption_is_not_a_success(summary):
    """A run that was stopped says so."""
    text = rendered(summary | {"failure": "interrupted", "exit_code": 130})
    assert "Interrupted" in text
    assert "Trained as planned" not in text


def test_what_was_not_measured_is_not_zero(summary):
    """Where nothing was measured the report says so and shows no number."""
    memory = summary["memory"] | {
        "measured_peak_allocated_bytes": None,
        "prediction_error_fraction": None,
        "ranks": [{"rank": 0, "peak_bytes": None}],
    }
    text = rendered(
        summary | {"memory": memory, "time": {"predicted_step_seconds": None, "measured_step_seconds": None}}
    )
    assert "not measured" in text
    assert "not predicted" in text
    assert "0.000" not in text
