"""The command of a launch: complete, explicit, and free of what the user's shell had decided before."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from autofit.errors import InputError
from autofit.launch.command import Invocation, build_command
from autofit.launch.launch import launch, refuse_absent_devices
from autofit.launch.script import check_script
from autofit.launch.summary import log_excerpt
from autofit.plan import Plan
from autofit.spec.configuration import Quantization
from tests.plans import A100, a_configuration, a_plan


def command_of(plan: Plan, environment: dict[str, str] | None = None) -> tuple[tuple[str, ...], dict[str, str]]:
    """Build the command for a machine of 8 cores."""
    invocation = Invocation(
        script=Path("/x/train.py"), arguments=("--lr", "1"), environment=environment or {}, num_cores=8
    )
    command = build_command(plan, Path("/run"), invocation)
    return command.argv, command.environment


def test_this_interpreter_launches_with_the_written_file() -> None:
    """accelerate runs in autofit's own Python, with --config_file, and gets the script's arguments last."""
    argv, _ = command_of(a_plan())
    assert argv[:3] == (sys.executable, "-m", "accelerate.commands.launch")
    assert argv[argv.index("--config_file") + 1] == "/run/accelerate.yaml"
    assert argv[-4:] == ("autofit.runtime", "/x/train.py", "--lr", "1")


@pytest.mark.parametrize(("sharding", "uses_cpu_variable"), [("ddp", True), ("none", True), ("zero2", False)])
def test_cpu_ranks_are_told_so_in_the_way_that_works(sharding: str, uses_cpu_variable: bool) -> None:
    """ACCELERATE_USE_CPU makes DDP ranks and would turn DeepSpeed off; the cores are shared among the ranks."""
    num_processes = 1 if sharding == "none" else 2
    _, environment = command_of(a_plan(a_configuration(sharding=sharding, num_processes=num_processes)))
    assert (environment.get("ACCELERATE_USE_CPU") == "true") == uses_cpu_variable
    assert environment["OMP_NUM_THREADS"] == str(8 // num_processes)
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


def test_gpus_stay_visible_and_threads_as_they_are() -> None:
    """On GPUs autofit sets neither."""
    _, environment = command_of(a_plan(device=A100), {"CUDA_VISIBLE_DEVICES": "0,1"})
    assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert "OMP_NUM_THREADS" not in environment


def test_ranks_that_update_on_the_host_share_its_cores() -> None:
    """accelerate gives each rank one core of a machine with GPUs, unless it is told; a user's number is kept."""
    offloaded = a_plan(a_configuration(sharding="zero2", offload="optimizer", num_processes=2), device=A100)
    assert command_of(offloaded)[1]["OMP_NUM_THREADS"] == "4"
    assert command_of(offloaded, {"OMP_NUM_THREADS": "3"})[1]["OMP_NUM_THREADS"] == "3"


def test_an_outer_launchers_decisions_do_not_leak_in() -> None:
    """Variables by which another accelerate or torchrun decides are dropped; everything else is kept."""
    outer = {
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_MIXED_PRECISION": "fp16",
        "FSDP_VERSION": "1",
        "WORLD_SIZE": "8",
        "RANK": "3",
        "HOME": "/home/me",
        "ACCELERATE_LOG_LEVEL": "info",
    }
    _, environment = command_of(a_plan(), outer)
    assert environment.keys() & outer.keys() == {"HOME", "ACCELERATE_LOG_LEVEL"}


def test_the_interpreters_own_tools_are_found_first() -> None:
    """DeepSpeed's compiler runs the ninja that is installed beside this Python, active environment or not."""
    _, environment = command_of(a_plan(), {"PATH": "/usr/bin"})
    assert environment["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "/usr/bin"]


def test_a_missing_script_is_wrong_input(tmp_path: Path) -> None:
    """The path is named, and nothing is written."""
    with pytest.raises(InputError, match="cannot read the script"):
        launch(a_plan(), tmp_path / "run", tmp_path / "no such train.py")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["def broken(:\n", "x = 1\0", "print 'python 2'\n"])
def test_a_script_that_is_not_python_is_wrong_input(tmp_path: Path, text: str) -> None:
    """A syntax error is found before any process starts, and its line is named."""
    (tmp_path / "train.py").write_text(text)
    with pytest.raises(InputError, match="is not valid Python"):
        check_script(tmp_path / "train.py")


def test_a_folder_is_not_a_script(tmp_path: Path) -> None:
    """A folder cannot be started."""
    with pytest.raises(InputError, match="cannot read the script"):
        check_script(tmp_path)


@pytest.mark.parametrize("name", ["log.txt", "summary.json", "events.jsonl", "accelerate.yaml"])
def test_a_foreign_file_in_the_run_folder_stops_the_launch(tmp_path: Path, name: str) -> None:
    """A file that a launch would write, in a folder without our plan, is refused and kept."""
    (tmp_path / "train.py").write_text("")
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="did not write"):
        launch(a_plan(), tmp_path, tmp_path / "train.py")
    assert (tmp_path / name).read_text() == "mine"


def test_a_checkpoint_that_comes_packed_is_not_started(tmp_path: Path) -> None:
    """No road loads one, so that neither a plan nor a fallback with such weights is started."""
    (tmp_path / "train.py").write_text("")
    packed = a_configuration(method="qlora", quantization=Quantization(quant_type="gptq", storage_dtype="int32"))
    for plan in (a_plan(packed), a_plan(a_configuration(method="qlora"), fallbacks=(packed,))):
        with pytest.raises(InputError, match="comes packed"):
            launch(plan, tmp_path / "run", tmp_path / "train.py")


def test_a_plan_for_gpus_is_not_started_where_they_are_not(tmp_path: Path) -> None:
    """Nothing starts and nothing is written where fewer GPUs can be seen than a node's ranks train on."""
    (tmp_path / "train.py").write_text("")
    plan = a_plan(a_configuration(num_processes=2), device=A100)
    for num_gpus in (0, 1):
        with pytest.raises(InputError, match=f"A100.*can be seen here: {num_gpus}"):
            refuse_absent_devices(plan, num_gpus)
    for num_gpus in (2, 8, None):
        refuse_absent_devices(plan, num_gpus)
    refuse_absent_devices(a_plan(), 0)


def test_the_log_excerpt_ends_where_the_launcher_begins() -> None:
    """What torchrun says after the script's own traceback is left out."""
    log = "step 1\nKeyError: 'x'\nE1122 /lib/torch/distributed/elastic/multiprocessing/api.py:1] failed\nTraceback\n"
    assert log_excerpt(log) == "step 1\nKeyError: 'x'"
