"""What a device holds besides tensors of the model: library workspaces, the context, communication buffers."""

from __future__ import annotations

from autofit.spec.hardware import Device
from autofit.units import GIB, KIB, MIB

NUM_CUBLAS_HANDLES = 2
"""One for each thread that multiplies: forward's and backward's."""


def workspace_bytes(device: Device) -> int:
    """cuBLAS workspaces, which torch takes from its own allocator.

    Source: torch v2.13 aten/src/ATen/cuda/CUDABlas.cpp, parseChosenWorkspaceSize: 4096 KiB x 2 + 16 KiB x 8, from
    compute capability 9.0 on 4096 KiB x 8.
    """
    return sum(workspace_sizes(device))


def workspace_sizes(device: Device) -> tuple[int, ...]:
    """The same, one for each thread that multiplies, in the order in which they are taken."""
    if device.kind != "cuda":
        return ()
    hopper = device.compute_capability is not None and device.compute_capability >= (9, 0)
    return (32 * MIB if hopper else 8 * MIB + 128 * KIB,) * NUM_CUBLAS_HANDLES


def context_bytes(device: Device, num_devices: int) -> int | None:
    """CUDA context, and NCCL's buffers where several devices take part; None for a CPU rank.

    Measured, and known for few devices: 141 MiB on a T4 (torch 2.10-2.14), 0.47-0.92 GiB on an A100 (torch 2.1),
    1.1-1.3 GiB on a V100. The highest figure near the device's generation is taken. NCCL: the first barrier of
    torch.distributed took 1.45 GiB on 2 GPUs.
    Source: fitcheck-llm 0.3.1 (T4); foundation-model-stack/fms-acceleration refs (A100); stas00/ml-engineering (NCCL).
    """
    if device.kind != "cuda":
        return None
    turing = (
        device.compute_capability is not None
        and device.compute_capability[0] == 7
        and device.compute_capability[1] == 5
    )
    context = 141 * MIB if turing else int(0.92 * GIB)
    return context + (int(1.45 * GIB) if num_devices > 1 else 0)
