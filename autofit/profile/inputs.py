"""What a model is fed: the tensors that a collator would make, by task."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autofit.profile.fit import Point
from autofit.profile.tasks import task_of
from autofit.spec.profile import Regime


def a_batch(point: Point, model: nn.Module, regime: Regime) -> dict[str, torch.Tensor]:
    """Make the inputs of a micro-step.

    Labels are the ids themselves, or one class for each sequence. An encoder-decoder's encoder and decoder get as many
    tokens each: it makes the decoder's inputs from the labels.

    Args:
        point: sequences of the micro-batch, tokens of a sequence.
        model: the model, with or without an adapter.
        regime: names the task.
    """
    ids = torch.randint(0, 8, point)
    labels = ids
    if task_of(_config(model), regime.task) == "sequence-classification":
        labels = torch.randint(0, 2, (point[0],))
    return {"input_ids": ids, "labels": labels}


def _config(model: Any) -> Any:
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).config
