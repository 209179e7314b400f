"""Which tokens reach which expert, where a mixture of experts reads it from values: evenly.

Where experts are not one grouped product, a loop goes over them, and values say which of them it visits and how many
tokens each gets. Fake tensors have none. Every expert is visited and gets an equal share of the assignments, rounded
up: over all experts as many rows are kept for backward however tokens are routed, and one expert's temporaries are as
large as an even share. Experts that compute nothing (longcat_flash's) get none, which is the most that can be needed.

Read from transformers 4.48 models/mixtral/modeling_mixtral.py (`MixtralSparseMoeBlock`), 5.23
models/dbrx/modeling_dbrx.py (`DbrxExperts`), models/longcat_flash/modeling_longcat_flash.py (`LongcatFlashExperts`)
and models/jetmoe/modeling_jetmoe.py (`JetMoeTopKGating`).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_MASK_DIMS = 2
"""Of one expert's mask: choices of a token, tokens."""
_ID_BYTES = 8


class EvenRouting(TorchDispatchMode):
    """Answers what is read from values about the routing as if every expert got the same number of tokens.

    Args:
        num_experts: experts that a token may be sent to.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self._num_experts = num_experts
        self._num_assigned = 0
        self.was_asked = False
        """Whether anything about the routing was read, as a loop over experts does and a grouped product does not."""
        self._numbers: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        """Storages that hold the numbers of all experts in order."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.nonzero.default:
            self.was_asked = True
            return self._nonzero(args[0])
        if func is aten._local_scalar_dense.default and (value := self._scalar(args[0])) is not None:
            self.was_asked = True
            return value
        out = func(*args, **(kwargs or {}))
        if func is aten.topk.default and self._may_stand_for_experts(args[0].shape[-1]):
            self._num_assigned = out[1].numel()
        return out

    def _may_stand_for_experts(self, size: int) -> bool:
        """Whether a dimension has an entry for each expert: some have a few more, for experts that compute nothing."""
        return self._num_experts <= size <= 2 * self._num_experts

    def _nonzero(self, mask: torch.Tensor) -> torch.Tensor:
        """Find the experts that are used, all of them; or the assignments of one of them, its share."""
        if mask.dim() == 1 and self._may_stand_for_experts(mask.numel()):
            numbers = torch.empty((self._num_experts, 1), dtype=torch.int64)
            storage = numbers.untyped_storage()
            key = storage._cdata
            self._numbers[key] = weakref.ref(storage, lambda _: self._numbers.pop(key, None))
            return numbers
        return torch.empty((self._share(mask.numel()), mask.dim()), dtype=torch.int64)

    def _scalar(self, element: torch.Tensor) -> int | None:
        """Read the number of an expert, or of the rows that one gets; None for anything else."""
        storage, position = element.untyped_storage(), element.storage_offset()
        if element.dtype != torch.int64 or storage.nbytes() != self._num_experts * _ID_BYTES:
            return None
        if storage._cdata in self._numbers:
            return int(position)
        if not self._num_assigned:
            return None
        least, more = divmod(self._num_assigned, self._num_experts)
        return least + (position < more)

    def _share(self, num_assigned: int) -> int:
        return -(-num_assigned // self._num_experts)


def even_routing(num_experts: int | None) -> EvenRouting | None:
    """Route tokens evenly over so many experts, None for a model without."""
    return None if num_experts is None else EvenRouting(num_experts)
