"""Operators whose results have another dtype on CUDA: operator -> what to call instead of it."""

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


def substitutes(regime: Regime) -> dict[Any, Substitute]:
    """Return the table for a regime's device; empty for a CPU rank."""
    return {aten.native_layer_norm.default: layer_norm} if regime.device == "cuda" else {}
