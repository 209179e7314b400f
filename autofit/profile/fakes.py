"""Parameters that cost nothing, and libraries that do not notice."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def fill_with_fakes(model: nn.Module) -> None:
    """Replace each meta parameter and buffer by a fake one, in place; call it under FakeTensorMode.

    `Module.to` cannot swap a fake parameter in. Tensors that were shared stay shared, or a tied head would count twice.
    """
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    originals = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = fake(tensor)  # type: ignore[assignment]
    if not any(name.endswith("modules_to_save") for name, _ in model.named_modules()):  # copies of peft's are not tied
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.tie_weights()
    del originals


def _no(*_args: Any, **_kwargs: Any) -> bool:
    return False


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def _owner(module: str, name: str) -> Any:
    """Return the module, or the class in it, that holds a dotted name."""
    owner = sys.modules.get(module)
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part, None)
    return owner


@contextmanager
def no_layer_dropped() -> Iterator[None]:
    """Let models that drop whole layers at random drop none, which is the most that a step can need.

    They compare a random scalar with `layerdrop`. Source: transformers/models/bart/modeling_bart.py 5.23,
    BartDecoder.forward.
    """
    rand = torch.rand

    def never_small(*size: Any, **kwargs: Any) -> Any:
        return 1.0 if size in ((), ((),), ([],)) else rand(*size, **kwargs)

    torch.rand = never_small  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.rand = rand


class _SortedSet(set[Any]):
    """A set that is gone through in the order of its elements' names."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__(), key=str))


@contextmanager
def sets_sorted(model: nn.Module) -> Iterator[None]:
    """Let the code of a model's modules go through sets in one order in every process.

    Python's order of strings depends on PYTHONHASHSEED, and with it which of the rotary tables and masks of several
    kinds of layers is made first. Their sizes are the same, in a real run too.
    Source: transformers/models/gemma3/modeling_gemma3.py 5.23, Gemma3TextModel.forward; masking_utils.py,
    create_masks_for_generate.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if type(value) is set and not name.startswith("_"):
                setattr(module, name, _SortedSet(value))
    names = {type(module).__module__ for module in model.modules()} | {"transformers.masking_utils"}
    owners = [vars(sys.modules[name]) for name in names if name.startswith("transformers.") and name in sys.modules]
    saved = [owner.get("set") for owner in owners]
    for owner in owners:
        owner["set"] = _SortedSet
    try:
        yield
    finally:
        for owner, old in zip(owners, saved, strict=True):
            if old is None:
                del owner["set"]
            else:
                owner["set"] = old


def _yes(*_args: Any, **_kwargs: Any) -> bool:
    return True


@contextmanager
def masks_without_holes() -> Iterator[None]:
    """Let transformers find every mask full, as it does where all sequences are of one length: it reads the values.

    Source: transformers/masking_utils.py 5.23, fast_all and _ignore_bidirectional_mask_sdpa.
    """
    module: Any = sys.modules.get("transformers.masking_utils")
    names = [name for name in ("fast_all", "_ignore_bidirectional_mask_sdpa") if hasattr(module, name)]
    real = {name: getattr(module, name) for name in names}

    def ignored(_mask: Any, *args: Any, **kwargs: Any) -> bool:
        return bool(real["_ignore_bidirectional_mask_sdpa"](None, *args, **kwargs))

    for name, new in (("fast_all", _yes), ("_ignore_bidirectional_mask_sdpa", ignored)):
        if name in real:
            setattr(module, name, new)
    try:
        yield
    finally:
        for name, old in real.items():
            setattr(module, name, old)


@contextmanager
def believing_it_is_real() -> Iterator[None]:
    """Keep transformers from noticing fake tensors, or it takes the branches meant for compilation."""
    patches = [
        ("transformers", "PreTrainedModel.warn_if_padding_and_no_attention_mask", _nothing),
        ("transformers.masking_utils", "is_tracing", _no),
        ("transformers.masking_utils", "find_packed_sequence_indices", _nothing),
        ("transformers.utils.import_utils", "is_fake_tensor", _no),
    ]
    owners = [(_owner(where, name), name.rpartition(".")[2], new) for where, name, new in patches]
    present = [(owner, name, new) for owner, name, new in owners if hasattr(owner, name)]
    saved = [getattr(module, name) for module, name, _ in present]
    for module, name, new in present:
        setattr(module, name, new)
    try:
        yield
    finally:
        for (module, name, _), old in zip(present, saved, strict=True):
            setattr(module, name, old)
