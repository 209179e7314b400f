"""Host memory: a second budget, of each node. What DeepSpeed and FSDP keep there instead of on the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct

from autofit.memory.tensors import Tensor
from autofit.spec.hardware import DeviceKind

FP32_BYTES = 4
NUM_MOMENTS = 2
"""DeepSpeedCPUAdam's, in fp32. Source: deepspeed/ops/adam/cpu_adam.py 0.19.8."""


class HostBuffers(Struct, frozen=True, kw_only=True):
    """What one process keeps on the host."""

    pinned: tuple[int, ...]
    """Sizes of what is page-locked, where the device is a GPU."""
    ordinary: tuple[int, ...]
    left_pinned: tuple[int, ...] = ()
    """Pinned once and free again; torch keeps such memory for requests of the same size."""

    def num_bytes(self, device: DeviceKind) -> int:
        """Add the buffers up. torch rounds pinned memory up to a power of two, and does not return it by itself.

        Source: torch v2.13 aten/src/ATen/core/CachingHostAllocator.h (`PowerOf2Ceil`); without a limit by default,
        c10/core/AllocatorConfig.h (`pinned_max_round_threshold_`).
        """
        if device != "cuda":
            return sum(self.pinned) + sum(self.ordinary)
        return sum(map(_power_of_two, (*self.pinned, *self.left_pinned))) + sum(self.ordinary)


def _power_of_two(num_bytes: int) -> int:
    return 1 << (num_bytes - 1).bit_length() if num_bytes > 0 else 0


def zero2_buffers(
    partition_elements: int, trained_elements: Sequence[int], bytes_per_element: int, *, accumulates: bool
) -> HostBuffers:
    """Return what one process keeps on the host under stage 2 with its optimizer offloaded.

    Of its partition: master weights, gradients and two moments in fp32, and the updated weights in the engine's dtype
    on their way back. Beside it one buffer of the largest parameter; with accumulation the partition's gradients in the
    engine's dtype, those on its edges whole.

    Source: deepspeed/runtime/zero/stage_1_and_2.py 0.19.8 (`weights_partition`,
    `param_buffer_of_bit16_for_cpu_offload_groups`, initialize_optimizer_states, `temp_grad_buffer_for_cpu_offload`,
    `accumulated_grads_in_cpu`).

    Args:
        partition_elements: elements that train, on this process.
        trained_elements: of each parameter that trains.
        bytes_per_element: of the engine's dtype.
        accumulates: whether a step has more than one micro-step.
    """
    largest = max(trained_elements, default=0)
    accumulated = _most_of_a_partition(trained_elements, partition_elements) if accumulates else ()
    return HostBuffers(
        pinned=(
            partition_elements * FP32_BYTES,
            partition_elements * FP32_BYTES,
            partition_elements * bytes_per_element,
            largest * bytes_per_element,
            *(n * bytes_per_element for n in accumulated),
        ),
        ordinary=(partition_elements * FP32_BYTES,) * NUM_MOMENTS,
    )


def _most_of_a_partition(trained_elements: Sequence[int], partition_elements: int) -> list[int]:
    """Return the parameters of the first partition, the one on its edge whole; other partitions may have two edges."""
    held: list[int] = []
    for n in trained_elements:
        if sum(held) >= partition_elements:
            break
        held.append(n)
    return held


def zero3_buffers(trained: Iterable[int], bytes_per_element: int, sub_group_elements: int) -> HostBuffers:
    """Return what one process keeps on the host under stage 3 with its optimizer offloaded.

    Of its partition: master weights, gradients and two moments in fp32, and the gradients in the engine's dtype.

    Source: deepspeed/runtime/zero/stage3.py 0.19.8 (_create_fp32_partitions, initialize_optimizer_states,
    `grad_partitions_flat_buffer`).

    Args:
        trained: elements of each parameter that trains, on this process.
        bytes_per_element: of the engine's dtype.
        sub_group_elements: the most that one sub-group holds; each has buffers of its own.
    """
    groups = sub_groups(trained, sub_group_elements)
    partition = sum(groups)
    return HostBuffers(
        pinned=(*(n * FP32_BYTES for n in groups), partition * bytes_per_element),
        ordinary=(partition * FP32_BYTES,) * (1 + NUM_MOMENTS),
    )


def sub_groups(trained: Iterable[int], sub_group_elements: int) -> list[int]:
    """Close a sub-group with the parameter that fills it. Source: stage3.py 0.19.8, _create_fp16_sub_groups."""
    groups = [0]
    for n in trained:
        if groups[-1] >= sub_group_elements:
            groups.append(0)
        groups[-1] += n
    return groups


def zero3_weight_buffers(shards: Sequence[Tensor]) -> HostBuffers:
    """Return what one process keeps of the weights on the host under stage 3 with them offloaded.

    Each shard is pinned by itself. The engine then moves those that train into one buffer; what they leave, torch
    keeps for pinned memory of the same size, which nobody asks for.

    Source: deepspeed/runtime/zero/partition_parameters.py 0.19.8 (_partition_param); stage3.py
    (_create_param_groups_fp16_flat_cpu_memory).

    Args:
        shards: this process's part of every parameter.
    """
    frozen = tuple(shard.num_bytes for shard in shards if not shard.trains)
    trained = tuple(shard.num_bytes for shard in shards if shard.trains)
    return HostBuffers(pinned=(*frozen, sum(trained)), ordinary=(), left_pinned=trained)


def fsdp_buffers(shards: Iterable[int], gradients: Iterable[int], optimizer_bytes: int) -> HostBuffers:
    """Return what one process keeps on the host under FSDP with everything offloaded.

    Each shard is pinned by itself, and so is each gradient's: FSDP2 copies it there without waiting, which makes torch
    take pinned memory for it; FSDP1 pins one for every flat parameter, frozen ones too. The optimizer's state and its
    temporaries are ordinary memory.

    Source: torch v2.13 distributed/fsdp/_fully_shard/_fsdp_param.py (`_init_sharded_param`), _fsdp_collectives.py
    (`foreach_reduce`, "D2H copy"), aten/src/ATen/native/TensorConversions.cpp (`_to_copy`, `pin_out`);
    distributed/fsdp/_flat_param.py (`init_flat_param_attributes`, `_cpu_grad`).

    Args:
        shards: bytes of this process's part of each parameter, or flat parameter.
        gradients: bytes of each gradient's part.
        optimizer_bytes: its state, and what its step takes for a moment.
    """
    return HostBuffers(pinned=(*shards, *gradients), ordinary=(optimizer_bytes,))
