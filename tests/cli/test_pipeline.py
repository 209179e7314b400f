"""The commands from end to end on a model that any machine traces and trains: what they print, write and exit with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from autofit.plan import adaptation, from_json, load_plan, to_json

SCHEMA = json.loads((Path(__file__).resolve().parents[2] / "docs" / "plan.schema.json").read_text(encoding="utf-8"))
SCRIPT = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

class Failing(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        raise RuntimeError("the third hard disk is on fire")

config = LlamaConfig(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
                     num_hidden_layers=2, vocab_size=256)
ids = torch.arange(32) % 256
print("a line of the script's own")
Trainer(
    model=LlamaForCausalLM(config),
    args=TrainingArguments("out", per_device_train_batch_size=2, max_steps=2, report_to="none", save_strategy="no"),
    train_dataset=[{"input_ids": ids, "labels": ids}] * 64,
    callbacks=[Failing()] if "--fail" in sys.argv else [],
).train()
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a small model's config.json and a script that trains it."""
    folder = tmp_path_factory.mktemp("job")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "vocab_size": 1024,
        "max_position_embeddings": 512,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "train.py").write_text(SCRIPT, encoding="utf-8")
    return folder


def run_in(folder, *arguments):
    """Run the command line as a process of its own in a folder."""
    command = [sys.executable, "-m", "autofit", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "110"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


FREE = ["--method", "full", "--sharding", "ddp", "--sharding", "zero2"]
PLAN = ["plan", *FREE, "--model", "config.json", "--seq-len", "64", "--global-batch", "8", "--gpus", "2xA100-80G"]
LAUNCH = ["launch", "--gpus", "2xCPU-1G", "--zero", "0"]


@pytest.fixture(scope="module")
def planned(folder):
    """Return what `plan --json -o run` did."""
    return run_in(folder, *PLAN, "--json", "-o", "run")


def test_a_plan_as_json_is_one_valid_object(planned):
    """Standard output holds one object that the published schema accepts; stderr, one line about tracing."""
    assert planned.returncode == 0, planned.stderr
    jsonschema.validate(json.loads(planned.stdout), SCHEMA)
    assert planned.stderr.count("\n") <= 1


def test_the_plan_that_is_written_is_the_plan_that_is_printed(planned, folder):
    """plan.json in the run folder loads back as what stdout said."""
    assert to_json(load_plan(folder / "run" / "plan.json")) == planned.stdout.rstrip("\n")


def test_a_second_plan_traces_nothing(planned, folder):
    """Once traced, a model is planned from its stored profile, without a word on stderr, and equally."""
    again = run_in(folder, *PLAN, "--json")
    assert again.stderr == ""
    assert again.stdout == planned.stdout


def test_planning_from_a_stored_profile_loads_no_training_stack(planned, folder):
    """The whole way from options to files, a process that plans what was traced before imports no torch."""
    program = "import sys; from autofit.cli import run; code = run(sys.argv[1:]); print(*sys.modules); sys.exit(code)"
    command = [sys.executable, "-c", program, *PLAN, "-o", "again"]
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in finished.stdout.splitlines()[-1].split()}
    assert "autofit" in loaded
    assert not loaded & {"torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes"}


def test_an_estimate_of_the_chosen_configuration_is_the_plan_of_it(planned, folder):
    """`estimate`, given every knob of the plan's choice, comes to the same bytes and seconds as the search did."""
    plan = json.loads(planned.stdout)
    chosen = plan["configuration"]
    checkpointing = "--gradient-checkpointing" if chosen["gradient_checkpointing"] else "--no-gradient-checkpointing"
    estimated = run_in(
        folder, "estimate", "--model", "config.json", "--seq-len", 64, "--gpus", "2xA100-80G",
        "--method", chosen["method"], "--optim", chosen["optim"], "--sharding", chosen["sharding"], checkpointing,
        "--micro-batch", chosen["per_device_train_batch_size"],
        "--gradient-accumulation-steps", chosen["gradient_accumulation_steps"], "--json",
    )  # fmt: skip
    document = json.loads(estimated.stdout)
    jsonschema.validate(document, SCHEMA)
    assert document["configuration"] == chosen
    assert document["memory"] == plan["memory"]
    assert document["time"] == plan["time"]
    assert document["fallbacks"] == []


@pytest.mark.parametrize("as_json", [False, True], ids=["for people", "for programs"])
def test_a_budget_of_one_megabyte_fits_nothing(folder, as_json):
    """Nothing fits two ranks of 1 MiB: exit code 3, the nearest configuration, by how much, and what would help."""
    arguments = [*PLAN[:-1], "2xCPU-1M", *(["--json"] if as_json else [])]
    result = run_in(folder, *arguments)
    said = json.loads(result.stdout)["error"] if as_json else result.stderr
    assert result.returncode == 3
    assert "Traceback" not in result.stderr
    if as_json:
        assert (said["kind"], said["exit_code"]) == ("NothingFitsError", 3)
        assert said["to_fix"]
    else:
        assert result.stdout == ""
        assert "Nearest:" in said
        assert "To fix:" in said


def test_a_dry_run_of_a_script_is_its_plan(folder):
    """What the script is about to train is read from it and planned; nothing is trained and nothing is written."""
    before = sorted(folder.rglob("*"))
    result = run_in(folder, *LAUNCH, "train.py", "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    plan = json.loads(result.stdout)
    jsonschema.validate(plan, SCHEMA)
    assert plan["configuration"]["method"] == "full"
    assert plan["inputs"]["job"]["workload"] == {
        "sequence_tokens": 32,
        "global_batch_sequences": 4,
        "lengths": None,
        "num_rows_per_sequence": 1,
    }
    assert sorted(folder.rglob("*")) == before


def test_a_launch_ends_with_predicted_beside_measured(folder):
    """A real launch on two CPU ranks ends with code 0; stdout is its summary alone, stderr has the script's words."""
    result = run_in(folder, *LAUNCH, "train.py", "-o", "launched", "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    memory = summary["memory"]
    assert len(memory["ranks"]) == 2
    assert memory["measured_peak_allocated_bytes"] > 0
    assert abs(memory["prediction_error_fraction"]) < 0.05
    assert "a line of the script's own" in result.stderr
    assert (folder / "launched" / "summary.json").exists()


@pytest.mark.parametrize(
    ("budget", "method", "planned", "because"),
    [
        ("1G", "auto", "full", None),
        ("2M", "auto", "lora", "nothing that trains as the script does fits, and --method allows lora"),
        ("1G", "lora", "lora", "you asked for --method lora"),
    ],
)
def test_a_scripts_method_is_changed_only_if_it_may_be(folder, budget, method, planned, because):
    """`--method auto` keeps full fine-tuning where it fits and adapts where it does not; a method that is asked for is
    taken. Whatever is not the script's own is said.
    """
    only = ["--optim", "adamw_torch_fused", "--no-gradient-checkpointing", "--precision", "fp32"]
    launch = ["launch", "train.py", "--gpus", f"2xCPU-{budget}", "--zero", "0", "--method", method, *only]
    result = run_in(folder, *launch, "--dry-run", "--json")
    assert result.returncode == 0, result.stderr
    plan = from_json(result.stdout)
    said = adaptation(plan)
    assert plan.configuration.method == planned
    assert (said is None) == (because is None)
    assert because is None or because in said


def test_a_script_that_fails_fails_the_launch(folder):
    """The script's own error ends the launch with code 1, is shown, and is not retried."""
    result = run_in(folder, *LAUNCH, "train.py", "-o", "failed", "--", "--fail")
    assert result.returncode == 1
    assert "the third hard disk is on fire" in result.stderr
    assert "error: the training failed" in result.stderr
    assert (folder / "failed" / "log.txt").exists()


def test_the_scripts_arguments_reach_it_when_it_is_read(folder):
    """A script that needs an argument to start gets it in discovery too."""
    (folder / "needs.py").write_text("import sys\nassert sys.argv[1:] == ['--epochs', '3']\n" + SCRIPT, "utf-8")
    result = run_in(folder, *LAUNCH, "needs.py", "--dry-run", "--json", "--", "--epochs", "3")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["inputs"]["job"]["script_arguments"] == ["--epochs", "3"]
