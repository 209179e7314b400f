"""What runs may move, and how far: properties of the estimate, and the whole way from records to a calibration."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from autofit.calibrate.fit import (
    HUBER_C,
    Observation,
    Widths,
    cautious,
    corrected_peak_bytes,
    estimate,
    fit_all,
    memory_widths,
    widths_of,
)
from autofit.memory.uncertainty import Residual, RunKind
from tests.calibrate.some_records import PREDICTED, a_record

WIDTHS = st.builds(Widths, machine=st.floats(0.001, 0.3), run=st.floats(0.001, 0.3))
RATIOS = st.floats(-5, 5)
SHARES = st.floats(0.1, 1.0)
OBSERVED = st.builds(Observation, log_ratio=RATIOS, share=SHARES)


def log_of(correction):
    """Return the logarithm of what predictions are multiplied by."""
    return math.log(correction.factor)


def objective(theta, observations, widths):
    """Return what the docstring says is minimised, with every run's share 1."""

    def rho(x):
        return x * x / 2 if abs(x) <= HUBER_C else HUBER_C * abs(x) - HUBER_C**2 / 2

    return theta**2 / (2 * widths.machine**2) + sum(rho((each.log_ratio - theta) / widths.run) for each in observations)


@given(WIDTHS)
def test_without_runs_nothing_moves(widths):
    """No observation: the factor is 1, and the estimate as unsure as a machine that nothing is known of."""
    found = cautious(estimate([], widths))
    assert (found.factor, found.num_runs, found.uncertainty_fraction) == (1.0, 0, widths.machine)


@given(OBSERVED, WIDTHS)
def test_one_run_is_bounded_by_the_widths_whatever_it_measured(observed, widths):
    """One run moves its figure by at most c t^2 / s, towards what it measured and never beyond."""
    moved = log_of(estimate([observed], widths))
    assert abs(moved) * observed.share <= HUBER_C * widths.machine**2 / widths.run * (1 + 1e-6) + 1e-12
    assert min(0, observed.log_ratio) - 1e-9 <= moved <= max(0, observed.log_ratio) + 1e-9


@settings(max_examples=20)
@given(st.floats(-0.1, 0.1), SHARES)
def test_many_consistent_runs_converge_to_where_they_agree(ratio, share):
    """Each tenfold number of runs that agree comes nearer, and a thousand leave less than a hundredth of the way."""
    widths = Widths(machine=0.01, run=0.01)
    agreed = Observation(log_ratio=ratio, share=share)
    left = [abs(log_of(estimate([agreed] * num, widths)) - ratio) for num in (1, 10, 100, 1000)]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(left))
    assert left[-1] <= 0.01 * abs(ratio) + 1e-12


@pytest.mark.parametrize("ratio", [-0.08, 0.002, 0.05])
def test_a_real_bias_is_learned_with_the_shipped_widths(ratio):
    """Of 400 runs that are off by the same, at the widths of published runs, at least 98 % of it is taken."""
    found = estimate([Observation(log_ratio=ratio)] * 400, memory_widths())
    assert log_of(found) == pytest.approx(ratio, rel=0.02)
    assert log_of(cautious(found)) == pytest.approx(ratio, rel=0.1)


@settings(max_examples=40)
@given(st.lists(OBSERVED, max_size=8).flatmap(lambda each: st.tuples(st.just(each), st.permutations(each))), WIDTHS)
def test_the_order_of_runs_does_not_matter(both, widths):
    """Every permutation gives the same estimate, to the last bit."""
    one, other = both
    assert estimate(one, widths) == estimate(other, widths)


@settings(max_examples=40)
@given(st.lists(st.floats(-0.01, 0.01), min_size=5, max_size=20), st.floats(1, 50))
def test_an_outlier_is_limited(ratios, wild):
    """However wild one run is, it moves the estimate as far as one at the edge of what is believed, and no further."""
    widths = Widths(machine=0.002, run=0.002)
    edge = max(ratios) + 2 * HUBER_C * widths.run + 0.001
    usual = [Observation(log_ratio=ratio) for ratio in ratios]
    at_edge = log_of(estimate([*usual, Observation(log_ratio=edge)], widths))
    assert log_of(estimate([*usual, Observation(log_ratio=wild)], widths)) == pytest.approx(at_edge, abs=1e-9)


@settings(max_examples=40)
@given(st.lists(st.floats(-0.5, 0.5), min_size=1, max_size=6), WIDTHS)
def test_the_estimate_minimises_what_the_docstring_says(ratios, widths):
    """No theta of a fine grid around it is better."""
    observations = [Observation(log_ratio=ratio) for ratio in ratios]
    best = log_of(estimate(observations, widths))
    least = objective(best, observations, widths)
    steps = (sign * 10.0**-power for power in range(1, 7) for sign in (-1, 1))
    assert all(least <= objective(best + step, observations, widths) + 1e-9 for step in steps)


@settings(max_examples=40)
@given(st.lists(OBSERVED, max_size=6), WIDTHS)
def test_a_prediction_is_lowered_less_readily_than_raised(observations, widths):
    """Caution never raises a figure that runs say is too high, never lowers it by more than estimated, and leaves what
    is to be raised as estimated.
    """
    found = estimate(observations, widths)
    careful = cautious(found)
    if found.estimate_fraction >= 0:
        assert careful == found
    else:
        assert found.estimate_fraction <= careful.applied_fraction <= 0


def test_the_widths_are_those_of_the_residuals():
    """By hand: ratios 1.02 and 0.98 of one source, 1.01 twice of another."""
    kind = RunKind(method="full", attention="flash", is_sharded=False)
    rows = [("a", 1.02), ("a", 0.98), ("b", 1.01), ("b", 1.01)]
    given_ones = [Residual(source=source, kind=kind, figure="peak_allocated", ratio=ratio) for source, ratio in rows]
    logs = [math.log(ratio) for _, ratio in rows]
    spread = (logs[0] - logs[1]) / 2
    found = widths_of(given_ones)
    assert found.machine == pytest.approx(math.sqrt(sum(log * log for log in logs) / 4))
    assert found.run == pytest.approx(math.sqrt(2 * spread**2 / 2))


def test_each_part_is_corrected_by_itself():
    """Runs whose static part is 3 % larger, tokens as predicted and steps 20 % longer move the first and the last."""
    (fitted,) = fit_all([a_record(n, static=1.03, time=1.2) for n in range(300)])
    calibration = fitted.calibration
    assert calibration.num_runs == 300
    assert calibration.static.factor == pytest.approx(1.03, abs=0.001)
    assert calibration.per_token.factor == pytest.approx(1.0, abs=1e-6)
    assert calibration.time.factor == pytest.approx(1.2, abs=0.005)
    before, after = fitted.errors["peak"]
    assert before == pytest.approx(1 - 20 / 20.24, abs=1e-4)
    assert after < before / 10


def test_what_grows_with_tokens_is_compared_without_the_rest():
    """With 5 % more activations, everything else as predicted, the factor per token is 1.05 and the peak right."""
    (fitted,) = fit_all([a_record(n, per_token=1.05) for n in range(500)])
    assert fitted.calibration.static.factor == pytest.approx(1, abs=1e-9)
    assert fitted.calibration.per_token.factor == pytest.approx(1.05, abs=0.003)
    measured = a_record(0, per_token=1.05).peak_allocated_bytes
    assert corrected_peak_bytes(PREDICTED, fitted.calibration) == pytest.approx(measured, rel=0.002)


def test_a_machine_and_its_libraries_are_groups_of_their_own():
    """Runs of another device, or under another release, move nothing here."""
    off = {"static": 1.05}
    records = [
        a_record(1),
        a_record(2, device="H100-SXM-80G", **off),
        a_record(3, versions={"torch": "2.14.0"}, **off),
    ]
    fitted = {(each.calibration.device_name, each.calibration.versions["torch"]): each for each in fit_all(records)}
    assert fitted.keys() == {("A100-SXM-80G", "2.13.0"), ("A100-SXM-80G", "2.14.0"), ("H100-SXM-80G", "2.13.0")}
    assert fitted["A100-SXM-80G", "2.13.0"].calibration.static.factor == 1


def test_runs_that_say_nothing_are_left_out_and_counted():
    """Failed runs and runs without a step move nothing; shorter batches than planned say nothing of tokens and time."""
    short = a_record(1, per_token=0.3, time=0.3)
    ranks = tuple(structs.replace(rank, longest_batch_tokens=20) for rank in short.ranks)
    idle = tuple(structs.replace(rank, num_steps=0) for rank in short.ranks)
    records = [
        structs.replace(short, ranks=ranks),
        a_record(2, static=3.0, failure="out_of_memory"),
        structs.replace(a_record(3, static=3.0), ranks=idle),
    ]
    (fitted,) = fit_all(records)
    assert sum(fitted.num_left_out.values()) == 2
    calibration = fitted.calibration
    assert (calibration.static.factor, calibration.per_token.factor, calibration.time.factor) == (1, 1, 1)
    assert (calibration.static.num_runs, calibration.per_token.num_runs, calibration.time.num_runs) == (1, 0, 0)


def test_a_record_counts_once():
    """The same record twice, as after an import, weighs as one."""
    record = a_record(1, static=1.01)
    assert fit_all([record, record]) == fit_all([record])
