"""Operators that CUDA takes apart, or keeps results of, in another way than a CPU.

They are composed of others before any tensor subclass sees them, so they are replaced in torch's dispatcher.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from autofit.profile.kernels.attention import attention_as_on_cuda
from autofit.spec.profile import Regime

aten = torch.ops.aten


def _fused_softmax(operator: Any) -> Callable[..., torch.Tensor]:
    """CUDA reads fp16 and returns fp32 in one kernel. Everything else, bf16 too, is converted first.

    Source: torch v2.13 aten/src/ATen/native/SoftMax.cpp, softmax, log_softmax (`half_to_float`).
    """

    def softmax(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        if x.dtype == torch.float16 and dtype == torch.float32:
            return operator(x, dim, True)  # type: ignore[no-any-return]
        return operator(x if dtype is None else x.to(dtype), dim, False)  # type: ignore[no-any-return]

    return softmax


def _dropout(x: torch.Tensor, p: float, train: bool) -> torch.Tensor:  # noqa: FBT001 - the operator's own signature
    """CUDA keeps a byte for each element; a CPU multiplies by noise in the input's dtype, and keeps that.

    Source: torch v2.13 aten/src/ATen/native/Dropout.cpp, dropout, is_fused_kernel_acceptable.
    """
    if not train or p == 0:
        return x
    if p == 1:
        return x * torch.zeros((), dtype=x.dtype)
    return aten.native_dropout(x, p, train)[0]  # type: ignore[no-any-return]


class _FusedRmsNorm(torch.autograd.Function):
    """One kernel: what is kept is the input, the weight and a number in fp32 for each row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, num_dims: int) -> tuple[torch.Tensor, ...]:
        rows = [*x.shape[: x.dim() - num_dims], *[1] * num_dims]
        out, deviation = torch.clone(x), torch.empty(rows)
        ctx.save_for_backward(x, weight, deviation)
        return out, deviation

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _grad_of_deviation: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, _deviation = ctx.saved_tensors
        return torch.clone(grad).to(x.dtype), None if weight is None else torch.clone(weight), None


def _fused_rms_norm(
    x: torch.Tensor, normalized_shape: list[int], weight: torch.Tensor | None, _eps: float | None
) -> tuple[torch.Tensor, ...]:
    """CUDA normalises in one kernel and keeps an fp32 number for each row; a CPU keeps each step of it in fp32.

    Of models, those with torch's own RMSNorm; most have transformers'. Source: torch v2.13
    aten/src/ATen/native/layer_norm.cpp, rms_norm_symint; cuda/layer_norm_kernel.cu, _fused_rms_norm_cuda.
    """
    return _FusedRmsNorm.apply(x, weight, len(normalized_shape))  # type: ignore[no-any-return, no-untyped-call]


@contextmanager
def operators_as_on_cuda(regime: Regime) -> Iterator[None]:
    """Put CUDA's forms of these operators in effect; afterwards torch's own are again."""
    library = torch.library.Library("aten", "IMPL")
    replaced: dict[str, Callable[..., Any]] = {
        "softmax.int": _fused_softmax(aten._softmax),
        "log_softmax.int": _fused_softmax(aten._log_softmax),
        "dropout": _dropout,
        "scaled_dot_product_attention": attention_as_on_cuda(regime),
    }
    if hasattr(aten, "_fused_rms_norm"):
        replaced["_fused_rms_norm"] = _fused_rms_norm
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, kernel in replaced.items():
                library.impl(name, kernel, "CompositeImplicitAutograd")
        yield
    finally:
        library._destroy()
