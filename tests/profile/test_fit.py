"""Polynomials from a few traced sizes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autofit.profile.fit import StructureDiffersError, evaluate, fit, inverse
from autofit.profile.recorder import RawSegment
from autofit.profile.trace import fold, trace_points
from autofit.profile.windows import lengths_to_trace

COEFFICIENTS = st.lists(st.integers(0, 2**40), min_size=6, max_size=6)
LENGTHS = (256, 512, 1024)
POINTS = trace_points(LENGTHS)


def bytes_at(coefficients: list[int], point: tuple[int, int]) -> int:
    """Evaluate a polynomial in whole numbers."""
    b, s = point
    return sum(c * m for c, m in zip(coefficients, (1, b, s, b * s, s * s, b * s * s), strict=True))


@given(COEFFICIENTS, st.integers(1, 64), st.integers(1, 8192))
def test_a_polynomial_is_recovered_from_its_values(coefficients, batch, tokens):
    """From its values at the traced sizes a polynomial in b and s comes back, and holds at every other size."""
    found = fit(inverse(POINTS), [bytes_at(coefficients, point) for point in POINTS])
    assert found == tuple(float(c) for c in coefficients)
    assert evaluate(found, (batch, tokens)) == pytest.approx(bytes_at(coefficients, (batch, tokens)), rel=1e-12)


@given(st.lists(st.integers(0, 2**40), min_size=3, max_size=3), st.integers(1, 8192))
def test_three_lengths_of_one_row_determine_what_only_the_length_does(coefficients, tokens):
    """A packed row is traced at three lengths: its terms in 1, s and s² come back, and none in b."""
    constant, linear, square = coefficients
    points = trace_points(LENGTHS, one_row=True)
    found = fit(inverse(points), [constant + linear * s + square * s * s for _, s in points])
    assert found == (constant, 0, linear, 0, square, 0)
    assert evaluate(found, (1, tokens)) == pytest.approx(constant + linear * tokens + square * tokens**2, rel=1e-12)


@pytest.mark.parametrize("max_tokens", [None, 131072, 2048, 1024, 512, 128])
def test_the_traced_sizes_determine_a_polynomial_and_fit_the_model(max_tokens):
    """Whatever the model's longest sequence is, the sizes determine six coefficients and none is longer."""
    points = trace_points(lengths_to_trace(SimpleNamespace(max_position_embeddings=max_tokens), None).traced)
    inverse(points)
    assert max(tokens for _, tokens in points) <= (max_tokens or 1024)


def test_points_on_a_line_determine_nothing():
    """Sizes that all have one length are refused, not fitted."""
    with pytest.raises(ValueError, match="do not determine"):
        inverse([(b, 256) for b in range(1, 7)])


def a_step(point: tuple[int, int]) -> list[RawSegment]:
    """Return a step of one segment with one birth and one death that depend on the size."""
    b, s = point
    events = [(8 * b * s, 0), (8 * b * s, 0, 0, 0)]
    return [RawSegment("embedding", "forward", None, events=events, matmul_flops=b * s * s, num_kernels=1)]


def test_equal_structures_are_folded():
    """Steps that differ in sizes alone become one with polynomials."""
    sizes, (segment,) = fold([a_step(point) for point in POINTS], POINTS)
    assert sizes == ((0.0, 0.0, 0.0, 8.0, 0.0, 0.0),)
    assert segment.events == ((0, 0), (0, 0, 0, 0))
    assert segment.matmul_flops == (0.0, 0.0, 0.0, 0.0, 0.0, 1.0)


def test_a_step_that_allocates_differently_at_one_size_is_refused():
    """A tensor more at a single size means that no polynomial describes the step."""
    steps = [a_step(point) for point in POINTS]
    steps[3][0].events.append((64, 0))
    with pytest.raises(StructureDiffersError, match="embedding"):
        fold(steps, POINTS)


def test_a_layer_that_another_size_does_not_have_is_refused():
    """Segments that are not the same layer are not folded into one."""
    steps = [a_step(point) for point in POINTS]
    steps[2][0] = replace(steps[2][0], layer=1)
    with pytest.raises(StructureDiffersError):
        fold(steps, POINTS)


def test_sizes_that_are_known_are_taken_where_they_hold():
    """Of one row, a tensor of 8 b s bytes has the polynomial that was found for more rows; one that only it has gets
    its own, after those.
    """
    sizes, _ = fold([a_step(point) for point in POINTS], POINTS)
    one_row = trace_points(LENGTHS, one_row=True)
    steps = [a_step(point) for point in one_row]
    for (_, tokens), (segment,) in zip(one_row, steps, strict=True):
        segment.events.append((3 * tokens, 0))
    together, (segment,) = fold(steps, one_row, sizes)
    assert together == (*sizes, (0.0, 0.0, 3.0, 0.0, 0.0, 0.0))
    assert segment.events == ((0, 0), (0, 0, 0, 0), (1, 0))
