"""What engines that gather weights take of the host's processor, in Python, around every module."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True, kw_only=True)
class HookSeconds:
    """Time that the host spends beside issuing operations, in one micro-step."""

    forward_seconds: float = 0.0
    backward_seconds: float = 0.0


def hook_seconds(totals: ParameterTotals, configuration: Configuration) -> HookSeconds:
    """Count an engine's hooks: once in forward, in backward once, and once more where forward is computed again."""
    if configuration.sharding == "zero3":
        once = totals.num_matrices * ZERO3_SECONDS
    elif configuration.uses_fsdp:
        once = totals.num_units * FSDP_SECONDS
    else:
        return HookSeconds()
    return HookSeconds(forward_seconds=once, backward_seconds=once * (2 if configuration.gradient_checkpointing else 1))
