"""Seconds of one collective over the links between devices: NCCL's own model of latency and bandwidth."""

from __future__ import annotations

import math
from typing import Literal

from msgspec import Struct

from autofit.spec.hardware import Cluster

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter"]

SWITCHED_FRACTION = 0.80
"""Share of an NVLink's data sheet that large collectives reach as bus bandwidth.

Source: stas00/ml-engineering network: A100 235 of 300 GB/s, H100 and H200 361 to 367 of 450, B200 682 of 900 (rings).
"""
PCIE_FRACTION = 0.44
"""The same over PCIe.

Source: NVIDIA/nccl issue 1639, 8 RTX 5090 on PCIe 5 x16 (63 GB/s): 28 GB/s (4 of them: 35), and its answer that CPU
and memory decide; mli/transformers-benchmarks: 6.2 of 15.8 GB/s (0.39) between two RTX 3090 Ti on x8.
"""
NETWORK_FRACTION = 0.90
"""The same of a node's network.

Source: stas00/ml-engineering network: EFA 340 of 400 Gbps (A100), 365 of 400 GB/s (H200), 382 of 400 (B200); an
InfiniBand adapter alone 193.7 of 200 Gbps.
"""
SWITCHED_OVER_HOST = 1.5
"""A link to the peers that is faster than the one to the host by more than this is not PCIe: that reaches 1 / 0.88."""

BASE_SECONDS = {"simple": 8.4e-6, "ll": 6.6e-6}
HOP_SECONDS = {
    "switched": {"simple": 3.4e-6, "ll": 0.6e-6},
    "pcie": {"simple": 5.7e-6, "ll": 1.0e-6},
    "network": {"simple": 14.0e-6, "ll": 2.7e-6},
}
"""Of a ring's step, by link and protocol.

Source: NVIDIA/nccl 2.2x src/graph/tuning.cc, `ncclTunerConstantsDefaults` (baseLatencies, hwLatencies), in
microseconds there. A network's hop also pays for posting it (`getNetOverhead`), which is within the rounding.
"""
TREE_HOP_SECONDS = {"switched": 4.0e-6, "pcie": 4.0e-6, "network": 14.0e-6}
TREE_BANDWIDTH_FRACTION = 0.92
LL_BANDWIDTH_FRACTIONS = {"switched": 0.36, "pcie": 0.5, "network": 0.12}
"""What the low-latency protocol reaches of the other's bandwidth.

Half of what it sends are flags, and it is bounded. Source: as above, `ncclTopoTuneModel` and llMaxBws: 87.7 GB/s within
an Ampere node and 141 within a Hopper one (of 240 and 365), 19 and 35 over several nodes (of 180 and 360).
"""
ACCESSES_BESIDE_KERNELS = 3
"""How often a byte that a rank sends passes its memory, whose bandwidth kernels that run meanwhile then lack.

Source: NVIDIA/nccl issue 1428 (2 to 3, its maintainer). Measured there on A100-SXM4-80GB beside an all-gather of 8: a
product took 2.08 ms for 1.18, attention 0.33 for 0.18, so they lose 43 and 45 %; by this figure it is 41 %.
arXiv 2507.03114, 4 A100 and 4 H100: kernels of a step that overlaps take 19 % longer on average, and up to 40 %.
"""


class Fabric(Struct, frozen=True, kw_only=True):
    """The links of a cluster at the rates that collectives reach. None: not known, or not there."""

    num_devices_per_node: int
    within_bytes_per_second: float | None
    """Bus bandwidth among the devices of a node."""
    between_bytes_per_second: float | None
    """Of a whole node to the others."""
    is_switched: bool
    """Whether devices of a node have links of their own (NVLink), rather than PCIe."""
    needs_within: bool = True
    needs_between: bool = False

    @property
    def is_known(self) -> bool:
        """Whether every link that a collective over all devices takes has a rate."""
        has_within = self.within_bytes_per_second is not None or not self.needs_within
        return has_within and (self.between_bytes_per_second is not None or not self.needs_between)


def fabric_of(cluster: Cluster) -> Fabric:
    """Return a cluster's links; devices without one of their own reach each other through the host."""
    device = cluster.device
    peer, host = device.peer_bytes_per_second, device.host_bytes_per_second
    within = host if peer is None else peer
    is_switched = peer is not None and (host is None or peer > SWITCHED_OVER_HOST * host)
    between = cluster.inter_node_bytes_per_second
    return Fabric(
        num_devices_per_node=cluster.num_devices_per_node,
        within_bytes_per_second=None
        if within is None
        else within * (SWITCHED_FRACTION if is_switched else PCIE_FRACTION),
        between_bytes_per_second=None if between is None else between * NETWORK_FRACTION,
        is_switched=is_switched,
        needs_within=cluster.num_devices_per_node > 1,
        needs_between=cluster.num_nodes > 1,
    )


class Group(Struct, frozen=True, kw_only=True):
    """Ranks that take part in a collective."""

    num_ranks: int
    num_nodes: int
    """Nodes that they are spread over evenly."""
    num_sharing: int = 1
    """Groups like this one that use a node's network at the same time."""


def collective_seconds(
    kind: CollectiveKind, num_bytes: float, group: Group, fabric: Fabric, *, num_messages: float = 1.0
) -> float:
    """Return the time of a collective over tensors of so many bytes together.

    A ring takes a hop for each step, and every rank sends (n - 1) / n of the tensor, twice that to sum it everywhere; a
    tree over nodes takes few hops of the network and sends the tensor twice. Of each message the faster of NCCL's two
    protocols is taken, as it chooses itself.
    Source: NVIDIA/nccl src/graph/tuning.cc, ncclTopoTuneModel; NVIDIA/nccl-tests doc/PERFORMANCE.md (the factors).
    """
    if group.num_ranks == 1 or not num_bytes:
        return 0.0
    each, ranks = num_bytes / num_messages, group.num_ranks
    bandwidth = group_bytes_per_second(group, fabric)
    sent = sent_bytes(kind, each, ranks)
    num_steps = (2 if kind == "all_reduce" else 1) * (ranks - 1)
    num_between = (2 if kind == "all_reduce" else 1) * (group.num_nodes - 1)
    within = "switched" if fabric.is_switched else "pcie"
    slowest = "network" if group.num_nodes > 1 else within
    best = min(
        BASE_SECONDS[protocol]
        + (num_steps - num_between) * HOP_SECONDS[within][protocol]
        + num_between * HOP_SECONDS["network"][protocol]
        + sent / (bandwidth * share)
        for protocol, share in (("simple", 1.0), ("ll", LL_BANDWIDTH_FRACTIONS[slowest]))
    )
    if kind == "all_reduce" and group.num_nodes > 1:
        best = min(best, _tree_seconds(each, bandwidth, group, within))
    return num_messages * best


def _tree_seconds(num_bytes: float, bandwidth: float, group: Group, within: str) -> float:
    ranks_per_node = group.num_ranks / group.num_nodes
    hops = (ranks_per_node - 1) * TREE_HOP_SECONDS[within]
    hops += math.log2(group.num_nodes) * TREE_HOP_SECONDS["network"]
    return BASE_SECONDS["simple"] + 2 * hops + 2 * num_bytes / (TREE_BANDWIDTH_FRACTION * bandwidth)


def sent_bytes(kind: CollectiveKind, num_bytes: float, num_ranks: int) -> float:
    """Return what each rank sends of a tensor.

    Source: NVIDIA/nccl-tests doc/PERFORMANCE.md: 2 (n - 1) / n of it to sum it everywhere, (n - 1) / n to gather it
    from its shards or to sum it into them.
    """
    return (2 if kind == "all_reduce" else 1) * (num_ranks - 1) / num_ranks * num_bytes


def group_bytes_per_second(group: Group, fabric: Fabric) -> float:
    """Return the bus bandwidth of a group: its slowest link.

    Each byte of a ring leaves a node once, over all of the node's network, which groups that run beside it share.
    Source: stas00/ml-engineering network (p5en, 4 nodes of 8 H200 with 400 GB/s a node: bus bandwidth 365 GB/s).
    """
    rates = []
    if group.num_ranks > group.num_nodes:
        rates.append(fabric.within_bytes_per_second)
    if group.num_nodes > 1:
        between = fabric.between_bytes_per_second
        rates.append(None if between is None else between / group.num_sharing)
    known = [rate for rate in rates if rate is not None]
    assert known, "a missing link is refused before any time is computed"
    assert len(known) == len(rates), "a missing link is refused before any time is computed"
    return min(known)


def occupied_seconds(kind: CollectiveKind, num_bytes: float, group: Group, memory_bytes_per_second: float) -> float:
    """Return what a collective takes from the kernels beside it, as time of the device's whole memory."""
    return ACCESSES_BESIDE_KERNELS * sent_bytes(kind, num_bytes, group.num_ranks) / memory_bytes_per_second
