"""A probe before the start: real processes, the longest batch, nothing saved; and what it decides."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from autofit.launch import Conduct, launch
from autofit.launch.evidence import read_events
from autofit.runtime.probe import stretched
from tests.plans import a_configuration, a_plan
from tests.scripts import TRAIN_SCRIPT, write_tiny_llama


@pytest.mark.slow
def test_a_probe_takes_the_next_rung_before_anything_is_trained(tmp_path: Path) -> None:
    """Full training is beyond the budget: its probe says so, and its training is not started. The adapter's probe takes
    two steps on batches of the planned length, longer than any of the script's, saves nothing, and is then started.
    """
    model = write_tiny_llama(tmp_path / "model")
    script = tmp_path / "train.py"
    saved_early = "if __import__('os').environ.get('AUTOFIT_PROBE'): trainer.save_model(output + '-of-a-probe')\n"
    script.write_text(TRAIN_SCRIPT + saved_early)
    plan = a_plan(
        budget_bytes=1_750_000,
        sequence_tokens=48,
        peak_allocated_bytes=1_000_000,
        fallbacks=(a_configuration(method="lora"),),
    )
    outcome = launch(
        plan,
        tmp_path / "run",
        script,
        [str(model), str(tmp_path / "out")],
        stream=io.BytesIO(),  # type: ignore[arg-type]
        conduct=Conduct(probes=True, store=tmp_path / "runs.jsonl"),
    )
    assert (outcome.exit_code, outcome.rung) == (0, 1)
    attempts = outcome.summary["attempts"]
    assert [(each["failure"], each["is_probe"]) for each in attempts] == [("out_of_memory", True), ("none", False)]
    assert not list((tmp_path / "run").glob("events-rank*"))

    probed = read_events(tmp_path / "run" / "rung-1" / "probe")
    assert {event.detail["tokens"] for event in probed if event.kind == "batch"} == {48}
    assert {event.detail["step"] for event in probed if event.kind == "step"} == {1, 2}
    assert not [event for event in probed if event.kind == "saved"]
    assert not (tmp_path / "out-of-a-probe").exists()
    trained = read_events(tmp_path / "run" / "rung-1")
    assert {event.detail["tokens"] for event in trained if event.kind == "batch"} == {32}
    assert (
        outcome.summary["probe"]["measured_peak_allocated_bytes"]
        > (outcome.summary["memory"]["measured_peak_allocated_bytes"])
    )
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_stretched_batch_is_one_that_could_occur() -> None:
    """Every row has the planned length and counts whole: its mask is one where it was added, its loss sees each token,
    positions go on; what is not one value a token stays, and so does a batch that is long enough.
    """
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([[5, 6, 7], [8, 9, -100]]),
        "position_ids": torch.arange(3).expand(2, 3),
        "class": torch.tensor([1, 0]),
    }
    longer = stretched(batch, 5)
    assert longer["input_ids"].tolist() == [[5, 6, 7, 7, 7], [8, 9, 0, 0, 0]]
    assert longer["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]]
    assert longer["labels"].tolist() == [[5, 6, 7, 7, 7], [8, 9, -100, 0, 0]]
    assert longer["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert longer["class"].tolist() == [1, 0]
    assert stretched(batch, 3) is batch
    packed = {"input_ids": ids[:1], "cu_seq_lens_q": torch.tensor([0, 3])}
    assert stretched(packed, 9) is packed
