"""How each way of sharding lays out weights, gradients and optimizer state. One class for each; the only `if` chooses.

A layout says what is resident all the time, how backward treats gradients, and what the optimizer's step adds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from autofit.memory.static import StaticBytes, optimizer_bytes, partition_optimizer_bytes
from autofit.memory.tensors import Tensor
from autofit.spec.configuration import Configuration
from autofit.spec.deepspeed import DeepSpeedSettings, bucket_settings
from autofit.spec.hardware import DeviceKind

Terms = dict[str, int]
GradientMode = Literal["kept", "bucketed", "used"]

MASTER_BYTES = 4
"""DeepSpeed's master weights and moments are fp32. Source: deepspeed/runtime/zero/config.py, bf16 block defaults."""
NCCL_ALIGNMENT_ELEMENTS = 2
"""DeepSpeed pads flat buffers to this many elements a rank. Source: stage_1_and_2.py, nccl_start_alignment_factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Bytes of one device, without activations."""

    resident: Terms
    """Held from before the first step to the end."""
    forward: Terms = field(default_factory=dict)
    """Held while forward and backward run."""
    backward: Terms = field(default_factory=dict)
    """Held while backward runs."""
    gradients: GradientMode = "kept"
    accumulated_gradients: int = 0
    """Gradients that micro-steps after the first find already there."""
    step: tuple[Terms, ...] = ()
    """Held at each of the optimizer step's moments that can be its highest."""
    host: int = 0


def layout(
    configuration: Configuration, model: tuple[Tensor, ...], static: StaticBytes, hidden_size: int, device: DeviceKind
) -> Layout:
    """Lay out a configuration's weights, gradients and state."""
    if configuration.zero_stage == 3:
        return _zero3(configuration, model, static, bucket_settings(configuration, hidden_size), device)
    if configuration.uses_deepspeed:
        return _zero12(configuration, static, bucket_settings(configuration, hidden_size), device)
    return _replicated(configuration, model, static, device)


def _weights(static: StaticBytes) -> Terms:
    return {
        "weights": static.frozen_weights + static.trained_weights,
        "quantized_weights": static.quantized_weights,
        "buffers": static.buffers,
    }


def _replicated(
    configuration: Configuration, model: tuple[Tensor, ...], static: StaticBytes, device: DeviceKind
) -> Layout:
    """Every device holds everything; DDP copies gradients into buckets of the same size.

    Source: torch v2.13 torch/csrc/distributed/c10d/reducer.cpp; accelerate leaves gradient_as_bucket_view False.
    """
    optimizer = optimizer_bytes(model, configuration.optim, device)
    resident = {**_weights(static), "optimizer_state": optimizer.state}
    if configuration.sharding == "ddp":
        resident["communication_buckets"] = static.gradients
    if optimizer.in_backward:
        return Layout(
            resident=resident,
            backward={"optimizer_temporaries": optimizer.step},
            gradients="used",
            step=({},),
            host=optimizer.host,
        )
    return Layout(
        resident=resident,
        accumulated_gradients=static.gradients,
        step=({"gradients": static.gradients, "optimizer_temporaries": optimizer.step},),
        host=optimizer.host,
    )


def _partition_elements(num_elements: int, num_ranks: int) -> int:
    return -(-num_elements // (num_ranks * NCCL_ALIGNMENT_ELEMENTS)) * NCCL_ALIGNMENT_ELEMENTS


def _zero12(
    configuration: Configuration, static: StaticBytes, settings: DeepSpeedSettings, device: DeviceKind
) -> Layout:
    """Weights whole in the engine's dtype; an fp32 master copy, state and (stage 2) gradients of a partition.

    Stage 1 copies its partition's gradients when all are there, and frees the others at the step.
    The step flattens the partition's gradients and casts them to fp32; one 16-bit copy is still there at the update.

    Source: deepspeed/runtime/zero/stage_1_and_2.py 0.19.8.
    """
    element = _engine_bytes(configuration)
    partition = _partition_elements(static.trained_elements, configuration.num_processes)
    optimizer = partition_optimizer_bytes(partition, configuration.optim, device)
    bucket = settings.reduce_bucket_size * element * (2 if settings.overlap_comm else 1)
    accumulates = configuration.gradient_accumulation_steps > 1
    splits = settings.stage == 2
    cast = partition * MASTER_BYTES if element != MASTER_BYTES else 0
    return Layout(
        resident={
            **_weights(static),
            "master_weights": partition * MASTER_BYTES,
            "optimizer_state": optimizer.state,
        },
        forward={"gradients": partition * element} if splits and accumulates else {},
        backward={
            "communication_buckets": bucket,
            "gradients": partition * element if splits else 0,
        },
        gradients="bucketed" if splits else "kept",
        accumulated_gradients=0 if splits else static.gradients,
        step=(
            {"gradients": partition * element + (0 if splits else static.gradients), "communication_buckets": bucket},
            {"gradients": partition * element * 2 + cast},
            {"gradients": partition * element + cast, "optimizer_temporaries": optimizer.step},
        ),
        host=optimizer.host,
    )


def _zero3(
    configuration: Configuration,
    model: tuple[Tensor, ...],
    static: StaticBytes,
    settings: DeepSpeedSettings,
    device: DeviceKind,
) -> Layout:
    """Everything in partitions; weights are gathered around the layer that needs them, up to a bound.

    The gradients of a bucket are interleaved in a copy before they are scattered. The step flattens a sub-group's
    gradients into a copy, and casts that to fp32.

    Source: deepspeed/runtime/zero/stage3.py, partitioned_param_coordinator.py and
    deepspeed/runtime/comm/coalesced_collectives.py (reduce_scatter_coalesced) 0.19.8.
    """
    ranks = configuration.num_processes
    parameters = [t for t in model if t.kind in ("parameter", "adapter", "quantized")]
    persistent = [t for t in parameters if t.num_elements <= settings.stage3_param_persistence_threshold]
    sharded = [t for t in parameters if t.num_elements > settings.stage3_param_persistence_threshold]
    shards = sum(-(-t.num_elements // ranks) * t.bytes_per_element for t in parameters)
    partition = sum(-(-t.num_elements // ranks) for t in parameters if t.trains)
    element = _engine_bytes(configuration)
    optimizer = partition_optimizer_bytes(partition, configuration.optim, device)
    sub_group = min(settings.sub_group_size, partition)
    flat, master = sub_group * element, sub_group * MASTER_BYTES
    return Layout(
        resident={
            "weights": shards + sum(t.num_bytes for t in persistent),
            "quantized_weights": sum(t.num_bytes for t in model if t.kind == "quant_state"),
            "buffers": static.buffers,
            "master_weights": partition * MASTER_BYTES,
            "optimizer_state": optimizer.state,
            "gradients": partition * element,
            "communication_buckets": settings.reduce_bucket_size * element,
        },
        forward={"gathered_weights": _gathered_bytes(sharded, settings)},
        backward={"communication_buckets": settings.reduce_bucket_size * element},
        gradients="bucketed",
        step=(
            {"gradients": flat + (master if element != MASTER_BYTES else 0)},
            {"gradients": master, "optimizer_temporaries": optimizer.step},
        ),
        host=optimizer.host,
    )


def _gathered_bytes(sharded: list[Tensor], settings: DeepSpeedSettings) -> int:
    """Weights whole at one time: all of them, or as many as may live and be prefetched."""
    elements = sum(t.num_elements for t in sharded)
    whole = sum(t.num_bytes for t in sharded)
    bound = settings.stage3_max_live_parameters + settings.stage3_prefetch_bucket_size
    return whole if elements <= bound else whole * bound // elements


def _engine_bytes(configuration: Configuration) -> int:
    return MASTER_BYTES if configuration.mixed_precision == "no" else 2
