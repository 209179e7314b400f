"""What a plan runs on: devices of one kind, some number to a node."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct, field
from msgspec.structs import replace

from autofit.spec.calibration import Calibration
from autofit.spec.software import Software

DeviceKind = Literal["cuda", "cpu"]


class Device(Struct, frozen=True, kw_only=True):
    """One accelerator, or one CPU rank with a memory budget. A `None` was not found in any source."""

    name: str
    """Catalogue name, for instance `A100-SXM-80G`."""
    kind: DeviceKind
    """`cuda` devices have a caching allocator and a context; a `cpu` rank has neither."""
    memory_bytes: int
    """What torch reports as the device's total memory (of a CPU rank: its budget for tensors)."""
    memory_is_estimated: bool = False
    """True where torch's figure is not published for this device and was derived from another one."""
    compute_capability: tuple[int, int] | None = None
    """CUDA compute capability, for instance (8, 0)."""
    computes_bf16: bool = False
    """Whether the hardware multiplies bfloat16."""
    bf16_flops_per_second: float | None = None
    """Dense, fp32 accumulate, from the datasheet."""
    fp16_flops_per_second: float | None = None
    """Dense, fp32 accumulate, from the datasheet."""
    fp32_flops_per_second: float | None = None
    """Without tensor cores."""
    tf32_flops_per_second: float | None = None
    memory_bytes_per_second: float | None = None
    """Bandwidth of the device's own memory."""
    peer_bytes_per_second: float | None = None
    """To the other devices of the node, one direction, summed over links."""
    host_bytes_per_second: float | None = None
    """To the host's memory, one direction."""
    dollars_per_hour: float | None = None
    """The lowest published cloud price of one device; a range, not a quote."""
    price_origin: str | None = None
    """Whose price it is; None: the catalogue's, the lowest that was found."""
    sources: tuple[str, ...] = ()
    """Where the row's figures come from."""


class Cluster(Struct, frozen=True, kw_only=True):
    """Equal devices, `num_devices_per_node` in each of `num_nodes` nodes."""

    device: Device
    num_devices_per_node: int
    num_nodes: int = 1
    inter_node_bytes_per_second: float | None = None
    """Of one node to the others, one direction; None: not known."""
    host_memory_bytes: int | None = None
    """Memory of one node; None: not known, and then not checked."""
    software: Software = field(default_factory=Software)
    """What is installed on every node, as far as it is known."""
    calibration: Calibration | None = None
    """What runs on such devices have taught about predictions; None: nothing, or it is left out."""

    @property
    def num_devices(self) -> int:
        """Devices over all nodes."""
        return self.num_nodes * self.num_devices_per_node

    def using(self, num_devices: int) -> Cluster:
        """Return the part of the cluster that so many devices are: within one node if they fit there, else whole nodes.

        Raises:
            ValueError: it has no such part.
        """
        if num_devices == self.num_devices:
            return self
        if 1 <= num_devices <= self.num_devices_per_node:
            return replace(self, num_nodes=1, num_devices_per_node=num_devices)
        num_nodes, rest = divmod(num_devices, self.num_devices_per_node)
        if rest or not 1 <= num_nodes <= self.num_nodes:
            raise ValueError(f"{num_devices} of {self.num_nodes} x {self.num_devices_per_node} devices")
        return replace(self, num_nodes=num_nodes)

    @property
    def parts(self) -> tuple[int, ...]:
        """Numbers of devices that divide the cluster, ascending: of one node, then of whole nodes."""
        within = [n for n in range(1, self.num_devices_per_node + 1) if self.num_devices_per_node % n == 0]
        nodes = [n for n in range(2, self.num_nodes + 1) if self.num_nodes % n == 0]
        return (*within, *(n * self.num_devices_per_node for n in nodes))
