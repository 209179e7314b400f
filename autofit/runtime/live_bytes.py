"""Counts the bytes of every tensor storage alive, as an allocator without rounding would: the memory of a CPU rank."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass


class LiveBytes(TorchDispatchMode):
    """Knows at every moment how many bytes the storages alive hold, and the most they ever held.

    A storage is seen when an operator returns a tensor on it, or when `count_existing` walks the heap; it is forgotten
    when it dies, and resized when `UntypedStorage.resize_` frees it without a death, as sharded training does. What a
    kernel allocates and frees inside one operator is not seen.

    Args:
        counts: which tensors to count; by default those on the CPU.
        limit_bytes: beyond this the counter raises `torch.OutOfMemoryError`, as a device that is full does.
    """

    def __init__(self, *, counts: Callable[[torch.Tensor], bool] | None = None, limit_bytes: int | None = None) -> None:
        super().__init__()
        self.now_bytes = 0
        self.peak_bytes = 0
        self.limit_bytes = limit_bytes
        self._counts = counts or _is_on_cpu
        self._sizes: dict[int, int] = {}
        self._watches: dict[int, weakref.ref[Any]] = {}

    def __enter__(self) -> Self:
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = _noting_resize(self, self._resize)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.add(out)
        elif isinstance(out, (tuple, list)):
            pytree.tree_map_only(torch.Tensor, self.add, out)
        return out

    def add(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor, once, at the size it has now; of a wrapper (a DTensor), what it wraps.

        A wrapper's own storage has the size of the whole tensor and holds nothing.
        """
        if not self._counts(tensor):
            return
        if is_traceable_wrapper_subclass(tensor):
            wrapped = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
            pytree.tree_map_only(torch.Tensor, self.add, wrapped)
            return
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse tensors have none of their own
            return
        self.note(storage)

    def note(self, storage: torch.UntypedStorage) -> None:
        """Count a storage at the size it has now."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self._watches:
            self._watches[key] = weakref.ref(storage, _forgetting(self, key))
        self._grow(size - self._sizes.get(key, 0))
        self._sizes[key] = size

    def count_existing(self, counts: Callable[[torch.Tensor], bool] | None = None) -> None:
        """Count the tensors made before the counter was entered: all, or those of which `counts` says so."""
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor) and (
                counts is None or counts(thing)
            ):  # not isinstance: proxies warn
                self.add(thing)
                if thing.is_leaf and thing.grad is not None:
                    self.add(thing.grad)

    def reset_peak(self) -> None:
        """Let the peak begin anew from what is alive now."""
        self.peak_bytes = self.now_bytes

    def _grow(self, num_bytes: int) -> None:
        self.now_bytes += num_bytes
        if self.limit_bytes is not None and self.now_bytes > self.limit_bytes:
            held = self.now_bytes - num_bytes
            raise torch.OutOfMemoryError(out_of_memory_message(num_bytes, held, self.limit_bytes))
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def _forget(self, key: int) -> None:
        self._watches.pop(key, None)
        self.now_bytes -= self._sizes.pop(key, 0)


def out_of_memory_message(asked_bytes: int, held_bytes: int, limit_bytes: int) -> str:
    """Say that a CPU rank's budget is spent, in the words of CUDA's message so that the same tools recognise it."""
    mib = 2**20
    return (
        f"CPU rank out of memory. Tried to allocate {asked_bytes / mib:.2f} MiB. The rank has a budget of "
        f"{limit_bytes / mib:.2f} MiB for tensors, of which {held_bytes / mib:.2f} MiB are in use."
    )


def _is_on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _forgetting(counter: LiveBytes, key: int) -> Callable[[object], None]:
    """Make the callback of a storage's death, which must not keep the counter alive."""
    reference = weakref.ref(counter)

    def forget(_: object) -> None:
        if (alive := reference()) is not None:
            alive._forget(key)

    return forget


def _noting_resize(counter: LiveBytes, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `UntypedStorage.resize_`, which frees a storage that stays alive."""

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        out = original(storage, size)
        if storage._cdata in counter._watches:
            counter.note(storage)
        return out

    return resize_
