"""Files reach the run folder whole, and never at the cost of a file that autofit did not write."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from autofit.errors import InputError
from autofit.plan import load_plan
from autofit.spec.configuration import Offload
from autofit.writers import render_files, write_files
from autofit.writers.render import PLAN_FILE
from autofit.writers.scripts import templates_folder
from tests.plans import A100, a_configuration, a_plan, with_script


def test_a_written_plan_loads_back_identical(tmp_path: Path) -> None:
    """plan.json holds the whole plan."""
    plan = a_plan(a_configuration(method="qlora"))
    write_files(render_files(plan, tmp_path), tmp_path)
    assert load_plan(tmp_path / PLAN_FILE) == plan


@pytest.mark.parametrize("name", ["accelerate.yaml", "plan.json", "launch.sh"])
def test_a_foreign_file_is_refused_and_kept(tmp_path: Path, name: str) -> None:
    """A file of the same name in a folder without our plan stops the writing before anything is written."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="did not write"):
        write_files(render_files(a_plan(), tmp_path), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_an_earlier_plan_of_ours_is_replaced(tmp_path: Path) -> None:
    """A run folder with our plan may be written again."""
    write_files(render_files(a_plan(), tmp_path), tmp_path)
    other = a_plan(a_configuration(per_device_train_batch_size=1))
    write_files(render_files(other, tmp_path), tmp_path)
    assert load_plan(tmp_path / PLAN_FILE) == other


def test_a_failed_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    """A file that cannot be put in place is cleaned up, and the error names the folder and not a traceback."""
    (tmp_path / "accelerate.yaml").mkdir()
    write_plan_of_ours = render_files(a_plan(), tmp_path)[PLAN_FILE]
    (tmp_path / PLAN_FILE).write_text(write_plan_of_ours)
    with pytest.raises(InputError, match="cannot write to the run folder"):
        write_files(render_files(a_plan(), tmp_path), tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """A path that is a file is wrong input."""
    (tmp_path / "run").write_text("mine")
    with pytest.raises(InputError):
        write_files(render_files(a_plan(), tmp_path / "run"), tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_paths_with_quotes_and_newlines_survive_yaml_and_shell(weird_tmp_path: Path) -> None:
    """PyYAML reads back the DeepSpeed path, and bash hands accelerate the config path and the script, unchanged."""
    script = str(weird_tmp_path / "my train.py")
    plan = with_script(a_plan(a_configuration(sharding="zero2")), script)
    write_files(render_files(plan, weird_tmp_path), weird_tmp_path)
    config = yaml.safe_load((weird_tmp_path / "accelerate.yaml").read_text(encoding="utf-8"))
    assert config["deepspeed_config"]["deepspeed_config_file"] == str(weird_tmp_path / "deepspeed.json")
    arguments = arguments_of_launch_script(weird_tmp_path)
    assert arguments[:3] == ["launch", "--config_file", str(weird_tmp_path / "accelerate.yaml")]
    assert arguments[-1] == script


def arguments_of_launch_script(folder: Path) -> list[str]:
    """Run launch.sh with an `accelerate` that only prints what it is given."""
    fake = folder / "bin" / "accelerate"
    fake.parent.mkdir()
    fake.write_text("#!/usr/bin/env python3\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    fake.chmod(0o755)
    path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [folder / "launch.sh"], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=True
    )
    return list(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("offload", "given", "found"), [("optimizer", None, "4"), ("optimizer", "3", "3"), ("none", None, "")]
)
def test_ranks_that_update_on_the_host_share_its_cores(
    tmp_path: Path, offload: Offload, given: str | None, found: str
) -> None:
    """Two ranks of a machine of 7 cores have 4 threads each; a user's number is kept; none is set without."""
    write_files(
        render_files(a_plan(a_configuration(sharding="zero2", offload=offload), device=A100), tmp_path), tmp_path
    )
    for name, text in (("accelerate", 'printf %s "${OMP_NUM_THREADS-}"'), ("nproc", "echo 7")):
        fake = tmp_path / "bin" / name
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(f"#!/usr/bin/env bash\n{text}\n")
        fake.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"OMP_NUM_THREADS": given} if given else {}
    done = subprocess.run([tmp_path / "launch.sh"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == found


@pytest.mark.parametrize("name", ["launch.sh", "slurm.sh"])
def test_scripts_are_valid_before_and_after_filling(tmp_path: Path, name: str) -> None:
    """bash parses the template as it lies in the repository, and the script made of it."""
    write_files(render_files(a_plan(device=A100), tmp_path), tmp_path)
    for path in (templates_folder() / name, tmp_path / name):
        subprocess.run(["bash", "-n", path], check=True)
    assert "$autofit_" not in (tmp_path / name).read_text()


@pytest.mark.parametrize("name", ["accelerate.yaml", "deepspeed.json", "launch.sh", "slurm.sh"])
def test_the_text_of_a_run_is_as_reviewed(snapshot: object, name: str) -> None:
    """The whole text of each file, for ZeRO-3 LoRA on two A100s."""
    configuration = a_configuration(method="lora", sharding="zero3", gradient_checkpointing=True, use_reentrant=True)
    assert render_files(a_plan(configuration, device=A100), Path("/runs/one"))[name] == snapshot
