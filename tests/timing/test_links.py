"""The time of a collective, against what nccl-tests measured and a ring walked step by step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autofit.sources.hardware import parse_cluster
from autofit.spec.hardware import Cluster, Device
from autofit.timing.links import (
    BASE_SECONDS,
    HOP_SECONDS,
    Fabric,
    Group,
    collective_seconds,
    fabric_of,
    occupied_seconds,
    sent_bytes,
)
from autofit.timing.rates import ACHIEVABLE_MEMORY_FRACTION

MIB = 2**20
EIGHT = Group(num_ranks=8, num_nodes=1)


def a_fabric(**changes):
    """Return eight devices a node with an A100's links, changed as asked."""
    values = {
        "num_devices_per_node": 8,
        "within_bytes_per_second": 240e9,
        "between_bytes_per_second": 180e9,
        "is_switched": True,
    }
    return Fabric(**values | changes)


@pytest.mark.parametrize(("num_ranks", "factor"), [(2, 1.0), (4, 1.5), (8, 1.75)])
def test_all_reduce_factor_is_the_one_nccl_tests_prints(num_ranks, factor):
    """nccl-tests converts algorithm to bus bandwidth of an all-reduce by 2 (n - 1) / n: 1, 1.5 and 1.75."""
    assert sent_bytes("all_reduce", 1.0, num_ranks) == factor
    assert sent_bytes("all_gather", 1.0, num_ranks) == factor / 2
    assert sent_bytes("reduce_scatter", 1.0, num_ranks) == factor / 2


@pytest.mark.parametrize(
    ("peer", "size_mib", "bus_gb_s", "tolerance"),
    [
        (300e9, 4, 72, 0.20),
        (300e9, 8, 110, 0.20),
        (300e9, 32, 139, 0.45),
        (300e9, 64, 172, 0.27),
        (300e9, 256, 194, 0.22),
        (300e9, 512, 223, 0.10),
        (450e9, 4, 107, 0.10),
        (450e9, 16, 220, 0.10),
    ],
)
def test_all_reduce_is_as_fast_as_nccl_tests_measured(peer, size_mib, bus_gb_s, tolerance):
    """Bus bandwidth by size, 8 A100 and 8 H200 of one node, as stas00/ml-engineering (network) prints them."""
    device = Device(name="any", kind="cuda", memory_bytes=1, peer_bytes_per_second=peer, host_bytes_per_second=27.7e9)
    fabric = fabric_of(Cluster(device=device, num_devices_per_node=8))
    seconds = collective_seconds("all_reduce", size_mib * MIB, EIGHT, fabric)
    assert sent_bytes("all_reduce", size_mib * MIB, 8) / seconds / 1e9 == pytest.approx(bus_gb_s, rel=tolerance)


def test_four_nodes_are_as_fast_as_measured_over_their_network():
    """8 B200 in each of 4 nodes over 400 GB/s: 327 GB/s at 512 MiB and 362 at 1 GiB (the same source), within 15 %."""
    device = Device(name="any", kind="cuda", memory_bytes=1, peer_bytes_per_second=900e9, host_bytes_per_second=55e9)
    cluster = Cluster(device=device, num_devices_per_node=8, num_nodes=4, inter_node_bytes_per_second=400e9)
    group = Group(num_ranks=32, num_nodes=4)
    for size_mib, bus_gb_s in ((512, 327), (1024, 362)):
        seconds = collective_seconds("all_reduce", size_mib * MIB, group, fabric_of(cluster))
        assert sent_bytes("all_reduce", size_mib * MIB, 32) / seconds / 1e9 == pytest.approx(bus_gb_s, rel=0.15)


@given(num_ranks=st.integers(2, 16), num_nodes=st.integers(1, 4), size_mib=st.integers(64, 1024))
def test_a_large_gather_is_a_ring_walked_step_by_step(num_ranks, num_nodes, size_mib):
    """n - 1 steps; in each every rank sends a shard on, and the last one of a node sends over the network."""
    ranks = num_ranks * num_nodes
    shard = size_mib * MIB / ranks
    fabric = a_fabric(between_bytes_per_second=100e9)
    walked = BASE_SECONDS["simple"]
    for step in range(ranks - 1):
        crosses = step < num_nodes - 1
        walked += HOP_SECONDS["network" if crosses else "switched"]["simple"]
        walked += shard / (100e9 if num_nodes > 1 else 240e9)
    group = Group(num_ranks=ranks, num_nodes=num_nodes)
    seconds = collective_seconds("all_gather", size_mib * MIB, group, fabric)
    assert seconds <= walked * (1 + 1e-9)
    assert seconds == pytest.approx(walked, rel=0.5)  # of small messages the protocol with flags is faster


def test_every_node_of_a_ring_adds_a_hop_of_the_network():
    """Of a message of 8 bytes only hops are left: 8 nodes have seven of the network among 63, one node has none."""
    hops = HOP_SECONDS["network"]["ll"], HOP_SECONDS["switched"]["ll"]
    one, eight = (
        collective_seconds("all_gather", 8, Group(num_ranks=64, num_nodes=nodes), a_fabric()) for nodes in (1, 8)
    )
    assert eight - one == pytest.approx(7 * (hops[0] - hops[1]), rel=1e-3)


def test_a_tree_is_faster_than_a_ring_over_many_nodes():
    """A small sum over 64 nodes takes log2(64) network hops there and back, not 126 of them."""
    group = Group(num_ranks=512, num_nodes=64)
    ring_seconds = 126 * HOP_SECONDS["network"]["ll"]
    assert collective_seconds("all_reduce", 4 * MIB, group, a_fabric()) < ring_seconds


def test_groups_that_share_a_network_get_their_part_of_it():
    """Eight groups of one rank a node have an eighth of the node's network each."""
    alone, shared = (Group(num_ranks=4, num_nodes=4, num_sharing=sharing) for sharing in (1, 8))
    times = [collective_seconds("all_reduce", 4096 * MIB, group, a_fabric()) for group in (alone, shared)]
    assert times[1] / times[0] == pytest.approx(8, rel=0.05)


@given(
    st.sampled_from(["all_reduce", "all_gather", "reduce_scatter"]),
    st.integers(1, 2**33),
    st.integers(2, 512),
    st.booleans(),
)
def test_more_bytes_more_messages_and_slower_links_never_take_less(kind, num_bytes, num_ranks, is_switched):
    """Time grows with bytes and messages, and a rank by itself sends nothing."""
    group = Group(num_ranks=num_ranks, num_nodes=max(1, num_ranks // 8))
    fabric = a_fabric(is_switched=is_switched)
    seconds = collective_seconds(kind, num_bytes, group, fabric)
    assert collective_seconds(kind, 2 * num_bytes, group, fabric) >= seconds
    assert collective_seconds(kind, num_bytes, group, fabric, num_messages=2) >= seconds
    slower = a_fabric(is_switched=is_switched, within_bytes_per_second=20e9, between_bytes_per_second=10e9)
    assert collective_seconds(kind, num_bytes, group, slower) >= seconds
    assert collective_seconds(kind, num_bytes, Group(num_ranks=1, num_nodes=1), fabric) == 0


@pytest.mark.parametrize(("alone_ms", "beside_ms"), [(1.18, 2.08), (0.18, 0.33)], ids=["product", "attention"])
def test_kernels_beside_a_collective_are_as_slow_as_measured(alone_ms, beside_ms):
    """On A100 whose NVLinks gather, kernels lose the share of their pace that nccl's issue 1428 shows, within 12 %."""
    a100 = parse_cluster("8xA100-SXM-80G")
    memory = a100.device.memory_bytes_per_second * ACHIEVABLE_MEMORY_FRACTION
    gathered = 8 / 7 * fabric_of(a100).within_bytes_per_second
    lost = occupied_seconds("all_gather", gathered, EIGHT, memory)
    assert lost == pytest.approx(1 - alone_ms / beside_ms, rel=0.12)


def test_links_of_their_own_are_told_from_pcie():
    """A GeForce's peers are reached over PCIe, at 0.44 of it; an A100's over NVLink, at 0.8."""
    for peer, host, expected in ((31e9, 27.7e9, 31e9 * 0.44), (300e9, 27.7e9, 240e9), (56e9, 27.7e9, 56e9 * 0.8)):
        device = Device(name="any", kind="cuda", memory_bytes=1, peer_bytes_per_second=peer, host_bytes_per_second=host)
        fabric = fabric_of(Cluster(device=device, num_devices_per_node=2))
        assert fabric.within_bytes_per_second == pytest.approx(expected)
