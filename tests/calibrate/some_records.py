"""Records made by hand, for tests of what is a function of records."""

from __future__ import annotations

from typing import Any

from autofit.calibrate.records import MeasuredRank, PredictedRun, RunRecord
from autofit.units import GIB
from tests.plans import a_configuration

VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}
PREDICTED = PredictedRun(
    peak_allocated_bytes=20 * GIB,
    after_step_allocated_bytes=8 * GIB,
    token_bytes=10 * GIB,
    peak_reserved_bytes=None,
    process_bytes=None,
    phases_bytes={},
    step_seconds=2.0,
)


def a_record(
    number: int, *, static: float = 1.0, per_token: float = 1.0, time: float = 1.0, **changes: Any
) -> RunRecord:
    """Return a run that measured so many times what was predicted: 8 GiB static, 10 of tokens, and 2 of neither."""
    after = round(8 * GIB * static)
    values: dict[str, Any] = {
        "id": f"{number:016x}",
        "ended_at": "2026-11-26T12:00:00Z",
        "autofit_version": "0.1.0",
        "device": "A100-SXM-80G",
        "num_devices": 2,
        "versions": VERSIONS,
        "architecture": "LlamaForCausalLM",
        "model": None,
        "configuration": a_configuration(),
        "row_tokens": 32,
        "averages_lengths": False,
        "is_probe": False,
        "rung": 0,
        "failure": "none",
        "predicted": PREDICTED,
        "ranks": (
            MeasuredRank(
                rank=0,
                peak_allocated_bytes=after + 2 * GIB + round(10 * GIB * per_token),
                before_training_peak_bytes=None,
                between_steps_peak_bytes=None,
                after_step_allocated_bytes=after,
                peak_reserved_bytes=None,
                device_used_bytes=None,
                process_peak_bytes=None,
                step_seconds=2.0 * time,
                num_steps=5,
                longest_batch_tokens=32,
            ),
        ),
    }
    return RunRecord(**values | changes)
