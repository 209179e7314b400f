"""Operators whose results fake tensors get wrong, or refuse: operator -> what to call instead of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from autofit.spec.profile import Regime

aten = torch.ops.aten
Substitute = Callable[..., Any]


def layer_norm(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """Mean and reciprocal deviation are kept in fp32; a CPU keeps them in the input's half precision.

    Source: torch v2.13 aten/src/ATen/native/cuda/layer_norm_kernel.cu, layer_norm_cuda (acc_type).
    """
    out, mean, deviation = aten.native_layer_norm.default(*args, **kwargs)
    return out, mean.float(), deviation.float()


def grouped_product(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Experts' products in fp32 and fp16 too, expert by expert into the result; torch's meta function knows bf16 only.

    On a CPU as well. Source: torch v2.13 aten/src/ATen/native/GroupedMMUtils.h, _grouped_mm_validate_inputs,
    _grouped_mm_fallback; torch/_meta_registrations.py, _meta_grouped_mm_common.
    """
    halves = (tensor.to(torch.bfloat16) for tensor in (a, b))
    out: torch.Tensor = aten._grouped_mm.default(*halves, *args, **kwargs)
    return out.to(a.dtype)


def substitutes(regime: Regime) -> dict[Any, Substitute]:
    """Return the table for a regime's device."""
    table: dict[Any, Substitute] = {}
    if hasattr(aten, "_grouped_mm"):
        table[aten._grouped_mm.default] = grouped_product
    if regime.device == "cuda":
        table[aten.native_layer_norm.default] = layer_norm
    return table
