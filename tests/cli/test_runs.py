"""What runs taught, from the command line: listed, shared, fitted, and said of every plan that uses it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jsonschema
import pytest
from msgspec import structs

from autofit.calibrate.store import append, read, store_path
from autofit.files import calibration_path
from autofit.spec.calibration import plain_versions
from autofit.spec.libraries import installed_versions
from tests.calibrate.some_records import a_record

SCHEMA = json.loads((Path(__file__).resolve().parents[2] / "docs" / "plan.schema.json").read_text(encoding="utf-8"))
ESTIMATE = ["estimate", "--model", "HuggingFaceTB/SmolLM2-135M", "--seq-len", 512, "--gpus", "1xA100-80G"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return a cache of the test's own, without runs; what other tests have traced is in it."""
    folder, traced = tmp_path / "cache", Path(os.environ["AUTOFIT_CACHE"]) / "profiles"
    folder.mkdir()
    traced.mkdir(exist_ok=True)
    (folder / "profiles").symlink_to(traced)
    monkeypatch.setenv("AUTOFIT_CACHE", str(folder))
    return folder


def remember(cache, num_runs, **ratios):
    """Remember runs of an A100 under the installed libraries, off by the given ratios."""
    versions = plain_versions(installed_versions())
    append(store_path(cache), [a_record(n, versions=versions, **ratios) for n in range(num_runs)])


def test_without_runs_there_is_nothing_to_calibrate(autofit, cache):
    """`runs` says where they will be; `calibrate` is refused with what to do."""
    listed, fitted = autofit("runs"), autofit("calibrate")
    assert (listed.exit_code, fitted.exit_code) == (0, 2)
    assert str(cache / "runs.jsonl") in listed.stdout.replace("\n", "")
    assert "autofit launch" in fitted.stderr


def test_runs_are_listed_exported_and_imported(autofit, cache, tmp_path, monkeypatch):
    """One line a run; an export imported elsewhere is the same list, and importing it again adds nothing."""
    remember(cache, 3)
    listed = autofit("runs", "--json")
    assert len(json.loads(listed.stdout)["runs"]) == 3
    assert autofit("runs").stdout.count("LlamaForCausalLM") == 3
    assert autofit("runs", "--export", tmp_path / "shared.json").exit_code == 0
    monkeypatch.setenv("AUTOFIT_CACHE", str(tmp_path / "elsewhere"))
    for _ in range(2):
        imported = autofit("runs", "--import", tmp_path / "shared.json", "--json")
        assert json.loads(imported.stdout)["runs"] == json.loads(listed.stdout)["runs"]
    refused = autofit("runs", "--export", tmp_path / "shared.json")
    assert (refused.exit_code, "Traceback" in refused.stderr) == (2, False)


def test_a_broken_line_is_said_and_the_rest_is_listed(autofit, cache):
    """What cannot be read is named on stderr with its line; the table has the others."""
    remember(cache, 2)
    with store_path(cache).open("ab") as file:
        file.write(b'{"half a')
    listed = autofit("runs", "--json")
    assert len(json.loads(listed.stdout)["runs"]) == 2
    assert "line 3" in listed.stderr


def test_an_estimate_says_that_it_is_calibrated_and_how_far_it_moved(autofit, cache):
    """After `calibrate`, each phase holds what the runs taught, the figure before is kept, and --no-calibration is it.

    The moved bytes are those of the formula, worked out here from the phases of the plain estimate.
    """
    plain = json.loads(autofit(*ESTIMATE, "--json").stdout)
    remember(cache, 300, static=1.03, per_token=1.05, time=1.5)
    assert autofit("calibrate", "--dry-run").exit_code == 0
    assert not calibration_path(cache).exists()
    fitted = json.loads(autofit("calibrate", "--json").stdout)["fitted"][0]
    assert fitted["errors"]["peak"][1] < fitted["errors"]["peak"][0]
    found = json.loads(autofit(*ESTIMATE, "--json").stdout)
    jsonschema.validate(found, SCHEMA)

    factors = {name: 1 + fitted["calibration"][name]["applied_fraction"] for name in ("static", "per_token")}
    static = plain["memory"]["after_step_allocated_bytes"] * (factors["static"] - 1)
    tokens = ("activations", "outputs", "batch")
    expected = max(
        phase["bytes"] + static + sum(phase["terms"].get(name, 0) for name in tokens) * (factors["per_token"] - 1)
        for phase in plain["memory"]["phases"]
    )
    assert found["memory"]["peak_allocated_bytes"] == pytest.approx(expected, abs=3)
    moved = found["memory"]["peak_allocated_bytes"] - plain["memory"]["peak_allocated_bytes"]
    assert moved > 0
    assert found["memory"]["process_bytes"] == plain["memory"]["process_bytes"] + moved
    assert all(phase["bytes"] == sum(phase["terms"].values()) for phase in found["memory"]["phases"])
    assert found["uncalibrated"]["peak_allocated_bytes"] == plain["memory"]["peak_allocated_bytes"]
    assert found["time"]["step_seconds"] == pytest.approx(1.5 * plain["time"]["step_seconds"], rel=0.05)
    assert any("calibrated on 300 runs of A100-SXM-80G" in reason for reason in found["reasons"])
    assert "calibrated on 300 runs" in autofit(*ESTIMATE).stdout.replace("\n", " ")
    assert json.loads(autofit(*ESTIMATE, "--no-calibration", "--json").stdout) == plain


def test_runs_of_another_device_or_release_move_nothing(autofit, cache):
    """An estimate for an H100, or under libraries that no run had, is what it was."""
    remember(cache, 50, static=1.2)
    other = [structs.replace(a_record(1000 + n, static=1.5), versions={"torch": "1.0"}) for n in range(50)]
    append(store_path(cache), other)
    autofit("calibrate")
    on_h100 = [*ESTIMATE[:-1], "1xH100-80G"]
    assert autofit(*on_h100, "--json").stdout == autofit(*on_h100, "--no-calibration", "--json").stdout
    reasons = json.loads(autofit(*ESTIMATE, "--json").stdout)["reasons"]
    assert any("calibrated on 50 runs" in reason for reason in reasons)


def test_a_calibration_that_cannot_be_read_is_said(autofit, cache):
    """A damaged file is refused with what to do, and left out when asked."""
    calibration_path(cache).write_text("{", encoding="utf-8")
    refused = autofit(*ESTIMATE)
    assert (refused.exit_code, "--no-calibration" in refused.stderr) == (2, True)
    assert autofit(*ESTIMATE, "--no-calibration").exit_code == 0


SCRIPT = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
config = LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
                     num_hidden_layers=2, vocab_size=256)
ids = torch.arange(32) % 256
Trainer(
    model=LlamaForCausalLM(config),
    args=TrainingArguments("out", per_device_train_batch_size=2, max_steps=3, report_to="none", save_strategy="no"),
    train_dataset=[{"input_ids": ids, "labels": ids}] * 64,
).train()
"""


@pytest.mark.slow
def test_a_launch_is_remembered_with_every_rank(autofit, cache, tmp_path, monkeypatch):
    """A real run on two CPU ranks: both ranks' figures, the longest batch, within 1 % of predicted; then it is learned
    from, and the next plan says so.
    """
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(SCRIPT, encoding="utf-8")
    free = ["--zero", 0, "--optim", "adamw_torch_fused", "--no-gradient-checkpointing"]
    launch = ["launch", "train.py", "--gpus", "2xCPU-1G", *free]
    assert autofit(*launch, "-o", "run", "--json").exit_code == 0
    (record,) = read(store_path(cache)).records
    assert (record.device, record.num_devices, record.failure, record.row_tokens) == ("CPU", 2, "none", 32)
    assert [(rank.rank, rank.num_steps, rank.longest_batch_tokens) for rank in record.ranks] == [(0, 3, 32), (1, 3, 32)]
    assert record.predicted.peak_allocated_bytes == pytest.approx(record.peak_allocated_bytes, rel=0.01)
    after = max(rank.after_step_allocated_bytes for rank in record.ranks)
    assert record.predicted.after_step_allocated_bytes == pytest.approx(after, rel=0.01)
    assert str(tmp_path) not in store_path(cache).read_text(encoding="utf-8")
    assert autofit("calibrate").exit_code == 0
    planned = json.loads(autofit(*launch, "--dry-run", "--json").stdout)
    assert any("calibrated on 1 runs of CPU" in reason for reason in planned["reasons"])
