"""launch.sh and slurm.sh: the planned run without autofit, from the templates in launch_templates/."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from string import Template

from autofit.memory.alloc_conf import alloc_conf_variables
from autofit.plan import Plan
from autofit.writers.accelerate_config import distributed_type


class ScriptTemplate(Template):
    """A template whose placeholders begin with `autofit_`, so that the shell's own variables stay as they are."""

    idpattern = r"autofit_[a-z_]+"
    flags = re.NOFLAG


def render_launch_script(plan: Plan, config_file: Path) -> str:
    """Fill launch.sh: one command on one machine."""
    return fill_template("launch.sh", _values(plan, config_file))


def render_slurm_script(plan: Plan, config_file: Path) -> str:
    """Fill slurm.sh: the same command on every node of a Slurm job."""
    return fill_template("slurm.sh", _values(plan, config_file))


def fill_template(name: str, values: dict[str, str]) -> str:
    """Fill a template completely; a placeholder without a value is a bug of ours."""
    template = ScriptTemplate((templates_folder() / name).read_text(encoding="utf-8"))
    missing = set(template.get_identifiers()) - values.keys()
    assert not missing, f"{name} asks for {sorted(missing)}"
    return template.safe_substitute(values)


def templates_folder() -> Path:
    """Find the templates: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_launch_templates"
    return installed if installed.is_dir() else package.parent / "launch_templates"


def _values(plan: Plan, config_file: Path) -> dict[str, str]:
    job, cluster = plan.inputs.job, plan.used
    script = (job.script, *job.script_arguments) if job.script else ("train.py",)
    return {
        "autofit_environment": "".join(f"export {name}={value}\n" for name, value in script_environment(plan).items())
        + (_threads(plan) if computes_on_host(plan) else ""),
        "autofit_config_file": shlex.quote(str(config_file)),
        "autofit_options": " ".join(launch_options(plan)),
        "autofit_script": shlex.join(script),
        "autofit_num_nodes": str(cluster.num_nodes),
        "autofit_num_devices_per_node": str(cluster.num_devices_per_node),
        "autofit_num_processes": str(plan.configuration.num_processes),
        "autofit_job_name": shlex.quote(f"autofit-{plan.configuration.method}"),
    }


def computes_on_host(plan: Plan) -> bool:
    """Tell whether ranks need the host's cores, of which `accelerate launch` otherwise leaves each one.

    Source: accelerate/commands/launch.py 1.15 (`num_cpu_threads_per_process`) and utils/launch.py (OMP_NUM_THREADS);
    for DeepSpeed's ranks, where they are several, torch/distributed/run.py 2.13, `config_from_args`.
    """
    return plan.inputs.cluster.device.kind == "cpu" or plan.configuration.offload != "none"


def ranks_of_a_node(plan: Plan) -> int:
    """Return how many ranks share a node's cores."""
    return min(plan.configuration.num_processes, plan.used.num_devices_per_node)


def _threads(plan: Plan) -> str:
    """Share the cores of the machine that the script runs on among its ranks, unless the user did."""
    ranks = ranks_of_a_node(plan)
    return f'export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-$((($(nproc) + {ranks} - 1) / {ranks}))}}"\n'


def launch_options(plan: Plan) -> list[str]:
    """Return what `accelerate launch` must be told beside the file.

    Beside a DeepSpeed file the precision may only be given on the command line: in the YAML accelerate refuses it.
    """
    if not plan.configuration.uses_deepspeed:
        return []
    return ["--mixed_precision", plan.configuration.mixed_precision]


def script_environment(plan: Plan) -> dict[str, str]:
    """Return the variables that put the allocator's options into effect, or without which CPU ranks would not train.

    FSDP's are told their device alone: accelerate shards on GPUs only, and tests make it take CPU ranks for some.

    DDP over gloo needs ACCELERATE_USE_CPU; with DeepSpeed the same variable silently turns DeepSpeed off, and
    `TrainingArguments.use_cpu` takes its place. Source: accelerate/state.py, `AcceleratorState.__init__`.
    """
    if plan.inputs.cluster.device.kind != "cpu":
        return alloc_conf_variables(plan.configuration)
    hidden_gpus = {"CUDA_VISIBLE_DEVICES": ""}
    if distributed_type(plan.configuration) == "DEEPSPEED":
        return hidden_gpus | {"DS_ACCELERATOR": "cpu"}
    if plan.configuration.uses_fsdp:
        return hidden_gpus | {"ACCELERATE_TORCH_DEVICE": "cpu"}
    return hidden_gpus | {"ACCELERATE_USE_CPU": "true"}
