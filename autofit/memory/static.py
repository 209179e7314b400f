"""Bytes of parameters, gradients and optimizer state, before and after sharding."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from msgspec import Struct

from autofit.memory.optimizers import OPTIMIZERS, clip_frame, step_frame, update_frame
from autofit.memory.tape import CUDA_BLOCK_BYTES
from autofit.memory.tensors import PARAMETER_KINDS, Model, Tensor, as_model
from autofit.spec.configuration import Optim
from autofit.spec.hardware import DeviceKind


def rounded(num_bytes: int, device: DeviceKind) -> int:
    """An allocation as the device's allocator counts it."""
    return -(-num_bytes // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES if device == "cuda" else num_bytes


class StaticBytes(Struct, frozen=True, kw_only=True):
    """What a single process without sharding holds."""

    frozen_weights: int
    trained_weights: int
    quantized_weights: int
    """Packed weights and their scales."""
    buffers: int
    gradients: int
    trained_elements: int
    frozen_elements: int
    """Elements of frozen parameters, packed ones as stored."""


def static_bytes(model: tuple[Tensor, ...], device: DeviceKind) -> StaticBytes:
    """Add up a model's tensors by what they are."""

    def total(chosen: Iterable[tuple[Tensor, int]]) -> int:
        return sum(rounded(tensor.num_bytes, device) * num for tensor, num in chosen)

    counted = as_model(model).counted
    parameters = [(t, num) for t, num in counted if t.kind in ("parameter", "adapter")]
    trained = [(t, num) for t, num in parameters if t.trains]
    return StaticBytes(
        frozen_weights=total((t, num) for t, num in parameters if not t.trains),
        trained_weights=total(trained),
        quantized_weights=total((t, num) for t, num in counted if t.kind in ("quantized", "quant_state")),
        buffers=total((t, num) for t, num in counted if t.kind == "buffer"),
        gradients=total(trained),
        trained_elements=sum(t.num_elements * num for t, num in trained),
        frozen_elements=sum(t.num_elements * num for t, num in counted if t.kind in PARAMETER_KINDS and not t.trains),
    )


class Update(Struct, frozen=True):
    """What an optimizer that works in backward takes for one tensor, as soon as its gradient is made."""

    gradient_bytes: int
    embeds: bool
    """Whether the tensor is an embedding's, whose gradient is made last."""
    step_bytes: int
    state_bytes: int


class OptimizerBytes(Struct, frozen=True, kw_only=True):
    """What an optimizer keeps between steps and takes for a moment."""

    state: int
    host: int
    step: int
    """In its step; of one whose gradients wait for the next one, beside that while backward runs."""
    not_yet: int = 0
    """State that the first step has not made at its highest moment."""
    temporaries: tuple[int, ...] = ()
    """What `step` is made of: sizes of the allocations at its highest moment, not rounded."""
    in_backward: bool = False
    """Whether gradients are used and freed as they are made."""
    updates: tuple[Update, ...] = ()
    """One for each kind of tensor, where that happens at once; then `step` is the most of them."""


def optimizer_bytes(
    model: tuple[Tensor, ...], optim: Optim, device: DeviceKind, *, clips: bool = True
) -> OptimizerBytes:
    """Add up an optimizer's state over the tensors that train.

    Args:
        model: all tensors.
        optim: whose state.
        device: where it is; of a CPU rank all memory is its own.
        clips: whether torch clips the gradients before the step.
    """
    return _optimizer_bytes(as_model(model).trained, optim, device, clips=clips)


@lru_cache(maxsize=1024)
def _optimizer_bytes(trained: Model, optim: Optim, device: DeviceKind, *, clips: bool) -> OptimizerBytes:
    optimizer = OPTIMIZERS[optim]
    states = [(optimizer.state(t), num) for t, num in trained.counted]
    host = sum(state.host * num for state, num in states)
    frame = step_frame(optim, trained, device)
    made = sum(rounded(size, device) * num for state, num in states for size in state.device)
    not_yet = 0
    if optimizer.makes_state_late:
        not_yet = made + frame.peak_bytes - step_frame(optim, trained, device, is_first=True).peak_bytes
    if clips and not optimizer.in_backward:
        frame = max(frame, clip_frame(trained, device), key=lambda each: each.peak_bytes)
    counters = sum(state.counter * num for state, num in states)
    return OptimizerBytes(
        state=made + (host + counters if device == "cpu" else 0),
        host=0 if device == "cpu" else host,
        step=frame.peak_bytes,
        not_yet=not_yet,
        temporaries=frame.at_peak,
        in_backward=optimizer.in_backward,
        updates=_updates(trained, optim, device) if optimizer.in_backward and not optimizer.waits else (),
    )


def _updates(trained: tuple[Tensor, ...], optim: Optim, device: DeviceKind) -> tuple[Update, ...]:
    state = OPTIMIZERS[optim].state
    return tuple(
        Update(
            gradient_bytes=rounded(tensor.num_bytes, device),
            embeds=tensor.embeds,
            step_bytes=update_frame(optim, tensor, device).peak_bytes,
            state_bytes=sum(rounded(size, device) for size in state(tensor).device),
        )
        for tensor in dict.fromkeys(trained)
    )


def partition_optimizer_bytes(num_elements: int, optim: Optim, device: DeviceKind) -> OptimizerBytes:
    """The same for a flat fp32 partition of `num_elements`, as DeepSpeed hands it to the optimizer.

    DeepSpeed clips in its own way.
    """
    whole = Tensor(num_elements, 4, trains=True, embeds=False, kind="parameter")
    return optimizer_bytes((whole,), optim, device, clips=False)
