"""Lets a CPU rank keep apart what FSDP would keep in host memory beside a GPU.

A CPU rank's device is the host: nothing can be pinned there, and a tensor that is moved to the device, or back, stays
where it is. Here each such call makes the copy that it makes beside a GPU, and what is the host's is known.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.fsdp._flat_param import FlatParamHandle
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_FSDP = "torch.distributed.fsdp"
_COPIES_GRADIENTS_BACK = "_fsdp_collectives"
"""The module whose moves go to the host; those of the others go to the device. Source: torch v2.13 foreach_reduce."""


class HostMemory:
    """Knows which storages are the host's, from the moment it is made on, and makes FSDP's copies."""

    def __init__(self) -> None:
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._is_placing = False
        move = torch.Tensor.to
        torch.Tensor.pin_memory = lambda tensor, *_args: self._copy(tensor)  # type: ignore[method-assign, assignment]
        torch.Tensor.is_pinned = lambda tensor, *_args: self.holds(tensor)  # type: ignore[method-assign, assignment]
        torch.Tensor.to = self._moving(move)  # type: ignore[method-assign, assignment]
        FlatParamHandle._writeback_orig_params = self.runs(FlatParamHandle._writeback_orig_params)  # noqa: SLF001
        FlatParamHandle.prepare_gradient_for_backward = self._forgetting(FlatParamHandle.prepare_gradient_for_backward)

    def is_elsewhere(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor would be on the device; what is made while placing is the host's from then on."""
        if tensor.device.type != "cpu" or is_traceable_wrapper_subclass(tensor):
            return tensor.device.type == "cpu"
        if self._is_placing:
            self._own(tensor)
        return not self.holds(tensor)

    def keeps(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor is the host's, or wraps one that may be."""
        return is_traceable_wrapper_subclass(tensor) or not self.is_elsewhere(tensor)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor's storage is the host's."""
        return tensor.untyped_storage()._cdata in self._storages  # noqa: SLF001 - as the counter knows storages

    @contextlib.contextmanager
    def placing(self) -> Iterator[None]:
        """Take all that is made inside for the host's."""
        before, self._is_placing = self._is_placing, True
        try:
            yield
        finally:
            self._is_placing = before

    def runs(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap what runs on the host."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.placing():
                return function(*args, **kwargs)

        return run

    def _forgetting(self, prepare: Callable[[Any], None]) -> Callable[[Any], None]:
        """FSDP1 lets go of a gradient that is on another device than the gathered weights, which it tells by that."""

        def prepare_gradient_for_backward(handle: Any) -> None:
            gradient = handle.flat_param.grad
            if gradient is not None and self.holds(gradient):
                handle.flat_param.grad = None
            prepare(handle)

        return prepare_gradient_for_backward

    def _own(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001
        self._storages[key] = weakref.ref(storage, lambda _: self._storages.pop(key, None))

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        with self.placing():
            copy = tensor.clone()
        if not is_traceable_wrapper_subclass(copy):
            self._own(copy)
        return copy

    def _moving(self, move: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            moved = move(tensor, *args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")  # noqa: SLF001
            if moved is not tensor or "non_blocking" not in kwargs or not caller.startswith(_FSDP):
                return moved
            return self._copy(tensor) if caller.endswith(_COPIES_GRADIENTS_BACK) else tensor.clone()

        return to
