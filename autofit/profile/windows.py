"""Lengths to trace: a window of attention changes the code path where a sequence reaches it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from autofit.errors import InputError

USUAL_LENGTHS = (256, 512, 1024)
_CHUNK = re.compile(r"^(?!attention).*chunk_size")
_WINDOW = re.compile(r"^(?!.*(?:pattern|layers)).*(?:window|attention_chunk|local_attention)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Lengths that take one code path, and the shortest and longest sequence that does."""

    traced: tuple[int, ...]
    min_sequence_tokens: int
    max_sequence_tokens: int | None


def lengths_to_trace(
    config: Any, sequence_tokens: int | None, *, masks_windows: bool = True, image_tokens: int = 0
) -> Lengths:
    """Choose three lengths on the same side of each of a config's windows as the sequences that are planned.

    A sequence as long as a window is masked by it (transformers/masking_utils.py 5.23, _ignore_causal_mask_sdpa).
    A scan in chunks pads to whole ones, and one chunk alone is a case of its own: lengths between two multiples of a
    chunk come out between those of the multiples, by less than a chunk too low.

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
    longest = getattr(config, "max_position_embeddings", None)
    chunk = max(_lengths(config, _CHUNK), default=0)
    longest = longest if isinstance(longest, int) and longest > 0 else None
    planned = sequence_tokens or max(min(USUAL_LENGTHS[-1], longest or USUAL_LENGTHS[-1]), image_tokens)
    limits = windows(config) if masks_windows else []
    low = max([limit for limit in limits if limit <= planned], default=0)
    if chunk >= USUAL_LENGTHS[0] and not limits:
        chunks = max(2, -(-image_tokens // chunk)) * chunk
        return Lengths(
            traced=(chunks, 2 * chunks, 4 * chunks),
            min_sequence_tokens=max(chunk + 1, image_tokens),
            max_sequence_tokens=None,
        )
    high = min([limit for limit in limits if limit > planned], default=None)
    bounded = longest if high is None else min(high - 1, longest or high)
    usual = _usual_from(image_tokens) if image_tokens > low else None
    return Lengths(
        traced=usual
        if usual and usual[-1] <= (bounded or usual[-1])
        else _three(max(low, image_tokens), bounded, longest),
        min_sequence_tokens=max(low, image_tokens, 1),
        max_sequence_tokens=None if high is None else high - 1,
    )


def _usual_from(tokens: int) -> tuple[int, ...]:
    """The usual lengths, as many times as large as it takes to hold so many tokens."""
    times = -(-tokens // USUAL_LENGTHS[0])
    return tuple(times * length for length in USUAL_LENGTHS)


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
