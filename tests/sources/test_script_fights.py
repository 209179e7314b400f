"""Scripts that fight back: each is told in a clear sentence what is in the way, none hangs, none leaves a process."""

import time
from pathlib import Path

import pytest

from autofit.errors import InputError
from autofit.sources.hardware import parse_cluster
from autofit.sources.models import resolve_model
from autofit.sources.script import NotRunError, discover
from autofit.sources.script_job import job_from_discovery
from autofit.sources.script_reading import read_instead

pytestmark = pytest.mark.slow
TRAIN = """
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2))
rows = [{"input_ids": [1] * 16, "labels": [1] * 16}] * 8
def train():
    Trainer(model, TrainingArguments("out", per_device_train_batch_size=2), train_dataset=rows).train()
"""
OWN_DDP = """
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
"""
WRAPS_DDP = """
import torch
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
"""
FORKS = TRAIN + "\nimport os\nif os.fork():\n    os._exit(0)\ntrain()\n"
SPAWNS = (
    """
import multiprocessing
worker = multiprocessing.get_context("spawn").Process(target=print)
worker.start()
worker.join()
"""
    + TRAIN
    + "train()\n"
)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("x = (\n", "SyntaxError"),
        ("exit()", "ended by itself without calling Trainer.train()"),
        ("import os; os._exit(7)", "failed (exit code 7)"),
        ("answer = input('Really? ')", "reads standard input"),
        ("import sys; sys.stdin.readline() or sys.exit('no answer')", "no answer"),
        (OWN_DDP, "starts its own process group (train.py:4)"),
        (WRAPS_DDP, "wraps its model in DistributedDataParallel itself (train.py:3)"),
        ("while True: pass", "within 4 s"),
        ("try:\n    while True: pass\nexcept BaseException: pass", "within 4 s"),
        ("import socket; socket.create_connection(('example.com', 80))", "--allow-hub"),
    ],
)
def test_what_is_in_the_way_is_said(tmp_path, body, says):
    """The message names what the script does, a way out, and reading it instead; exit code 2, in a few seconds."""
    script = tmp_path / "train.py"
    script.write_text(body, encoding="utf-8")
    limit_seconds = 4 if says.startswith("within") else 90
    began = time.monotonic()
    with pytest.raises(InputError) as refusal:
        discover(script, time_limit_seconds=limit_seconds)
    assert time.monotonic() - began < limit_seconds + 10
    assert says in str(refusal.value)
    assert "--no-discover" in str(refusal.value)
    assert "Traceback" not in refusal.value.message.splitlines()[0]
    if isinstance(refusal.value, NotRunError):  # its source names nothing that trains either: it stays refused
        with pytest.raises(NotRunError) as again:
            read_instead(refusal.value, script, find_model=resolve_model)
        assert again.value is refusal.value
    else:
        assert body in {"exit()", OWN_DDP, WRAPS_DDP}, (
            "what ran to its end, and what says that it cannot be planned for"
        )


@pytest.mark.parametrize("body", [TRAIN + "train()\n", FORKS, SPAWNS])
def test_neither_forks_nor_spawned_workers_nor_a_missing_guard_matter(tmp_path, body):
    """What the script trains is found in whichever process it gets there, and none of them is left."""
    script = tmp_path / "train.py"
    script.write_text(body, encoding="utf-8")
    found = discover(script, time_limit_seconds=90)
    assert found.lengths.sequence_tokens == 16
    assert found.arguments["per_device_train_batch_size"] == 2
    assert not [pid for pid in _processes() if str(script) in pid]


NAMED = """
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MAX_LENGTH = 64
model = AutoModelForCausalLM.from_pretrained(MODEL)
Trainer(model=model, args=TrainingArguments("out", per_device_train_batch_size=2), train_dataset=[]).train()
"""


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("import not_installed_here", "ModuleNotFoundError: No module named 'not_installed_here'"),
        ("import torch\nassert torch.cuda.is_available(), 'give me a GPU'", "give me a GPU"),
        ("while True: pass", "did not begin to train within 3 s"),
    ],
)
def test_a_script_that_cannot_be_run_here_is_read(tmp_path, body, says):
    """What its source names is planned for, called a guess, with what kept it from running and a place for each."""
    script = tmp_path / "train.py"
    script.write_text(f"{body}\n{NAMED}", encoding="utf-8")
    with pytest.raises(NotRunError) as refusal:
        discover(script, time_limit_seconds=3 if says.startswith("did not") else 90)
    found = read_instead(refusal.value, script, find_model=resolve_model)
    job = job_from_discovery(found, parse_cluster("2xCPU-8G"), script=script)
    assert job.workload.global_batch_sequences == 4
    assert says in job.found["guessed"]
    assert job.found["sequence"].endswith(f"read in train.py:{len(body.splitlines()) + 3}")
    places = ("read in train.py:", "by transformers' defaults", "as train.py names no LoraConfig")
    assert all(any(place in words for place in places) for fact, words in job.found.items() if fact != "guessed")


def _processes() -> list[str]:
    """Return the command lines of all processes."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return lines


def test_a_handler_of_everything_cannot_keep_a_script_from_ending(tmp_path):
    """A script that catches whatever is raised, and whose threads would hold its process up, ends all the same."""
    script = tmp_path / "train.py"
    threads = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\n"
    script.write_text(threads + TRAIN + "while True:\n    try:\n        train()\n    except BaseException: pass\n")
    began = time.monotonic()
    assert discover(script, time_limit_seconds=90).trainer == "Trainer"
    assert time.monotonic() - began < 80


def test_a_device_map_is_named_and_left_to_the_plan(tmp_path):
    """Where the script puts its model is among what was found, with what happens to it."""
    from transformers import LlamaConfig

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    LlamaConfig(**sizes, num_attention_heads=2).save_pretrained(tmp_path / "model")
    script = tmp_path / "train.py"
    load = f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r}, device_map='auto')"
    body = TRAIN.replace("import LlamaConfig", "import AutoModelForCausalLM, LlamaConfig")
    script.write_text(f"{body}\nmodel = {load}\ntrain()\n")
    job = job_from_discovery(discover(script), parse_cluster("2xCPU-8G"), script=script)
    assert job.found["device_map"].startswith("the script's auto, which the plan replaces, train.py:")


def test_nothing_is_pushed_by_the_hubs_own_client(tmp_path):
    """A script that makes its repository and uploads to it goes on without one, and without being offline."""
    script = tmp_path / "train.py"
    pushes = """
from huggingface_hub import HfApi, create_repo, upload_file
assert HfApi().create_repo("mine", exist_ok=True, token="none").repo_id == "user/mine"
assert create_repo("them/theirs").repo_id == "them/theirs"
HfApi().upload_folder(repo_id="them/theirs", folder_path=".")
upload_file(path_or_fileobj=b"", path_in_repo="a", repo_id="them/theirs")
"""
    script.write_text(pushes + TRAIN + "train()\n")
    assert discover(script).trainer == "Trainer"


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    """What the script makes in folders of its own is gone again with them, and its tracker starts no run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb.py").write_text("import pathlib\ndef init(**_k): pathlib.Path('tracked').touch()\n")
    script = tmp_path / "train.py"
    script.write_text(
        "import os, wandb\nos.makedirs('runs/today')\nopen('runs/log', 'w')\nwandb.init(project='x')\n"
        + TRAIN
        + "train()\n"
    )
    discover(script)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["train.py", "wandb.py"]
