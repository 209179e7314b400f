"""Which tokens reach which expert, where a mixture of experts reads it from values: evenly.

Releases of transformers before grouped products pick each expert's tokens with `torch.where` on a mask of its
assignments, shape (choices of a token, tokens). Fake tensors have no values; an expert's share of all assignments is
their number over the number of experts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


class EvenRouting(TorchDispatchMode):
    """Answers `nonzero` of an expert's mask as if every expert got the same number of tokens.

    Args:
        num_experts: experts that a token may be sent to.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self._num_experts = num_experts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.nonzero.default:
            return func(*args, **(kwargs or {}))
        mask = args[0]
        return torch.empty((mask.numel() // self._num_experts, mask.dim()), dtype=torch.int64)


def even_routing(model: nn.Module) -> AbstractContextManager[Any]:
    """Route a model's tokens evenly, if its config names a number of experts."""
    found = (getattr(model.config, name, None) for name in _EXPERT_COUNTS)
    count = next((count for count in found if isinstance(count, int) and count > 1), None)
    return nullcontext() if count is None else EvenRouting(count)
