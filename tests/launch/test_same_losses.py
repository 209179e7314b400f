"""What a plan changes of memory changes nothing of training: the losses are those of the script without autofit."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autofit.launch import launch
from tests.plans import a_configuration, a_plan
from tests.scripts import LEAVE_GLOO, write_tiny_llama

pytestmark = pytest.mark.slow
SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

folder, output = sys.argv[1:3]
model = AutoModelForCausalLM.from_pretrained(folder)
generator = torch.Generator().manual_seed(0)
rows = [torch.randint(0, 256, (32,), generator=generator) for _ in range(64)]
arguments = TrainingArguments(
    output_dir=output, max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3,
    logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, ddp_backend="gloo",
)
trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
trainer.train()
if trainer.is_world_process_zero():
    losses = [[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "loss" in entry]
    with open(output + ".json", "w") as file:
        json.dump(losses, file)
"""
"""A global batch of 8 sequences on two ranks, five steps."""
PLANS: dict[str, dict[str, Any]] = {
    "checkpointing, micro-batches of one": {
        "gradient_checkpointing": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
    },
    "ZeRO-2, one micro-batch": {
        "sharding": "zero2",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
    },
    "ZeRO-3": {"sharding": "zero3"},
}
NOISE = 2e-4
"""Relative; sums in fp32 are taken in another order, and the loss is logged to six digits."""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the script, beside a model."""
    folder = tmp_path_factory.mktemp("script")
    write_tiny_llama(folder / "model")
    (folder / "train.py").write_text(SCRIPT + LEAVE_GLOO)
    return folder / "train.py"


@pytest.fixture(scope="module")
def without(script: Path) -> list[list[float]]:
    """Return losses and gradient norms of the script alone, started by torchrun on two ranks."""
    out = script.parent / "alone"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    subprocess.run(
        [*command, "--standalone", str(script), str(script.parent / "model"), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        timeout=300,
    )
    return read(out)


def read(out: Path) -> list[list[float]]:
    """Read what a run logged."""
    return list(json.loads(out.with_suffix(".json").read_text()))


@pytest.mark.parametrize("name", PLANS)
def test_the_losses_are_those_without_a_plan(
    script: Path, without: list[list[float]], tmp_path: Path, name: str
) -> None:
    """Step by step, loss and norm of the gradient differ by no more than the noise of fp32 sums."""
    plan = a_plan(a_configuration(mixed_precision="no", optim="adamw_torch_fused", **PLANS[name]))
    out = tmp_path / "planned"
    arguments = [str(script.parent / "model"), str(out)]
    outcome = launch(plan, tmp_path / "run", script, arguments, stream=io.BytesIO())  # type: ignore[arg-type]
    assert outcome.exit_code == 0
    losses = read(out)
    assert len(losses) == len(without) == 5
    assert max_difference(losses, without) < NOISE
    assert losses[-1][0] < losses[0][0] - 1e-3, "nothing was learnt, so nothing was compared"


def max_difference(some: list[list[float]], others: list[list[float]]) -> float:
    """Return the largest relative difference of two lists of pairs."""
    pairs = [(a, b) for one, other in zip(some, others, strict=True) for a, b in zip(one, other, strict=True)]
    return max(abs(a / b - 1) for a, b in pairs)
