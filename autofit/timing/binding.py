"""Which resource a step waits for most."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from autofit.spec.configuration import Configuration
from autofit.spec.hardware import Cluster

COMPUTE = "the devices' arithmetic"
MEMORY = "the devices' memory bandwidth"
ISSUING = "the host issuing kernels"
UPDATING = "the host's processors updating what is offloaded"
HOST_LINK = "the link to the host"
PEERS = "the links between devices"
NETWORK = "the network between nodes"


def binding_resource(terms: Mapping[str, float], configuration: Configuration, cluster: Cluster) -> str | None:
    """Name the resource that a step keeps busy longest; None where no time is known.

    What a matrix product reads and writes counts as arithmetic.

    Args:
        terms: seconds by what they are spent on, of `TimeEstimate`.
        configuration: that takes them.
        cluster: of several nodes all ranks' collectives are as slow as the network (`links.group_bytes_per_second`).
    """
    updating = MEMORY if configuration.offload == "none" else UPDATING
    resources = {
        "matmul": COMPUTE,
        "attention": COMPUTE,
        "memory": MEMORY,
        "dequantization": MEMORY,
        "optimizer": updating,
        "launch": ISSUING,
        "paging": HOST_LINK,
        "offload": HOST_LINK,
        "communication": NETWORK if cluster.num_nodes > 1 else PEERS,
    }
    seconds: dict[str, float] = defaultdict(float)
    for name, value in terms.items():
        seconds[resources[name]] += value
    return max(seconds, key=lambda name: seconds[name], default=None)
