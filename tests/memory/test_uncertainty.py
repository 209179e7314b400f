"""Intervals from published residuals: what they hold, and that they hold it where a source is left out."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

import autofit
from autofit.memory.uncertainty import (
    FIGURES,
    LEVEL,
    Residual,
    RunKind,
    interval,
    interval_of,
    run_kind,
    shipped,
)
from autofit.spec.regimes import regime_of
from tests.plans import A100, a_configuration

KIND = RunKind(method="qlora", attention="eager", is_sharded=False)


def residuals(ratios: list[float], kind: RunKind = KIND, sources: tuple[str, ...] = ("a", "b", "c")) -> list[Residual]:
    """Return residuals of one kind, from three sources in turn."""
    return [
        Residual(source=source, kind=kind, figure="peak_reserved", ratio=ratio)
        for ratio, source in zip(ratios, itertools.cycle(sources), strict=False)
    ]


def test_a_source_that_is_left_out_is_mostly_held():
    """Intervals made without a source hold at least four fifths of its figures: of what torch allocates, of what it
    reserves, and of what the process takes. Runs of one source are alike, so this is below the nominal share.
    """
    for figure in FIGURES:
        found = [
            (held := interval_of([each for each in shipped() if each.source != left_out], figure, each.kind))
            is not None
            and held.low <= each.ratio <= held.high
            for left_out in {each.source for each in shipped()}
            for each in shipped()
            if each.source == left_out and each.figure == figure
        ]
        assert len(found) >= 39
        assert sum(found) / len(found) >= 0.8, figure


def _without(source: str) -> list[Residual]:
    return [each for each in shipped() if each.source != source]


@given(st.lists(st.floats(0.5, 2), min_size=5, max_size=60))
def test_an_interval_holds_what_it_says_of_its_own_residuals(ratios):
    """The share of its residuals inside is at least the coverage that it states, and the prediction is inside."""
    found = interval_of(residuals(ratios), "peak_reserved", KIND)
    assert found.low <= 1 <= found.high
    assert sum(found.low <= ratio <= found.high for ratio in ratios) >= found.coverage * len(ratios)


@pytest.mark.parametrize(("num", "rank"), [(5, 1), (18, 1), (19, 1), (39, 2), (59, 3)])
def test_order_statistics_follow_the_finite_sample_rule(num, rank):
    """Of 19 residuals the extremes keep nine tenths, of 39 the second from either end, of 59 the third."""
    ratios = [1 + (n - num // 2) / 100 for n in range(num)]
    found = interval_of(residuals(ratios), "peak_reserved", KIND)
    assert (found.low, found.high) == (min(1.0, ratios[rank - 1]), max(1.0, ratios[-rank]))
    assert found.coverage == pytest.approx(1 - 2 * rank / (num + 1))
    assert num < 19 or found.coverage >= LEVEL - 1e-9


def test_what_was_not_published_gets_the_widest():
    """A kind without runs, with few, or from one source only is no better known than all kinds together."""
    known = residuals([0.9, 0.95, 1.0, 1.05, 1.2])
    other = replace(KIND, attention="flash")
    for few in ([], residuals([1.0] * 4, other), residuals([1.0] * 9, other, sources=("a",))):
        found = interval_of([*known, *few], "peak_reserved", other)
        assert (found.low, found.high, found.is_of_kind) == (0.9, 1.2, False)
    assert interval_of(known, "process", KIND) is None
    assert interval_of([*known, *residuals([1.0] * 5, other)], "peak_reserved", other).high == 1.0


def test_the_kind_of_a_run_is_its_code_path():
    """A T4 has no flash attention: the same configuration is another kind of run there."""
    configuration = a_configuration(method="lora", attention="sdpa")
    kinds = [
        run_kind(regime_of(configuration, replace(A100, compute_capability=capability)), is_sharded=False).attention
        for capability in ((7, 5), (8, 0))
    ]
    assert kinds == ["efficient", "flash"]
    eager = regime_of(replace(configuration, attention="eager"), A100)
    assert run_kind(eager, is_sharded=True) == RunKind(method="lora", attention="eager", is_sharded=True)


def test_bounds_are_bytes_around_the_prediction():
    """Rounded outwards; every shipped figure has an interval, and none is a flat share."""
    found = {figure: interval(figure, KIND) for figure in FIGURES}
    for each in found.values():
        low, high = each.around(10**9)
        assert low <= 10**9 <= high
        assert high - low >= int((each.high - each.low) * 10**9)
    assert len({(each.low, each.high) for each in found.values()}) == len(FIGURES)
    assert found["peak_allocated"].high < found["peak_reserved"].high


def test_a_lower_bound_is_not_below_that_of_what_it_contains():
    """What is allocated is reserved, and what is reserved is the process's, also where each is off on its own."""
    found = autofit.estimate(model="meta-llama/Llama-3.1-8B", gpus="8xA100-80G", seq_len=4096, method="lora").memory
    lows = [
        found.peak_allocated_interval_bytes[0],
        found.peak_reserved_interval_bytes[0],
        found.process_interval_bytes[0],
    ]
    assert lows == sorted(lows)
    assert found.process_interval_bytes[1] > found.process_bytes
