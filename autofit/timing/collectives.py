"""Bytes that every rank sends for one optimizer step, by what sharding makes the ranks exchange."""

from __future__ import annotations

from autofit.spec.configuration import Configuration
from autofit.timing.parameters import ParameterTotals


def all_reduce_bytes(num_bytes: float, num_ranks: int) -> float:
    """Bytes each rank sends to sum a tensor over a ring.

    Source: NVIDIA/nccl-tests doc/PERFORMANCE.md, 2 (n - 1) / n of the tensor.
    """
    return 2 * (num_ranks - 1) / num_ranks * num_bytes


def gather_bytes(num_bytes: float, num_ranks: int) -> float:
    """Bytes each rank sends to gather a tensor from its shards, or to reduce it into them.

    Source: NVIDIA/nccl-tests doc/PERFORMANCE.md, (n - 1) / n of the whole tensor.
    """
    return (num_ranks - 1) / num_ranks * num_bytes


def step_traffic_bytes(totals: ParameterTotals, configuration: Configuration) -> float:
    """Bytes each rank sends in one optimizer step.

    DDP reduces once a step (accumulation runs under no_sync); stage 1 reduces into shards and gathers the updated
    weights, once a step; stage 2 reduces in every micro-step; stage 3 gathers all weights, frozen ones too, for
    forward and again for backward.
    Source: Rajbhandari et al. 2020 (ZeRO), section 7; deepspeed/runtime/zero/stage_1_and_2.py and stage3.py.
    """
    num_ranks, num_micro_steps = configuration.num_processes, configuration.gradient_accumulation_steps
    shard = gather_bytes(totals.trained_bytes, num_ranks)
    whole = gather_bytes(totals.whole_bytes, num_ranks)
    return {
        "none": 0.0,
        "ddp": all_reduce_bytes(totals.trained_bytes, num_ranks),
        "zero1": 2 * shard,
        "zero2": (num_micro_steps + 1) * shard,
        "zero3": num_micro_steps * (2 * whole + shard),
        "fsdp1": num_micro_steps * (2 * whole + shard),
        "fsdp2": num_micro_steps * (2 * whole + shard),
    }[configuration.sharding]
