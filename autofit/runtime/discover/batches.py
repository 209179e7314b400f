"""Collates batches of a script's own data with its own collator, and reads how long and how joined sequences are."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from autofit.spec.configuration import Batching
from autofit.spec.discovered import FoundLengths

MAX_SAMPLES = 4096
"""Samples whose length is looked at; more are left to the user's --seq-len."""
MAX_SCAN_SECONDS = 15.0
NUM_FIRST_BATCHES = 3
PAIR_COLUMNS = ("chosen_ids", "rejected_ids")
"""What trl's preference data holds beside `prompt_ids`. Source: trl/trainer/dpo_trainer.py 1.16."""


def lengths_of(
    loader: Any, lengths: Mapping[int, int], per_device_train_batch_size: int, config: Any
) -> FoundLengths | None:
    """Collate the first batches and the longest of many samples, and return the widest.

    Args:
        loader: the script's DataLoader.
        lengths: of its samples, see `sample_lengths`.
        per_device_train_batch_size: samples of a batch.
        config: of the model, which names the token that stands for images.
    """
    longest = _longest(loader.dataset, lengths, per_device_train_batch_size)
    batches = [*itertools.islice(loader, NUM_FIRST_BATCHES), *([loader.collate_fn(longest)] if longest else [])]
    found = [batch for batch in batches if _shape(batch) is not None]
    if not found:
        return None
    batching = _batching(found, lengths, loader.dataset, per_device_train_batch_size)
    rows = 2 if _holds_pairs(loader.dataset) else 1
    return FoundLengths(
        sequence_tokens=_sequence_tokens(found, lengths, batching, per_device_train_batch_size) * rows,
        num_samples_seen=len(lengths) or NUM_FIRST_BATCHES * per_device_train_batch_size,
        num_samples=_size(loader.dataset),
        image_tokens=max(_image_tokens(batch, config) for batch in found),
        batching=batching,
        num_rows_per_sequence=rows,
    )


def sample_lengths(dataset: Any, progress: Callable[[int, int], None] = lambda _done, _total: None) -> dict[int, int]:
    """Return the lengths of many samples, by their index; of a dataset that cannot be asked, nothing.

    Args:
        dataset: the script's.
        progress: called with (samples looked at, of how many).
    """
    size = _size(dataset)
    if size is None or not hasattr(dataset, "__getitem__"):
        return {}
    deadline, lengths = time.monotonic() + MAX_SCAN_SECONDS, {}
    indices = range(0, size, max(1, math.ceil(size / MAX_SAMPLES)))
    for index in indices:
        length = _sample_length(dataset[index])
        if length is None:
            return {}
        lengths[index] = length
        progress(len(lengths), len(indices))
        if time.monotonic() > deadline:
            break
    return lengths


def _sample_length(sample: Any) -> int | None:
    if not isinstance(sample, Mapping):
        return None
    if "input_ids" in sample:
        return len(sample["input_ids"])
    if all(name in sample for name in PAIR_COLUMNS):
        return len(sample.get("prompt_ids", ())) + max(len(sample[name]) for name in PAIR_COLUMNS)
    return None


def _longest(dataset: Any, lengths: Mapping[int, int], num_samples: int) -> list[Any]:
    longest = sorted(lengths, key=lambda index: lengths[index], reverse=True)[:num_samples]
    return [dataset[index] for index in longest]


def _batching(
    batches: Sequence[Any], lengths: Mapping[int, int], dataset: Any, per_device_train_batch_size: int
) -> Batching:
    """Say how sequences share a batch.

    A row that trl has packed says what it was packed of (`seq_lengths`). Padding needs a mask, and sequences that
    differ.
    """
    if any("position_ids" in batch and "attention_mask" not in batch and _shape(batch)[0] == 1 for batch in batches):
        is_packed = any("seq_lengths" in sample for sample in _first(dataset))
        return "packed" if is_packed else "padding_free" if per_device_train_batch_size > 1 else "equal"
    masks = [batch["attention_mask"] for batch in batches if batch.get("attention_mask") is not None]
    differ = len(set(lengths.values())) > 1
    return "padded" if any(bool((mask == 0).any()) for mask in masks) or (masks and differ) else "equal"


def _first(dataset: Any) -> Iterator[Mapping[str, Any]]:
    sample = dataset[0] if _size(dataset) and hasattr(dataset, "__getitem__") else None
    if isinstance(sample, Mapping):
        yield sample


def _holds_pairs(dataset: Any) -> bool:
    return any(all(name in sample for name in PAIR_COLUMNS) for sample in _first(dataset))


def _sequence_tokens(
    batches: Sequence[Any], lengths: Mapping[int, int], batching: Batching, per_device_train_batch_size: int
) -> int:
    """Return the longest sequence: the widest batch, or of rows without padding the longest sample."""
    widest = max(_shape(batch)[1] for batch in batches)
    if batching not in {"packed", "padding_free"}:
        return widest
    return max(math.ceil(widest / per_device_train_batch_size), *lengths.values()) if lengths else widest


def _size(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None


def _shape(batch: Any) -> Any:
    """Return rows and tokens of a batch; None where it holds no token ids of two dimensions."""
    ids = batch.get("input_ids") if hasattr(batch, "get") else None
    return (int(ids.shape[0]), int(ids.shape[1])) if ids is not None and ids.ndim == 2 else None


def _image_tokens(batch: Any, config: Any) -> int:
    """Return the most tokens of a sequence that stand for images, 0 where the batch holds none."""
    names = ("image_token_id", "image_token_index")
    number = next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
    if number is None or batch.get("pixel_values") is None:
        return 0
    return int((batch["input_ids"] == number).sum(1).max())
