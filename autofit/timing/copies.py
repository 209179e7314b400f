"""What a step moves in a device's memory beside its kernels: gradients that are added up, and engines' own copies."""

from __future__ import annotations

from msgspec import Struct

from autofit.spec.configuration import Configuration
from autofit.timing.kernels import Amount
from autofit.timing.parameters import ParameterTotals

SUM_ACCESSES = 3
"""Adding a micro-step's gradients to those before reads both and writes one.

Source: torch/csrc/autograd/functions/accumulate_grad.h, `accumulateGrad`; the first micro-step's are taken over.
"""
COPY_ACCESSES = 2
"""Whatever is copied, or scaled in place, is read and written."""
DDP_COPIES = 2
"""Gradients are copied to their bucket, and back when it has been summed.

Source: torch/csrc/distributed/c10d/reducer.cpp (`mark_variable_ready_dense`, `finalize_bucket_dense`), where buckets
are no views of gradients, which is the default that transformers leaves.
"""


class CopiedBytes(Struct, frozen=True, kw_only=True):
    """Bytes that one device reads and writes so, by when."""

    forward_bytes: float = 0.0
    """In the forward pass of every micro-step."""
    backward_bytes: float = 0.0
    """In the backward pass of every micro-step."""
    later_backward_bytes: float = 0.0
    """In that of every micro-step but the first."""
    last_backward_bytes: float = 0.0
    """In that of the last."""


def copied_bytes(totals: ParameterTotals, configuration: Configuration) -> CopiedBytes:
    """List the copies of weights and gradients, whole where a rank holds them whole.

    FSDP1's gradients of a unit are joined to one in every backward pass, and divided before they are summed; FSDP2
    copies weights out of what was gathered, and gradients into what is sent. DeepSpeed copies gradients to its buckets;
    what stage 2 and 3 add up is a rank's part. The weights that stage 3 gathers several at a time are copied too, which
    is not counted: that depends on what is prefetched.
    Source: torch 2.13 distributed/fsdp/_flat_param.py (`_get_unflat_views_unaligned`: torch.split, whose backward
    joins), _runtime_utils.py (`_div_if_needed`), _fully_shard/_fsdp_collectives.py (split_with_sizes_copy, chunk_cat);
    deepspeed 0.19.8 runtime/zero/stage_1_and_2.py (reduce_independent_p_g_buckets_and_remove_grads), stage3.py
    (__add_grad_to_ipg_bucket).
    """
    sharding, gradients = configuration.sharding, float(totals.trained_bytes)
    copied, summed = COPY_ACCESSES * gradients, SUM_ACCESSES * gradients
    if sharding == "ddp":
        return CopiedBytes(later_backward_bytes=summed, last_backward_bytes=DDP_COPIES * copied)
    if sharding == "zero1":
        return CopiedBytes(later_backward_bytes=summed, last_backward_bytes=copied)
    if sharding in {"zero2", "zero3"}:
        return CopiedBytes(backward_bytes=copied, later_backward_bytes=summed / configuration.num_processes)
    if sharding == "fsdp1":
        return CopiedBytes(backward_bytes=copied, later_backward_bytes=summed, last_backward_bytes=copied)
    if sharding == "fsdp2":
        weights = float(COPY_ACCESSES * totals.whole_bytes)
        return CopiedBytes(
            forward_bytes=weights,
            backward_bytes=weights if configuration.reshard_after_forward else 0.0,
            later_backward_bytes=summed,
            last_backward_bytes=copied,
        )
    return CopiedBytes(later_backward_bytes=summed)


class CopySeconds(Struct, frozen=True, kw_only=True):
    """The times of a step's copies, by when they run; see `CopiedBytes`."""

    forward_seconds: float
    backward_seconds: float
    later_backward_seconds: float
    last_backward_seconds: float

    def some_seconds(self, num_micro_steps: Amount) -> Amount:
        """What runs in some micro-steps of a step only."""
        return (num_micro_steps - 1) * self.later_backward_seconds + self.last_backward_seconds

    def seconds(self, num_micro_steps: Amount) -> Amount:
        """All copies of a step."""
        every = num_micro_steps * (self.forward_seconds + self.backward_seconds)
        return every + self.some_seconds(num_micro_steps)


def copy_seconds(copied: CopiedBytes, memory_bytes_per_second: float) -> CopySeconds:
    """Time copies: they are as slow as the memory."""
    return CopySeconds(
        forward_seconds=copied.forward_bytes / memory_bytes_per_second,
        backward_seconds=copied.backward_bytes / memory_bytes_per_second,
        later_backward_seconds=copied.later_backward_bytes / memory_bytes_per_second,
        last_backward_seconds=copied.last_backward_bytes / memory_bytes_per_second,
    )
