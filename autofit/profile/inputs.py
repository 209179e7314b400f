"""What a model is fed: the tensors that a collator would make, by task."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autofit.errors import InputError
from autofit.profile.fit import Point
from autofit.profile.image_rows import images_attended_at_once
from autofit.profile.images import Images, find_images, image_token_id
from autofit.profile.known import KnownValues
from autofit.profile.parts import base_model
from autofit.profile.tasks import task_of
from autofit.spec.profile import MONOMIALS, Polynomial, Regime


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFeed:
    """The images of every sequence, and the mode that keeps their integers real."""

    images: Images
    known: KnownValues


@contextmanager
def feeding_images(model: nn.Module, regime: Regime) -> Iterator[ImageFeed | None]:
    """Find the images that become the regime's tokens, and let the values that the model reads of them be known.

    Call it under a FakeTensorMode; yields None where the regime has no images.

    Raises:
        InputError: the model has no images of that many tokens, or the regime's batches hold no images.
    """
    if not regime.image_tokens:
        yield None
        return
    if regime.batching == "packed":
        raise InputError(
            "packed batches hold no images: DataCollatorWithFlattening and TRL's packing carry tokens alone",
            to_fix="use batching equal or padded, or leave image_tokens out",
        )
    known = KnownValues()
    with known, images_attended_at_once(model, regime):
        yield ImageFeed(images=find_images(model, regime.image_tokens, known), known=known)


def a_batch(point: Point, model: nn.Module, regime: Regime, feed: ImageFeed | None = None) -> dict[str, torch.Tensor]:
    """Make the inputs of a micro-step.

    Labels are the ids themselves, or one class for each sequence. An encoder-decoder's encoder and decoder get as many
    tokens each: it makes the decoder's inputs from the labels.

    Args:
        point: sequences of the micro-batch, tokens of a sequence.
        model: the model, with or without an adapter.
        regime: names the task.
        feed: images of each sequence.
    """
    if feed is not None:
        return _with_images(point, base_model(model), regime, feed)
    ids = torch.randint(0, 8, point)
    labels = ids
    if task_of(base_model(model).config, regime.task) == "sequence-classification":
        labels = torch.randint(0, 2, (point[0],))
    return {"input_ids": ids, "labels": labels}


def _with_images(point: Point, model: Any, regime: Regime, feed: ImageFeed) -> dict[str, torch.Tensor]:
    """Images come first in each sequence, after one token of text where there is any.

    Labels are no copy of the ids: those of an image's tokens do not count. A processor also says of each token whether
    it is an image's, if the model asks for that.
    Source: transformers/processing_utils.py 5.23, create_mm_token_type_ids.
    """
    begin = min(1, point[1] - regime.image_tokens)
    ids = torch.zeros(point, dtype=torch.int64)
    ids[:, begin : begin + regime.image_tokens] = image_token_id(model.config)
    with feed.known.making(known=False):
        labels = torch.zeros(point, dtype=torch.int64)
    types = {}
    for name in inspect.signature(model.forward).parameters:
        if name.endswith("token_type_ids"):
            types[name] = torch.zeros(point, dtype=torch.int64)
            types[name][:, begin : begin + regime.image_tokens] = 1
    return {"input_ids": ids, "labels": labels, **types, **feed.images.inputs(point[0], feed.known)}


def input_bytes(batch: Mapping[str, torch.Tensor], point: Point) -> Polynomial:
    """Return the bytes of a micro-step's inputs as a polynomial: some grow with tokens, the others with sequences."""
    num_sequences, num_tokens = point
    sizes = [(tensor.numel() * tensor.element_size(), tensor.shape) for tensor in batch.values()]
    of_tokens = sum(size for size, shape in sizes if shape == point)
    of_sequences = sum(size for size, shape in sizes if shape != point)
    found = {(1, 1): of_tokens / (num_sequences * num_tokens), (1, 0): of_sequences / num_sequences}
    return tuple(found.get(monomial, 0.0) for monomial in MONOMIALS)
