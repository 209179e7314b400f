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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, kernel in replaced.items():
                library.impl(name, kernel, "CompositeImplicitAutograd")
        yield
    finally:
        library._destroy()
