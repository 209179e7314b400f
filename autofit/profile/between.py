"""Whether what a few lengths determine holds at the lengths between them.

Kernels and scans pad to whole blocks or chunks: masks to 16 bytes for the memory-efficient kernel, sequences to whole
chunks. The lengths that are traced are multiples of such blocks, and show nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autofit.profile.fit import Point, inverse
from autofit.profile.recorder import RawSegment
from autofit.spec.profile import MONOMIALS

TOLERANCE = 1e-3
"""Relative, of the highest moment. Rows of statistics that kernels round up to 32 or 128 tokens stay below, and chunks
that a scan fills up do not."""
_BIRTH_FIELDS = 2


def holds_at(
    step: Sequence[RawSegment], point: Point, steps: Sequence[Sequence[RawSegment]], points: Sequence[Point]
) -> bool:
    """Say whether the polynomials through `points` give a step at another size.

    It has as many tensors, and its highest moment is what they say.

    Args:
        step: traced at `point`.
        point: not among `points`.
        steps: traced at `points`, all with the same tensors.
        points: in general position, see `inverse`.
    """
    if sum(segment.num_births for segment in step) != sum(segment.num_births for segment in steps[0]):
        return False
    traced = [_changes(each) for each in steps]
    if len({len(changes) for changes in traced}) > 1:
        return False
    expected, found = _highest(_weights(points, point) @ np.stack(traced)), _highest(_changes(step))
    return abs(expected / found - 1) <= TOLERANCE


def _weights(points: Sequence[Point], point: Point) -> np.ndarray:
    """The share of each traced value in that of a polynomial at `point`."""
    b, s = point
    rows = inverse(points)
    return np.array(
        [float(sum(b**i * s**j * rows[n][k] for n, (i, j) in enumerate(MONOMIALS))) for k in range(len(points))]
    )


def _changes(step: Sequence[RawSegment]) -> np.ndarray:
    """Bytes that each event adds to what is alive, or takes away."""
    return np.array(
        [event[0] if len(event) == _BIRTH_FIELDS else -event[0] for segment in step for event in segment.events],
        dtype=np.float64,
    )


def _highest(changes: np.ndarray) -> float:
    return float(np.max(np.cumsum(changes)))
