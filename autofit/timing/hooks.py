"""What engines that gather weights take of the host's processor, in Python, around every module."""

from __future__ import annotations

from msgspec import Struct

from autofit.spec.configuration import Configuration
from autofit.timing.parameters import ParameterTotals

ZERO3_SECONDS = 5.3e-4
"""For each weight in each pass: fetching, waiting, releasing, and the bookkeeping of what comes next.

Source: measured, processor time of a micro-step of a Llama of 16 layers and 256 columns on one process of a CPU (torch
2.13, transformers 5.23, DeepSpeed 0.19.8), stage 3 less stage 0, over 114 weights: 118 to 141 ms for two passes, 150 to
201 ms for three, so 0.44 to 0.62 ms.
"""
FSDP_SECONDS = 8.4e-4
"""For each unit in each pass. Source: measured, as above, torch's `fully_shard` less none: 0.73 and 0.95 ms a unit."""

ADAPTER_UNIT_SECONDS = 2.1e-4
"""For each adapter's weight in each pass under FSDP1, of which peft makes a unit of its own (`fsdp_auto_wrap_policy`).

Source: measured, processor time of a micro-step of a Llama of 16 layers and 64 columns with adapters on four products a
layer, sharded by torch's FSDP1 over a process group that moves nothing, less the same without FSDP (torch 2.13, peft
0.21): 0.22 ms a unit and pass, 0.19 where it is recomputed. CUDA's streams and events are not in it.
"""


class HookSeconds(Struct, frozen=True, kw_only=True):
    """Time that the host spends beside issuing operations, in one micro-step."""

    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    forward_waited_seconds: float = 0.0
    """Of these, what the device waits for, because the host may not run ahead."""
    backward_waited_seconds: float = 0.0


def hook_seconds(totals: ParameterTotals, configuration: Configuration) -> HookSeconds:
    """Count an engine's hooks: once in forward, in backward once, and once more where forward is computed again.

    FSDP1 gathers a unit only when the one before the last has been freed on the device. Two adapters' weights are a few
    kernels, so that among them the host is no further ahead than those, and the device waits for what it does there.
    Source: torch/distributed/fsdp/_runtime_utils.py 2.13 (`_unshard`: `limit_all_gathers`) and _limiter_utils.py (two
    in flight).
    """
    waited = 0.0
    if configuration.sharding == "zero3":
        once = totals.num_matrices * ZERO3_SECONDS
    elif configuration.uses_fsdp:
        waited = totals.num_adapters * ADAPTER_UNIT_SECONDS if configuration.sharding == "fsdp1" else 0.0
        once = totals.num_units * FSDP_SECONDS + waited
    else:
        return HookSeconds()
    backward_passes = 2 if configuration.gradient_checkpointing else 1
    return HookSeconds(
        forward_seconds=once,
        backward_seconds=once * backward_passes,
        forward_waited_seconds=waited,
        backward_waited_seconds=waited * backward_passes,
    )
