"""The files of a run as text: one function from a plan to all of them."""

from __future__ import annotations

from pathlib import Path

from autofit.errors import InputError
from autofit.plan import Plan, to_json
from autofit.writers.accelerate_config import DEEPSPEED_FILE, render_accelerate_config
from autofit.writers.deepspeed_config import render_deepspeed_config
from autofit.writers.scripts import render_launch_script, render_slurm_script
from autofit.writers.training_arguments import render_training_arguments

PLAN_FILE = "plan.json"
ACCELERATE_FILE = "accelerate.yaml"
TRAINING_ARGUMENTS_FILE = "training_arguments.json"
LAUNCH_SCRIPT_FILE = "launch.sh"
SLURM_SCRIPT_FILE = "slurm.sh"


def render_files(plan: Plan, run_folder: Path) -> dict[str, str]:
    """Render every file of a run by its name in `run_folder`, which must be absolute: the files name each other.

    Pure: nothing is read but the templates, and nothing is written.

    Raises:
        InputError: processes share sequences, which can be estimated only.
    """
    if plan.configuration.sequence_parallel_size > 1:
        raise InputError(
            "a run whose processes share sequences is not launched yet: its batches would need positions.",
            to_fix="estimate it only, or leave sequence_parallel_size at 1",
        )
    files = {
        PLAN_FILE: to_json(plan) + "\n",
        ACCELERATE_FILE: render_accelerate_config(plan, run_folder),
        TRAINING_ARGUMENTS_FILE: render_training_arguments(plan),
        LAUNCH_SCRIPT_FILE: render_launch_script(plan, run_folder / ACCELERATE_FILE),
        SLURM_SCRIPT_FILE: render_slurm_script(plan, run_folder / ACCELERATE_FILE),
    }
    if plan.configuration.uses_deepspeed:
        files[DEEPSPEED_FILE] = render_deepspeed_config(plan)
    return files
