"""Lists a model's parameters and buffers, and folds those that every layer has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from msgspec.structs import replace
from torch import nn

from autofit.profile.dtypes import DTYPES
from autofit.profile.models import is_loaded_in_fp32
from autofit.spec.configuration import Dtype
from autofit.spec.profile import StaticTensor


def static_tensors(model: nn.Module, fp32_beside: Dtype | None = None) -> list[tuple[str, StaticTensor]]:
    """List the parameters and buffers, shared ones once, in the model's order.

    Args:
        model: on any device.
        fp32_beside: the dtype that it would be loaded in, if what transformers loads in fp32 then is to be marked.
    """
    embedding = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables = (nn.Linear, nn.Embedding)
    known = {id(module.weight) for module in model.modules() if isinstance(module, tables)}
    seen: set[int] = set()
    found = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        static = _static(name, tensor, embeds=id(tensor) in embedding)
        is_outside = isinstance(tensor, nn.Parameter) and tensor.dim() > 1 and id(tensor) not in known
        is_fp32 = (
            fp32_beside is not None
            and static.kind == "parameter"
            and is_loaded_in_fp32(model, name, DTYPES[fp32_beside])
        )
        found.append((name, replace(static, outside_linear=is_outside, loaded_in_fp32=is_fp32)))
    return found


def _static(name: str, tensor: torch.Tensor, *, embeds: bool) -> StaticTensor:
    return StaticTensor(
        name=name,
        num_elements=tensor.numel(),
        dtype=str(tensor.dtype).removeprefix("torch."),
        trains=tensor.requires_grad,
        repeats=False,
        kind=_kind(name, tensor),
        embeds=embeds,
        rows=tensor.shape[0] if tensor.dim() > 1 else 1,
        columns=tensor.shape[-1] if tensor.dim() else 1,
    )


def _kind(name: str, tensor: torch.Tensor) -> Any:
    if "quant_" in name.rsplit(".", 1)[-1]:
        return "quant_state"
    if not isinstance(tensor, nn.Parameter):
        return "buffer"
    if "lora_" in name:
        return "adapter"
    if name.rsplit(".", 1)[-1].startswith("packed_"):
        return "quantized"
    is_packed = tensor.shape[-1:] == (1,) and tensor.dim() == 2 and not tensor.requires_grad
    return "quantized" if is_packed or tensor.dtype == torch.int8 else "parameter"


def fold_layers(named: Sequence[tuple[str, StaticTensor]], stack: str) -> tuple[StaticTensor, ...]:
    """Let the first layer's tensors stand for those of every layer of a stack.

    Args:
        named: by dotted name.
        stack: dotted name of the list of layers.
    """
    folded = []
    for name, tensor in named:
        index = layer_index(name, stack)
        if index is None:
            folded.append(tensor)
        elif index == 0:
            folded.append(replace(tensor, repeats=True))
    return tuple(folded)


def layer_index(name: str, stack: str) -> int | None:
    """The layer of a stack that a parameter's dotted name lies in."""
    _, inside, rest = name.partition(f"{stack}.")
    number = rest.partition(".")[0]
    return int(number) if inside and number.isdigit() else None
