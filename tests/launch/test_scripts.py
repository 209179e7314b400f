"""Scripts that know nothing of autofit, launched as they are: discovered without a flag, and verified on two ranks."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from autofit.errors import InputError
from autofit.launch.evidence import read_events
from autofit.plan import load_plan
from autofit.sources.hardware import parse_cluster
from autofit.sources.script import discover
from autofit.sources.script_job import job_from_discovery
from tests.scripts import write_tiny_models

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LLAMA, BERT, OUT = "LLAMA", "BERT", "OUT"
"""Words in a script's arguments, for what a test makes."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A script, and what it says itself that it trains: to be found on two ranks."""

    script: str
    arguments: tuple[str, ...]
    architecture: str
    tokens: int
    global_batch: int
    method: str
    batching: str
    loss: str = "stock"
    lora_r: int | None = None


CASES = {
    "HfArgumentParser": Case(
        script="run_clm.py",
        arguments=(
            *("--model_name_or_path", LLAMA, "--block_size", "48", "--output_dir", OUT, "--max_steps", "2"),
            *("--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "2", "--save_strategy", "no"),
        ),
        architecture="LlamaForCausalLM",
        tokens=48,
        global_batch=12,
        method="full",
        batching="equal",
    ),
    "SFT packed": Case(
        script="sft.py",
        arguments=("--model", LLAMA, "--output", OUT),
        architecture="LlamaForCausalLM",
        tokens=256,
        global_batch=8,
        method="lora",
        batching="packed",
        loss="chunked",
        lora_r=8,
    ),
    "SFT on completions": Case(
        script="sft.py",
        arguments=("--completion-only", "--model", LLAMA, "--output", OUT),
        architecture="LlamaForCausalLM",
        tokens=256,
        global_batch=8,
        method="lora",
        batching="padded",
        loss="chunked",
        lora_r=8,
    ),
    "DPO": Case(
        script="dpo.py",
        arguments=("--model", LLAMA, "--output", OUT),
        architecture="LlamaForCausalLM",
        tokens=2 * 128,
        global_batch=8,
        method="lora",
        batching="padded",
        loss="chunked",
        lora_r=8,
    ),
    "a loop": Case(
        script="accelerate_loop.py",
        arguments=("--model", LLAMA, "--output", OUT, "--max-steps", "2"),
        architecture="LlamaForCausalLM",
        tokens=128,
        global_batch=8,
        method="full",
        batching="equal",
    ),
    "classification": Case(
        script="classify.py",
        arguments=("--model", BERT, "--output", OUT),
        architecture="BertForSequenceClassification",
        tokens=128,
        global_batch=16,
        method="full",
        batching="padded",
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the folders that stand for the words in the cases' arguments."""
    llama, bert = write_tiny_models(tmp_path_factory.mktemp("models"))
    return {LLAMA: str(llama), BERT: str(bert)}


@pytest.fixture(scope="module", params=CASES)
def launched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, folders: dict[str, str]
) -> tuple[Case, Path, dict[str, Any]]:
    """Launch a script on two CPU ranks without sharding; no flag says what it trains."""
    case, folder = CASES[request.param], tmp_path_factory.mktemp("run")
    words = {**folders, OUT: str(folder / "out")}
    arguments = [words.get(word, word) for word in case.arguments]
    return case, folder / "run", launch_command(folder, case.script, arguments)


def launch_command(folder: Path, script: str, arguments: list[str]) -> dict[str, Any]:
    """Run the command line as a user would, and return the summary that it prints."""
    command = [sys.executable, "-m", "autofit", "launch", str(EXAMPLES / script), "--gpus", "2xCPU-4G"]
    finished = subprocess.run(
        [*command, "--zero", "0", "--json", "-o", str(folder / "run"), "--", *arguments],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return dict(json.loads(finished.stdout))


def test_it_is_discovered_without_a_flag(launched: tuple[Case, Path, dict[str, Any]]) -> None:
    """Model, tokens, global batch, method, adapter, batching and loss are those that the script itself sets."""
    case, run_folder, _ = launched
    plan = load_plan(run_folder / "plan.json")
    job, configuration = plan.inputs.job, plan.configuration
    assert job.model.config["architectures"] == [case.architecture]
    assert job.workload.sequence_tokens == case.tokens
    assert job.workload.global_batch_sequences == configuration.global_batch_sequences == case.global_batch
    assert (configuration.method, configuration.batching, configuration.loss) == (case.method, case.batching, case.loss)
    assert (None if configuration.lora is None else configuration.lora.r) == case.lora_r
    assert f"{case.script}:" in job.found["model"]


def test_both_ranks_verify_and_train(launched: tuple[Case, Path, dict[str, Any]]) -> None:
    """Each rank found every planned setting in effect before its first step, and none that was not."""
    _, run_folder, summary = launched
    events = read_events(run_folder)
    assert summary["failure"] == "none"
    assert {event.rank for event in events if event.kind == "verified"} == {0, 1}
    assert {event.rank for event in events if event.kind == "step"} == {0, 1}
    assert not [event for event in events if event.kind == "mismatch"]


def test_its_peak_was_predicted(launched: tuple[Case, Path, dict[str, Any]]) -> None:
    """The measured peak is not above the predicted one by more than a tenth, nor below half of it."""
    case, _, summary = launched
    measured = summary["memory"]["measured_peak_allocated_bytes"]
    assert 0.5 < measured / summary["memory"]["predicted_peak_allocated_bytes"] < 1.1, case.script


def test_examples_know_nothing_of_autofit() -> None:
    """They are what their users would have written before."""
    assert not [path.name for path in EXAMPLES.glob("*.py") if "autofit" in path.read_text()]


def test_the_yaml_file_is_read_by_the_script(tmp_path: Path, folders: dict[str, str]) -> None:
    """A configuration file after `--` is the script's: what it holds is found as if it had been typed."""
    import yaml

    settings = yaml.safe_load((EXAMPLES / "run_clm.yaml").read_text())
    settings |= {"model_name_or_path": folders[LLAMA], "output_dir": str(tmp_path / "out")}
    del settings["gguf_file"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    found = discover(EXAMPLES / "run_clm.py", [str(tmp_path / "mine.yaml")])
    assert found.lengths is not None
    assert found.lengths.sequence_tokens == settings["block_size"]
    said = found.arguments
    assert (said["per_device_train_batch_size"], said["gradient_accumulation_steps"], said["max_steps"]) == (2, 2, 3)
    assert not (tmp_path / "out").exists()


def test_discovering_the_sft_example_is_quick_and_reads_no_weights(tmp_path: Path, monkeypatch: Any) -> None:
    """It takes at most 15 s of a processor, which is 15 s where nothing else runs, and less than 1 GiB.

    Libraries take half of that; SmolLM2's weights in fp32 would be another half.
    """
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = discover(EXAMPLES / "sft.py", time_limit_seconds=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 15
    assert (found.peak_process_bytes or 0) < 2**30
    assert found.config["num_hidden_layers"] == 30
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precomputes", [False, True])
def test_a_reference_model_beside_the_trained_one_is_refused(
    tmp_path: Path, folders: dict[str, str], precomputes: bool
) -> None:
    """Without an adapter DPO holds two models, which no plan counts; asked for its answers beforehand, it holds one."""
    script = tmp_path / "dpo.py"
    whole = "".join(line for line in (EXAMPLES / "dpo.py").open() if "peft_config=" not in line)
    said = f"max_length=128, precompute_ref_log_probs={precomputes},"
    script.write_text(whole.replace("max_length=128,", said))
    found = discover(script, ["--model", folders[LLAMA], "--output", str(tmp_path / "out")])
    assert found.reference_model != precomputes
    if precomputes:
        assert job_from_discovery(found, parse_cluster("2xCPU-8G")).restrictions.methods == ("full",)
        return
    with pytest.raises(InputError, match="holds a reference model"):
        job_from_discovery(found, parse_cluster("2xCPU-8G"))
