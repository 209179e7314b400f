"""Bad input gets exit code 2, a message that says what was given and what to do, and never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from autofit.plan import to_json
from tests.plans import a_configuration, a_plan

PLAN = {"--model": "meta-llama/Llama-3.1-8B", "--seq-len": "512", "--global-batch": "8", "--gpus": "2xA100-80G"}


def plan_arguments(**changes):
    """Return the arguments of a plan that would succeed, with some of them changed."""
    options = PLAN | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    return ["plan", *(part for pair in options.items() for part in pair)]


def assert_refused(result, *words):
    """Check that a command was refused as wrong input, on stderr alone, in words that a user can act on."""
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "meta-llama/Llama-3.1-8C"}, ["Llama-3.1-8C", "Llama-3.1-8B", "To fix:"]),
        ({"model": "/nowhere/config.json"}, ["/nowhere/config.json", "To fix:"]),
        ({"model": ""}, ["To fix:"]),
        ({"gpus": "2xA100-90G"}, ["A100-90G", "A100-80G", "To fix:"]),
        ({"gpus": "0xA100-80G"}, ["0", "To fix:"]),
        ({"gpus": ""}, ["To fix:"]),
        ({"seq_len": "0"}, ["--seq-len", "greater than or equal to 1"]),
        ({"seq_len": "-5"}, ["--seq-len"]),
        ({"seq_len": "many"}, ["--seq-len", "integer"]),
        ({"global_batch": "0"}, ["--global-batch"]),
        ({"method": "dora"}, ["'dora'", "qlora"]),
        ({"optim": "sgdd"}, ["'sgdd'", "adamw_torch_fused"]),
        ({"zero": "4"}, ["--zero"]),
        ({"precision": "fp8"}, ["fp8", "bf16"]),
        ({"lora_target_modules": " , "}, ["--lora-target-modules", "To fix:"]),
        ({"zero": "2", "sharding": "ddp"}, ["--zero and --sharding"]),
        ({"output": ""}, ["--output", "leave the option out"]),
        ({"output": "a\0b"}, ["--output", "NUL"]),
        ({"output": "--gpus"}, ["--gpus names an option", "./--gpus"]),
        ({"price": "a\0b"}, ["--price"]),
        ({"price": "nan"}, ["is no price"]),
        ({"price": "1" + "0" * 30}, ["is no price"]),
        ({"global_batch": "9" * 24}, ["--global-batch", "beyond all reason"]),
        ({"gpus": "999999999999xA100-80G"}, ["more devices than there are"]),
        ({"per_device_eval_batch_size": "9" * 24}, ["--per-device-eval-batch-size", "beyond all reason"]),
        ({"lora_alpha": "9" * 24}, ["--lora-alpha", "beyond all reason"]),
        ({"tokens": "1e30"}, ["--tokens"]),
    ],
    ids=str,
)
def test_a_wrong_value_is_named(autofit, changes, words):
    """What was given is repeated, and beside it stands what may be given instead."""
    assert_refused(autofit(*plan_arguments(**changes)), *words)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"hidden_size": 64}', '{"model_type": 3}', '{"model_type": "nosuch"}', "\x00\xff"],
    ids=repr,
)
def test_a_broken_config_is_refused(autofit, tmp_path, text):
    """A config.json that is empty, cut off, of another kind or without a model type is wrong input, with its path."""
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    assert_refused(autofit(*plan_arguments(model=path)), "config.json")


def test_a_model_in_a_folder_with_a_strange_name_is_found(autofit, weird_tmp_path):
    """Quotes, blanks, dollar signs and newlines in a path reach the file; its content is what is refused."""
    (weird_tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert_refused(autofit(*plan_arguments(model=weird_tmp_path)), "JSON")


def test_every_missing_option_is_named_with_what_it_means(autofit):
    """What a command needs and was not given is said at once, each with its value and its meaning, and nothing else."""
    refused = autofit("plan", "--model", "meta-llama/Llama-3.1-8B")
    assert_refused(refused, "--global-batch SEQUENCES: Sequences in one optimizer step", "--gpus GPUS: 2xA100-80G")
    assert "--model" not in refused.stderr


def test_a_misspelt_command_is_answered_with_the_right_one(autofit):
    """The nearest command is offered."""
    assert_refused(autofit("plna"), "plan")


def test_an_unknown_template_is_answered_with_the_known_ones(autofit):
    """The names of the templates are in the message."""
    assert_refused(autofit("templates", "lunch.sh"), "launch.sh")


def test_a_refusal_asked_for_as_json_is_one_object(autofit):
    """With --json a refusal is a JSON object on stdout, with the exit code of the process in it."""
    result = autofit(*plan_arguments(gpus="2xA100-90G"), "--json")
    error = json.loads(result.stdout)["error"]
    assert result.exit_code == error["exit_code"] == 2
    assert error["kind"] == "InputError"
    assert "A100-90G" in error["message"]


def test_a_misspelt_option_asked_for_as_json_is_one_object(autofit):
    """So is a command line that cannot be parsed."""
    result = autofit("plan", "--modle", "x", "--json")
    assert result.exit_code == 2
    assert "--modle" in json.loads(result.stdout)["error"]["message"]


def test_the_scripts_own_json_flag_is_not_ours(autofit):
    """What follows -- belongs to the script: a --json there does not change how autofit speaks."""
    result = autofit("launch", "/nowhere/train.py", "--gpus", "2xCPU-8G", "--", "--json")
    assert_refused(result, "/nowhere/train.py")


def test_the_process_exits_with_the_code_and_no_traceback(tmp_path):
    """As a real process too, bad input ends with code 2, an empty stdout and no traceback."""
    command = [sys.executable, "-m", "autofit", *plan_arguments(model=str(tmp_path / "nothing.json"))]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert "nothing.json" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_reader_that_stops_early_gets_no_traceback():
    """`autofit models | head -1` ends quietly."""
    command = f"{sys.executable} -m autofit models | head -1"
    finished = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    assert finished.stdout.count("\n") == 1
    assert "Traceback" not in finished.stderr
    assert "BrokenPipe" not in finished.stderr


def test_a_word_without_an_option_is_named_before_what_is_missing(autofit):
    """A model given as other tools take it gets the option's name, and --help is still help."""
    assert_refused(autofit("plan", "org/model", "--gpus", "A100-80G"), "'org/model'", "--model org/model")
    assert autofit("plan", "org/model", "--help").exit_code == 0


@pytest.mark.parametrize(("arguments", "is_of_script"), [(("t.py", "--lr", "1"), True), ((), False)])
def test_a_scripts_own_arguments_are_told_their_place(autofit, arguments, is_of_script):
    """What launch does not know may be the script's; a launch without a script is another mistake."""
    result = autofit("launch", *arguments)
    assert_refused(result)
    assert ("the script's own arguments after --" in result.stderr) == is_of_script


def test_a_list_of_prices_with_a_price_of_the_wrong_kind_is_refused(autofit, tmp_path):
    """Also where that price is not the one that is asked for."""
    (tmp_path / "prices.yaml").write_text("A100-80G: {spot: cheap, on-demand: 1.5}\n")
    assert_refused(autofit(*plan_arguments(price=str(tmp_path / "prices.yaml"))), "'cheap' is no price")


def test_a_run_folder_whose_name_is_no_text_is_refused(autofit, tmp_path):
    """A name in another encoding than UTF-8 cannot be written into the run's files."""
    assert_refused(autofit(*plan_arguments(output=f"{tmp_path}/run\udcff", method="lora")), "UTF-8", "To fix:")
    assert not list(tmp_path.iterdir())


NONSENSE = {
    "num_processes is 0": ("configuration", "num_processes", 0),
    "a micro-batch of nothing": ("configuration", "per_device_train_batch_size", 0),
    "negative accumulation": ("configuration", "gradient_accumulation_steps", -3),
    "another global batch": ("configuration", "gradient_accumulation_steps", 7),
    "no adapter": ("configuration", "lora", None),
    "a budget of nothing": ("memory", "budget_bytes", 0),
    "no devices": ("inputs.cluster", "num_devices_per_node", 0),
    "memory below nothing": ("inputs.cluster.device", "memory_bytes", -1),
    "tokens beyond 64 bits": ("inputs.job.workload", "sequence_tokens", 10**30),
    "no precision": ("inputs.job.restrictions", "precision", []),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_plan_that_makes_no_sense_is_none(autofit, tmp_path, name):
    """Values of the right type that no plan has are refused by whatever reads the plan, and so is half a file."""
    path, field, value = NONSENSE[name]
    configuration = a_configuration(method="lora", gradient_accumulation_steps=2)
    document = json.loads(to_json(a_plan(configuration)))
    part = document
    for key in path.split("."):
        part = part[key]
    part[field] = value
    (tmp_path / "train.py").write_text("")
    for text in (json.dumps(document), json.dumps(document)[:-40], '{"schema_version": 1, "inputs":' + "[" * 100_000):
        (tmp_path / "plan.json").write_text(text)
        for command in (["explain", "plan.json"], ["launch", "train.py", "--plan", "plan.json", "--dry-run"]):
            arguments = [str(tmp_path / each) if "." in each else each for each in command]
            assert_refused(autofit(*arguments), "plan.json", "To fix:")


@pytest.mark.parametrize("command", ["plan", "compare", "estimate"])
def test_a_command_that_starts_nothing_says_so_of_dry_run(autofit, command):
    """`--dry-run` is launch's: of what never starts a training it is said to be needless."""
    assert_refused(
        autofit(*plan_arguments(), "--dry-run") if command == "plan" else autofit(command, "--dry-run"),
        "No such option: --dry-run",
        f"leave it out: {command} never starts a training",
    )


@pytest.mark.parametrize("as_json", [False, True])
def test_a_comparison_that_finds_no_hardware_ends_as_plan_would(autofit, as_json):
    """With 2 if what was given cannot be planned on any of it, with 3 if it would fit on none of which it can.

    What was asked for is printed all the same, with the reason of each; one that fits is enough for a 0.
    """
    job = ("--model", "HuggingFaceTB/SmolLM2-135M-Instruct", "--seq-len", "512", "--global-batch", "8")
    extra = ("--json",) if as_json else ()
    none = autofit("compare", *job, "--gpus", "3xA100-80G", *extra)
    assert none.exit_code == autofit("plan", *job, "--gpus", "3xA100-80G").exit_code == 2
    assert "does not divide over 3 devices" in none.stdout
    assert none.stderr == ""
    large = ("--model", "meta-llama/Llama-3.1-8B", "--seq-len", "512", "--global-batch", "8", "--method", "full")
    assert autofit("compare", *large, "--gpus", "1xT4-16G", "--gpus", "3xA100-80G", *extra).exit_code == 3
    if not as_json:
        assert autofit("compare", *job, "--gpus", "3xA100-80G", "--gpus", "T4").exit_code == 0
