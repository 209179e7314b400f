"""accelerate.yaml: what `accelerate launch --config_file` needs to start the planned processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autofit.plan import Plan
from autofit.spec.configuration import Configuration
from autofit.spec.hardware import Cluster

DEEPSPEED_FILE = "deepspeed.json"


def render_accelerate_config(plan: Plan, run_folder: Path) -> str:
    """Write the configuration as YAML whose scalars are JSON, which is YAML too and needs no YAML library."""
    return "".join(_yaml_lines(accelerate_config(plan, run_folder)))


def accelerate_config(plan: Plan, run_folder: Path) -> dict[str, Any]:
    """Decide every key of a plan's launch; see `launcher_keys`."""
    return launcher_keys(plan.configuration, plan.used, run_folder)


def launcher_keys(configuration: Configuration, cluster: Cluster, run_folder: Path) -> dict[str, Any]:
    """Decide every key that accelerate would otherwise take from a default or from the user's cached file.

    Source: accelerate/commands/config/config_args.py, `ClusterConfig`.
    """
    return {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": distributed_type(configuration),
        "enable_cpu_affinity": False,
        "machine_rank": 0,
        "main_training_function": "main",
        "num_machines": cluster.num_nodes,
        "num_processes": configuration.num_processes,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": cluster.device.kind == "cpu",
        **_strategy_keys(configuration, cluster, run_folder),
    }


def distributed_type(configuration: Configuration) -> str:
    """Name the launcher's mode.

    Two CPU ranks are MULTI_GPU as well: MULTI_CPU starts a single process unless there is an MPI host file.
    Source: accelerate/commands/launch.py, `launch_command`.
    """
    types = {"none": "NO", "ddp": "MULTI_GPU", "fsdp1": "FSDP", "fsdp2": "FSDP"}
    return "DEEPSPEED" if configuration.uses_deepspeed else types[configuration.sharding]


def _strategy_keys(configuration: Configuration, cluster: Cluster, run_folder: Path) -> dict[str, Any]:
    """Return the keys that differ between DeepSpeed, FSDP and the rest.

    Next to a `deepspeed_config_file` accelerate refuses `mixed_precision`: the DeepSpeed file has it.
    Source: accelerate/utils/dataclasses.py, `_deepspeed_config_checks`.
    """
    if configuration.uses_fsdp:
        return {"mixed_precision": configuration.mixed_precision, **_fsdp_keys(configuration, cluster)}
    if not configuration.uses_deepspeed:
        return {"mixed_precision": configuration.mixed_precision}
    deepspeed: dict[str, Any] = {
        "deepspeed_config_file": str(run_folder / DEEPSPEED_FILE),
        "zero3_init_flag": configuration.zero_stage == 3,
    }
    if cluster.num_nodes > 1:
        deepspeed["deepspeed_multinode_launcher"] = "standard"
    return {"deepspeed_config": deepspeed}


def _fsdp_keys(configuration: Configuration, cluster: Cluster) -> dict[str, Any]:
    """Return FSDP's keys; what its first version alone knows is left out for the second, which would warn.

    A wrap policy must be named, or nothing but the root is wrapped. The full state dict, or `save_model` writes
    nothing. Only the first rank loads the weights; that needs a device to send them from, which CPU ranks have not.
    Source: accelerate/utils/dataclasses.py 1.15, `FullyShardedDataParallelPlugin.__post_init__`; transformers 5.23
    trainer.py, `save_model`.
    """
    loads_once = cluster.device.kind == "cuda"
    keys: dict[str, Any] = {
        "fsdp_version": 1 if configuration.sharding == "fsdp1" else 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_offload_params": configuration.offload != "none",
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": loads_once,
        "fsdp_sync_module_states": loads_once,
        "fsdp_activation_checkpointing": configuration.gradient_checkpointing,
    }
    if configuration.sharding == "fsdp1":
        strategy = _sharding_strategy(configuration)
        first: dict[str, Any] = {"fsdp_sharding_strategy": strategy, "fsdp_reshard_after_forward": strategy}
        first |= {"fsdp_backward_prefetch": "BACKWARD_PRE", "fsdp_forward_prefetch": False}
        return {"fsdp_config": keys | first | {"fsdp_use_orig_params": True}}
    keys["fsdp_reshard_after_forward"] = configuration.reshard_after_forward
    keys["fsdp_activation_checkpointing_offload"] = configuration.checkpoint_offload
    if configuration.num_replicas == 1:
        return {"fsdp_config": keys}
    return {"fsdp_config": keys, "parallelism_config": _replica_sizes(configuration)}


def _sharding_strategy(configuration: Configuration) -> str:
    """Name FSDP1's strategy. Source: torch/distributed/fsdp/api.py, `ShardingStrategy`."""
    if configuration.num_replicas > 1:
        return "HYBRID_SHARD" if configuration.reshard_after_forward else "HYBRID_SHARD_ZERO2"
    return "FULL_SHARD" if configuration.reshard_after_forward else "SHARD_GRAD_OP"


def _replica_sizes(configuration: Configuration) -> dict[str, int]:
    """Spell the groups of a hybrid shard. Source: accelerate/parallelism_config.py 1.15."""
    replicas = configuration.num_replicas
    sizes = {"dp_replicate": replicas, "dp_shard": configuration.num_processes // replicas, "tp": 1, "cp": 1, "sp": 1}
    return {f"parallelism_config_{name}_size": size for name, size in sizes.items()}


def _yaml_lines(mapping: dict[str, Any], indent: str = "") -> list[str]:
    lines: list[str] = []
    for key, value in mapping.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:\n", *_yaml_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {json.dumps(value, ensure_ascii=False)}\n")
    return lines
