"""Makes accelerate take gloo ranks on a CPU for GPUs, so that its own FSDP code paths run where there are none.

Python imports a module of this name at its start, from any folder on PYTHONPATH. accelerate turns FSDP on for the
distributed types of accelerators only. Source: accelerate/state.py 1.15, `AcceleratorState.__init__`.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from typing import Any


class PatchState(importlib.abc.MetaPathFinder):
    """Patches accelerate.state right after it was executed, and steps aside."""

    def find_spec(self, name: str, _path: Any, _target: Any = None) -> Any:
        """Find accelerate.state as the other finders do, with a step added to its execution."""
        if name != "accelerate.state":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            module.PartialState._prepare_backend = prepare_backend_of(module)  # noqa: SLF001 (there is no public seam)
            pretend_to_pin()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def prepare_backend_of(module: Any) -> Any:
    """Return a choice of backend, with accelerate's arguments, that calls a rank a GPU's."""

    def prepare_backend(_self: Any, *_args: Any, **_kwargs: Any) -> Any:
        if int(os.environ.get("LOCAL_RANK", "-1")) != -1:
            return "gloo", module.DistributedType.MULTI_GPU
        return None, module.DistributedType.NO

    return prepare_backend


def pretend_to_pin() -> None:
    """Leave tensors where they are that would be pinned for a GPU, or waited for: torch refuses to without one."""
    import torch

    torch.Tensor.pin_memory = lambda tensor, *_args: tensor  # type: ignore[method-assign, assignment]
    torch.Tensor.is_pinned = lambda _tensor, *_args: True  # type: ignore[method-assign, assignment]
    torch.cpu.Stream.synchronize = lambda _stream: None  # type: ignore[attr-defined]


sys.meta_path.insert(0, PatchState())
