"""Small tensors whose values a step reads: they are real, and everything that is computed from them alone is.

Where the images of a batch lie, and how large they are, decides what a vision-language model does: it counts masks,
splits rows of patches by their images, and builds positions in loops. A fake tensor has no values to decide by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from autofit.errors import InputError

aten = torch.ops.aten
LARGEST_KNOWN_BYTES = 2**27
"""Larger tensors are fake whatever they are computed from; a step that reads one is refused."""
SMALL_ELEMENTS = 4096
"""Of inputs: operators on fewer are run without asking how large their result is."""
_INDEXING = frozenset(
    {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
)


def is_known(tensor: torch.Tensor) -> bool:
    """Whether a tensor has values."""
    return not isinstance(tensor, FakeTensor) and not tensor.is_meta


class KnownValues(TorchDispatchMode):
    """Computes for real what has only real inputs; enter it inside a FakeTensorMode.

    What is made of nothing (`arange`, `zeros`) is real where it holds integers or booleans.
    """

    def __init__(self) -> None:
        super().__init__()
        self._makes: bool | None = None

    @contextmanager
    def making(self, *, known: bool) -> Iterator[None]:
        """Let what is made of nothing be real, or fake, whatever its dtype."""
        before, self._makes = self._makes, known
        try:
            yield
        finally:
            self._makes = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(args[0] if args else None, FakeTensor) and func not in _INDEXING and not func._schema.is_mutable:
            return func(*args, **kwargs)  # nearly every operator
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not given:
            return self._made(func, args, kwargs)
        if all(map(is_known, given)):
            return _real(func, args, kwargs)
        if func in _INDEXING:
            args = (args[0], _positions(args[1]), *args[2:])
        if func._schema.is_mutable:
            _refuse_to_forget(func, args, kwargs)
        return func(*args, **kwargs)

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        fake = func(*args, **kwargs)
        if not isinstance(fake, torch.Tensor):
            return fake
        makes = not (fake.is_floating_point() or fake.is_complex()) if self._makes is None else self._makes
        return _real(func, args, kwargs) if makes and _num_bytes(fake) <= LARGEST_KNOWN_BYTES else fake


def _real(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on values; without them where its result would be too large to keep."""
    if _may_be_large(func, args):
        sizes = func(*args, **kwargs)
        if any(_num_bytes(leaf) > LARGEST_KNOWN_BYTES for leaf in pytree.tree_leaves(sizes) if _is_tensor(leaf)):
            return sizes
    with no_dispatch():
        return func(*args, **kwargs)


def _may_be_large(func: Any, args: Any) -> bool:
    """Whether an operator may broadcast its inputs to a large result; one whose shape depends on values does not."""
    if func._schema.is_mutable or torch.Tag.dynamic_output_shape in func.tags or not _returns_tensors(func):
        return False
    return sum(leaf.numel() for leaf in pytree.tree_leaves(args) if _is_tensor(leaf)) > SMALL_ELEMENTS


def _returns_tensors(func: Any) -> bool:
    return all("Tensor" in str(result.type) for result in func._schema.returns)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _positions(indices: Any) -> list[torch.Tensor | None]:
    """Turn known masks of an index into the positions where they hold, as the operator does inside."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8) and is_known(index):
            with no_dispatch():
                found += [*index.nonzero().unbind(1)]
        else:
            found.append(index)
    return found


def _refuse_to_forget(func: Any, args: Any, kwargs: Any) -> None:
    """Values that are written over with unknown ones would be read as they were before."""
    named = zip(func._schema.arguments, args, strict=False)
    written = [value for argument, value in named if argument.is_write]
    written += [
        kwargs[argument.name] for argument in func._schema.arguments if argument.is_write and argument.name in kwargs
    ]
    if any(_is_tensor(value) and is_known(value) for value in pytree.tree_leaves(written)):
        raise InputError(
            f"a step writes what it computed over integers that its inputs gave: {func}",
            to_fix="choose another model; what its memory is cannot be known before it runs",
        )
