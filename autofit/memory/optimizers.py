"""What each optimizer keeps for a tensor, and what its step takes. A new optimizer is one entry in `OPTIMIZERS`.

Each is made as transformers' Trainer makes it by default: without `optim_args`, momentum or weight decay.
Source: transformers/trainer_optimizer.py 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Struct
from msgspec.structs import replace

from autofit.memory import optimizer_steps as steps
from autofit.memory.optimizer_steps import FP32_BYTES, Frame, Step
from autofit.memory.tensors import Tensor
from autofit.spec.configuration import Optim
from autofit.spec.hardware import DeviceKind

BLOCK_ELEMENTS = 256
"""Elements that share a scale in an 8-bit state.

Source: bitsandbytes 0.50 optim/optimizer.py, Optimizer2State.init_state; transformers hands the same number to torchao.
"""
MIN_8BIT_ELEMENTS = 4096
"""Smaller tensors keep their dtype's or 32-bit state.

Source: bitsandbytes optim/optimizer.py, `min_8bit_size`; torchao optim/adam.py, _new_buffer."""
MIN_PAGED_ELEMENTS = 100_000
"""Smaller states are not paged. Source: bitsandbytes optim/optimizer.py, get_state_buffer."""
QMAP_ELEMENTS = {8: 256, 4: 16}
"""Of the code table that torchao keeps with every tensor. Source: torchao optim/subclass_8bit.py, subclass_4bit.py."""


class State(Struct, frozen=True, kw_only=True):
    """Bytes that an optimizer keeps for one tensor, by where they live."""

    device: tuple[int, ...] = ()
    """Sizes of the tensors in the device's allocator."""
    counter: int = 0
    """A step count in the host's ordinary memory: of the same device only on a CPU rank."""
    host: int = 0
    """Managed memory, which the driver moves to the device when a kernel reads it, or state that a step fetches."""


StateOf = Callable[[Tensor], State]


class Optimizer(Struct, frozen=True, kw_only=True):
    """Memory of one of transformers' `optim` names."""

    state: StateOf
    """What is kept for a tensor that trains."""
    step: Step
    """What is allocated and freed while the tensors that train are updated."""
    makes_state_late: bool = False
    """Whether the first step makes the state of a tensor when it comes to it, instead of all before."""
    in_backward: bool = False
    """Whether each gradient is used as soon as it is made, and freed; then `step` runs there, for one tensor."""
    waits: bool = False
    """Whether that is not before the next gradient is made."""


def step_frame(optim: Optim, tensors: Sequence[Tensor], device: DeviceKind, *, is_first: bool = False) -> Frame:
    """Run an optimizer's step over tensors; the frame tells the most that it held, and in what sizes.

    Of a first step that includes the state, where that is made as the step goes.

    The Trainer puts what has no weight decay (norms, biases) into a second group, which is updated last. Which tensors
    are neighbours matters to loops; a `foreach` over two groups takes a little less than over both, which is counted.
    Source: transformers/trainer.py 5.23, create_optimizer and get_decay_parameter_names.
    """
    optimizer = OPTIMIZERS[optim]
    if not optimizer.in_backward:
        makes_state = is_first and optimizer.makes_state_late
        frame = Frame(device, (lambda tensor: optimizer.state(tensor).device) if makes_state else None)
        optimizer.step(frame, sorted(tensors, key=lambda tensor: not tensor.is_matrix))
        return frame
    frames = [update_frame(optim, tensor, device) for tensor in tensors]
    return max(frames, key=lambda frame: frame.peak_bytes, default=Frame(device))


def update_frame(optim: Optim, tensor: Tensor, device: DeviceKind) -> Frame:
    """Run the step of one that works in backward, over one tensor."""
    frame = Frame(device)
    OPTIMIZERS[optim].step(frame, [tensor])
    return frame


def clip_frame(tensors: Sequence[Tensor], device: DeviceKind) -> Frame:
    """Run the clipping of gradients that goes before a step."""
    frame = Frame(device)
    steps.clip(frame, tensors)
    return frame


def _nothing(_tensor: Tensor) -> State:
    return State()


def _adamw(tensor: Tensor) -> State:
    """Two moments in the parameter's dtype; the step count stays on the host. Source: torch/optim/adam.py."""
    return State(device=(tensor.num_bytes, tensor.num_bytes), counter=FP32_BYTES)


def _adamw_fused(tensor: Tensor) -> State:
    """The step count is on the device. Source: torch/optim/adam.py, _init_group."""
    return State(device=(tensor.num_bytes, tensor.num_bytes, FP32_BYTES))


def _one_moment(tensor: Tensor) -> State:
    """Source: torch/optim/adagrad.py (`sum`), torch/optim/rmsprop.py (`square_avg`)."""
    return State(device=(tensor.num_bytes,), counter=FP32_BYTES)


def _adafactor(tensor: Tensor) -> State:
    """Sums over rows and columns in fp32, of a vector the whole; and the weight's root mean square.

    Source: transformers/optimization.py 5.23, Adafactor.step.
    """
    if not tensor.is_matrix:
        return State(device=(FP32_BYTES * tensor.num_elements, FP32_BYTES))
    return State(device=(FP32_BYTES * tensor.row_sums, FP32_BYTES * tensor.column_sums, FP32_BYTES))


def _adalomo(tensor: Tensor) -> State:
    """Source: lomo-optim 0.1.1 adalomo.py, __init__."""
    return State(device=_adafactor(tensor).device[:-1])


def _bitsandbytes(num_bits: int, *states: int) -> StateOf:
    """Make the state of a bitsandbytes optimizer.

    In 8 bits a byte an element, with an fp32 scale for every 256; embeddings and small tensors keep 32 bits.
    Source: bitsandbytes 0.50 optim/optimizer.py, init_state, and optim/ademamix.py; transformers/trainer.py 5.23
    registers the embeddings' override (create_optimizer).

    Args:
        num_bits: `optim_bits`.
        states: elements of each state tensor for one of the parameter.
    """

    def kept(tensor: Tensor) -> State:
        if num_bits == 32 or tensor.embeds or tensor.num_elements < MIN_8BIT_ELEMENTS:
            return State(device=tuple(FP32_BYTES * count * tensor.num_elements for count in states))
        blocks = -(-tensor.num_elements // BLOCK_ELEMENTS)
        scales = [FP32_BYTES * count * blocks for count in states]
        return State(device=(*(count * tensor.num_elements for count in states), *scales))

    return kept


def _paged(state: StateOf, num_states: int) -> StateOf:
    """Put states of 100,000 elements or more in managed memory; their scales stay in the device's allocator.

    Source: bitsandbytes 0.50 optim/optimizer.py, get_state_buffer; functional.py, get_paged.
    """

    def moved(tensor: Tensor) -> State:
        kept = state(tensor)
        if tensor.num_elements < MIN_PAGED_ELEMENTS:
            return kept
        return State(device=kept.device[num_states:], host=sum(kept.device[:num_states]))

    return moved


def _torchao(num_bits: int) -> StateOf:
    """Two moments of so many bits, each with an fp32 scale for every 256 elements and a code table.

    Source: torchao 0.18 optim/adam.py, _new_buffer; optim/subclass_8bit.py and subclass_4bit.py, zeros.
    """

    def kept(tensor: Tensor) -> State:
        if tensor.num_elements < MIN_8BIT_ELEMENTS or tensor.num_elements % BLOCK_ELEMENTS:
            return State(device=(tensor.num_bytes,) * 2, counter=FP32_BYTES)
        codes = tensor.num_elements * num_bits // 8
        scales = FP32_BYTES * tensor.num_elements // BLOCK_ELEMENTS
        return State(device=(codes, scales, FP32_BYTES * QMAP_ELEMENTS[num_bits]) * 2, counter=FP32_BYTES)

    return kept


def _schedule_free(num_states: int) -> StateOf:
    """Source: schedulefree 1.4, step: `z`, and but for SGD a second moment, in the parameter's dtype."""
    return lambda tensor: State(device=(tensor.num_bytes,) * num_states)


def _stable_adamw(tensor: Tensor) -> State:
    """Two moments and epsilon in the parameter's dtype, for halves also what rounding loses (Kahan).

    Source: torch-optimi 0.3 optimi/stableadamw.py, _init_state; two scalars more are there on a GPU.
    """
    loses = tensor.bytes_per_element < FP32_BYTES
    return State(device=(tensor.num_bytes,) * (3 if loses else 2) + (tensor.bytes_per_element,))


def _grokadamw(tensor: Tensor) -> State:
    """Three tensors on the host. Source: grokadamw 0.1.2 grokadamw.py, _update_group (`device='cpu'`)."""
    return State(host=3 * tensor.num_bytes)


def _apollo(tensor: Tensor) -> State:
    """Moments of low rank, the projection, and the last norm, for linear weights; whole moments for the rest.

    Source: apollo-torch 1.0.3 apollo.py, AdamW.step.
    """
    low = steps.apollo_elements(tensor) * tensor.bytes_per_element
    if not steps.is_projected(tensor):
        return State(device=(low, low))
    projection = steps.LOW_RANK * min(tensor.row_sums, tensor.column_sums) * tensor.bytes_per_element
    return State(device=(low, low, projection, tensor.bytes_per_element))


def _galore(state: StateOf, projects_in: Callable[[Tensor], int]) -> StateOf:
    """Make the state of a GaLore optimizer: of a projected gradient in place of a linear weight's, and the projector.

    Args:
        state: of the optimizer that is projected.
        projects_in: bytes of an element of the gradient that is projected.
    """

    def kept(tensor: Tensor) -> State:
        found = state(steps.galore_gradient(tensor))
        if not steps.is_projected(tensor):
            return found
        projection = steps.galore_projection_bytes(tensor, projects_in(tensor))
        return replace(found, device=(*found.device, projection))

    return kept


def _galore_adamw(tensor: Tensor) -> State:
    """Two moments; the step is counted in Python. Source: galore-torch 1.0 adamw.py, step."""
    return State(device=(tensor.num_bytes, tensor.num_bytes))


def _galore_adamw_8bit(tensor: Tensor) -> State:
    """bitsandbytes' state, also of embeddings, and a norm: GaLore's options reach bitsandbytes 0.50 as others.

    Its percentile_clipping of 100 is max_unorm there (100 times the weight's norm bounds an update), and block_wise is
    skip_zeros. transformers asks for 32-bit state of embeddings only from bitsandbytes' own classes.
    Source: galore-torch 1.0 adamw8bit.py, __init__; bitsandbytes 0.50 optim/optimizer.py, init_state (`unorm_vec`);
    transformers/trainer.py 5.23, create_optimizer.
    """
    kept = _bitsandbytes(8, 1, 1)(replace(tensor, embeds=False))
    return State(device=(*kept.device, FP32_BYTES))


_ADAM8, _ADAM32 = _bitsandbytes(8, 1, 1), _bitsandbytes(32, 1, 1)
_LION8, _LION32 = _bitsandbytes(8, 1), _bitsandbytes(32, 1)
_ADEMAMIX8, _ADEMAMIX32 = _bitsandbytes(8, 2, 1), _bitsandbytes(32, 2, 1)
_GALORE = _galore(_galore_adamw, lambda tensor: tensor.bytes_per_element)

OPTIMIZERS: dict[Optim, Optimizer] = {
    "adamw_torch": Optimizer(state=_adamw, step=steps.adam),
    "adamw_torch_fused": Optimizer(state=_adamw_fused, step=steps.in_place),
    "adamw_8bit": Optimizer(state=_ADAM8, step=steps.in_place),
    "paged_adamw_8bit": Optimizer(state=_paged(_ADAM8, 2), step=steps.in_place),
    "paged_adamw_32bit": Optimizer(state=_paged(_ADAM32, 2), step=steps.in_place),
    "lion_8bit": Optimizer(state=_LION8, step=steps.in_place),
    "lion_32bit": Optimizer(state=_LION32, step=steps.in_place),
    "paged_lion_8bit": Optimizer(state=_paged(_LION8, 1), step=steps.in_place),
    "paged_lion_32bit": Optimizer(state=_paged(_LION32, 1), step=steps.in_place),
    "ademamix": Optimizer(state=_ADEMAMIX32, step=steps.in_place),
    "ademamix_8bit": Optimizer(state=_ADEMAMIX8, step=steps.in_place),
    "paged_ademamix_32bit": Optimizer(state=_paged(_ADEMAMIX32, 2), step=steps.in_place),
    "paged_ademamix_8bit": Optimizer(state=_paged(_ADEMAMIX8, 2), step=steps.in_place),
    "rmsprop_bnb": Optimizer(state=_LION32, step=steps.in_place),
    "rmsprop_bnb_32bit": Optimizer(state=_LION32, step=steps.in_place),
    "rmsprop_bnb_8bit": Optimizer(state=_LION8, step=steps.in_place),
    "sgd": Optimizer(state=_nothing, step=steps.in_place),
    "adagrad": Optimizer(state=_one_moment, step=steps.adagrad),
    "rmsprop": Optimizer(state=_one_moment, step=steps.rmsprop),
    "adafactor": Optimizer(state=_adafactor, step=steps.adafactor),
    "adamw_torch_8bit": Optimizer(state=_torchao(8), step=steps.in_place),
    "adamw_torch_4bit": Optimizer(state=_torchao(4), step=steps.in_place),
    "schedule_free_adamw": Optimizer(state=_schedule_free(2), step=steps.schedule_free),
    "schedule_free_radam": Optimizer(state=_schedule_free(2), step=steps.schedule_free),
    "schedule_free_sgd": Optimizer(state=_schedule_free(1), step=steps.in_place),
    "stable_adamw": Optimizer(state=_stable_adamw, step=steps.stable_adamw),
    "grokadamw": Optimizer(state=_grokadamw, step=steps.grokadamw),
    "apollo_adamw": Optimizer(state=_apollo, step=steps.apollo, makes_state_late=True),
    "apollo_adamw_layerwise": Optimizer(state=_apollo, step=steps.apollo, in_backward=True),
    "galore_adamw": Optimizer(state=_GALORE, step=steps.galore_adamw, makes_state_late=True),
    "galore_adamw_layerwise": Optimizer(state=_GALORE, step=steps.galore_adamw, in_backward=True),
    "galore_adamw_8bit": Optimizer(
        state=_galore(_galore_adamw_8bit, lambda tensor: tensor.bytes_per_element),
        step=steps.galore_adamw_8bit,
        makes_state_late=True,
    ),
    "galore_adafactor": Optimizer(
        state=_galore(_adafactor, lambda _: FP32_BYTES), step=steps.galore_adafactor, makes_state_late=True
    ),
    "lomo": Optimizer(state=_nothing, step=steps.lomo, in_backward=True, waits=True),
    "adalomo": Optimizer(state=_adalomo, step=steps.adalomo, in_backward=True, waits=True),
}

UNMODELLED: dict[Optim, str] = {
    "adamw_apex_fused": "transformers 5 has no such name",
}
"""Names that are refused, and why."""
