"""Exact polynomials in b and s from a few traced sizes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from autofit.errors import AutofitError
from autofit.profile.loops import Growth
from autofit.spec.profile import MONOMIALS, Polynomial

LENGTHS_ALONE = tuple((i, j) for i, j in MONOMIALS if i == 0)
BATCHES_ALONE = tuple((i, j) for i, j in MONOMIALS if j == 0)

Point = tuple[int, int]
"""(b, s): sequences of the micro-batch, tokens of a sequence."""


def inverse(points: Sequence[Point]) -> list[list[Fraction]]:
    """Invert the matrix of monomials at `points`, exactly; a row for each monomial.

    Args:
        points: as many as there are monomials, in general position; or three lengths of one row, which determine the
            powers of s alone; or two batches of one length, which determine those of b.

    Raises:
        ValueError: the points do not determine the coefficients.
    """
    size = len(points)
    monomials = next(each for each in (MONOMIALS, LENGTHS_ALONE, BATCHES_ALONE) if len(each) == size)
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


def by_tokens(polynomial: Polynomial, sequence_tokens: int) -> Polynomial:
    """Say bytes for each token where a polynomial of one length has bytes for each sequence: the same value, exactly.

    Where they are no whole number for each token, they stay.
    """
    values = dict(zip(MONOMIALS, polynomial, strict=True))
    per_token, rest = divmod(values[1, 0], sequence_tokens)
    if not rest:
        values |= {(1, 0): 0.0, (1, 1): per_token}
    return tuple(values[monomial] for monomial in MONOMIALS)


class StructureDiffersError(AutofitError):
    """Two sizes of the same step did not allocate the same tensors in the same order.

    Args:
        message: what differs.
        growth: how many operators the two steps have.
    """

    def __init__(self, message: str, *, growth: Growth | None = None) -> None:
        super().__init__(message)
        self.growth = growth
