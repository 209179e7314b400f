"""The command line and the environment of one launch: pure, so that `--dry-run` can show exactly what would start."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from autofit.launch.road import Road, flags_of
from autofit.memory.alloc_conf import refuse_other_setting
from autofit.plan import Plan
from autofit.spec.event import NO_STRICT_VARIABLE, PROBE_VARIABLE, ROAD_VARIABLE, RUN_FOLDER_VARIABLE
from autofit.writers.render import ACCELERATE_FILE
from autofit.writers.scripts import computes_on_host, launch_options, ranks_of_a_node, script_environment

INHERITED_DECISIONS = (
    "ACCELERATE_USE_",
    "ACCELERATE_DEEPSPEED_",
    "ACCELERATE_CONFIG_",
    "ACCELERATE_MIXED_PRECISION",
    "ACCELERATE_GRADIENT_",
    "ACCELERATE_DYNAMO_",
    "ACCELERATE_FP8_",
    "FSDP_",
    "PARALLELISM_CONFIG_",
    "MEGATRON_LM_",
)
"""Prefixes of variables by which an outer launcher would decide what the plan decides.

Source: accelerate/utils/launch.py, `prepare_multi_gpu_env` and `prepare_deepspeed_cmd_env`.
"""
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
"""Variables that make a process believe it is one of many already."""
TRACKERS_OFF = {
    "WANDB_MODE": "disabled",
    "COMET_MODE": "disabled",
    "CLEARML_OFFLINE_MODE": "1",
    "NEPTUNE_MODE": "debug",
}
"""Keeps a probe from starting a tracker's run."""


class Invocation(Struct, frozen=True, kw_only=True):
    """What the user wants run, and from where."""

    script: Path
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str]
    """Of the process that launches."""
    num_cores: int
    """Of this machine, shared by its CPU ranks."""
    python: str = sys.executable
    road: Road = "hooks"
    """How the plan reaches the script."""
    source: str = ""
    """Of the script; only looked at where flags are appended."""
    is_strict: bool = True
    """Whether a planned setting that is not in effect stops the training."""
    is_probe: bool = False
    """Whether two steps on the longest batch are all that is wanted."""


class Command(Struct, frozen=True, kw_only=True):
    """What is started, completely."""

    argv: tuple[str, ...]
    environment: dict[str, str]
    """The whole environment of the process."""
    added: dict[str, str]
    """The part of it that autofit sets."""


def build_command(plan: Plan, run_folder: Path, invocation: Invocation) -> Command:
    """Build the `accelerate launch` of a plan, run by this interpreter and always with the file that was written.

    Without `--config_file` accelerate merges the user's cached default config into the run.
    Source: accelerate/commands/launch.py, `_validate_launch_command`.

    Raises:
        InputError: the plan relies on options of torch's allocator that the user's environment sets otherwise; or a
            planned value has no flag, and flags are the road.
    """
    refuse_other_setting(plan.configuration, invocation.environment)
    added = added_environment(plan, run_folder, invocation)
    return Command(
        argv=(
            *(invocation.python, *(["-P"] if invocation.road == "flags" else []), "-m", "accelerate.commands.launch"),
            *("--config_file", str(run_folder / ACCELERATE_FILE)),
            *launch_options(plan),
            *_script(plan, invocation),
        ),
        environment=_without_inherited_decisions(invocation.environment) | added,
        added=added,
    )


def _script(plan: Plan, invocation: Invocation) -> tuple[str, ...]:
    script = (str(invocation.script), *invocation.arguments)
    if invocation.road == "flags":
        return (*script, *flags_of(plan, invocation.source, invocation.arguments))
    return ("--module", "autofit.runtime", *script)


def added_environment(plan: Plan, run_folder: Path, invocation: Invocation) -> dict[str, str]:
    """Return the variables that the ranks need; a thread count that the user set is kept.

    The interpreter's own folder goes first on the PATH, as activating its environment would put it: DeepSpeed compiles
    its operators with the `ninja` it finds there, and compiles them all again whenever another release of it did.
    PYTHONSAFEPATH keeps `python -m` from putting the current folder before the libraries, where a file of the user's
    could hide one of them; `python train.py` would not search it either. A script that is started itself is left its
    own folder.
    """
    added = {RUN_FOLDER_VARIABLE: str(run_folder), "PYTHONUNBUFFERED": "1"}
    if invocation.road != "flags":
        added["PYTHONSAFEPATH"] = "1"
    if invocation.road == "api":
        added[ROAD_VARIABLE] = "api"
    added["PATH"] = os.pathsep.join([str(Path(invocation.python).parent), invocation.environment.get("PATH", "")])
    if computes_on_host(plan) and "OMP_NUM_THREADS" not in invocation.environment:
        added["OMP_NUM_THREADS"] = str(max(1, invocation.num_cores // ranks_of_a_node(plan)))
    if not invocation.is_strict:
        added[NO_STRICT_VARIABLE] = "1"
    if invocation.is_probe:
        added |= {PROBE_VARIABLE: "1", **TRACKERS_OFF}
    return added | script_environment(plan)


def _without_inherited_decisions(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name not in RANK_VARIABLES and not name.startswith(INHERITED_DECISIONS)
    }
