"""Turns what stops a trace into words: a step that needs values, or that is not the same at every length."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from autofit.errors import InputError
from autofit.profile.fit import Point, StructureDiffersError
from autofit.profile.loops import Growth
from autofit.profile.recorder import RawSegment, num_operators


class ValuesNeededError(InputError):
    """A step depends on what tensors hold."""


@contextmanager
def values_refused(model: nn.Module) -> Iterator[None]:
    """Refuse a step whose memory or path depends on what tensors hold, naming the operator and the line.

    Raises:
        ValuesNeededError: it does.
    """
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        frames = [
            frame for frame in traceback.extract_tb(error.__traceback__) if "transformers/models" in frame.filename
        ]
        where = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
        raise ValuesNeededError(
            f"a step of {type(model).__name__} depends on values and not only on shapes: {error.func}{where}",
            to_fix="choose another model or attention; what its memory is cannot be known before it runs",
        ) from error


def check_structure(model: nn.Module, steps: Sequence[Sequence[RawSegment]], points: Sequence[Point]) -> None:
    """Hold the step at the latest size to the first: it has as many tensors, segment by segment.

    Raises:
        StructureDiffersError: it loops over tokens, or takes another path at another size.
    """
    first, last = steps[0], steps[-1]
    (b, s), (later_b, later_s) = points[0], points[len(steps) - 1]
    if (b == 1) != (later_b == 1):  # one sequence alone is a special case: a slice of one row needs no copy
        return
    growth = Growth(tokens=(s, later_s), operators=(num_operators(first), num_operators(last)))
    for one, other in zip_longest(first, last, fillvalue=_NO_SEGMENT):
        if (one.name, one.layer) != (other.name, other.layer) or one.num_births != other.num_births:
            what = one.name if one.layer is None else f"{one.name} {one.layer}"
            raise StructureDiffersError(
                f"{type(model).__name__} allocates {one.num_births} tensors in its {what} for {b} x {s} tokens and "
                f"{other.num_births} for {later_b} x {later_s}: it loops over tokens, or takes another path there",
                growth=growth,
            )


_NO_SEGMENT = RawSegment("no segment", "forward", None)
