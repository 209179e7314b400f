"""What `autofit launch` says of a script before anything is started."""

import json
import shlex
from pathlib import Path

import pytest

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
