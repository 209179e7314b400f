"""Attention over a row of patches that holds several images or windows: one call, where transformers loops.

The loop makes as many tensors as there are images, and a step's tensors must be the same ones at every size. One call
over all parts of one length keeps and frees the same bytes.
Source: transformers 5.23 models/qwen2_5_vl/modeling_qwen2_5_vl.py, Qwen2_5_VLVisionAttention.forward; 32 other files
have the same lines.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from autofit.profile.known import is_known
from autofit.spec.profile import Regime

_BOUNDS = "cu_seqlens"
_ROW_DIM = 2


class _Row:
    """What an attention module that runs now was told about its row of patches."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths
        self.joined: torch.Tensor | None = None

    def is_split_of(self, tensor: torch.Tensor, sizes: Any, dim: int) -> bool:
        return (
            dim == _ROW_DIM and isinstance(sizes, (list, tuple)) and list(sizes) == self.lengths and self.holds(tensor)
        )

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.dim() == 4 and tensor.shape[0] == 1 and tensor.shape[_ROW_DIM] == sum(self.lengths)


class _Parts(torch.autograd.Function):
    """The parts of a row, those of one length together: views, whose gradients are put together as a split's are."""

    @staticmethod
    def forward(
        ctx: Any,
        row: torch.Tensor,
        lengths: tuple[tuple[int, int], ...],
        copies: bool,  # noqa: FBT001 - autograd passes no keywords
    ) -> tuple[torch.Tensor, ...]:
        ctx.shape, ctx.copies = row.shape, copies
        _, heads, _, size = row.shape
        _, of_head, of_token, of_element = row.stride()
        strides = (heads * of_head, of_head, of_token, of_element)
        return tuple(row.as_strided((num, heads, length, size), strides) for length, num in lengths)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.copies:
            return grads[0].new_empty(ctx.shape), None, None
        _, heads, tokens, size = ctx.shape
        return grads[0].transpose(1, 2).reshape(1, tokens, heads, size).transpose(1, 2), None, None


@contextmanager
def images_attended_at_once(model: nn.Module, regime: Regime) -> Iterator[None]:
    """Let attention modules that are told where a row's images begin (`cu_seqlens`) attend to all at once."""
    told = [module for module in model.modules() if _BOUNDS in inspect.signature(module.forward).parameters]
    if not told:
        yield
        return
    from transformers.modeling_utils import AttentionInterface

    rows: list[_Row] = []
    is_flash = regime.attention == "flash_attention_2"
    with ExitStack() as stack:
        for module in told:
            stack.enter_context(_announcing(module, rows))
        for library in {sys.modules[type(module).__module__] for module in told} if is_flash else ():
            if hasattr(library, "is_flash_attention_requested"):
                stack.enter_context(_replaced(library, "is_flash_attention_requested", _requested(library, rows)))
        stack.enter_context(_replaced(torch, "split", _split(torch.split, rows)))
        stack.enter_context(_replaced(torch, "cat", _cat(torch.cat, rows)))
        get = AttentionInterface.get_interface
        attends = lambda *args: _at_once(get(*args), rows, copies=not is_flash)  # noqa: E731
        stack.enter_context(_replaced(AttentionInterface, "get_interface", attends))
        yield


@contextmanager
def _announcing(module: nn.Module, rows: list[_Row]) -> Iterator[None]:
    """Know the innermost module's row while it runs, when checkpoints run it again too."""
    signature = inspect.signature(module.forward)

    def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
        bounds = signature.bind(*args, **kwargs).arguments.get(_BOUNDS)
        known = isinstance(bounds, torch.Tensor) and is_known(bounds)
        rows.append(_Row(bounds.diff().tolist() if known and bounds is not None else []))

    def after(*_args: Any) -> None:
        rows.pop()

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old)


def _requested(library: Any, rows: Sequence[_Row]) -> Callable[..., bool]:
    """flash-attn takes a whole row and its bounds; the model was built for sdpa, as it may not be installed."""
    asked = library.is_flash_attention_requested

    def requested(*args: Any, **kwargs: Any) -> bool:
        return bool(rows) or bool(asked(*args, **kwargs))

    return requested


def _split(split: Callable[..., Any], rows: Sequence[_Row]) -> Callable[..., Any]:
    def split_or_leave(tensor: torch.Tensor, sizes: Any, dim: int = 0) -> Any:
        return (tensor,) if rows and rows[-1].is_split_of(tensor, sizes, dim) else split(tensor, sizes, dim)

    return split_or_leave


def _cat(cat: Callable[..., Any], rows: Sequence[_Row]) -> Callable[..., Any]:
    def cat_or_leave(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        done = rows[-1].joined if rows else None
        if done is None or len(tensors) != 1 or tensors[0] is not done:
            return cat(tensors, *args, **kwargs)
        rows[-1].joined = None
        return done

    return cat_or_leave


def _at_once(attend: Callable[..., Any], rows: Sequence[_Row], *, copies: bool) -> Callable[..., Any]:
    """Attend to all parts of one length together, and put their outputs into one row.

    Args:
        attend: what transformers calls for each part, or with flash-attn for the row.
        rows: the modules that run.
        copies: whether the loop's outputs are copied into a row; flash-attn's lie in one.
    """

    def attends(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any
    ) -> Any:
        row = rows[-1] if rows else None
        if row is None or not row.lengths or not all(map(row.holds, (query, key, value))):
            return attend(module, query, key, value, *args, **kw)
        lengths = tuple(Counter(row.lengths).items())
        if not copies and len(lengths) > 1:
            return attend(module, query, key, value, *args, **kw)
        parts = zip(*(_Parts.apply(tensor, lengths, copies) for tensor in (query, key, value)), strict=True)
        outputs = [attend(module, *part, *args, **kw)[0] for part in parts]
        flat = [output.reshape(1, -1, *output.shape[2:]) for output in outputs]
        if not copies:
            return flat[0], None
        row.joined = torch.cat(flat, dim=1)
        return row.joined, None

    return attends
