"""Finds a model's repeated layers and cuts the step at them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autofit.errors import InputError
from autofit.profile.recorder import Recorder


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of repeated layers: the longest list whose items are of one class or more and hold most parameters.

    Raises:
        InputError: the model has no list of layers.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no list of layers to cut the step at", to_fix="give a transformer"
        )
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def watch_layers(model: nn.Module, recorder: Recorder) -> None:
    """Cut the step where a layer begins, in forward and in backward."""
    layers = decoder_layers(model)
    last = len(layers) - 1

    def begin(index: int) -> None:
        if recorder.segments[-1].kind == "forward":
            recorder.mark("layer", "forward", index)

    def begin_backward(index: int | None) -> None:
        name = "embedding_backward" if index is None else "layer_backward"
        if recorder.segments[-1].kind == "backward" and recorder.segments[-1].layer != index:
            recorder.mark(name, "backward", index)

    def before(index: int, hidden: Any) -> None:
        if recorder.segments[-1].kind == "forward":
            begin(index)
            if index == 0 and isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda _grad: begin_backward(None))

    def after(index: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if recorder.segments[-1].kind == "forward":
            if hidden.requires_grad:
                hidden.register_hook(lambda _grad: begin_backward(index))
            if index == last:
                recorder.mark("head", "forward")
        else:
            begin_backward(index)

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda _m, args, index=index: before(index, args[0] if args else None))
        layer.register_forward_hook(lambda _m, _args, output, index=index: after(index, output))
