"""What is shipped is what was tested: the wheel, away from the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def run_in(folder, *command, **environment):
    """Run a command in a folder outside the checkout and return its standard output."""
    finished = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a folder into which the built wheel, and nothing else, is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(CHECKOUT)]
    run_in(folder, *build)
    (wheel,) = folder.glob("*.whl")
    target = folder / "installed"
    run_in(folder, sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel))
    return target


def autofit(installed, folder, *arguments):
    """Run the installed command line in a folder."""
    return run_in(folder, sys.executable, "-m", "autofit", *arguments, PYTHONPATH=str(installed))


def test_the_wheel_is_what_runs(installed, tmp_path):
    """With the wheel on the path the checkout is not what is imported."""
    location = run_in(
        tmp_path, sys.executable, "-c", "import autofit; print(autofit.__file__)", PYTHONPATH=str(installed)
    )
    assert Path(location.strip()).is_relative_to(installed)


def test_the_wheel_has_every_module_and_data_file(installed):
    """Each file of the package that git keeps is in the wheel, and so are the launch templates."""
    kept = run_in(CHECKOUT, "git", "ls-files", "autofit", "launch_templates").splitlines()
    shipped = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    wanted = {name.replace("launch_templates/", "autofit/_launch_templates/", 1) for name in kept}
    assert not wanted - shipped


def test_the_wheel_has_the_command(installed, tmp_path):
    """The installed script `autofit` starts and shows its help."""
    text = run_in(tmp_path, str(installed / "bin" / "autofit"), "--help", PYTHONPATH=str(installed))
    assert "Usage: autofit" in text


def test_the_wheel_lists_devices_and_templates(installed, tmp_path):
    """Catalogues and templates are found inside the package."""
    assert "A100" in autofit(installed, tmp_path, "devices")
    assert "launch.sh" in autofit(installed, tmp_path, "templates")


def test_the_wheel_traces_plans_and_writes(installed, tmp_path):
    """Away from the checkout a model is traced and planned, and the run is written from the packaged templates."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "vocab_size": 256}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes), encoding="utf-8")
    workload = ["--model", "config.json", "--seq-len", "64", "--global-batch", "8", "--gpus", "2xA100-80G"]
    one = ["--method", "lora", "--zero", "0", "--no-gradient-checkpointing"]
    text = autofit(installed, tmp_path, "plan", *workload, *one, "-o", "run")
    assert text.startswith("LoRA (r=16) of config.json on 2 x A100")
    assert "accelerate launch" in (tmp_path / "run" / "launch.sh").read_text(encoding="utf-8")


def test_what_reads_the_packages_own_files_passes_against_the_wheel(installed, tmp_path):
    """The fast tests of what reads catalogues, templates and profiles pass when autofit is imported from the wheel."""
    folders = [str(CHECKOUT / "tests" / name) for name in ("cli", "report", "search", "sources", "writers")]
    command = [sys.executable, "-m", "pytest", "-c", str(CHECKOUT / "pyproject.toml"), "--rootdir", str(CHECKOUT)]
    run_in(
        tmp_path, *command, "-q", "-m", "not slow", "-p", "no:cacheprovider", *folders,
        PYTHONPATH=str(installed),
    )  # fmt: skip
