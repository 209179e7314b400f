"""How sequences share a micro-batch, and what transformers does about it where it would read values.

Fake tensors have none, so each branch that depends on them is decided here as a real run decides it: a padded batch has
holes, and a packed row holds several sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch
import transformers
from torch.nn import functional

from autofit.errors import InputError
from autofit.profile.fit import Point
from autofit.spec.profile import Regime

_MASKS = "transformers.masking_utils"
_FLASH = "transformers.modeling_flash_attention_utils"


def arrange(batch: Mapping[str, torch.Tensor], regime: Regime) -> dict[str, torch.Tensor]:
    """Let the sequences of a batch share it as the regime's collator does.

    Padded: with an attention mask, int64 as tokenizers make it. Packed: all in one row, each with its own positions,
    and no mask.
    Source: transformers/data/data_collator.py 5.23, DataCollatorWithPadding and DataCollatorWithFlattening;
    trl/trainer/sft_trainer.py 1.16, DataCollatorForLanguageModeling(padding_free=True), which packing uses.
    """
    if regime.batching == "equal":
        return dict(batch)
    if regime.batching == "padded":
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    rows = {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
    return {**rows, "position_ids": torch.zeros_like(rows["input_ids"])}


@contextmanager
def branches_of(regime: Regime, point: Point) -> Iterator[None]:
    """Take the branches that transformers takes for the regime's batches.

    Args:
        regime: what the step does.
        point: sequences of the micro-batch, tokens of a sequence.

    Raises:
        InputError: the installed transformers builds its masks in another way.
    """
    with ExitStack() as stack:
        if regime.batching != "equal":
            for where, name, new in _replacements(regime, point):
                stack.enter_context(_replaced(where, name, new))
            if regime.attention == "flash_attention_2":
                stack.enter_context(_flash_in_place_of_sdpa())
        yield


def _replacements(regime: Regime, point: Point) -> list[tuple[str, str, Callable[..., Any]]]:
    if regime.batching == "padded":
        replacements: list[tuple[str, str, Callable[..., Any]]] = [
            (_MASKS, "_ignore_causal_mask_sdpa", _has_no_mask),
            (_MASKS, "_ignore_bidirectional_mask_sdpa", _has_no_mask),
        ]
    else:
        replacements = [(_MASKS, "find_packed_sequence_indices", _packed_sequence_indices)]
    if regime.attention == "flash_attention_2":
        replacements += [
            (_FLASH, "lazy_import_flash_attention", _torch_as_flash),
            (_FLASH, "_get_unpad_data", _unpad_data),
            (_FLASH, "_is_packed_sequence", lambda *_args: regime.batching == "packed"),
            (_FLASH, "prepare_fa_kwargs_from_position_ids", lambda _ids: _sequence_bounds(*point)),
        ]
    return replacements


@contextmanager
def _replaced(where: str, name: str, new: Callable[..., Any]) -> Iterator[None]:
    try:
        module = import_module(where)
        old = getattr(module, name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"transformers {transformers.__version__} has no {where}.{name}; padded and packed batches are traced "
            "through it",
            to_fix="install transformers 5.23, or plan for sequences of equal length (batching equal)",
        ) from error
    setattr(module, name, new)
    try:
        yield
    finally:
        setattr(module, name, old)


def _has_no_mask(padding_mask: torch.Tensor | None, *_args: Any, **_kwargs: Any) -> bool:
    """Whether no mask has to be built: never for a batch with holes."""
    return padding_mask is None


def _packed_sequence_indices(position_ids: torch.Tensor) -> torch.Tensor:
    """Number the sequences of a row, as for one that holds several.

    Source: transformers/masking_utils.py 5.23, find_packed_sequence_indices, without its test for a single sequence.
    """
    difference = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (difference != 1).cumsum(-1)


@contextmanager
def _flash_in_place_of_sdpa() -> Iterator[None]:
    """Run transformers' own flash attention code in a model that was built for sdpa, which needs no flash-attn."""
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    interfaces = ((ALL_ATTENTION_FUNCTIONS, flash_attention_forward), (ALL_MASK_ATTENTION_FUNCTIONS, _flash_mask))
    for interface, function in interfaces:
        interface["sdpa"] = function
    try:
        yield
    finally:
        for interface, _ in interfaces:
            del interface["sdpa"]  # uncovers the library's own


def _flash_mask(attention_mask: torch.Tensor | None = None, **_kwargs: Any) -> torch.Tensor | None:
    """The padding mask itself. Source: transformers/masking_utils.py 5.23, flash_attention_mask."""
    return attention_mask


def _unpad_data(attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Where the tokens are, if hardly any is padding: the most that flash attention keeps.

    Source: transformers/modeling_flash_attention_utils.py 5.23, _get_unpad_data.
    """
    batch, tokens = attention_mask.shape
    bounds = torch.zeros(batch + 1, dtype=torch.int32)
    return torch.arange(batch * tokens), bounds, tokens


def _sequence_bounds(num_sequences: int, tokens: int) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[int, int]]:
    bounds = torch.zeros(num_sequences + 1, dtype=torch.int32)
    return (bounds, bounds), (tokens, tokens)


def _torch_as_flash(*_args: Any, **_kwargs: Any) -> Any:
    """flash-attn's functions by torch's flash attention, which saves the same tensors.

    Source: flash_attn/flash_attn_interface.py 2.8, FlashAttnVarlenFunc (saves q, k, v, out, lse).
    """
    from transformers.modeling_flash_attention_utils import _pad_input, _unpad_input

    return (_flash, _flash_varlen, None, _pad_input, _unpad_input), (_causal_only, dict)


def _causal_only(*, is_causal: bool, dropout: float, softmax_scale: float | None = None, **_kwargs: Any) -> Any:
    return {"causal": is_causal, "dropout_p": dropout, "softmax_scale": softmax_scale}


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, dropout_p: float, softmax_scale: float | None
) -> torch.Tensor:
    """Attention over (batch, tokens, heads, head_dim)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    shares_keys = q.shape[1] != k.shape[1]
    out = functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, dropout_p=dropout_p, scale=softmax_scale, enable_gqa=shares_keys
    )
    return out.transpose(1, 2)


def _flash_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cu_seqlens_q: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """Attention over (tokens of all sequences, heads, head_dim)."""
    num_sequences = cu_seqlens_q.shape[0] - 1
    rows = (x.reshape(num_sequences, -1, *x.shape[1:]) for x in (q, k, v))
    kwargs = {name: kwargs[name] for name in ("causal", "dropout_p", "softmax_scale")}
    return _flash(*rows, **kwargs).reshape(q.shape)
