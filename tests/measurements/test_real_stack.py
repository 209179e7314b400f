"""Predictions against the real Trainer, Accelerate, peft, bitsandbytes and DeepSpeed on two CPU ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "real_stack.py"
sys.path.insert(0, str(BENCHMARK.parent))

from real_stack import parse_cell  # noqa: E402 (a script beside the package)

pytestmark = pytest.mark.slow
CELLS = (
    "full-ddp-bf16-adamw_torch_fused-b2-s256-ga2-keeps",
    "freeze-zero3-bf16-adamw_torch_fused-b2-s256-ga1",
    "lora-zero3-bf16-adamw_torch_fused-b2-s256-ga1-ckpt",
    "qlora-zero2-bf16-adamw_torch_fused-b2-s256-ga1-ckpt",
    "full-zero3-bf16-adamw_torch_fused-b1-s32-ga1",
    (
        "full-zero3-bf16-adamw_torch_fused-b2-s256-ga1"
        "-sub_group_size=1000000-stage3_max_reuse_distance=5000000-stage3_max_live_parameters=1"
    ),
    "full-ddp-fp32-adamw_torch-b1-s32-ga1-accelerate-views",
    "full-zero2_offload-bf16-adamw_torch-b1-s32-ga1",
    "full-none-fp32-adamw_torch_fused-b2-s256-ga1-accelerate",
    "full-zero2-bf16-adamw_torch_fused-b2-s512-ga1-sp2",
    "full-fsdp1_offload_all-bf16-adamw_torch_fused-b2-s256-ga1",
    "qlora_bf16-fsdp2_offload_all-bf16-adamw_torch_fused-b2-s256-ga1-ckpt",
    "lora-ddp-bf16-adamw_torch_fused-b2-s256-ga1-ragged",
    "full-fsdp1-bf16-adamw_torch_fused-b1-s32-ga1-hybrid",
    "lora-fsdp2-bf16-adamw_torch_fused-b2-s256-ga1-fp32down",
)
"""Activations are the peak of most; in one the optimizer's step is, in one what offloading a gradient takes."""
SURE = ("forward", "backward", "optimizer_step", "host", "loading", "first_step", "preparing", "saving")
"""Phases and stages that are counted; evaluation is a bound."""


def held_by_the_loop_bytes(cell: str) -> int:
    """Return what training loops hold beside what is predicted: losses and norms, scalars of 4 or 8 bytes.

    Ranks that share sequences also hold three whole batches of ids, labels and positions: the loop's own, the one that
    accelerate's loader has ready, and the next, which the Trainer fetches before it lets go of its own.
    Sources: accelerate 1.15 data_loader.py, `DataLoaderShard.__iter__`; transformers 5.23 trainer.py, `_run_epoch`.
    """
    configuration, tokens = parse_cell(cell)
    shared = 3 * 3 if configuration.sequence_parallel_size > 1 else 0
    return shared * configuration.per_device_train_batch_size * tokens * 8 + 1024


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    """Train every cell, once."""
    child = subprocess.run(
        [sys.executable, str(BENCHMARK), "--json", "--cells", ",".join(CELLS)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(child.stdout)
    assert [result["cell"] for result in found] == list(CELLS)
    return found


def test_the_peak_of_a_real_run_is_predicted(results):
    """What tensors hold at most, from the first step to the last, and what they hold afterwards: within 1 %."""
    for result in results:
        assert abs(result["error"]) < 0.01, result
        assert result["predicted_after_step_bytes"] == pytest.approx(
            result["measured_after_step_bytes"], rel=0.01, abs=held_by_the_loop_bytes(result["cell"])
        )


def test_each_phase_of_a_real_run_is_predicted(results):
    """Phases of a steady step and the stages around it, each by itself: within 2 %, an evaluation up to 3 % too high.

    On the device, and under FSDP on the host.
    """
    for result in results:
        slack_bytes = held_by_the_loop_bytes(result["cell"])
        for name, figure in result["figures"].items():
            stage = name.removesuffix(" host")
            near = pytest.approx(figure["measured_bytes"], rel=0.02, abs=slack_bytes)
            if stage in SURE:
                assert figure["predicted_bytes"] == near, (result["cell"], name, figure)
            else:
                assert -0.01 < figure["predicted_bytes"] / figure["measured_bytes"] - 1 < 0.03, (result["cell"], name)
