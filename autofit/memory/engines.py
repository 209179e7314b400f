"""How each way of sharding lays out weights, gradients and optimizer state. One class for each; the only `if` chooses.

A layout says what is resident all the time, how backward treats gradients, and what the optimizer's step adds.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Literal

from msgspec import Struct, field
from msgspec.structs import replace

from autofit.memory.host import sub_groups, zero2_buffers, zero3_buffers, zero3_weight_buffers
from autofit.memory.static import OptimizerBytes, StaticBytes, Update, optimizer_bytes, partition_optimizer_bytes
from autofit.memory.tensors import Model, Tensor, as_model
from autofit.spec.configuration import Configuration, Optim
from autofit.spec.deepspeed import DeepSpeedSettings, bucket_settings
from autofit.spec.hardware import DeviceKind

Terms = dict[str, int]
GradientMode = Literal["kept", "moved", "bucketed", "offloaded", "used"]
Updated = Literal["tensors", "shards", "partition", "nothing"]
"""What an optimizer updates on the device: what trains, FSDP's shards of it, a flat fp32 partition, or nothing."""

MASTER_BYTES = 4
"""DeepSpeed's master weights and moments are fp32. Source: deepspeed/runtime/zero/config.py, bf16 block defaults."""
NORM_BYTES = 8
"""DeepSpeed casts a gradient to fp64 for its norm. Source: deepspeed/runtime/zero/utils.py 0.19.8, get_norm_dtype."""
NCCL_ALIGNMENT_ELEMENTS = 2
"""DeepSpeed pads flat buffers to this many elements a rank. Source: stage_1_and_2.py, nccl_start_alignment_factor."""


class Layout(Struct, frozen=True, kw_only=True):
    """Bytes of one device, without activations."""

    resident: Terms
    """Held from before the first step to the end."""
    forward: Terms = field(default_factory=dict)
    """Held while forward and backward run."""
    gathering_bytes: int = 0
    """What gathering the head takes beside its weight, before its forward."""
    backward: Terms = field(default_factory=dict)
    """Held while backward runs."""
    gradients: GradientMode = "kept"
    accumulated_gradients: int = 0
    """Gradients that micro-steps after the first find already there; where offloaded, the most that a micro-step before
    the last leaves on the device until it ends."""
    clones_outputs: bool = False
    """Whether what forward returns is cloned before it is handed on."""
    reduction_fraction: float = 0.0
    """What reducing a gradient too large for the bucket takes for a moment, as a share of its bytes."""
    reduction_bytes: int = 0
    """What reducing a gradient that fits the bucket takes for a moment, at most."""
    reduction: tuple[Terms, ...] = ()
    """Held at each moment between the last gradient and the optimizer's step that can be the highest there."""
    updates: tuple[Update, ...] = ()
    """What is taken for each kind of tensor when its gradient has been made, where it is used up at once."""
    step: tuple[Terms, ...] = ()
    """Held at each of the optimizer step's moments that can be its highest; the last is the update itself."""
    updated: Updated = "nothing"
    partition_elements: int = 0
    """Of the partition that is updated."""
    not_yet_made: int = 0
    """State that the first step has not made at its highest moment."""
    host: int = 0
    """Host memory of one process: offloaded and paged state, and the buffers that serve it."""
    host_made_later: int = 0
    """What of it the first backward makes."""


def layout(
    configuration: Configuration, model: tuple[Tensor, ...], static: StaticBytes, hidden_size: int, device: DeviceKind
) -> Layout:
    """Lay out a configuration's weights, gradients and state."""
    whole = as_model(model)
    without = engine_layout(configuration, whole, static, hidden_size, device)
    return with_optimizer(without, optimizer_on_device(without, whole, configuration.optim, device))


def optimizer_on_device(without: Layout, model: Model, optim: Optim, device: DeviceKind) -> OptimizerBytes | None:
    """Return what an optimizer adds to an engine's layout; None where the host updates.

    Args:
        without: the layout.
        model: the tensors that are updated, and others.
        optim: which optimizer.
        device: where.
    """
    if without.updated == "partition":
        return partition_optimizer_bytes(without.partition_elements, optim, device)
    return None if without.updated == "nothing" else optimizer_bytes(model, optim, device)


def with_optimizer(without: Layout, optimizer: OptimizerBytes | None) -> Layout:
    """Add an optimizer to an engine's layout: its state all the time, its temporaries to the update.

    One that works in backward uses up each gradient as it is made.
    """
    if optimizer is None:
        return without
    with_state = replace(
        without,
        resident={**without.resident, "optimizer_state": optimizer.state},
        host=without.host + optimizer.host,
    )
    if optimizer.in_backward:
        return replace(
            with_state,
            backward={} if optimizer.updates else {"optimizer_temporaries": optimizer.step},
            updates=optimizer.updates,
            gradients="used",
            accumulated_gradients=0,
            clones_outputs=False,
            step=({},),
        )
    *before, update = without.step
    return replace(
        with_state,
        step=(*before, {**update, "optimizer_temporaries": optimizer.step}),
        not_yet_made=optimizer.not_yet if without.updated == "tensors" else 0,
    )


def engine_layout(
    configuration: Configuration, model: Model, static: StaticBytes, hidden_size: int, device: DeviceKind
) -> Layout:
    """Lay out all that does not depend on the optimizer: its state and temporaries stand in it with no bytes."""
    if configuration.zero_stage == 3:
        return _zero3(configuration, model, static, bucket_settings(configuration, hidden_size), device)
    if configuration.offload != "none":
        return _zero2_offload(configuration, model, static, bucket_settings(configuration, hidden_size), device)
    if configuration.uses_deepspeed:
        return _zero12(configuration, model, static, bucket_settings(configuration, hidden_size))
    return _replicated(configuration, static)


def _weights(static: StaticBytes) -> Terms:
    return {
        "weights": static.frozen_weights + static.trained_weights,
        "quantized_weights": static.quantized_weights,
        "buffers": static.buffers,
    }


def _replicated(configuration: Configuration, static: StaticBytes) -> Layout:
    """Every device holds everything; DDP copies gradients into buckets of the same size.

    Where DDP looks for unused parameters, it clones the model's output. The Trainer has it do so; not around
    checkpoints, nor around what does not train whole, where a plan says otherwise; nor does a loop of one's own.

    Source: torch v2.13 torch/csrc/distributed/c10d/reducer.cpp; nn/parallel/distributed.py, _DDPSink; accelerate leaves
    gradient_as_bucket_view False; transformers/trainer.py 5.23, _build_accelerator_args (`find_unused`).

    With `gradient_as_bucket_view` each gradient gives way to its place in a bucket as soon as it is made; not where
    micro-steps before the last, which reduce nothing, made it already.
    """
    resident = {**_weights(static), "optimizer_state": 0}
    if configuration.sharding == "ddp":
        resident["communication_buckets"] = static.gradients
    moves = configuration.gradient_as_bucket_view and configuration.gradient_accumulation_steps == 1
    return Layout(
        resident=resident,
        gradients="moved" if moves else "kept",
        accumulated_gradients=static.gradients,
        clones_outputs=configuration.sharding == "ddp"
        and configuration.method == "full"
        and not (configuration.gradient_checkpointing or configuration.keeps_outputs),
        step=({"gradients": 0 if moves else static.gradients, "optimizer_temporaries": 0},),
        updated="tensors",
    )


def _partition_elements(num_elements: int, num_ranks: int) -> int:
    return -(-num_elements // (num_ranks * NCCL_ALIGNMENT_ELEMENTS)) * NCCL_ALIGNMENT_ELEMENTS


class _Casts(Struct, frozen=True, kw_only=True):
    """What DeepSpeed copies into fp32 to reduce it, where processes share sequences; nothing elsewhere.

    Source: deepspeed/runtime/zero/stage_1_and_2.py 0.19.8 (allreduce_bucket, always fp32 then); engine.py
    (`seq_parallel_communication_data_type`) and constants.py (its default: a method is compared with a string, so that
    no release of NCCL changes it); stage3.py (__avg_scatter_grads).
    """

    fraction: float
    """Of a gradient that is reduced by itself."""
    bucket_bytes: int
    """Of a full bucket."""
    alone_bytes: int
    """The largest gradient that is reduced by itself, as it is, 0 if all go through the bucket."""

    @property
    def most_bytes(self) -> int:
        """The largest copy."""
        return max(self.bucket_bytes, int(self.alone_bytes * self.fraction))


def _casts(configuration: Configuration, model: Model, settings: DeepSpeedSettings) -> _Casts:
    element = _engine_bytes(configuration)
    if configuration.sequence_parallel_size == 1 or element == MASTER_BYTES:
        return _Casts(fraction=0.0, bucket_bytes=0, alone_bytes=0)
    trained = model.trained.counted
    alone = max((t.num_elements for t, _ in trained if t.num_elements > settings.reduce_bucket_size), default=0)
    num_elements = sum(t.num_elements * num for t, num in trained)
    return _Casts(
        fraction=MASTER_BYTES / element,
        bucket_bytes=min(settings.reduce_bucket_size, num_elements) * MASTER_BYTES,
        alone_bytes=alone * element,
    )


def _zero12(
    configuration: Configuration,
    model: Model,
    static: StaticBytes,
    settings: DeepSpeedSettings,
) -> Layout:
    """Weights whole in the engine's dtype; an fp32 master copy, state and (stage 2) gradients of a partition.

    Stage 1 copies its partition's gradients when all are there, then frees them all.
    The step takes the norm of each of the partition's gradients in fp64, then flattens them and casts them to fp32. One
    copy in the engine's dtype is still there at the update; in fp32 it is the flat one that needs no cast.

    Source: deepspeed/runtime/zero/stage_1_and_2.py 0.19.8.
    """
    element = _engine_bytes(configuration)
    partition = _partition_elements(static.trained_elements, configuration.num_processes)
    bucket = settings.reduce_bucket_size * element * (2 if settings.overlap_comm else 1)
    accumulates = configuration.gradient_accumulation_steps > 1
    splits = settings.stage == 2
    cast = partition * MASTER_BYTES if element != MASTER_BYTES else 0
    largest = min(partition, max((t.num_elements for t, _ in model.trained.counted), default=0))
    casts = _casts(configuration, model, settings)
    waiting = casts.alone_bytes if splits else 0
    reduced = partition * element + (0 if splits else static.gradients) + waiting
    return Layout(
        resident={
            **_weights(static),
            "master_weights": partition * MASTER_BYTES,
            "optimizer_state": 0,
        },
        forward={"gradients": partition * element} if splits and accumulates else {},
        backward={
            "communication_buckets": bucket,
            "gradients": partition * element if splits else 0,
        },
        gradients="bucketed" if splits else "kept",
        accumulated_gradients=0 if splits else static.gradients,
        reduction_fraction=casts.fraction if splits else 0.0,
        reduction_bytes=casts.bucket_bytes if splits else 0,
        reduction=({"gradients": reduced, "communication_buckets": bucket + casts.most_bytes},),
        step=(
            {"gradients": partition * element, "optimizer_temporaries": largest * NORM_BYTES},
            {"gradients": partition * element * 2 + cast},
            {"gradients": partition * (element + MASTER_BYTES), "optimizer_temporaries": 0},
        ),
        updated="partition",
        partition_elements=partition,
    )


def _zero2_offload(
    configuration: Configuration,
    model: Model,
    static: StaticBytes,
    settings: DeepSpeedSettings,
    device: DeviceKind,
) -> Layout:
    """Weights whole on the device; all that the optimizer touches on the host, and nothing of its step on the device.

    A gradient of the partition goes to the host when its bucket is reduced, after an fp64 copy for its norm and through
    an fp32 one. A gradient too large for the bucket is cloned as soon as it is made; in micro-steps before the last the
    clone stays until the end of backward. One buffer of the largest parameter brings accumulated gradients back.

    Source: deepspeed/runtime/zero/stage_1_and_2.py 0.19.8 (reduce_independent_p_g_buckets_and_remove_grads,
    copy_grads_in_partition, async_inplace_copy_grad_to_fp32_buffer_from_gpu, temp_grad_buffer_for_gpu_offload).
    """
    element = _engine_bytes(configuration)
    partition = _partition_elements(static.trained_elements, configuration.num_processes)
    trained = [t.num_elements for t in model.trained]
    accumulates = configuration.gradient_accumulation_steps > 1
    small = max((n for n in trained if n <= settings.reduce_bucket_size), default=0)
    host = zero2_buffers(partition, trained, element, accumulates=accumulates).num_bytes(device)
    return Layout(
        resident={**_weights(static), "offload_buffers": max(trained, default=0) * element, "optimizer_state": 0},
        backward={"communication_buckets": settings.reduce_bucket_size * element * (2 if settings.overlap_comm else 1)},
        gradients="offloaded",
        accumulated_gradients=partition * element if accumulates else 0,
        reduction_fraction=NORM_BYTES / element,
        reduction_bytes=small * NORM_BYTES,
        step=({},),
        host=host,
        host_made_later=host - zero2_buffers(partition, trained, element, accumulates=False).num_bytes(device),
    )


def _zero3(
    configuration: Configuration,
    model: Model,
    static: StaticBytes,
    settings: DeepSpeedSettings,
    device: DeviceKind,
) -> Layout:
    """Everything in partitions; weights are gathered around the layer that needs them, up to a bound.

    Packed weights stay whole from forward to the end of the step, see `_kept_packed_bytes`.

    The gradients of a bucket are interleaved in a copy before they are scattered; one that is alone in it only where
    it does not divide. The step flattens a sub-group's gradients into a copy, and casts that to fp32.

    With the optimizer offloaded, master weights, state and gradients are the host's: reducing a bucket takes its
    partition's gradients back to the device for a moment, and an fp64 copy of them for their norm; the weight of a
    gradient that waited is free again by then. With weights offloaded, the shards are the host's too.

    Source: deepspeed/runtime/zero/stage3.py, partitioned_param_coordinator.py and
    deepspeed/runtime/comm/coalesced_collectives.py (reduce_scatter_coalesced) 0.19.8.
    """
    if configuration.offload != "none":
        return _zero3_offload(configuration, model, static, settings, device)
    ranks = configuration.num_processes
    parameters = model.parameters
    shards = sum(-(-t.num_elements // ranks) * t.bytes_per_element * num for t, num in parameters.counted)
    partition = sum(-(-t.num_elements // ranks) * num for t, num in parameters.counted if t.trains)
    element = _engine_bytes(configuration)
    cut = (-(-t.num_elements // ranks) for t in parameters if t.trains)
    sub_group = max(sub_groups(cut, settings.sub_group_size))
    flat, master = sub_group * element, sub_group * MASTER_BYTES
    packed = _kept_packed_bytes(parameters, settings, configuration)
    largest = max((-(-t.num_elements // ranks) for t, _ in parameters.counted if t.trains), default=0)
    gathered = _gathered_bytes(parameters, settings, configuration)
    casts = _casts(configuration, model, settings)
    interleaves = _interleaves(model, configuration, settings)
    fraction = interleaves
    if casts.fraction:  # the copy, interleaved if need be; gloo copies it again, and what comes back is cast
        sent_again = casts.fraction if device == "cpu" else 0.0
        fraction = casts.fraction * (1 + interleaves) + max(sent_again, 1 / ranks)
    last = {"gathered_weights": gathered, "communication_buckets": int(casts.alone_bytes * (1 + fraction))}
    return Layout(
        resident={
            "weights": shards + _persistent_bytes(parameters, settings),
            "quantized_weights": _replicated_packed_bytes(model, configuration),
            "buffers": static.buffers,
            "master_weights": partition * MASTER_BYTES,
            "optimizer_state": 0,
            "gradients": partition * element,
            "communication_buckets": settings.reduce_bucket_size * element,
        },
        forward={"gathered_weights": gathered, "quantized_weights": packed},
        gathering_bytes=_gathering_bytes(parameters, configuration),
        backward={"communication_buckets": max(settings.reduce_bucket_size * element, 2 * casts.bucket_bytes)},
        gradients="bucketed",
        reduction_fraction=fraction,
        reduction=({**last, "quantized_weights": packed},) if casts.alone_bytes else (),
        step=(
            {"optimizer_temporaries": largest * NORM_BYTES, "quantized_weights": packed},
            {"gradients": flat + (master if element != MASTER_BYTES else 0), "quantized_weights": packed},
            {"gradients": master, "optimizer_temporaries": 0, "quantized_weights": packed},
        ),
        updated="partition",
        partition_elements=partition,
    )


def _zero3_offload(
    configuration: Configuration,
    model: Model,
    static: StaticBytes,
    settings: DeepSpeedSettings,
    device: DeviceKind,
) -> Layout:
    ranks, element = configuration.num_processes, _engine_bytes(configuration)
    parameters = model.parameters
    cut = {id(t): replace(t, num_elements=-(-t.num_elements // ranks)) for t, _ in parameters.counted}
    shards = Model(cut[id(t)] for t in parameters)
    trained = [t.num_elements for t in shards if t.trains]
    bucket = settings.reduce_bucket_size * element
    taken = NORM_BYTES + (element if device == "cuda" else 0)
    freed = 0.0 if ties_embeddings(model) else 1.0
    offloads_weights = configuration.offload == "optimizer_and_parameters"
    packed = _kept_packed_bytes(parameters, settings, configuration)
    host = zero3_buffers(trained, element, settings.sub_group_size).num_bytes(device)
    return Layout(
        resident={
            "weights": _persistent_bytes(parameters, settings)
            + (0 if offloads_weights else sum(t.num_bytes * num for t, num in shards.counted)),
            "quantized_weights": _replicated_packed_bytes(model, configuration),
            "buffers": static.buffers,
            "communication_buckets": bucket,
            "optimizer_state": 0,
        },
        forward={"gathered_weights": _gathered_bytes(parameters, settings, configuration), "quantized_weights": packed},
        gathering_bytes=_gathering_bytes(parameters, configuration),
        backward={"communication_buckets": bucket},
        gradients="bucketed",
        reduction_fraction=max(0.0, _interleaves(model, configuration, settings) + taken / (element * ranks) - freed),
        reduction_bytes=max((n for n in trained if n * ranks <= settings.reduce_bucket_size), default=0) * taken,
        step=({"quantized_weights": packed} if packed else {},),
        host=host + (zero3_weight_buffers(shards).num_bytes(device) if offloads_weights else 0),
    )


def _interleaves(model: Model, configuration: Configuration, settings: DeepSpeedSettings) -> float:
    """Return 1 where a gradient that fills a bucket alone is copied before it is scattered: one that does not divide.

    Source: deepspeed/runtime/comm/coalesced_collectives.py 0.19.8, reduce_scatter_coalesced.
    """
    alone = (t.num_elements for t, _ in model.trained.counted if t.num_elements > settings.reduce_bucket_size)
    return float(any(n % configuration.num_processes for n in alone))


def _persistent_bytes(parameters: Model, settings: DeepSpeedSettings) -> int:
    """Parameters so small that every process keeps them whole."""
    threshold = settings.stage3_param_persistence_threshold
    return sum(t.num_bytes * num for t, num in parameters.counted if t.num_elements <= threshold)


def _gathered_bytes(parameters: Model, settings: DeepSpeedSettings, configuration: Configuration) -> int:
    """Weights whole at one time, small ones apart: all that are used again, or as many as may live and be prefetched.

    Prefetching goes on as long as fewer than `stage3_max_live_parameters` are there, several modules ahead of what
    runs, and what it has passed over is not freed; so nearly as many are there all the time.

    What backward does not use is freed when forward has: an embedding that is frozen, unless checkpoints around an
    adapter ask its output for a gradient, and frozen layers below all that trains.
    Source: deepspeed/runtime/zero/partitioned_param_coordinator.py 0.19.8, __params_to_release.
    """
    adapts, is_tied = configuration.lora is not None, ties_embeddings(parameters)
    below = [] if adapts else list(takewhile(lambda t: not t.trains, parameters))
    above = Model(parameters[len(below) :]) if below else parameters
    used = [*((t, 1) for t in below if is_tied and t.embeds), *above.counted]
    if adapts and not configuration.gradient_checkpointing and not is_tied:
        used = [(t, num) for t, num in used if not t.embeds or t.trains]
    if _keeps_packed(configuration) or _is_int8(configuration):
        used = [(t, num) for t, num in used if t.kind != "quantized"]
    held = [(t, num) for t, num in used if t.num_elements > settings.stage3_param_persistence_threshold]
    elements = sum(t.num_elements * num for t, num in held)
    whole = sum(t.num_bytes * num for t, num in held)
    bound = max(settings.stage3_max_live_parameters, _elements_used_soon(above, settings))
    bound += settings.stage3_prefetch_bucket_size
    return whole if elements <= bound else whole * bound // elements


def _elements_used_soon(parameters: Model, settings: DeepSpeedSettings) -> int:
    """Elements that stay whole between their forward and their backward, as little is used in between: the last ones.

    With checkpoints there is more in between, and fewer stay.
    Source: deepspeed/runtime/zero/partitioned_param_coordinator.py 0.19.8, __params_to_release
    (`max_reuse_dist_in_numel`).
    """
    later = 0
    for tensor in reversed(parameters):
        if 2 * later >= settings.stage3_max_reuse_distance:
            break
        later += tensor.num_elements
    return later


def _gathering_bytes(parameters: Model, configuration: Configuration) -> int:
    """Weights that are gathered together arrive in one buffer, of which each is then made: at most the largest again.

    The head is fetched ahead with the adapters before it; without any, the last layer's matrix fills the bucket.
    Source: deepspeed/runtime/zero/partition_parameters.py 0.19.8, AllGatherCoalescedHandle.wait (`torch.cat`).
    """
    if configuration.lora is None:
        return 0
    return max((t.num_bytes for t, _ in parameters.counted if t.kind != "quantized"), default=0)


def _is_int8(configuration: Configuration) -> bool:
    return configuration.quantization is not None and configuration.quantization.is_int8


def _replicated_packed_bytes(model: Model, configuration: Configuration) -> int:
    """What stage 3 does not shard of packed weights: their scales, and int8 weights, whole beside their shards.

    bitsandbytes holds those itself, and gives them to the layer in every forward.
    Source: bitsandbytes 0.50 nn/modules.py, Linear8bitLt.forward (`self.weight.data = self.state.CB`).
    """
    kinds = {"quant_state", "quantized"} if _is_int8(configuration) else {"quant_state"}
    return sum(t.num_bytes * num for t, num in model.counted if t.kind in kinds)


def _keeps_packed(configuration: Configuration) -> bool:
    """Whether the graph holds four-bit weights: bitsandbytes' product keeps its weight as an attribute.

    Neither checkpoints that are not reentrant see that, nor backward's end; only the graph's own does.
    Source: bitsandbytes 0.50 autograd/_functions.py, MatMul4Bit.forward (`ctx.tensors`).
    """
    recomputes_all = configuration.gradient_checkpointing and configuration.use_reentrant
    return configuration.quantization is not None and not _is_int8(configuration) and not recomputes_all


def _kept_packed_bytes(parameters: Model, settings: DeepSpeedSettings, configuration: Configuration) -> int:
    """Packed weights that stay whole, though DeepSpeed lets go of them, until the loss is gone: after its step."""
    if not _keeps_packed(configuration):
        return 0
    packed = ((t, num) for t, num in parameters.counted if t.kind == "quantized")
    threshold = settings.stage3_param_persistence_threshold
    return sum(t.num_bytes * num for t, num in packed if t.num_elements > threshold)


def ties_embeddings(model: Model) -> bool:
    """Whether no other parameter is as large as an embedding: then the head is the embedding itself."""
    tables = [t for t, _ in model.counted if t.embeds]
    return not any(t.num_elements == table.num_elements for table in tables for t, _ in model.counted if not t.embeds)


def _engine_bytes(configuration: Configuration) -> int:
    return MASTER_BYTES if configuration.mixed_precision == "no" else 2
