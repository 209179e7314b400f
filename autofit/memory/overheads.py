"""What a device holds besides tensors of the model: library workspaces, the context, communication buffers."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib import resources
from typing import Any

from autofit.spec.hardware import Device
from autofit.units import KIB, MIB

NUM_CUBLAS_HANDLES = 2
"""One for each thread that multiplies: forward's and backward's."""
FIRST_WITH_LARGE_WORKSPACE = (9, 0)
"""Compute capability."""


def workspace_bytes(device: Device) -> int:
    """cuBLAS workspaces, which torch takes from its own allocator; see `workspace_sizes`."""
    return sum(workspace_sizes(device))


def workspace_sizes(device: Device) -> tuple[int, ...]:
    """cuBLAS workspaces in bytes, one for each thread that multiplies, in the order in which they are taken.

    cuBLASLt, which adds biases, works in the same allocation.
    Source: torch v2.13 aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize: 4096 KiB x 2 + 16 KiB x 8,
    on Hopper and Blackwell 4096 KiB x 8; torch/backends/cuda/__init__.py, `blas_workspace_size`
    (TORCH_CUBLASLT_UNIFIED_WORKSPACE).
    """
    if device.kind != "cuda":
        return ()
    is_large = (device.compute_capability or (0, 0)) >= FIRST_WITH_LARGE_WORKSPACE
    return (32 * MIB if is_large else 8 * MIB + 128 * KIB,) * NUM_CUBLAS_HANDLES


def context_bytes(device: Device, num_devices: int, *, num_communicators: int = 1) -> int | None:
    """CUDA context with loaded kernels, and NCCL's buffers where several devices take part; None for a CPU rank.

    Args:
        device: what it is about; a generation of which nothing was published counts as the one before it.
        num_devices: those that take part.
        num_communicators: groups that a device talks in.

    Source: autofit/memory/data/overheads.json, each figure with where it was published.
    """
    if device.kind != "cuda":
        return None
    figures = _figures()
    capability = list(device.compute_capability or _newest(figures))
    known = [each for each in figures["contexts"] if each["from_compute_capability"] <= capability]
    context = int(known[-1]["bytes"])
    buffers = max(each["bytes"] for each in figures["communicators"])
    return context + (num_communicators * int(buffers) if num_devices > 1 else 0)


def _newest(figures: dict[str, Any]) -> list[int]:
    """A device whose compute capability is not known is taken for a recent one."""
    newest: list[int] = figures["contexts"][-1]["from_compute_capability"]
    return newest


@lru_cache(maxsize=1)
def _figures() -> dict[str, Any]:
    text = resources.files("autofit.memory").joinpath("data", "overheads.json").read_text(encoding="utf-8")
    figures: dict[str, Any] = json.loads(text)
    return figures
