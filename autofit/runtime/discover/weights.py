"""Weights that look real and cost nothing: every parameter is one stored zero, expanded to its shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def hide_gpus() -> None:
    """Make the process one without a GPU, whatever the script does to CUDA_VISIBLE_DEVICES."""
    import torch

    torch.cuda.is_available = lambda: False
    torch.cuda.device_count = lambda: 0


def make_modules_thrifty() -> None:
    """Let modules stay where they are, and change dtype without giving expanded parameters memory."""
    import torch
    from torch import nn

    convert, move = nn.Module._apply, nn.Module.to

    def _apply(self: Any, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return convert(self, lambda tensor: _converted(fn, tensor), *args, **kwargs)

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
        return self if dtype is None else move(self, dtype)

    nn.Module._apply, nn.Module.to, nn.Module.cuda = _apply, to, lambda self, *_args, **_kwargs: self


def _converted(fn: Callable[..., Any], tensor: Any) -> Any:
    if tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size():
        return fn(tensor)
    return fn(tensor.detach().as_strided((1,), (1,))).reshape(()).expand(tensor.shape)


def give_weights(model: Any) -> None:
    """Replace meta parameters by zeros that look real, one stored element each; those that are tied stay tied."""
    import torch
    from torch import nn

    replaced: dict[int, Any] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and old.is_meta:
                zero = torch.zeros((), dtype=old.dtype).expand(old.shape)
                module._parameters[name] = replaced.setdefault(id(old), nn.Parameter(zero, old.requires_grad))
        for name, old in module._buffers.items():
            if old is not None and old.is_meta:
                module._buffers[name] = torch.zeros(old.shape, dtype=old.dtype)
