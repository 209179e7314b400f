"""What optimizers allocate and free in a step: the variables of their loops over tensors, written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from autofit.memory.tape import CUDA_BLOCK_BYTES
from autofit.memory.tensors import Tensor
from autofit.spec.hardware import DeviceKind

FP32_BYTES = 4
LOW_RANK = 128
"""Of what low-rank optimizers project on.

Source: transformers/trainer_optimizer.py 5.23, _get_galore_optimizer and _get_apollo_optimizer."""


class Frame:
    """The variables of a step, each naming what it holds; counts the most that is held at one time.

    A variable that is assigned anew frees what it held after the new value is there, as in Python.

    Args:
        device: whose allocator rounds the sizes.
        state: sizes of what is made for a tensor when a first step comes to it; None in later steps, and where all is
            made before.
    """

    def __init__(self, device: DeviceKind, state: Callable[[Tensor], Sequence[int]] | None = None) -> None:
        self.device = device
        self._state = state
        self.peak_bytes = 0
        self.at_peak: tuple[int, ...] = ()
        """Sizes of what is held at the highest moment."""
        self._held: dict[str, tuple[int, ...]] = {}
        self._now_bytes = 0

    def assign(self, name: str, *sizes: int) -> None:
        """Let a variable hold tensors of these sizes instead of what it holds; of none: end it."""
        before = self._held.pop(name, ())
        self._note((*before, *sizes), self._now_bytes + self._total(sizes))
        self._now_bytes += self._total(sizes) - self._total(before)
        if any(sizes):
            self._held[name] = sizes

    def moment(self, *sizes: int) -> None:
        """Hold temporaries that no variable names, all at one time."""
        self._note(sizes, self._now_bytes + self._total(sizes))

    @property
    def makes_state(self) -> bool:
        """Whether this is a first step, of an optimizer that makes its state as it goes."""
        return self._state is not None

    def make_state(self, tensor: Tensor) -> None:
        """Make what is kept for a tensor, in a first step."""
        if self._state is not None:
            self.moment(*self._state(tensor))
            self._now_bytes += self._total(self._state(tensor))

    def free(self, *sizes: int) -> None:
        """Free for good what was there before the step, of these sizes."""
        self._now_bytes -= self._total(sizes)

    def _note(self, unnamed: tuple[int, ...], num_bytes: int) -> None:
        if num_bytes > self.peak_bytes:
            self.peak_bytes = num_bytes
            held = [size for sizes in self._held.values() for size in sizes]
            self.at_peak = tuple(size for size in (*held, *unnamed) if size)

    def _total(self, sizes: Sequence[int]) -> int:
        if self.device == "cuda":
            return sum(-(-size // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES for size in sizes)
        return sum(sizes)


CHUNK_ELEMENTS = 65536
"""Of a tensor that one block reduces.

Source: torch v2.13 aten/src/ATen/native/cuda/MultiTensorApply.cuh, kChunkSize."""
GLOBAL_NORM_ELEMENTS = 320
"""Partial sums over all tensors. Source: torch aten/src/ATen/native/cuda/ForeachReduceOp.cu, `global_output`."""


def clip(frame: Frame, tensors: Sequence[Tensor]) -> None:
    """Trainer clips gradients before every step: `foreach` norms keep fp32 sums for as many chunks as the largest has.

    For every tensor, and a scalar each. On a CPU there are only the scalars, which are not counted.
    Source: transformers/training_args.py 5.23 (`max_grad_norm` 1.0); torch/nn/utils/clip_grad.py; torch
    aten/src/ATen/native/cuda/ForeachReduceOp.cu, _foreach_tensor_norm_cuda_impl.
    """
    if frame.device == "cuda" and tensors:
        chunks = max(-(-tensor.num_elements // CHUNK_ELEMENTS) for tensor in tensors)
        frame.assign("sums", FP32_BYTES * len(tensors) * chunks, FP32_BYTES * GLOBAL_NORM_ELEMENTS)
        frame.assign("norms", *(tensor.bytes_per_element for tensor in tensors))


Step = Callable[[Frame, Sequence[Tensor]], None]


def in_place(_frame: Frame, _tensors: Sequence[Tensor]) -> None:
    """One kernel updates each tensor, or all of them, and allocates nothing.

    Source: torch/optim/adam.py, _fused_adam; torch/optim/sgd.py (`_foreach_add_` alone, without momentum and weight
    decay); bitsandbytes 0.50 backends/cuda/ops.py, optimizer updates; torch-optimi 0.3 on a GPU (Triton).
    """


def adam(frame: Frame, tensors: Sequence[Tensor]) -> None:
    """On CUDA `foreach` makes a square root of every second moment at once; on a CPU it goes tensor by tensor.

    Source: torch/optim/adam.py, _multi_tensor_adam (`_foreach_sqrt`) and _single_tensor_adam (`sqrt() / bias`).
    """
    if frame.device == "cuda":
        frame.assign("square_roots", *(t.num_bytes for t in tensors))
        return
    for tensor in tensors:
        frame.moment(tensor.num_bytes, tensor.num_bytes)
        frame.assign("denom", tensor.num_bytes)


def adagrad(frame: Frame, tensors: Sequence[Tensor]) -> None:
    """On CUDA `foreach` makes two copies of everything: square roots and scaled gradients; on a CPU one of a tensor.

    Source: torch/optim/adagrad.py, _multi_tensor_adagrad (`std`, `numerator`) and _single_tensor_adagrad.
    """
    if frame.device == "cuda":
        frame.assign("std", *(t.num_bytes for t in tensors))
        frame.assign("numerator", *(t.num_bytes for t in tensors))
        return
    for tensor in tensors:
        frame.assign("std", tensor.num_bytes)


def rmsprop(frame: Frame, tensors: Sequence[Tensor]) -> None:
    """Source: torch/optim/rmsprop.py, _multi_tensor_rmsprop (`_foreach_sqrt`) and _single_tensor_rmsprop (`avg`)."""
    if frame.device == "cuda":
        frame.assign("avg", *(t.num_bytes for t in tensors))
        return
    for tensor in tensors:
        frame.assign("avg", tensor.num_bytes)


def schedule_free(frame: Frame, tensors: Sequence[Tensor]) -> None:
    """`foreach`, also on a CPU: a copy of everything for the square roots.

    Source: schedulefree 1.4 adamw_schedulefree.py and radam_schedulefree.py, step (`denom`).
    """
    frame.assign("denom", *(t.num_bytes for t in tensors))


def stable_adamw(frame: Frame, tensors: Sequence[Tensor]) -> None:
    """A GPU runs Triton kernels; a CPU squares a gradient and bounds a second moment at one time.

    Source: torch-optimi 0.3 optimi/stableadamw.py, _single_param_stableadamw.
    """
    if frame.device == "cpu":
        for tensor in tensors:
            frame.moment(tensor.num_bytes, tensor.num_bytes)


def adafactor(frame: Frame, tensors: Sequence[Tensor]) -> None:
    """Copies of a tensor in fp32, and what is left of the tensor before: gradient and weight too where they are halves.

    Source: transformers/optimization.py 5.23, Adafactor.step and _approx_sq_grad.
    """
    for tensor in tensors:
        whole = FP32_BYTES * tensor.num_elements
        copied = whole if tensor.bytes_per_element < FP32_BYTES else 0
        frame.assign("grad")
        frame.assign("grad", copied)
        frame.assign("p_data_fp32")
        frame.assign("p_data_fp32", copied)
        frame.moment(whole, whole)
        frame.assign("update", whole)
        _adafactor_update(frame, tensor, whole)
        frame.moment(whole)


def _adafactor_update(frame: Frame, tensor: Tensor, whole: int) -> None:
    if tensor.is_matrix:
        frame.moment(whole, FP32_BYTES * tensor.row_sums, FP32_BYTES * tensor.column_sums)
    frame.assign("update", whole)


def grokadamw(frame: Frame, tensors: Sequence[Tensor]) -> None:
    """A GPU fetches a tensor's three states from the host; then two copies of it while the tensor before's are there.

    Source: grokadamw 0.1.2 grokadamw.py, _update_group.
    """
    for tensor in tensors:
        size = tensor.num_bytes
        if frame.device == "cuda":
            frame.moment(size, size)
            frame.assign("moments", size, size)
            frame.assign("grok_ema", size)
        frame.moment(size, size)
        frame.assign("grok_grad", size)
        frame.moment(size)


def apollo(frame: Frame, tensors: Sequence[Tensor]) -> None:
    """Linear weights are projected on few rows or columns, scaled back, and their growth limited: two whole copies.

    The projection is drawn anew in the first and every 200th step, through an fp32 copy of a gradient in halves.
    Source: apollo-torch 1.0.3 apollo.py, AdamW.step, and random_projector.py, GradientProjector.
    """
    for tensor in projected_last(tensors):
        size = tensor.num_bytes
        low = apollo_elements(tensor) * tensor.bytes_per_element
        frame.assign("grad")
        if is_projected(tensor):
            drawn = FP32_BYTES * LOW_RANK * min(tensor.row_sums, tensor.column_sums)
            copied = FP32_BYTES * tensor.num_elements if tensor.bytes_per_element < FP32_BYTES else 0
            frame.moment(copied, drawn, drawn)
            frame.assign("grad", low)
        frame.make_state(tensor)
        frame.assign("denom", low)
        frame.assign("norm_grad", low)
        if is_projected(tensor):
            frame.assign("scale", max(tensor.row_sums, tensor.column_sums) * tensor.bytes_per_element)
            frame.assign("scaled_grad", size)
            if not frame.makes_state:  # growth is limited from the second step on
                frame.moment(size)
            frame.assign("norm_grad")


def is_projected(tensor: Tensor) -> bool:
    """Whether a low-rank optimizer takes a tensor for a linear layer's weight (`optim_target_modules="all-linear"`)."""
    is_two_dimensional = tensor.rows * tensor.column_sums == tensor.num_elements
    return not tensor.outside_linear and tensor.is_matrix and is_two_dimensional and not tensor.embeds


def projected_last(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The order of the groups that transformers makes for a low-rank optimizer.

    Source: transformers/trainer_optimizer.py 5.23, _setup_low_rank_optimizer.
    """
    return sorted(tensors, key=is_projected)


def apollo_elements(tensor: Tensor) -> int:
    """Elements of a tensor's moments: of APOLLO's rank instead of the shorter side."""
    if not is_projected(tensor):
        return tensor.num_elements
    return LOW_RANK * max(tensor.row_sums, tensor.column_sums)


def galore_gradient(tensor: Tensor) -> Tensor:
    """A projected gradient: of GaLore's rank instead of the shorter side, and never of more than that has.

    Source: galore-torch 1.0 galore_projector.py, project (`std`).
    """
    if not is_projected(tensor):
        return tensor
    short, long = sorted((tensor.rows, tensor.column_sums))
    rank = min(LOW_RANK, short)
    rows, columns = (long, rank) if tensor.rows == long else (rank, long)
    return replace(tensor, num_elements=rank * long, rows=rows, columns=columns)


def galore_projection_bytes(tensor: Tensor, bytes_per_element: int) -> int:
    """What the projector of a tensor keeps.

    For a gradient in fp32 it is a view of one of the two factors, whose whole storage stays; of halves a copy.
    Source: galore-torch 1.0 galore_projector.py, get_orthogonal_matrix (`Vh[:rank, :]`, `U[:, :rank]`).
    """
    short = min(tensor.rows, tensor.column_sums)
    if bytes_per_element < FP32_BYTES:
        return bytes_per_element * short * min(LOW_RANK, short)
    return FP32_BYTES * short * short


def galore_adamw(frame: Frame, tensors: Sequence[Tensor]) -> None:
    """Linear weights' gradients are projected; what is updated with is projected back, and scaled in a copy.

    Source: galore-torch 1.0 adamw.py, step, and galore_projector.py, project_back.
    """
    for tensor in projected_last(tensors):
        size, low = tensor.num_bytes, galore_gradient(tensor).num_bytes
        frame.assign("grad")
        if is_projected(tensor):
            _decompose(frame, tensor, tensor.bytes_per_element)
            frame.assign("grad", low)
        frame.make_state(tensor)
        frame.assign("denom", low)
        frame.assign("norm_grad", low)
        if is_projected(tensor):
            frame.moment(size, size)
            frame.assign("norm_grad", size)


def galore_adafactor(frame: Frame, tensors: Sequence[Tensor]) -> None:
    """As Adafactor, on a projected gradient; what is updated with is whole, and copied once more to be subtracted.

    Source: galore-torch 1.0 adafactor.py, step.
    """
    for tensor in projected_last(tensors):
        gradient = galore_gradient(tensor)
        whole, low = FP32_BYTES * tensor.num_elements, FP32_BYTES * gradient.num_elements
        copied = whole if tensor.bytes_per_element < FP32_BYTES else 0
        frame.assign("grad", copied)
        if is_projected(tensor):
            _decompose(frame, tensor, FP32_BYTES)
            frame.assign("grad", low)
        frame.make_state(tensor)
        frame.assign("p_data_fp32")
        frame.assign("p_data_fp32", copied)
        frame.moment(low, low)
        frame.assign("update", low)
        _adafactor_update(frame, gradient, low)
        if is_projected(tensor):
            frame.moment(whole, whole)
            frame.assign("update", whole)
        frame.moment(whole)


def galore_adamw_8bit(frame: Frame, tensors: Sequence[Tensor]) -> None:
    """A weight is put aside in a copy, and a projected one of zeros updated in its place; its gradient is freed.

    Source: galore-torch 1.0 adamw8bit.py, step (`p.saved_data`, `p.data`, `p.grad`).
    """
    for number, tensor in enumerate(projected_last(tensors)):
        if not is_projected(tensor):
            frame.make_state(tensor)
            continue
        size, low = tensor.num_bytes, galore_gradient(tensor).num_bytes
        _decompose(frame, tensor, tensor.bytes_per_element)
        frame.moment(low, size, low)
        # The weight's copy is the weight from here on; its gradient is the projected one, until gradients are dropped.
        frame.assign(f"gradient {number}", low)
        frame.free(size)
        frame.make_state(tensor)
        frame.moment(low, size, size)


def _decompose(frame: Frame, tensor: Tensor, bytes_per_element: int) -> None:
    """The first step and every 200th decompose a gradient, in fp32: both factors, and those of their largest values.

    What the decomposition allocates inside is a GPU's: a copy of the matrix, and a workspace.
    Source: galore-torch 1.0 galore_projector.py, get_orthogonal_matrix; torch v2.13
    aten/src/ATen/native/cuda/linalg/BatchLinearAlgebraLib.cpp, svd_cusolver (`gesvdj`, `cloneBatchedColumnMajor`).
    """
    short, rank = min(tensor.rows, tensor.column_sums), min(LOW_RANK, tensor.rows, tensor.column_sums)
    whole, low = FP32_BYTES * tensor.num_elements, FP32_BYTES * galore_gradient(tensor).num_elements
    frame.assign("matrix", whole if bytes_per_element < FP32_BYTES else 0)
    factors = (whole, FP32_BYTES * short, FP32_BYTES * short * short)
    if frame.device == "cuda":
        frame.moment(*factors, whole, svd_workspace_bytes(tensor), FP32_BYTES)
    frame.assign("factors", *factors)
    frame.moment(FP32_BYTES * rank * rank, low)
    if bytes_per_element < FP32_BYTES:
        frame.moment(low, galore_projection_bytes(tensor, bytes_per_element))
    frame.assign("factors")
    frame.assign("matrix")


def svd_workspace_bytes(tensor: Tensor) -> int:
    """Assumed: what cuSOLVER takes to decompose a matrix, two copies of it and four squares of its shorter side.

    The size is not published; only a GPU tells it (cusolverDnSgesvdj_bufferSize). This is more than the method needs
    (a QR decomposition of the longer side, and rotations of squares of the shorter), and nobody has compared it.
    """
    short = min(tensor.rows, tensor.column_sums)
    return FP32_BYTES * (2 * tensor.num_elements + 4 * short * short)


def lomo(frame: Frame, tensors: Sequence[Tensor]) -> None:
    """The gradient before the newest, which waited; in halves it and its weight are copied to fp32.

    Source: lomo-optim 0.1.1 lomo.py, fuse_update.
    """
    for tensor in tensors:
        whole = FP32_BYTES * tensor.num_elements
        frame.assign("grad", tensor.num_bytes)
        if tensor.bytes_per_element < FP32_BYTES:
            frame.assign("grad", whole)
            frame.moment(whole)
        frame.assign("grad")


def adalomo(frame: Frame, tensors: Sequence[Tensor]) -> None:
    """As LOMO, with Adafactor's update of the gradient that waited.

    Source: lomo-optim 0.1.1 adalomo.py, fuse_update.
    """
    for tensor in tensors:
        whole = FP32_BYTES * tensor.num_elements
        frame.assign("grad", tensor.num_bytes)
        if tensor.bytes_per_element < FP32_BYTES:
            frame.assign("grad", whole)
        frame.moment(whole, whole)
        frame.assign("update", whole)
        _adafactor_update(frame, tensor, whole)
        frame.moment(whole if tensor.bytes_per_element < FP32_BYTES else 0)
        frame.assign("grad")
        frame.assign("update")
