"""What FSDP has made of a model: its version, its units and its groups, read from the wrapped module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

FULL_SHARDS = ("FULL_SHARD", "HYBRID_SHARD")
"""FSDP1's strategies that free a layer's weights between its forward and its backward."""


def fsdp_name(engine: Any) -> str | None:
    """Name the version that wraps a model, in the plan's words; None where neither does."""
    if _has_class(engine, "FullyShardedDataParallel"):
        return "fsdp1"
    return "fsdp2" if _has_class(engine, "FSDPModule") else None


def num_wrapped_layers(engine: Any, layer_classes: frozenset[str]) -> int:
    """Count the layers that are units of their own; accelerate also wraps what checkpoints them."""
    return len({id(unit) for unit in _units(engine) if any(_has_class(unit, name) for name in layer_classes)})


def reshards_after_forward(engine: Any) -> bool:
    """Tell whether layers are freed between their forward and their backward."""
    if fsdp_name(engine) == "fsdp1":
        return engine.sharding_strategy.name in FULL_SHARDS
    return any(group._reshard_after_forward for group in _layer_groups(engine))


def num_shards(engine: Any) -> int:
    """Count the ranks that share one copy of the model."""
    if fsdp_name(engine) == "fsdp1":
        return int(engine.process_group.size())
    return next((int(group.mesh_info.shard_mesh_size) for group in _layer_groups(engine)), 1)


def offload_name(engine: Any) -> str:
    """Say what waits on the host, in the plan's words: everything, or nothing."""
    if fsdp_name(engine) == "fsdp1":
        offloads = bool(engine.cpu_offload.offload_params)
    else:
        offloads = any(type(group.offload_policy).__name__ == "CPUOffloadPolicy" for group in _layer_groups(engine))
    return "optimizer_and_parameters" if offloads else "none"


def checkpoints_units(engine: Any) -> bool:
    """Tell whether FSDP's own checkpointing wraps the layers."""
    return any(_has_class(module, "CheckpointWrapper") for module in engine.modules())


def _has_class(module: Any, name: str) -> bool:
    return any(each.__name__ == name for each in type(module).__mro__)


def _units(engine: Any) -> Iterator[Any]:
    """Walk the modules that are gathered by themselves, below the wrappers around them."""
    for module in engine.modules():
        if fsdp_name(module) is not None and module is not engine:
            yield _unwrapped(module)


def _unwrapped(module: Any) -> Any:
    for name in ("_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        module = getattr(module, name, module)
    return module


def _layer_groups(engine: Any) -> Iterator[Any]:
    """Walk the groups of parameters of every unit but the root's.

    Source: torch/distributed/fsdp/_fully_shard/_fsdp_state.py 2.13, `_fsdp_param_groups` (one, before 2.12).
    """
    for module in engine.modules():
        if fsdp_name(module) == "fsdp2" and module is not engine:
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)
            yield from groups if groups is not None else [state._fsdp_param_group]
