"""What a model is fed: the tensors that a collator would make, by task."""

from __future__ import annotations

import torch

from autofit.profile.fit import Point


def a_batch(point: Point) -> dict[str, torch.Tensor]:
    """Make the inputs of a micro-step.

    Args:
        point: sequences of the micro-batch, tokens of a sequence.
    """
    ids = torch.randint(0, 8, point)
    return {"input_ids": ids, "labels": ids}
