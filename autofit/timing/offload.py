"""Bytes between a device and its host in a step whose optimizer, or weights too, are offloaded."""

from __future__ import annotations

from msgspec import Struct

from autofit.spec.configuration import Configuration
from autofit.timing.optimizer import num_updated
from autofit.timing.parameters import ParameterTotals


class HostTraffic(Struct, frozen=True, kw_only=True):
    """What crosses one device's link to the host, by when."""

    forward_bytes: float = 0.0
    """In the forward pass of every micro-step: this rank's shards, before they are gathered."""
    backward_bytes: float = 0.0
    """In the backward pass of every micro-step: the shards again, and the gradients that are done."""
    step_bytes: float = 0.0
    """After the update: the new weights, where the device keeps them."""


def host_traffic(totals: ParameterTotals, configuration: Configuration) -> HostTraffic:
    """List what crosses the link.

    Gradients of a rank's partition leave in every micro-step, where they are summed. Weights that stay on the device
    come back once, updated; those that do not come for every gather.
    Source: deepspeed/runtime/zero/stage_1_and_2.py 0.19.8 (copy_grads_in_partition), stage3.py (partition_grads),
    partition_parameters.py; torch/distributed/fsdp/_runtime_utils.py (CPUOffload).
    """
    if configuration.offload == "none":
        return HostTraffic()
    gradients = num_updated(totals, configuration) * totals.trained_bytes_per_param
    if configuration.offload == "optimizer":
        return HostTraffic(backward_bytes=gradients, step_bytes=gradients)
    shard = totals.whole_bytes * num_updated(totals, configuration) / max(1, totals.num_trained)
    return HostTraffic(forward_bytes=shard, backward_bytes=shard + gradients)
