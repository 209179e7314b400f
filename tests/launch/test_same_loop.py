"""A loop of the script's own trains the same however the plan splits its global batch, and under ZeRO."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from autofit.launch import launch
from autofit.launch.evidence import read_events
from autofit.plan import Plan
from autofit.spec.job import ScriptLoop
from tests.plans import a_configuration, a_plan
from tests.scripts import LEAVE_GLOO, write_tiny_llama

pytestmark = pytest.mark.slow
SCRIPT = """
import json, math, sys
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, get_scheduler

ACCUMULATION, EPOCHS = 2, 2
folder, output = sys.argv[1:3]
accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
set_seed(0)
model = AutoModelForCausalLM.from_pretrained(folder)
generator = torch.Generator().manual_seed(0)
rows = [torch.randint(0, 256, (32,), generator=generator) for _ in range(48)]
loader = DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=2, shuffle=True)
held_out = DataLoader([{"input_ids": row, "labels": row} for row in rows[:6]], batch_size=2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
num_steps = EPOCHS * math.ceil(len(loader) / accelerator.num_processes / ACCUMULATION)
scheduler = get_scheduler("linear", optimizer, 0, num_steps * accelerator.num_processes)
held_out, model, optimizer, loader, scheduler = accelerator.prepare(held_out, model, optimizer, loader, scheduler)
assert EPOCHS * math.ceil(len(loader) / ACCUMULATION) == num_steps
log, losses = [], []
for epoch in range(EPOCHS):
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            losses.append(accelerator.gather(loss.detach()).mean().item())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            log.append([sum(losses) / len(losses), scheduler.get_last_lr()[0]])
            losses = []
    model.eval()
    with torch.no_grad():
        assert all(batch["input_ids"].shape[0] == 2 for batch in held_out)
assert len(log) == num_steps and log[-1][1] == 0, log
weights = accelerator.get_state_dict(model)
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(output, state_dict=weights)
    with open(output + ".json", "w") as file:
        json.dump(log, file)
"""
"""A global batch of 8 sequences on two ranks, six steps an epoch."""
LOOP = ScriptLoop(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.5, train_loader=1)
PLANS: dict[str, dict[str, Any]] = {
    "one micro-batch": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
    "ZeRO-2, micro-batches of one": {
        "sharding": "zero2",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
    },
    "ZeRO-3": {"sharding": "zero3"},
}
NOISE = 2e-4
"""Relative: sums in fp32 are taken in another order."""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the script, beside a model."""
    folder = tmp_path_factory.mktemp("script")
    write_tiny_llama(folder / "model")
    (folder / "train.py").write_text(SCRIPT + LEAVE_GLOO)
    return folder / "train.py"


@pytest.fixture(scope="module")
def alone(script: Path) -> Path:
    """Return what the script leaves when torchrun starts it on two ranks."""
    out = script.parent / "alone"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    arguments = [str(script.parent / "model"), str(out)]
    subprocess.run([*command, *arguments], env=environment, check=True, capture_output=True, timeout=300)
    return out


def planned(**configuration: Any) -> Plan:
    """Return a plan for the script."""
    plan = a_plan(a_configuration(mixed_precision="no", optim="sgd", **configuration))
    job = structs.replace(plan.inputs.job, script_loop=LOOP)
    return structs.replace(plan, inputs=structs.replace(plan.inputs, job=job))


def weights_of(folder: Path) -> dict[str, Any]:
    """Read saved weights."""
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("name", PLANS)
def test_a_loop_trains_as_it_does_alone(script: Path, alone: Path, tmp_path: Path, name: str) -> None:
    """Step by step the same loss and learning rate, as many steps, and the same weights in the end; all verified."""
    out, run = tmp_path / "planned", tmp_path / "run"
    outcome = launch(planned(**PLANS[name]), run, script, [str(script.parent / "model"), str(out)], stream=io.BytesIO())
    assert outcome.exit_code == 0
    some, others = json.loads(out.with_suffix(".json").read_text()), json.loads(alone.with_suffix(".json").read_text())
    assert len(some) == len(others) == 12
    assert [rate for _, rate in some] == pytest.approx([rate for _, rate in others])
    assert [loss for loss, _ in some] == pytest.approx([loss for loss, _ in others], rel=NOISE)
    assert some[-1][0] < some[0][0] - 1e-3, "nothing was learnt, so nothing was compared"
    own = weights_of(alone)
    assert own.keys() == weights_of(out).keys()
    for weight, tensor in weights_of(out).items():
        assert (tensor - own[weight]).abs().max() < NOISE, weight
    checked = {
        setting: value
        for event in read_events(run)
        if event.kind == "verified"
        for setting, value, _ in event.detail["checks"]
    }
    assert checked["optimizer steps of an epoch"] == "6"
    assert "gradient_accumulation_steps" in checked
