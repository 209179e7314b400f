"""The linear function that DeepSpeed puts in the place of torch's when it shards weights (stage 3)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional


class _Linear(torch.autograd.Function):
    """Keeps its input for backward even where the weight is frozen, which torch's own does not.

    Source: deepspeed/runtime/zero/linear.py 0.19.8, LinearFunctionForZeroStage3.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        output = x.matmul(weight.t())
        if bias is not None:
            output += bias
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias = ctx.saved_tensors
        grad_input = grad.matmul(weight) if ctx.needs_input_grad[0] else None
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = rows.t().matmul(x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        grad_bias = rows.sum(0) if bias is not None and ctx.needs_input_grad[2] else None
        return grad_input, grad_weight, grad_bias


@contextmanager
def linear_as_in_zero3() -> Iterator[None]:
    """Replace torch's linear function, as DeepSpeed does unless `memory_efficient_linear` is off.

    Source: deepspeed/runtime/zero/partition_parameters.py 0.19.8, _enable_mem_efficient_linear.
    """
    real = functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        output: torch.Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return output

    functional.linear = linear  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.linear = real
