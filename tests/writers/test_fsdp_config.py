"""FSDP plans as accelerate reads them: its own loader, its environment for the ranks, and the plugin made of that."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from autofit.plan import Plan
from autofit.spec.configuration import Quantization
from autofit.writers import render_files
from tests.plans import A100, a_configuration, a_plan
from tests.writers.test_host_loaders import launch_parser, training_arguments, written

CHANGES: dict[str, dict[str, Any]] = {
    "second": {"sharding": "fsdp2"},
    "second, checkpointed": {"sharding": "fsdp2", "gradient_checkpointing": True, "checkpoint_offload": True},
    "second, kept": {"sharding": "fsdp2", "reshard_after_forward": False, "mixed_precision": "no"},
    "second, offloaded": {"sharding": "fsdp2", "offload": "optimizer_and_parameters", "optim": "adamw_torch"},
    "second, hybrid": {"sharding": "fsdp2", "num_processes": 8, "num_replicas": 2},
    "second, qlora": {
        "sharding": "fsdp2",
        "method": "qlora",
        "quantization": Quantization(storage_dtype="bfloat16"),
    },
    "first": {"sharding": "fsdp1"},
    "first, checkpointed": {"sharding": "fsdp1", "gradient_checkpointing": True},
    "first, kept": {"sharding": "fsdp1", "reshard_after_forward": False},
    "first, hybrid": {"sharding": "fsdp1", "num_processes": 8, "num_replicas": 2},
    "first, hybrid and kept": {
        "sharding": "fsdp1",
        "num_processes": 8,
        "num_replicas": 2,
        "reshard_after_forward": False,
    },
}
STRATEGIES = {(True, 1): "FULL_SHARD", (False, 1): "SHARD_GRAD_OP"} | {
    (True, 2): "HYBRID_SHARD",
    (False, 2): "_HYBRID_SHARD_ZERO2",
}


@pytest.fixture(params=CHANGES)
def plan(request: pytest.FixtureRequest) -> Plan:
    """Return each plan for GPUs in turn."""
    return a_plan(a_configuration(**CHANGES[request.param]), device=A100)


def environment_of(plan: Plan, folder: Path) -> dict[str, str]:
    """Let accelerate turn the written file into the environment of its ranks, starting nothing."""
    from accelerate.commands.launch import _validate_launch_command
    from accelerate.utils.launch import prepare_multi_gpu_env

    argv = ["--config_file", str(written(plan, folder) / "accelerate.yaml"), "train.py"]
    arguments, _, _ = _validate_launch_command(launch_parser().parse_args(argv))
    assert arguments.use_fsdp
    return dict(prepare_multi_gpu_env(arguments))


@contextmanager
def plugin_of(environment: dict[str, str]) -> Iterator[Any]:
    """Make the plugin that every rank would.

    Weights are not loaded once for all here: this machine has no device to send them from.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin

    changes = {"FSDP_SYNC_MODULE_STATES": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    with mock.patch.dict(os.environ, environment | changes):
        yield FullyShardedDataParallelPlugin()


def test_every_rank_shards_as_planned(plan: Plan, tmp_path: Path) -> None:
    """accelerate's plugin has the planned version, sharding, checkpointing and offload, and wraps each layer."""
    configuration = plan.configuration
    environment = environment_of(plan, tmp_path)
    assert environment["ACCELERATE_MIXED_PRECISION"] == configuration.mixed_precision
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    with plugin_of(environment) as plugin:
        assert plugin.fsdp_version == (1 if configuration.sharding == "fsdp1" else 2)
        assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
        assert plugin.activation_checkpointing == configuration.gradient_checkpointing
        assert plugin.activation_checkpointing_offload == configuration.checkpoint_offload
        assert plugin.state_dict_type.name == "FULL_STATE_DICT"
        if plugin.fsdp_version == 2:
            assert plugin.reshard_after_forward == configuration.reshard_after_forward
            assert (type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy") == (configuration.offload != "none")
        else:
            strategy = STRATEGIES[configuration.reshard_after_forward, configuration.num_replicas]
            assert plugin.sharding_strategy.name == strategy
            assert plugin.backward_prefetch.name == "BACKWARD_PRE"
            assert plugin.use_orig_params


def test_a_hybrid_shard_of_the_second_version_has_the_planned_groups(tmp_path: Path) -> None:
    """accelerate's parallelism has as many replicas as planned, and shards over the processes of each."""
    from accelerate.parallelism_config import ParallelismConfig

    plan = a_plan(a_configuration(**CHANGES["second, hybrid"]), device=A100)
    environment = environment_of(plan, tmp_path)
    with mock.patch.dict(os.environ, environment):
        parallelism = ParallelismConfig()
    assert environment["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
    assert (parallelism.dp_replicate_size, parallelism.dp_shard_size, parallelism.total_size) == (2, 4, 8)


def test_transformers_leaves_checkpointing_to_fsdp(plan: Plan, tmp_path: Path) -> None:
    """Asked for both, Trainer raises: the argument is off whatever is planned."""
    arguments = training_arguments(written(plan, tmp_path))
    assert not arguments.activation_checkpointing
    assert arguments.bf16 == (plan.configuration.mixed_precision == "bf16")


def test_what_the_first_version_alone_knows_is_not_said_to_the_second() -> None:
    """accelerate would warn of each of them."""
    text = render_files(a_plan(a_configuration(sharding="fsdp2"), device=A100), Path("/run"))["accelerate.yaml"]
    assert not any(word in text for word in ("prefetch", "use_orig_params", "sharding_strategy"))
    assert json.loads(text.split("fsdp_version: ")[1].splitlines()[0]) == 2
