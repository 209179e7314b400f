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
_TO_HOST = {
    "foreach_reduce",
    "flat_param_to",
    "_iterate_state_dict",
    "_unflatten_orig_param_states",
    "_init_sharded_param",
    "fsdp2_load_full_state_dict",
}
"""Functions that move what is on the device to the host, as gradients, or what is saved.

Source: torch v2.13 distributed/fsdp/_fully_shard/_fsdp_collectives.py and _fsdp_param.py, distributed/fsdp/
_flat_param.py and _optim_utils.py, distributed/_state_dict_utils.py; accelerate 1.15 utils/fsdp_utils.py."""
_TO_DEVICE = {"_move_states_to_device", "dtensor_func", "fsdp2_load_full_state_dict"}
"""Functions that move what the host has to the device, beside those of FSDP that do not wait (`non_blocking`).

Source: torch v2.13 distributed/fsdp/_init_utils.py and _fully_shard/_fsdp_init.py, distributed/_state_dict_utils.py;
accelerate 1.15 utils/fsdp_utils.py."""


class HostMemory:
    """Knows which storages are the host's, from the moment it is made on, and makes FSDP's copies.

    Args:
        offloads: whether FSDP1's shards and gradients are the host's.
    """

    def __init__(self, *, offloads: bool) -> None:
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._is_placing = False
        move = torch.Tensor.to
        torch.Tensor.pin_memory = lambda tensor, *_args: self._copy(tensor)  # type: ignore[method-assign, assignment]
        torch.Tensor.is_pinned = lambda tensor, *_args: self.holds(tensor)  # type: ignore[method-assign, assignment]
        torch.Tensor.to = self._moving(move)  # type: ignore[method-assign, assignment]
        self._clone = torch.Tensor.clone
        torch.Tensor.clone = self._cloning()  # type: ignore[method-assign, assignment]
        torch.Tensor.cpu = self._moving(torch.Tensor.cpu)  # type: ignore[method-assign, assignment]
        if offloads:
            self._place_what_is_offloaded()

    def _place_what_is_offloaded(self) -> None:
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
        return tensor.device.type == "cpu" and (is_traceable_wrapper_subclass(tensor) or not self.is_elsewhere(tensor))

    def holds(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor's storage is the host's; of a DTensor, that of its shard."""
        tensor = getattr(tensor, "_local_tensor", tensor)
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
            copy = self._clone(tensor)
        self._own(getattr(copy, "_local_tensor", copy))
        return copy

    def _cloning(self) -> Callable[..., torch.Tensor]:
        """A clone of what the host has is the host's."""

        def clone(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            with self.placing() if self.holds(tensor) else contextlib.nullcontext():
                return self._clone(tensor, *args, **kwargs)

        return clone

    def _moving(self, move: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Make the copies of moves; what is converted stays where it is."""

        def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            is_on_host = self.holds(tensor)
            with self.placing() if is_on_host else contextlib.nullcontext():
                moved = move(tensor, *args, **kwargs)
            if moved is not tensor:
                return moved
            caller = sys._getframe(1)  # noqa: SLF001
            function, module = caller.f_code.co_name, caller.f_globals.get("__name__", "")
            if is_on_host:
                waits = not (module.startswith(_FSDP) and "non_blocking" in kwargs)
                return self._clone(tensor) if function in _TO_DEVICE or not waits else moved
            return self._copy(tensor) if function in _TO_HOST else moved

        return to


def prepare_as_beside_a_gpu(num_devices_of_node: int) -> None:
    """Let FSDP1 send the first rank's weights to the others, for which accelerate and torch ask for an accelerator.

    Source: accelerate 1.15 utils/dataclasses.py, `FullyShardedDataParallelPlugin.__post_init__`; torch v2.13
    distributed/fsdp/_init_utils.py, `_check_module_states_for_sync_module_states`, `_init_process_group_state`.

    Args:
        num_devices_of_node: that FSDP1 finds: within a node its hybrid shard splits a model.
    """
    from accelerate.utils import dataclasses
    from torch.distributed.fsdp import _init_utils

    torch.cpu.device_count = lambda: num_devices_of_node
    dataclasses.is_cuda_available = lambda: True
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    _init_utils._check_module_states_for_sync_module_states = lambda _states: None  # noqa: SLF001
    make = _init_utils._init_param_handle_from_params  # noqa: SLF001

    def make_and_offload(state: Any, *args: Any) -> None:
        """What FSDP1 offloads leaves the device when it is cut, unless that is the host itself."""
        make(state, *args)
        if state._handle is not None and state.cpu_offload.offload_params:  # noqa: SLF001
            state._handle.flat_param_to(torch.device("cpu"))  # noqa: SLF001

    _init_utils._init_param_handle_from_params = make_and_offload  # noqa: SLF001
