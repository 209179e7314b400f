"""Batches of a data set, against brute force, random draws, and the library that packs them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autofit.spec.job import Workload
from autofit.timing import TimeModel, estimate_cost
from autofit.timing.batches import (
    best_fit_decreasing,
    expected_slowest,
    mean_sample_tokens,
    micro_batch_shape,
    packed_rows,
    padding_share,
    step_tokens,
)
from tests.plans import a_configuration, a_distribution
from tests.timing.hand_profiles import a_profile, a_segment, per_token
from tests.timing.test_assemble import ALONE, ONE, PAIR

FEW = [3, 3, 10, 20, 20, 20, 700]
LOGNORMAL = np.random.default_rng(1).lognormal(6, 1, 5000).astype(int) + 1
WORKLOAD = Workload(sequence_tokens=2048, global_batch_sequences=8, lengths=a_distribution(LOGNORMAL))
CUT = np.minimum(LOGNORMAL, 2048)


@pytest.mark.parametrize("cut", [5, 20, 100, 700])
@pytest.mark.parametrize("num_drawn", [1, 2, 3, 7])
def test_the_longest_of_a_batch_is_that_of_all_batches(num_drawn, cut):
    """The expected longest is the mean of the longest over every batch that can be drawn, each sequence once."""
    batches = list(itertools.combinations(np.minimum(FEW, cut).tolist(), num_drawn))
    expected = np.mean([max(batch) for batch in batches])
    assert a_distribution(FEW).expected_longest(num_drawn, cut) == pytest.approx(expected, rel=1e-9)


def test_more_than_there_are_or_of_a_sample_are_drawn_anew():
    """The longest of a draw from a sample, or of more than there are, is that of draws with replacement."""
    sampled = a_distribution(FEW, num_sequences=1000)
    for distribution, num_drawn in ((sampled, 3), (a_distribution(FEW[:3]), 4)):
        lengths = FEW[: distribution.num_measured_sequences]
        expected = np.mean([max(batch) for batch in itertools.product(lengths, repeat=num_drawn)])
        assert distribution.expected_longest(num_drawn, 700) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("num_drawn", [1, 2, 8, 64, 512])
@pytest.mark.parametrize("cut", [700, 2048, 10**6])
def test_bins_are_narrow_enough(num_drawn, cut):
    """With far more lengths than bins the expected longest is that of all 5,000 lengths within 0.5 %."""
    ordered = np.minimum(np.sort(LOGNORMAL), cut)
    ranks, num = np.arange(1, len(ordered) + 1), len(ordered)
    up_to = np.prod([np.maximum(ranks - i, 0) / (num - i) for i in range(num_drawn)], axis=0)
    expected = float((ordered * np.diff(up_to, prepend=0)).sum())
    assert a_distribution(LOGNORMAL).expected_longest(num_drawn, cut) == pytest.approx(expected, rel=0.005)


def drawn(shape, seed=0):
    """Draw cut lengths at random, with replacement."""
    return np.random.default_rng(seed).choice(CUT, shape)


SHARED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_processes": 8}


@pytest.mark.parametrize("batching", ["padded", "padding_free"])
@pytest.mark.parametrize(("sharding", "waits_each"), [("ddp", False), ("zero1", False), ("zero3", True)])
def test_the_slowest_rank_sets_the_pace(batching, sharding, waits_each):
    """A step takes as long as its slowest rank, and under stage 3 each micro-step: 2 % within 40,000 random steps.

    What a rank computes is its sequences padded to the longest, or their tokens.
    """
    configuration = a_configuration(batching=batching, sharding=sharding, **SHARED)
    num, tokens = micro_batch_shape(WORKLOAD, configuration)
    lengths = drawn((40_000, 8, 4, 2))
    work = lengths.max(axis=3) * 2 if batching == "padded" else lengths.sum(axis=3)
    slowest = work.max(axis=1).mean() if waits_each else work.mean(axis=2).max(axis=1).mean()
    assert num * tokens == pytest.approx(slowest, rel=0.02)


def test_one_rank_waits_for_none():
    """On one device an average micro-batch is what it is on average: twice the mean, or the longest of two."""
    alone = {**ALONE, "per_device_train_batch_size": 2}
    num, tokens = micro_batch_shape(WORKLOAD, a_configuration(batching="padding_free", **alone))
    assert num * tokens == pytest.approx(2 * CUT.mean(), rel=0.002)
    num, tokens = micro_batch_shape(WORKLOAD, a_configuration(batching="padded", **alone))
    assert (num, tokens) == (2, pytest.approx(drawn((100_000, 2)).max(axis=1).mean(), rel=0.01))
    assert micro_batch_shape(WORKLOAD, a_configuration(batching="equal", **alone)) == (2, 2048)


def test_without_padding_attention_works_within_sequences():
    """The shape that stands for sequences in one row has their tokens and the sum of their squares."""
    configuration = a_configuration(batching="padding_free", **ALONE)
    num, tokens = micro_batch_shape(WORKLOAD, configuration)
    each = configuration.per_device_train_batch_size
    assert num * tokens**2 == pytest.approx(each * (CUT.astype(float) ** 2).mean(), rel=0.005)


@settings(max_examples=50)
@given(
    values=st.lists(st.integers(1, 4000), min_size=1, max_size=8, unique=True),
    num_averaged=st.integers(1, 32),
    num_ranks=st.integers(1, 64),
)
def test_waiting_costs_no_less_than_nothing_and_no_more_than_all(values, num_averaged, num_ranks):
    """The slowest rank is between the mean and the longest; averaging more, or fewer ranks, never makes it slower."""
    shares = [1 / len(values)] * len(values)
    ordered = sorted(values)
    slowest = expected_slowest(ordered, shares, num_averaged, num_ranks)
    assert np.mean(values) * (1 - 1e-9) <= slowest <= max(values) * (1 + 1e-9)
    assert expected_slowest(ordered, shares, num_averaged + 1, num_ranks) <= slowest * (1 + 1e-9)
    assert expected_slowest(ordered, shares, num_averaged, num_ranks + 1) >= slowest * (1 - 1e-9)


def test_padding_is_what_is_not_trained():
    """Of a padded batch that share is padding which random batches have; none where nothing is padded."""
    configuration = a_configuration(batching="padded", **ALONE)
    batches = drawn((100_000, 2))
    expected = 1 - batches.mean() / batches.max(axis=1).mean()
    assert padding_share(WORKLOAD, configuration) == pytest.approx(expected, abs=0.01)
    assert padding_share(WORKLOAD, a_configuration(batching="padding_free", **ALONE)) == pytest.approx(0, abs=1e-9)


def packed_by_trl(lengths, row_tokens):
    """Return the tokens of each row that trl packs."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
    packed = trl.pack_dataset(rows, row_tokens, "bfd")
    return [len(row) for row in packed["input_ids"]]


@pytest.mark.parametrize("row_tokens", [512, 2048, 8192])
def test_rows_are_those_that_trl_packs(row_tokens):
    """Of 5,000 sequences trl makes as many rows, as full, within 1 %; of one batch of them exactly as many."""
    found, rows = packed_rows(a_distribution(LOGNORMAL), row_tokens), packed_by_trl(LOGNORMAL, row_tokens)
    assert found.num_rows == pytest.approx(len(rows), rel=0.01)
    assert found.mean_tokens == pytest.approx(np.mean(rows), rel=0.01)
    assert found.mean_sequences == pytest.approx(5000 / len(rows), rel=0.01)
    assert found.fill_fraction <= 1
    batch = LOGNORMAL[:900]
    few = packed_by_trl(batch, row_tokens)
    assert best_fit_decreasing(np.minimum(batch, row_tokens).tolist(), row_tokens) == len(few)


@settings(max_examples=100)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=60))
def test_packing_is_no_worse_than_half_full(lengths):
    """Rows are at least as many as the tokens need, at most as many as the sequences, and more than half full."""
    num_rows = best_fit_decreasing(lengths, 100)
    assert sum(lengths) / 100 <= num_rows <= len(lengths)
    assert num_rows <= 2 * sum(lengths) / 100 + 1


PROFILE = a_profile(segments=(a_segment(matmul_flops=per_token(6e9)),))


@pytest.mark.parametrize("batching", ["equal", "padded", "padding_free", "packed"])
def test_speed_counts_what_is_trained(batching):
    """Seconds are those of the tokens computed, padding too; rate and price are for the tokens that data has."""
    configuration = a_configuration(batching=batching, **ALONE)
    time = TimeModel(PROFILE, ONE, WORKLOAD).time(configuration)
    useful = 8 * (packed_rows(WORKLOAD.lengths, 2048).mean_tokens if batching == "packed" else CUT.mean())
    assert step_tokens(WORKLOAD, configuration) == pytest.approx(useful, rel=0.002)
    assert time.tokens_per_second * time.step_seconds == pytest.approx(useful, rel=0.002)
    num, tokens = micro_batch_shape(WORKLOAD, configuration)
    assert time.terms["matmul"] == pytest.approx(4 * num * tokens * 6e9 / 265.5e12, rel=0.01)
    cost = estimate_cost(time, ONE, WORKLOAD, configuration)
    assert cost.device_hours_per_million_tokens == pytest.approx(time.step_seconds / 3600 / useful * 1e6, rel=0.002)


def test_less_padding_is_faster():
    """For the same sequences, padding to the longest possible is slowest, and no padding fastest."""
    seconds = [
        TimeModel(PROFILE, PAIR, WORKLOAD).time(a_configuration(batching=batching, num_processes=2)).step_seconds
        for batching in ("equal", "padded", "padding_free")
    ]
    assert seconds[0] > seconds[1] > seconds[2]


def test_without_lengths_all_are_as_long():
    """A workload that knows no lengths has sequences of its length, whatever the batching is called."""
    plain = Workload(sequence_tokens=512, global_batch_sequences=8)
    for batching in ("equal", "padded", "padding_free", "packed"):
        configuration = a_configuration(batching=batching, **ALONE)
        assert micro_batch_shape(plain, configuration) == (2, 512)
        assert mean_sample_tokens(plain, configuration) == 512
