"""Lengths to trace: a window of attention changes the code path where a sequence reaches it."""

from __future__ import annotations

import math
import re
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from autofit.errors import InputError

USUAL_LENGTHS = (256, 512, 1024)
ODD_TOKENS = 3
"""More than a traced length: a multiple of nothing that anything is padded to."""
BLOCK_TOKENS = 64
MASK_COLUMNS = 8
"""Source: torch v2.13 aten/src/ATen/native/transformers/attention.cpp, pad_bias."""
_CHUNK = re.compile(r"^(?!attention).*chunk_size")
_WINDOW = re.compile(r"^(?!.*(?:pattern|layers)).*(?:window|attention_chunk|local_attention)")


class Lengths(Struct, frozen=True, kw_only=True):
    """Lengths that take one code path, and the shortest and longest sequence that does."""

    traced: tuple[int, ...]
    min_sequence_tokens: int
    max_sequence_tokens: int | None

    @property
    def multiple_tokens(self) -> int:
        """The most tokens that all are multiples of."""
        return math.gcd(*self.traced)

    @property
    def between(self) -> dict[int, int]:
        """Lengths among them to try, and the multiple for which what is traced holds if it does there.

        What pads to whole blocks or chunks shows at them. Masks are padded to 8 columns, so that is tried as well.
        """
        first, multiple = self.traced[0], self.multiple_tokens
        return {first + ODD_TOKENS: 1, first + MASK_COLUMNS: MASK_COLUMNS} if multiple > MASK_COLUMNS else {}

    @property
    def odd(self) -> Lengths:
        """The lengths one token further: what pads to whole blocks pads most there."""
        return replace(self, traced=tuple(tokens + 1 for tokens in self.traced))


def one_length(sequence_tokens: int) -> Lengths:
    """Trace a length alone: what the step does there says nothing of another."""
    return Lengths(traced=(sequence_tokens,), min_sequence_tokens=sequence_tokens, max_sequence_tokens=sequence_tokens)


def planned_length(config: Any, sequence_tokens: int | None) -> int:
    """Return the length that is planned, or if none is, 1,024 or the most that the model has positions for."""
    return sequence_tokens or min(USUAL_LENGTHS[-1], _longest(config) or USUAL_LENGTHS[-1])


def lengths_to_trace(
    config: Any, sequence_tokens: int | None, *, masks_windows: bool = True, image_tokens: int = 0
) -> Lengths:
    """Choose three lengths on the same side of each of a config's windows as the sequences that are planned.

    A sequence as long as a window is masked by it (transformers/masking_utils.py 5.23, _ignore_causal_mask_sdpa).
    A scan in chunks pads to whole ones, and one chunk alone is a case of its own: lengths are of two chunks or more.

    Args:
        config: of the language model.
        sequence_tokens: what is planned; None: the lengths around 1,024.
        masks_windows: whether attention builds a mask for a window; flash-attn takes the window's width instead.
        image_tokens: tokens of a sequence that are images', which no sequence is shorter than.

    Raises:
        InputError: a sequence has fewer tokens than its images.
    """
    if sequence_tokens is not None and sequence_tokens < image_tokens:
        raise InputError(
            f"a sequence of {sequence_tokens} tokens cannot hold {image_tokens} image tokens",
            to_fix="give longer sequences (--seq-len), or fewer image tokens (--image-tokens)",
        )
    longest = _longest(config)
    chunk = max(_lengths(config, _CHUNK), default=0)
    planned = max(planned_length(config, sequence_tokens), image_tokens)
    limits = windows(config) if masks_windows else []
    if chunk >= USUAL_LENGTHS[0] and not limits:
        chunks = max(2, -(-image_tokens // chunk)) * chunk
        return Lengths(
            traced=(chunks, 2 * chunks, 4 * chunks),
            min_sequence_tokens=max(chunk + 1, image_tokens),
            max_sequence_tokens=None,
        )
    low = max([limit for limit in limits if limit <= planned], default=0)
    high = min([limit for limit in limits if limit > planned], default=None)
    bounded = longest if high is None else min(high - 1, longest or high)
    usual = _usual_from(image_tokens) if image_tokens > low else None
    return Lengths(
        traced=usual
        if usual and usual[-1] <= (bounded or usual[-1])
        else _whole_blocks(_three(max(low, image_tokens), bounded, longest), max(low, image_tokens)),
        min_sequence_tokens=max(low, image_tokens, 1),
        max_sequence_tokens=None if high is None else high - 1,
    )


def _usual_from(tokens: int) -> tuple[int, ...]:
    """The usual lengths, as many times as large as it takes to hold so many tokens."""
    times = -(-tokens // USUAL_LENGTHS[0])
    return tuple(times * length for length in USUAL_LENGTHS)


def _longest(config: Any) -> int | None:
    """The most positions that a model has, if it says so."""
    longest = getattr(config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None


def _three(low: int, high: int | None, longest: int | None) -> tuple[int, ...]:
    """Three lengths from `low` to `high`, the usual ones where they are allowed."""
    if low < USUAL_LENGTHS[0] and (high is None or high >= USUAL_LENGTHS[-1]):
        return USUAL_LENGTHS
    if not low and high:
        quarter = (high + 1) // 4  # of a window of a power of two a whole number of kernels' blocks
        return (quarter, 2 * quarter, high if high % quarter == 0 else 3 * quarter)
    limits = [limit for limit in (high, longest) if limit is not None and limit >= low + len(USUAL_LENGTHS)]
    top = min([max(4 * low, USUAL_LENGTHS[-1]), *limits])
    return (low + (top - low) // 4, low + (top - low) // 2, top)


def _whole_blocks(lengths: tuple[int, ...], low: int) -> tuple[int, ...]:
    """The lengths in whole blocks where they leave room for it, so that no kernel pads one and not another."""
    whole = tuple(length - length % BLOCK_TOKENS for length in lengths)
    return whole if whole[0] >= max(low, 1) and len(set(whole)) == len(lengths) else lengths


def windows(config: Any) -> list[int]:
    """Return the lengths at which attention changes: what a config calls a window, a chunk or local attention."""
    return _lengths(config, _WINDOW)


def _lengths(config: Any, pattern: re.Pattern[str]) -> list[int]:
    found = set()
    for name, value in vars(config).items():
        if pattern.search(name):
            found |= {size for size in (value if isinstance(value, (list, tuple)) else [value]) if _is_length(size)}
    return sorted(found)


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1
