"""What ranks send each other in one optimizer step, by what sharding makes them exchange, and when."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from msgspec import Struct

from autofit.spec.configuration import Configuration
from autofit.spec.deepspeed import DeepSpeedSettings
from autofit.timing.links import CollectiveKind, Fabric, Group, collective_seconds, occupied_seconds
from autofit.timing.parameters import ParameterTotals

DDP_BUCKET_BYTES = 25 * 2**20
"""Source: torch/nn/parallel/distributed.py, `bucket_cap_mb`."""
BROADCAST_BUCKET_BYTES = 250 * 2**20
"""Source: torch/nn/parallel/distributed.py, `broadcast_bucket_size`."""


class Collective(Struct, frozen=True, kw_only=True):
    """Messages of one kind."""

    kind: CollectiveKind
    num_bytes: float
    """Of all tensors whole, over all messages."""
    num_messages: float
    over_replicas: bool = False
    """Among the ranks that hold the same shard (hybrid shard), rather than among those that share a copy."""


class Traffic(Struct, frozen=True, kw_only=True):
    """The collectives of a step by when they run."""

    forward: tuple[Collective, ...] = ()
    """In the forward pass of every micro-step."""
    backward: tuple[Collective, ...] = ()
    """In the backward pass of every micro-step."""
    last_backward: tuple[Collective, ...] = ()
    """In that of the last micro-step only."""
    step: tuple[Collective, ...] = ()
    """After it, when nothing else runs."""
    overlaps: bool = False
    """Whether kernels run meanwhile."""
    forward_room_fraction: float = 1.0
    """What of forward's kernels run while the next layer is gathered, where they overlap at all."""

    def all(self, num_micro_steps: int) -> Iterator[tuple[int, Collective]]:
        """Yield every collective with how often it runs in a step."""
        yield from ((num_micro_steps, each) for each in (*self.forward, *self.backward))
        yield from ((1, each) for each in (*self.last_backward, *self.step))


def step_traffic(totals: ParameterTotals, configuration: Configuration, settings: DeepSpeedSettings) -> Traffic:
    """List what ranks exchange.

    DDP sums once a step, for accumulation runs under no_sync. So does stage 1, and then gathers the updated weights;
    stage 2 sums in every micro-step. Both sum everywhere and drop what is another rank's
    (`use_multi_rank_bucket_allreduce`), which the ZeRO paper counts as half. Stage 3 gathers all weights, frozen ones
    too, for forward and again for backward, and sums into shards in every micro-step. FSDP does the same, but leaves
    the summing to the last micro-step.
    Source: Rajbhandari et al. 2020 (ZeRO), section 7; deepspeed/runtime/zero/stage_1_and_2.py 0.19.8 (average_tensor)
    and stage3.py; torch/nn/parallel/distributed.py (no_sync); transformers/trainer.py 5.23 (accelerate's no_sync
    outside DeepSpeed).
    """
    sharding = configuration.sharding
    if sharding == "ddp":
        summed = (_buckets(totals.trained_bytes, DDP_BUCKET_BYTES),)
        sent = _sent_buffers(totals, configuration)
        return Traffic(forward=sent, last_backward=summed, overlaps=not sent)
    if sharding in {"zero1", "zero2"}:
        return _partitioned(totals, configuration, settings)
    if sharding == "zero3":
        return _zero3(totals, settings)
    return _fsdp(totals, configuration) if configuration.uses_fsdp else Traffic()


def _buckets(num_bytes: float, bucket_bytes: float) -> Collective:
    return Collective(kind="all_reduce", num_bytes=num_bytes, num_messages=max(1, ceil(num_bytes / bucket_bytes)))


def _sent_buffers(totals: ParameterTotals, configuration: Configuration) -> tuple[Collective, ...]:
    """The first rank's packed weights, which are buffers, go to all before each forward pass, and nothing runs beside.

    Trainer leaves `ddp_broadcast_buffers` to DDP, which sends. A ring takes as long for all bytes as for gathering what
    every rank has an even share of, and the share of one more.
    Source: torch v2.13 nn/parallel/distributed.py, `_pre_forward` (`will_sync_module_buffers`); transformers/trainer.py
    5.23, `ddp_broadcast_buffers`.
    """
    ranks = configuration.num_processes
    if not totals.packed_bytes or ranks == 1:
        return ()
    messages = ceil(totals.packed_bytes / BROADCAST_BUCKET_BYTES)
    num_bytes = totals.packed_bytes * ranks / (ranks - 1)
    return (Collective(kind="all_gather", num_bytes=num_bytes, num_messages=messages),)


def _partitioned(totals: ParameterTotals, configuration: Configuration, settings: DeepSpeedSettings) -> Traffic:
    bytes_per_param = totals.trained_bytes_per_param
    gathered = Collective(
        kind="all_gather",
        num_bytes=totals.trained_bytes,
        num_messages=max(1, ceil(totals.num_trained / settings.allgather_bucket_size)),
    )
    summed = (_buckets(totals.trained_bytes, settings.reduce_bucket_size * bytes_per_param or 1),)
    every = configuration.sharding == "zero2"
    return Traffic(
        backward=summed if every else (),
        last_backward=() if every else summed,
        step=(gathered,),
        overlaps=settings.overlap_comm,
    )


def _zero3(totals: ParameterTotals, settings: DeepSpeedSettings) -> Traffic:
    """A module's weights are one message; gradients go in buckets, or by themselves where they are larger."""
    gathered = Collective(kind="all_gather", num_bytes=totals.whole_bytes, num_messages=totals.num_matrices)
    summed = Collective(
        kind="reduce_scatter",
        num_bytes=totals.trained_bytes,
        num_messages=max(1, min(totals.num_matrices, ceil(totals.num_trained / settings.reduce_bucket_size))),
    )
    return Traffic(forward=(gathered,), backward=(gathered, summed), overlaps=settings.overlap_comm)


def _fsdp(totals: ParameterTotals, configuration: Configuration) -> Traffic:
    """A layer is one message; what is kept from forward is not gathered again, and replicas sum each shard.

    FSDP1 gathers a unit in forward when the unit before the last has been freed on the device. Where each adapter's
    weight is a unit, that is the first of the layer's last adapted product, so that only what follows this product runs
    beside the next layer's gather: nothing, if it is the layer's last. In backward a layer is prefetched.
    Source: torch/distributed/fsdp/_runtime_utils.py 2.13 (`_unshard`: `limit_all_gathers`), _limiter_utils.py (two in
    flight); peft/utils/other.py (`fsdp_auto_wrap_policy`).
    """
    waits = configuration.sharding == "fsdp1" and totals.num_adapters > 0 and configuration.reshard_after_forward
    gathered = Collective(kind="all_gather", num_bytes=totals.whole_bytes, num_messages=totals.num_units)
    num_shards = configuration.num_processes // configuration.num_replicas
    summed = [Collective(kind="reduce_scatter", num_bytes=totals.trained_bytes, num_messages=totals.num_units)]
    if configuration.num_replicas > 1:
        shard_bytes = totals.trained_bytes / num_shards
        summed.append(
            Collective(kind="all_reduce", num_bytes=shard_bytes, num_messages=totals.num_units, over_replicas=True)
        )
    return Traffic(
        forward=(gathered,),
        backward=(gathered,) if configuration.reshard_after_forward else (),
        last_backward=tuple(summed),
        overlaps=True,
        forward_room_fraction=totals.after_adapters_fraction if waits else 1.0,
    )


class TrafficSeconds(Struct, frozen=True, kw_only=True):
    """The times of a step's collectives, by when they run."""

    forward_seconds: float
    backward_seconds: float
    last_backward_seconds: float
    step_seconds: float
    overlaps: bool
    forward_room_fraction: float
    hidden_fraction: float
    """What can at best go on behind kernels: all but the first message, or the last."""
    occupied_fraction: float
    """What of the time that collectives go on behind kernels they take from those."""


def traffic_seconds(
    traffic: Traffic, configuration: Configuration, fabric: Fabric, memory_bytes_per_second: float
) -> TrafficSeconds:
    """Time a step's collectives, on devices of this memory bandwidth."""
    shards, replicas = groups(configuration, fabric)

    def seconds(each: Collective) -> float:
        group = replicas if each.over_replicas else shards
        return collective_seconds(each.kind, each.num_bytes, group, fabric, num_messages=each.num_messages)

    overlapping = [*traffic.backward, *traffic.last_backward] if traffic.overlaps else []
    if traffic.overlaps and traffic.forward_room_fraction:
        overlapping += traffic.forward
    fewest = min((each.num_messages for each in overlapping), default=1)
    overlapping_seconds = sum(map(seconds, overlapping))
    occupied = sum(
        occupied_seconds(each.kind, each.num_bytes, replicas if each.over_replicas else shards, memory_bytes_per_second)
        for each in overlapping
    )
    return TrafficSeconds(
        forward_seconds=sum(map(seconds, traffic.forward)),
        backward_seconds=sum(map(seconds, traffic.backward)),
        last_backward_seconds=sum(map(seconds, traffic.last_backward)),
        step_seconds=sum(map(seconds, traffic.step)),
        overlaps=traffic.overlaps,
        forward_room_fraction=traffic.forward_room_fraction,
        hidden_fraction=1 - 1 / fewest,
        occupied_fraction=min(1.0, occupied / overlapping_seconds) if overlapping_seconds else 0.0,
    )


def groups(configuration: Configuration, fabric: Fabric) -> tuple[Group, Group]:
    """Return the ranks that share a copy, and those that hold the same shard of different copies.

    Ranks of a copy are neighbours.
    Source: torch/distributed/fsdp/_init_utils.py, _init_intra_node_process_group and _init_inter_node_process_group.
    """
    ranks, replicas = configuration.num_processes, configuration.num_replicas
    per_node = fabric.num_devices_per_node
    shards = ranks // replicas
    return (
        Group(num_ranks=shards, num_nodes=ceil(shards / per_node)),
        Group(
            num_ranks=replicas,
            num_nodes=min(replicas, ceil(ranks / per_node)),
            num_sharing=max(1, min(shards, per_node)),
        ),
    )
