"""trl's own scripts, as they lie in its package, are discovered and launched like any other.

The source distributions of transformers 5.23, peft 0.21 and accelerate 1.15 hold no example scripts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data import topics

import pytest

from autofit.sources.hardware import parse_cluster
from autofit.sources.script import discover
from autofit.sources.script_job import job_from_discovery
from autofit.spec.configuration import Lora
from tests.scripts import write_tiny_models

pytestmark = pytest.mark.slow
TRL = importlib.util.find_spec("trl")
assert TRL is not None, "scripts/install.sh test installs trl"
SCRIPTS = Path(str(TRL.origin)).parent / "scripts"
FEW_TOPICS = sorted(topics.topics)[:24]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, a data set of texts and one of preferences."""
    path = tmp_path_factory.mktemp("official")
    write_tiny_models(path)
    texts = [{"text": topics.topics[name][:1500]} for name in FEW_TOPICS]
    pairs = [
        {"prompt": name, "chosen": topics.topics[name][:200], "rejected": topics.topics[name][200:300] or "no"}
        for name in FEW_TOPICS
    ]
    for name, rows in (("texts", texts), ("pairs", pairs)):
        (path / name).mkdir()
        (path / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(folder: Path, data: str, output: Path) -> list[str]:
    """Return what the scripts' documentation has their users pass, for a run of two steps with LoRA."""
    return [
        *("--model_name_or_path", str(folder / "llama"), "--dataset_name", str(folder / data)),
        *("--output_dir", str(output), "--max_length", "64", "--per_device_train_batch_size", "2"),
        *("--gradient_accumulation_steps", "3", "--use_peft", "--lora_r", "4", "--max_steps", "2"),
        *("--save_strategy", "no", "--report_to", "none"),
    ]


def test_trls_dpo_script_is_discovered(folder: Path, tmp_path: Path) -> None:
    """Pairs of 64 tokens each, six a device and step, with trl's own LoRA defaults around the given rank."""
    found = discover(SCRIPTS / "dpo.py", arguments(folder, "pairs", tmp_path / "out"))
    job = job_from_discovery(found, parse_cluster("2xCPU-8G"))
    assert (found.trainer, job.workload.num_rows_per_sequence) == ("DPOTrainer", 2)
    assert (job.workload.sequence_tokens, job.workload.global_batch_sequences) == (128, 12)
    expected = Lora(r=4, lora_alpha=32, lora_dropout=0.05, target_modules=("q_proj", "v_proj"))
    assert (job.restrictions.methods, job.restrictions.lora) == (("lora",), expected)
    assert not (tmp_path / "out").exists()


def test_trls_sft_script_is_launched_as_it_is(folder: Path, tmp_path: Path) -> None:
    """Discovered without a flag, verified on two ranks, and its adapter is saved where it was asked to be."""
    command = [sys.executable, "-m", "autofit", "launch", str(SCRIPTS / "sft.py"), "--gpus", "2xCPU-4G", "--json"]
    finished = subprocess.run(
        [*command, "--zero", "0", "-o", "run", "--", *arguments(folder, "texts", tmp_path / "out")],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    summary = json.loads(finished.stdout)
    assert summary["failure"] == "none"
    assert "adapter_model.safetensors" in summary["trained"][-1]["files"]
    measured = summary["memory"]["measured_peak_allocated_bytes"]
    assert 0.5 < measured / summary["memory"]["predicted_peak_allocated_bytes"] < 1.1
