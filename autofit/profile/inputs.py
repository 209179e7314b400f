"""What a model is fed: the tensors that a collator would make, by task."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from msgspec import Struct
from torch import nn

from autofit.errors import InputError
from autofit.profile.fit import Point
from autofit.profile.image_rows import images_attended_at_once
from autofit.profile.images import Images, find_images, image_token_id
from autofit.profile.known import KnownValues
from autofit.profile.parts import base_model, text_config
from autofit.profile.tasks import task_of
from autofit.spec.profile import MONOMIALS, Polynomial, Regime


class Feed(Struct, frozen=True, kw_only=True):
    """The mode that keeps the integers of a batch real, and the images of every sequence, if it has any."""

    known: KnownValues
    images: Images | None = None


@contextmanager
def feeding(model: nn.Module, regime: Regime, *, knows_values: bool = False) -> Iterator[Feed | None]:
    """Find the images that become the regime's tokens, and let the values that the model reads of them be known.

    Call it under a FakeTensorMode; yields None where no value is known.

    Args:
        model: filled with fakes.
        regime: what the step does.
        knows_values: whether a text's are known too, for a model that decides by them.

    Raises:
        InputError: the model has no images of that many tokens, or the regime's batches hold no images.
    """
    if not regime.image_tokens:
        if not knows_values:
            yield None
            return
        known = KnownValues()
        with known, known.making(known=True):
            yield Feed(known=known)
        return
    if regime.batching == "packed":
        raise InputError(
            "packed batches hold no images: DataCollatorWithFlattening and TRL's packing carry tokens alone",
            to_fix="use batching equal or padded, or leave image_tokens out",
        )
    known = KnownValues()
    with known, images_attended_at_once(model, regime):
        yield Feed(images=find_images(model, regime.image_tokens, known), known=known)


def a_batch(point: Point, model: nn.Module, regime: Regime, feed: Feed | None = None) -> dict[str, torch.Tensor]:
    """Make the inputs of a micro-step.

    Labels are the ids themselves, or one class for each sequence. An encoder-decoder's encoder and decoder get as many
    tokens each: it makes the decoder's inputs from the labels.

    Args:
        point: sequences of the micro-batch, tokens of a sequence.
        model: the model, with or without an adapter.
        regime: names the task.
        feed: what is known of the batch.
    """
    if feed is not None and feed.images is not None:
        return _with_images(point, base_model(model), regime, feed.images, feed.known)
    ids = torch.randint(0, 8, point) if feed is None else _text(point, base_model(model).config)
    labels = ids
    if task_of(base_model(model).config, regime.task) == "sequence-classification":
        labels = torch.randint(0, 2, (point[0],))
    return {"input_ids": ids, "labels": labels}


def _text(point: Point, config: Any) -> torch.Tensor:
    """Tokens of which none means anything to a model, but the last, which ends a sequence.

    Source: transformers/models/bart/modeling_bart.py 5.23, BartForSequenceClassification.forward ("All examples must
    have the same number of <eos> tokens").
    """
    text = text_config(config)
    named = [getattr(part, name, None) for part in (config, text) for name in dir(part) if name.endswith("token_id")]
    ordinary = next(number for number in itertools.count() if number not in named)
    ids = torch.full(point, ordinary)
    if isinstance(end := getattr(text, "eos_token_id", None), int):
        ids[:, -1] = end
    return ids


def _with_images(
    point: Point, model: Any, regime: Regime, images: Images, known: KnownValues
) -> dict[str, torch.Tensor]:
    """Images come first in each sequence, after one token of text where there is any.

    Labels are no copy of the ids: those of an image's tokens do not count. A processor also says of each token whether
    it is an image's, if the model asks for that.
    Source: transformers/processing_utils.py 5.23, create_mm_token_type_ids.
    """
    begin = min(1, point[1] - regime.image_tokens)
    ids = torch.zeros(point, dtype=torch.int64)
    ids[:, begin : begin + regime.image_tokens] = image_token_id(model.config)
    with known.making(known=False):
        labels = torch.zeros(point, dtype=torch.int64)
    types = {}
    for name in inspect.signature(model.forward).parameters:
        if name.endswith("token_type_ids"):
            types[name] = torch.zeros(point, dtype=torch.int64)
            types[name][:, begin : begin + regime.image_tokens] = 1
    return {"input_ids": ids, "labels": labels, **types, **images.inputs(point[0], known)}


def input_bytes(batch: Mapping[str, torch.Tensor], point: Point) -> Polynomial:
    """Return the bytes of a micro-step's inputs as a polynomial: some grow with tokens, the others with sequences."""
    num_sequences, num_tokens = point
    sizes = [(tensor.numel() * tensor.element_size(), tensor.shape) for tensor in batch.values()]
    of_tokens = sum(size for size, shape in sizes if shape == point)
    of_sequences = sum(size for size, shape in sizes if shape != point)
    found = {(1, 1): of_tokens / (num_sequences * num_tokens), (1, 0): of_sequences / num_sequences}
    return tuple(found.get(monomial, 0.0) for monomial in MONOMIALS)
