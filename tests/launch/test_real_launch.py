"""Real launches on two CPU ranks, through accelerate, torchrun, gloo, the Trainer, peft, bitsandbytes and DeepSpeed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from autofit import cli
from autofit.calibrate.fit import reason_to_leave_out
from autofit.calibrate.store import read, store_path
from autofit.errors import LadderExhaustedError, TrainingFailedError
from autofit.launch import Outcome, launch
from autofit.launch.evidence import read_events
from autofit.launch.process import belongs_to_run
from autofit.plan import Plan
from autofit.spec.configuration import Configuration, Lora, Quantization
from autofit.spec.event import MISMATCH_EXIT_CODE
from autofit.writers import render_files, write_files
from tests.plans import a_configuration, a_plan
from tests.scripts import TRAIN_SCRIPT, write_tiny_llama

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny Llama on disk."""
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


def launch_script(
    folder: Path, model: Path, plan: Plan | None = None, text: str = TRAIN_SCRIPT, **changes: Any
) -> tuple[Outcome, str]:
    """Launch a script on a plan of one configuration; return the outcome and what the user saw."""
    script = folder / "train.py"
    script.write_text(text)
    seen = io.BytesIO()
    outcome = launch(
        plan or a_plan(a_configuration(**changes)),
        folder / "run",
        script,
        [str(model), str(folder / "out")],
        stream=seen,  # type: ignore[arg-type]
    )
    return outcome, seen.getvalue().decode(errors="replace")


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return what the ranks of a run told of one kind."""
    return [event.detail for event in read_events(folder) if event.kind == kind]


CONFIGURATIONS = {
    "ddp full": {},
    "ddp dora": {"method": "lora", "lora": Lora(r=8, lora_alpha=16, use_dora=True, use_rslora=True)},
    "zero2 full": {"sharding": "zero2"},
    "zero3 full": {"sharding": "zero3", "gradient_checkpointing": True, "use_reentrant": True},
    "ddp qlora": {"method": "qlora", "optim": "adamw_8bit", "gradient_checkpointing": True},
    "zero3 qlora": {"method": "qlora", "sharding": "zero3"},
    "ddp int8": {
        "method": "qlora",
        "quantization": Quantization(bits=8),
        "gradient_checkpointing": True,
        "use_reentrant": True,
    },
}
WITH_ADAPTER = [name for name, changes in CONFIGURATIONS.items() if changes.get("method", "full") != "full"]


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_folder: Path
) -> tuple[Configuration, Outcome, Path]:
    """Train once on each configuration; the tests below all look at the same runs."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    changes = CONFIGURATIONS[request.param]
    outcome, _ = launch_script(folder, model_folder, **changes)
    return a_configuration(**changes), outcome, folder


def test_the_training_ends_well_and_saves(trained: tuple[Configuration, Outcome, Path]) -> None:
    """Exit code 0 on the first rung; the trained weights, or the adapter's, are where the summary says.

    What is saved of an adapter says of which kind it is.
    """
    configuration, outcome, folder = trained
    assert (outcome.exit_code, outcome.rung) == (0, 0)
    saved = outcome.summary["trained"][-1]
    assert saved["folder"] == str(folder / "out")
    assert ("model.safetensors" if configuration.method == "full" else "adapter_model.safetensors") in saved["files"]
    if configuration.lora is not None:
        adapter = json.loads((folder / "out" / "adapter_config.json").read_text())
        kinds = (configuration.lora.use_dora, configuration.lora.use_rslora)
        assert (adapter["use_dora"], adapter["use_rslora"]) == kinds


@pytest.mark.parametrize("trained", WITH_ADAPTER, indirect=True)
def test_a_saved_adapter_loads_back_with_plain_peft(
    trained: tuple[Configuration, Outcome, Path], model_folder: Path
) -> None:
    """Of a script that trains all weights and has not heard of peft, the adapter of a plan loads onto the same model
    with `PeftModel.from_pretrained`: each of its tensors is found, none is left over, and training has moved it.
    """
    _, _, folder = trained
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), folder / "out")
    loaded = {name.replace(".default", ""): value for name, value in model.named_parameters() if "lora_" in name}
    loaded = {name.replace("magnitude_vector.weight", "magnitude_vector"): value for name, value in loaded.items()}
    saved = load_file(folder / "out" / "adapter_model.safetensors")
    assert loaded.keys() == saved.keys()
    assert all((loaded[name] == value).all() for name, value in saved.items())
    assert all(value.any() for name, value in saved.items() if "lora_B" in name)  # peft begins with zeros


def test_both_ranks_verified_the_plan_before_their_first_step(trained: tuple[Configuration, Outcome, Path]) -> None:
    """Each rank compared its settings and its first batch, found all in effect, and only then took a step."""
    _, outcome, _ = trained
    for rank in (0, 1):
        kinds = [event.kind for event in read_events(outcome.run_folder) if event.rank == rank]
        assert kinds.count("verified") == 2
        assert "mismatch" not in kinds
        assert max(number for number, kind in enumerate(kinds) if kind == "verified") < kinds.index("step")


def test_every_rank_measured_its_peak(trained: tuple[Configuration, Outcome, Path]) -> None:
    """Both ranks report a peak, above what stays after a step; equal work has equal peaks, but for ZeRO-2's last rank.

    There it came out at 1,728,484 or 1,761,252 bytes from run to run on a busy machine, 2.0 % apart; not explained.
    """
    configuration, outcome, _ = trained
    ranks = outcome.summary["memory"]["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert all(rank["peak_bytes"] > rank["after_step_bytes"] > 0 for rank in ranks)
    tolerance = 0.025 if configuration.sharding == "zero2" else 0.01
    assert ranks[0]["peak_bytes"] == pytest.approx(ranks[1]["peak_bytes"], rel=tolerance)
    assert outcome.summary["memory"]["measured_peak_allocated_bytes"] == max(rank["peak_bytes"] for rank in ranks)


@pytest.fixture(scope="module")
def reference_losses(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> list[float]:
    """Return the losses of one ordinary process, in fp32, on batches as large as the plan's global batch."""
    script = tmp_path_factory.mktemp("reference") / "train.py"
    text = TRAIN_SCRIPT.replace("per_device_train_batch_size=1", "per_device_train_batch_size=8, use_cpu=True")
    log = script.with_name("log.json")
    script.write_text(f"{text}\ntrainer.state.save_to_json({str(log)!r})\n")
    subprocess.run([sys.executable, script, model_folder, script.parent / "out"], check=True, capture_output=True)
    return [entry["loss"] for entry in json.loads(log.read_text())["log_history"] if "loss" in entry]


def test_every_strategy_trains_the_same(
    trained: tuple[Configuration, Outcome, Path], reference_losses: list[float]
) -> None:
    """On every strategy the losses are those of one process: of each step, or for an adapter of the first one."""
    configuration, outcome, _ = trained
    losses = [detail["loss"] for detail in events_of(outcome.run_folder, "log")]
    assert len(losses) == len(reference_losses) == 3
    num_comparable = 3 if configuration.method == "full" else 1
    assert losses[:num_comparable] == pytest.approx(reference_losses[:num_comparable], abs=0.005)


def test_the_files_of_the_run_are_where_the_summary_says(trained: tuple[Configuration, Outcome, Path]) -> None:
    """Every named file exists; the merged events are those of both ranks."""
    _, outcome, _ = trained
    assert all(Path(path).is_file() for path in outcome.summary["files"].values())
    merged = (outcome.run_folder / "events.jsonl").read_text().splitlines()
    assert len(merged) == len(read_events(outcome.run_folder))
    assert json.loads((outcome.run_folder / "summary.json").read_text())["exit_code"] == 0


def test_what_stays_after_a_ddp_step_is_known_by_arithmetic(model_folder: Path, tmp_path: Path) -> None:
    """Full fp32 training under DDP keeps 16 bytes a parameter: weights 4, Adam 8, reducer buckets 4."""
    from transformers import AutoModelForCausalLM

    num_params = AutoModelForCausalLM.from_pretrained(model_folder).num_parameters()
    outcome, _ = launch_script(tmp_path, model_folder, mixed_precision="no")
    after_step = outcome.summary["memory"]["ranks"][0]["after_step_bytes"]
    assert after_step == pytest.approx(16 * num_params, rel=0.02)


def test_a_hostile_cached_config_and_a_weird_folder_change_nothing(
    model_folder: Path, weird_tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate's default config in the user's cache would start one fp16 process; the plan's two are started.

    The run folder and the script's own folder have blanks, both quotes, a dollar sign and a newline in their names.
    """
    cache = weird_tmp_path / "cache"
    (cache / "accelerate").mkdir(parents=True)
    (cache / "accelerate" / "default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: fp16\nnum_processes: 1\n"
        "use_cpu: false\ndebug: true\n"
    )
    monkeypatch.setenv("HF_HOME", str(cache))
    outcome, _ = launch_script(weird_tmp_path, model_folder, method="lora", sharding="zero2")
    assert len(outcome.summary["memory"]["ranks"]) == 2


def test_a_spent_budget_takes_the_next_rung(model_folder: Path, tmp_path: Path) -> None:
    """A rank beyond its budget ends with an out-of-memory event, and the planned fallback trains to the end."""
    plan = a_plan(budget_bytes=1_500_000, fallbacks=(a_configuration(method="lora"),))
    outcome, seen = launch_script(tmp_path, model_folder, plan)
    assert (outcome.exit_code, outcome.rung) == (0, 1)
    assert "CPU rank out of memory. Tried to allocate" in seen
    assert [attempt["failure"] for attempt in outcome.summary["attempts"]] == ["out_of_memory", "none"]
    assert (tmp_path / "run" / "rung-1" / "accelerate.yaml").exists()
    assert outcome.summary["memory"]["measured_peak_allocated_bytes"] <= 1_500_000


REAL_ALLOCATOR_LIMIT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (3 * 2**30, 3 * 2**30))
import torch
torch.zeros(2**30)
"""


def test_the_allocators_own_failure_is_out_of_memory(model_folder: Path, tmp_path: Path) -> None:
    """A process that the kernel denies memory is judged the same, and a plan without fallbacks is exhausted."""
    with pytest.raises(LadderExhaustedError) as caught:
        launch_script(tmp_path, model_folder, text=REAL_ALLOCATOR_LIMIT)
    assert "DefaultCPUAllocator" in str(caught.value)


def test_a_killed_rank_is_taken_for_the_work_of_the_hosts_oom_killer(model_folder: Path, tmp_path: Path) -> None:
    """SIGKILL leaves no event and no traceback, and still counts as memory."""
    text = "import os, time\nif os.environ['RANK'] == '1':\n    os.kill(os.getpid(), 9)\ntime.sleep(60)"
    with pytest.raises(LadderExhaustedError, match="signal 9"):
        launch_script(tmp_path, model_folder, text=text)


def test_the_scripts_own_error_is_shown_and_not_retried(model_folder: Path, tmp_path: Path) -> None:
    """The traceback reaches the log, the error names the line, and no fallback is started."""
    text = TRAIN_SCRIPT.replace("trainer.train()", "raise KeyError('my own mistake')")
    plan = a_plan(fallbacks=(a_configuration(method="lora"),))
    with pytest.raises(TrainingFailedError, match="my own mistake") as caught:
        launch_script(tmp_path, model_folder, plan, text)
    line = text.splitlines().index("raise KeyError('my own mistake')") + 1
    assert f"train.py:{line}" in str(caught.value)
    assert "KeyError: 'my own mistake'" in (tmp_path / "run" / "log.txt").read_text()
    assert not (tmp_path / "run" / "rung-1").exists()


def test_a_setting_that_is_not_in_effect_stops_the_training_before_its_first_step(
    model_folder: Path, tmp_path: Path
) -> None:
    """A script that makes its own optimizer cannot have the planned one: both are named, and no step is taken."""
    text = TRAIN_SCRIPT.replace("model=model,", "model=model, optimizers=(torch.optim.SGD(model.parameters()), None),")
    with pytest.raises(TrainingFailedError, match="optim planned adamw_torch_fused, in effect sgd") as caught:
        launch_script(tmp_path, model_folder, text=text)
    assert caught.value.exit_code == 1
    assert "<- not in effect" in (tmp_path / "run" / "log.txt").read_text()
    assert not events_of(tmp_path / "run", "step")


def test_without_strictness_the_same_table_is_shown_and_the_training_goes_on(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A script with an optimizer and a checkpointing of its own, launched from the command line with and without
    --no-strict: the first ends with 1 before its first step, the second with 0 after the last. Both show the same
    table, with both settings; the summary, its report and the remembered run say that it was not as planned.
    """
    monkeypatch.setenv("AUTOFIT_CACHE", str(tmp_path / "cache"))
    own = "model.gradient_checkpointing_enable(); optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)\n"
    text = TRAIN_SCRIPT.replace("trainer = Trainer(", f"{own}trainer = Trainer(\n    optimizers=(optimizer, None),")
    (tmp_path / "train.py").write_text(text)
    (tmp_path / "plan.json").write_text(render_files(a_plan(), tmp_path)["plan.json"])
    tables, codes = [], []
    for name, more in (("strict", []), ("lax", ["--no-strict"])):
        where = ["--plan", str(tmp_path / "plan.json"), "-o", str(tmp_path / name)]
        script = [str(tmp_path / "train.py"), "--", str(model_folder), str(tmp_path / "out")]
        codes.append(cli.run(["launch", *where, *more, *script]))
        _, _, table = (tmp_path / name / "log.txt").read_text().partition("autofit: the plan is not in effect.\n")
        tables.append([line for line in table.splitlines() if "not in effect" in line or line.startswith("setting")])
    assert codes == [1, 0]
    assert tables[0] == tables[1]
    assert [line.split()[0] for line in tables[0]] == ["setting", "gradient_checkpointing", "optim"]
    assert not events_of(tmp_path / "strict", "step")
    codes_of_ranks = [detail.get("exit_code") for detail in events_of(tmp_path / "strict", "failed")]
    assert codes_of_ranks.count(MISMATCH_EXIT_CODE) >= 1
    assert len(events_of(tmp_path / "lax", "step")) == 2 * 3
    assert (tmp_path / "out" / "model.safetensors").exists()
    summary = json.loads((tmp_path / "lax" / "summary.json").read_text())
    expected = [["gradient_checkpointing", "False", "True"], ["optim", "adamw_torch_fused", "sgd"]]
    assert summary["not_in_effect"] == expected
    assert "Trained, but not as planned (--no-strict): gradient_checkpointing planned False" in capfd.readouterr().out
    stored = read(store_path(tmp_path / "cache")).records
    assert [(record.failure, record.in_effect) for record in stored] == [("plan_not_in_effect", False), ("none", False)]
    assert all(reason_to_leave_out(record) for record in stored)


def test_longer_sequences_than_planned_stop_the_training(model_folder: Path, tmp_path: Path) -> None:
    """The first batch is looked at before the model is, for memory was planned for its length."""
    with pytest.raises(TrainingFailedError, match="tokens of its sequences planned 16, in effect 32"):
        launch_script(tmp_path, model_folder, a_plan(sequence_tokens=16))


LAUNCHER = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
from autofit.launch import launch
from autofit.plan import load_plan
folder, model = Path(sys.argv[1]), sys.argv[2]
outcome = launch(load_plan(folder / "plan.json"), folder / "run", folder / "train.py", [model, str(folder / "out")])
sys.exit(outcome.exit_code)
"""


def test_ctrl_c_ends_every_rank_and_keeps_the_files(model_folder: Path, tmp_path: Path) -> None:
    """SIGINT to the launcher ends it with 130, no rank survives, and the run folder tells of the interruption."""
    (tmp_path / "train.py").write_text(TRAIN_SCRIPT.replace("max_steps=3", "max_steps=100000"))
    (tmp_path / "plan.json").write_text(render_files(a_plan(), tmp_path)["plan.json"])
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(tmp_path), str(model_folder)], stdout=subprocess.DEVNULL
    )
    wait_until(lambda: len(events_of(tmp_path / "run", "step")) >= 2)
    ranks = [detail["pid"] for detail in events_of(tmp_path / "run", "started")]
    assert all(belongs_to_run(rank, str(tmp_path / "run")) for rank in ranks)
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(timeout=60) == 130
    except subprocess.TimeoutExpired:
        process.terminate()  # which is never ignored: nothing may train on behind the tests
        raise
    assert not any(belongs_to_run(rank, str(tmp_path / "run")) for rank in ranks)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["failure"] == "interrupted"


def wait_until(holds: Any, timeout_seconds: float = 90) -> None:
    """Poll until something holds."""
    deadline = time.monotonic() + timeout_seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


ENDING = """
assert "autofit" not in sys.modules
print(type(trainer.deepspeed))
torch.distributed.destroy_process_group()
"""


def test_the_written_files_work_without_autofit(model_folder: Path, tmp_path: Path) -> None:
    """launch.sh trains under ZeRO-2 with accelerate alone, where the script's arguments agree with the written ones."""
    plan = a_plan(a_configuration(sharding="zero2"))
    write_files(render_files(plan, tmp_path / "run"), tmp_path / "run")
    agreed = "**{**__import__('json').load(open(sys.argv[3])), 'learning_rate': 1e-3}, output_dir=output, max_steps=3,"
    text = TRAIN_SCRIPT.replace(
        "output_dir=output, max_steps=3, per_device_train_batch_size=1, learning_rate=1e-3,", agreed
    )
    assert agreed in text
    (tmp_path / "train.py").write_text(text + ENDING)
    arguments = [tmp_path / "train.py", model_folder, tmp_path / "out", tmp_path / "run" / "training_arguments.json"]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [tmp_path / "run" / "launch.sh", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "DeepSpeedEngine" in done.stdout
