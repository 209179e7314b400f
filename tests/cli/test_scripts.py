"""What `autofit launch` says of a script before anything is started."""

import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from autofit.report.progress import discovery_display
from tests.plans import TINY_LLAMA

FULL = Path(__file__).resolve().parents[1] / "sources" / "scripts" / "full.py"
READ = ("launch", FULL, "--no-discover", "--seq-len", 4096, "--dry-run", "--precision", "fp32", "--zero", 0)


def test_what_was_read_is_shown_also_where_nothing_fits(autofit):
    """Llama-3.1-8B does not fit two ranks of 8 GB; what the script was taken for stands before the refusal."""
    result = autofit(*READ, "--model", "meta-llama/Llama-3.1-8B", "--gpus", "2xCPU-8G")
    assert result.exit_code == 3
    assert result.stderr.index("Read from the script") < result.stderr.index("does not fit")
    assert "the script was read, not run (--no-discover)" in result.stderr
    assert "4 sequences a device x 2 accumulation steps x 2 devices, read in full.py:" in result.stderr


def test_a_script_without_a_model_is_refused_in_words(autofit):
    """full.py takes its model from the command line, where there is none: --model is asked for."""
    result = autofit(*READ, "--gpus", "2xCPU-8G")
    assert result.exit_code == 2
    assert "does not say which model it trains" in result.stderr
    assert "--model" in result.stderr


CANNOT_RUN = """
import not_installed_here
BLOCK_SIZE = 64
model = AutoModelForCausalLM.from_pretrained("tiny")
Trainer(model=model, args=TrainingArguments("out", per_device_train_batch_size=2)).train()
"""


@pytest.fixture
def cannot_run(tmp_path, monkeypatch):
    """Return the arguments that launch a script which needs a module that is not there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(CANNOT_RUN)
    (tmp_path / "tiny").mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TINY_LLAMA}
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    return (
        "launch",
        "train.py",
        "--gpus",
        "2xCPU-8G",
        "--precision",
        "fp32",
        "--zero",
        "0",
        "--no-gradient-checkpointing",
        "--optim",
        "sgd",
        "-o",
        "run",
    )


@pytest.mark.slow
def test_a_script_that_cannot_be_run_is_planned_from_its_source(autofit, cannot_run, tmp_path):
    """--dry-run says first what failed and that all is guessed; the plan it stores says so too."""
    result = autofit(*cannot_run, "--dry-run", "--json")
    assert result.exit_code == 0
    assert result.stderr.index("could not be run here") < result.stderr.index("guessed from its source")
    assert "No module named 'not_installed_here'" in result.stderr
    found = json.loads(result.stdout)["inputs"]["job"]["found"]
    assert next(iter(found)) == "guessed"
    assert "No module named 'not_installed_here'" in found["guessed"]
    assert found["sequence"] == "64 tokens, which the source names; no data was looked at, read in train.py:3"
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["inputs"]["job"]["found"] == found


@pytest.mark.slow
def test_a_training_on_guesses_has_to_be_asked_for(autofit, cannot_run, tmp_path):
    """Without --dry-run the plan is said in a line, nothing is started, and the command that would is named."""
    result = autofit(*cannot_run)
    assert result.exit_code == 2
    assert not (tmp_path / "run").exists()
    assert "Full fine-tuning of" in result.stderr
    command = result.stderr.rpartition("Hint: ")[2].strip()
    assert shlex.split(command) == ["autofit", "launch", "--no-discover", *cannot_run[1:]]
    asked = autofit(*shlex.split(command)[1:], "--dry-run")
    assert asked.exit_code == 0
    assert "the script was read, not run (--no-discover)" in asked.stdout


@pytest.mark.slow
def test_what_cannot_be_run_and_names_nothing_stays_refused(autofit, cannot_run, tmp_path):
    """Where the source says no more, the refusal is that of the run."""
    (tmp_path / "train.py").write_text("import not_installed_here\n")
    result = autofit(*cannot_run, "--dry-run")
    assert result.exit_code == 2
    assert "failed (exit code 1) before it began to train" in result.stderr
    assert "guessed" not in result.stderr


SLOW_DATA = """
import time
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
class Rows:
    def __len__(self):
        return 300
    def __getitem__(self, index):
        print("[1, 2]")
        time.sleep(0.003)
        return {"input_ids": [1] * 16, "labels": [1] * 16}
arguments = TrainingArguments("out", torch_compile=True)
Trainer(LlamaForCausalLM(LlamaConfig(**sizes)), arguments, train_dataset=Rows()).train()
"""
"""It is refused as soon as it has been looked at, so that nothing is planned."""


@pytest.mark.slow
def test_a_bar_shows_the_lengths_being_read_and_json_stays_alone(tmp_path):
    """On a terminal the samples are counted up while they are looked at; stdout has one JSON object and nothing else,
    though the script prints JSON too.
    """
    script = tmp_path / "train.py"
    script.write_text(SLOW_DATA)
    command = [sys.executable, "-m", "autofit", "launch", script, "--dry-run", "--json", "--gpus", "2xCPU-8G"]
    terminal, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "200", "TERM": "xterm"}
    done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True)
    os.close(theirs)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(iter(lambda: _read(terminal), b"")).decode())
    assert "torch_compile" in json.loads(done.stdout.read())["error"]["message"]
    assert done.wait() == 2
    assert "up to its first training step" in shown
    assert "lengths of the samples of train.py" in shown
    counted = [int(number) for number in re.findall(r"(\d+)/300", shown)]
    assert counted == sorted(counted)
    assert 3 < len(set(counted)) <= 300


def _read(terminal):
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other side is closed
        return b""


def test_in_a_pipe_one_line_says_what_takes_long():
    """Where nobody watches, no bar is drawn, however many samples there are."""
    text = io.StringIO()
    with discovery_display(Console(file=text, width=200), Path("a/train.py")) as report:
        for done in range(100):
            report("train.py", done, 100)
    assert text.getvalue() == "Running train.py up to its first training step, to see what it trains ...\n"
