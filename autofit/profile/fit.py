"""Exact polynomials in b and s from a few traced sizes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from autofit.errors import AutofitError
from autofit.spec.profile import MONOMIALS, Polynomial

LENGTHS_ALONE = tuple((i, j) for i, j in MONOMIALS if i == 0)

Point = tuple[int, int]
"""(b, s): sequences of the micro-batch, tokens of a sequence."""


def inverse(points: Sequence[Point]) -> list[list[Fraction]]:
    """Invert the matrix of monomials at `points`, exactly; a row for each monomial.

    Args:
        points: as many as there are monomials, in general position; or three lengths of one row, which determine the
            powers of s alone.

    Raises:
        ValueError: the points do not determine the coefficients.
    """
    size = len(points)
    monomials = MONOMIALS if size == len(MONOMIALS) else LENGTHS_ALONE
    rows = [
        [Fraction(b**i * s**j) for i, j in monomials] + [Fraction(int(k == n)) for k in range(size)]
        for n, (b, s) in enumerate(points)
    ]
    for column in range(size):
        pivot = next((row for row in range(column, size) if rows[row][column]), None)
        if pivot is None:
            raise ValueError(f"the points {points} do not determine a polynomial")
        rows[column], rows[pivot] = rows[pivot], rows[column]
        scale = rows[column][column]
        rows[column] = [value / scale for value in rows[column]]
        for row in range(size):
            if row != column and rows[row][column]:
                factor = rows[row][column]
                rows[row] = [a - factor * b for a, b in zip(rows[row], rows[column], strict=True)]
    solved = dict(zip(monomials, (row[size:] for row in rows), strict=True))
    return [solved.get(monomial, [Fraction(0)] * size) for monomial in MONOMIALS]


def fit(inverted: Sequence[Sequence[Fraction]], values: Sequence[int]) -> Polynomial:
    """Return the coefficients that take `values` at the points of `inverted`."""
    return tuple(float(sum(row[k] * values[k] for k in range(len(values)))) for row in inverted)


def evaluate(polynomial: Polynomial, point: Point) -> float:
    """Value of a polynomial at (b, s)."""
    b, s = point
    return sum(c * b**i * s**j for c, (i, j) in zip(polynomial, MONOMIALS, strict=True))


class StructureDiffersError(AutofitError):
    """Two sizes of the same step did not allocate the same tensors in the same order."""
