"""Losses that never hold all logits: Liger's fused linear cross entropy and TRL's chunked head, by their own code.

Their kernels are Triton's, which run on no fake tensor. A kernel allocates nothing, so each launch is only told of, for
the bytes it moves, and the Python around it, which allocates, runs as it is installed. What it decides by the device,
or by values that fake tensors have none of, is decided here as on a GPU.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.utils.flop_counter  # asks whether Triton is there, and must not find its stand-in
from torch import nn
from torch.nn import functional

from autofit.errors import InputError
from autofit.spec.profile import Regime

MOST_MULTIPROCESSORS = 160
"""Of any GPU so far: Liger makes a row of a norm's gradient for each. Source: NVIDIA Blackwell Ultra (B300), 160."""
_FUSED = "liger_kernel.ops.fused_linear_cross_entropy"
Launched = Callable[..., None]
"""Is told of every kernel that is launched: what it reads and what it writes, a tensor that it does both to twice; and
its FLOPs, if it multiplies matrices."""
OVERWRITTEN: Mapping[str, tuple[int, ...]] = {
    "_swiglu_backward_kernel": (1, 2),
    "_swiglu_backward_kernel_tiled": (1, 2),
    "_geglu_tanh_backward_kernel": (1, 2),
    "_triton_rope": (0, 2),
    "_triton_qwen2vl_mrope": (0, 1),
    "_llama4_rope_kernel": (0, 1),
    "element_mul_kernel": (0,),
}
"""Which arguments Liger's kernels read and write over. All others are read or written, once.

Source: liger_kernel/ops/swiglu.py, geglu.py, rope.py, qwen2vl_mrope.py, llama4_rope.py and utils.py 0.8.5.
"""
EXPERT_PRODUCTS: Mapping[str, tuple[int, int]] = {
    "_fused_up_proj_swiglu_kernel": (2, 6),
    "_fused_down_proj_kernel": (1, 0),
    "_moe_bwd_down_proj_kernel": (1, 5),
    "_moe_bwd_dW2_kernel": (1, 0),
    "_moe_bwd_dX_expanded_kernel": (2, 0),
    "_moe_bwd_dW1_kernel": (2, 1),
}
"""Of Liger's kernels that multiply experts' matrices: how many of `H_dim` x `I_dim`, and which argument has a row for
each token of each expert.

Source: liger_kernel/ops/fused_moe.py 0.8.5, LigerFusedMoEFunction.
"""


@contextmanager
def loss_of(model: nn.Module, regime: Regime, launched: Launched) -> Iterator[dict[str, Any]]:
    """Let the model compute the regime's loss; yield what its forward is called with besides the batch.

    Args:
        model: is changed until the end of the context.
        regime: says which loss.
        launched: is told of each of Triton's kernels.

    Raises:
        InputError: the library is not installed, is of another release, or does not know the model or the device.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with ExitStack() as stack:
        if regime.loss == "stock":
            yield {}
        elif regime.loss == "liger":
            stack.enter_context(_liger(base, regime, launched))
            yield {"num_items_in_batch": torch.ones((), dtype=torch.int64)}
        else:
            stack.enter_context(_chunked(base, regime, launched))
            yield {"fused_lm_head": True, "num_items_in_batch": torch.ones((), dtype=torch.int64)}


@contextmanager
def _replaced(owner: Any, **changes: Any) -> Iterator[None]:
    saved = {name: getattr(owner, name) for name in changes}
    for name, new in changes.items():
        setattr(owner, name, new)
    try:
        yield
    finally:
        for name, old in saved.items():
            setattr(owner, name, old)


@contextmanager
def _liger(model: Any, regime: Regime, launched: Launched) -> Iterator[None]:
    """Apply Liger as Trainer does (`use_liger_kernel`), and take back what it changes outside the model.

    Source: transformers/integrations/liger.py 5.23; liger_kernel/transformers/monkey_patch.py 0.8.5.
    """
    _refuse_a_cpu(regime)
    liger, fused, norms = _import_liger()
    model_type = getattr(model.config, "model_type", None)
    if model_type not in liger.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise InputError(
            f"liger-kernel has no kernels for model_type {model_type!r}.", to_fix="plan with the stock loss"
        )
    library = {module for part in model.modules() if (module := _library_module(part)) is not None}
    saved = [(module, dict(vars(module))) for module in library]
    with ExitStack() as stack:
        stack.enter_context(_replaced(functional, cross_entropy=functional.cross_entropy))
        stack.enter_context(_replaced(torch.Tensor, item=lambda _tensor: 1))
        stack.enter_context(_replaced(torch, equal=lambda *_tensors: False))
        forward = _fused_forward(launched, sums_in_place=regime.flash_kernel)
        stack.enter_context(_replaced(fused, fused_linear_cross_entropy_forward=forward))
        stack.enter_context(_replaced(norms, rms_norm_backward=_with_a_row_for_each_multiprocessor(norms)))
        stack.enter_context(_triton_or_stand_in())
        stack.enter_context(_telling_of_launches(launched))
        try:
            liger._apply_liger_kernel_to_instance(model=model)
            yield
        finally:
            for module, names in saved:
                vars(module).update(names)


def _refuse_a_cpu(regime: Regime) -> None:
    if regime.device != "cuda":
        raise InputError(
            "Liger's kernels are written in Triton and run on GPUs only.",
            to_fix="plan for a GPU, or with the stock loss",
        )


def _library_module(module: nn.Module) -> ModuleType | None:
    name = type(module).__module__
    return sys.modules.get(name) if name.startswith("transformers.models.") else None


def _import_liger() -> tuple[Any, Any, Any]:
    try:
        with _triton_or_stand_in():
            modules = [
                importlib.import_module(name)
                for name in ("liger_kernel.transformers.monkey_patch", _FUSED, "liger_kernel.ops.rms_norm")
            ]
    except ImportError as error:
        raise InputError(
            f"the loss liger is traced with Liger's own code, which cannot be imported here: {error}",
            to_fix="pip install liger-kernel, or plan with the stock loss",
        ) from error
    if not hasattr(modules[1], "_can_use_mm_out"):
        raise InputError(
            "this release of liger-kernel computes its loss in another way than 0.8.5, which is modelled.",
            to_fix="pip install -U liger-kernel, or plan with the stock loss",
        )
    return modules[0], modules[1], modules[2]


def _fused_forward(launched: Launched, *, sums_in_place: bool) -> Callable[..., Any]:
    """Stand in for Liger's chunked head, with all rows as one chunk: `memory.fused_losses` knows its rows.

    Args:
        launched: is told of the kernel between the products.
        sums_in_place: whether the head's gradient is summed by one product (Ampere and later).
    """

    def forward(
        _input: torch.Tensor,
        weight: torch.Tensor,
        target: torch.Tensor,
        bias: torch.Tensor | None = None,
        ignore_index: int = -100,
        **_kwargs: Any,
    ) -> tuple[Any, ...]:
        """Allocate and multiply as liger_kernel/ops/fused_linear_cross_entropy.py 0.8.5 of that name.

        Between the products a kernel reads the logits twice and writes their gradient over them.
        Source: liger_kernel/ops/cross_entropy.py 0.8.5, liger_cross_entropy_kernel.
        """
        trains_head = _input.requires_grad and weight.requires_grad
        grad_input = torch.zeros_like(_input)
        grad_weight = torch.zeros_like(weight) if trains_head else None
        grad_bias = torch.zeros_like(bias) if bias is not None else None
        losses = torch.zeros(_input.shape[0], dtype=torch.float32)
        counted = (target != ignore_index).sum()
        if _writes_in_place(_input, weight):
            logits = torch.empty(_input.shape[0], weight.shape[0], dtype=_input.dtype)
            torch.mm(_input, weight.t(), out=logits)
            launched([logits, logits, logits, target, losses])
            torch.mm(logits, weight, out=grad_input)
        else:
            logits = _input @ weight.t()
            launched([logits, logits, logits, target, losses])
            grad_input[:] = logits @ weight
        if grad_weight is not None:
            rows = _input.to(logits.dtype)
            if sums_in_place:
                torch.mm(logits.t(), rows, out=_low_half(grad_weight, logits.dtype))
            else:
                grad_weight += torch.mm(logits.t(), rows).float()
        del logits, counted
        return losses.sum(), None, None, None, grad_input, grad_weight, grad_bias

    return forward


def _writes_in_place(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """As liger_kernel/ops/fused_linear_cross_entropy.py 0.8.5, _can_use_mm_out, on CUDA."""
    if hidden.dtype != weight.dtype:
        return False
    return not torch.is_autocast_enabled("cpu") or hidden.dtype == torch.get_autocast_dtype("cpu")


def _low_half(accumulator: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A view of the accumulator that a product of `dtype` can be written to: CUDA's addmm sums it into fp32 itself."""
    return accumulator if accumulator.dtype == dtype else accumulator.view(dtype)[:, ::2]


def _with_a_row_for_each_multiprocessor(norms: Any) -> Callable[..., Any]:
    """The gradient of a norm's weight is summed in as many fp32 rows as the GPU has multiprocessors; a CPU takes one.

    Source: liger_kernel/ops/rms_norm.py 0.8.5, rms_norm_backward.
    """
    original = norms.rms_norm_backward

    def backward(*args: Any, needs_dw: bool | None = None, **kwargs: Any) -> Any:
        gradient, weight = args[0], args[2]
        sums = needs_dw is not False and weight is not None
        rows = torch.empty(MOST_MULTIPROCESSORS - 1, gradient.shape[-1], dtype=torch.float32) if sums else None
        out = original(*args, needs_dw=needs_dw, **kwargs)
        del rows
        return out

    return backward


@contextmanager
def _telling_of_launches(launched: Launched) -> Iterator[None]:
    """Launch nothing, neither kernels of an installed Triton nor those of its stand-in, and tell of each."""

    def launcher(kernel: Any, _grid: Any) -> Callable[..., None]:
        name = _name(kernel)
        again = OVERWRITTEN.get(name, ())

        def launch(*args: Any, **options: Any) -> None:
            moved = [*args, *(args[position] for position in again)]
            if name in EXPERT_PRODUCTS:
                matrices, rows = EXPERT_PRODUCTS[name]
                launched(moved, 2 * matrices * args[rows].shape[0] * options["H_dim"] * options["I_dim"])
            else:
                launched(moved)

        return launch

    interface = getattr(sys.modules.get("triton.runtime.jit"), "KernelInterface", None)
    with ExitStack() as stack:
        for each in filter(None, (interface, _Kernel)):
            stack.enter_context(_replaced(each, __getitem__=launcher))
        yield


def _name(kernel: Any) -> str:
    """Name the function that a kernel was made of; around it may be what chooses its settings."""
    while hasattr(kernel, "fn"):
        kernel = kernel.fn
    return str(kernel.__name__)


@contextmanager
def _triton_or_stand_in() -> Iterator[None]:
    """Let `import triton` succeed, if need be with modules that hold nothing."""
    try:
        importlib.import_module("triton")
    except ImportError:
        pass
    else:
        yield
        return
    finder = _StandIns()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
            del sys.modules[name]


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


class _Kernel:
    """A kernel that can be launched, and does nothing; or whatever else a library takes from Triton at import."""

    def __init__(self, name: str = "") -> None:
        self.__name__ = name

    def __getitem__(self, _grid: Any) -> Callable[..., None]:
        return _nothing

    def __call__(self, *args: Any, **_kwargs: Any) -> Any:
        """Decorate: what is made of a function, or of a kernel, has its name."""
        return _Kernel(getattr(args[0], "__name__", "") if args else "")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "fn":
            raise AttributeError(name)
        return _Kernel()


class _Triton(ModuleType):
    __version__ = "3.0.0"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return {"cdiv": _ceil_divided, "next_power_of_2": next_power_of_two}.get(name, _Kernel())


def _ceil_divided(number: int, by: int) -> int:
    return -(-number // by)


def next_power_of_two(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()


class _StandIns(MetaPathFinder, Loader):
    """Finds `triton` and every module in it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name == "triton" or name.startswith("triton.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Triton(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return


@contextmanager
def _chunked(model: Any, regime: Regime, launched: Launched) -> Iterator[None]:
    """Give the model TRL's fused head, as SFTTrainer does, for one step.

    Source: trl/trainer/utils.py 1.16, add_fused_lm_head; trl/trainer/sft_trainer.py.
    """
    try:
        utils = importlib.import_module("trl.trainer.utils")
        kernels = importlib.import_module("trl.kernels.chunked_logprob")
        add_fused_lm_head = utils.add_fused_lm_head
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"the loss chunked is traced with TRL's own code, which cannot be imported here: {error}",
            to_fix="pip install 'trl>=1.16', or plan with the stock loss",
        ) from error
    before = vars(model).get("forward")
    with ExitStack() as stack:
        if regime.device == "cuda":
            stack.enter_context(_replaced(utils, _use_triton=lambda _device: True))
            tiles = {"_forward_tile": _reading(launched), "_backward_tile": _overwriting(launched)}
            stack.enter_context(_replaced(kernels, **tiles, _addmm_fp32=_summed_inside))
            stack.enter_context(_all_tokens_chosen())
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        try:
            yield
        finally:
            del model.forward
            if before is not None:
                model.forward = before


def _reading(launched: Launched) -> Callable[..., None]:
    """Stand in for the kernel that folds a tile of logits. Source: trl/kernels/chunked_logprob.py 1.16."""
    return lambda tile, *_args, **_kwargs: launched([tile])


def _overwriting(launched: Launched) -> Callable[..., None]:
    """Stand in for the kernel that turns a tile of logits into its gradient, in place. Source: as above."""
    return lambda tile, *_args, **_kwargs: launched([tile, tile])


def _summed_inside(accumulator: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """CUDA adds a product of halves to an fp32 sum in one kernel. Source: trl/kernels/chunked_logprob.py 1.16."""
    torch.mm(a, b, out=_low_half(accumulator, a.dtype))


@contextmanager
def _all_tokens_chosen() -> Iterator[None]:
    """Where tokens are chosen by a mask, let all be: the most there can be.

    A mask becomes one int64 index for each of its dimensions, which backward needs.
    Source: torch v2.13 aten/src/ATen/native/IndexingUtils.h, expandTensors.
    """
    getitem = torch.Tensor.__getitem__

    def chosen(tensor: torch.Tensor, index: Any) -> Any:
        if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
            index = tuple(torch.empty(index.numel(), dtype=torch.int64) for _ in range(index.dim()))
        return getitem(tensor, index)

    with _replaced(torch.Tensor, __getitem__=chosen, masked_scatter=_scatter):
        yield


def _scatter(target: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> Any:
    return _Scattered.apply(target, mask, source)


class _Scattered(torch.autograd.Function):
    """`masked_scatter` with a mask that is true everywhere, whose backward cannot read it.

    Source: torch v2.13 tools/autograd/derivatives.yaml, masked_scatter; FunctionsManual.cpp, masked_scatter_backward.
    """

    @staticmethod
    def forward(ctx: Any, target: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(mask)
        return target.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        return None, None, grad.reshape(-1).clone()
