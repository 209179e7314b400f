"""Plans for a data set: memory for the longest batch, time for the average one, and a step that never changes."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from msgspec.structs import replace
from rich.console import Console

from autofit.errors import InputError
from autofit.plan import from_json, to_json
from autofit.report.whatif import whatif_report
from autofit.search import candidates, estimate, required_regimes, solve
from autofit.search.whatif import Answer, counterfactuals
from autofit.sources.lengths import planned_tokens
from autofit.spec.job import Model
from autofit.timing.batches import packed_rows
from tests.plans import a_distribution
from tests.search.worlds import PlausibleMemory, a_cluster, a_job, made_up_profile, profiles_for

LENGTHS = np.random.default_rng(5).lognormal(6, 1, 3000).astype(int) + 1
DATA = a_distribution(LENGTHS)
MEMORY = PlausibleMemory(1_000_000_000)


def a_data_job(cut=2048, global_batch=16, lengths=DATA, **restrictions):
    """Return a job on a data set, with no bound on positions."""
    job = a_job(global_batch, cut, **restrictions)
    model = replace(job.model, config={**job.model.config, "max_position_embeddings": 2**20})
    return replace(job, model=model, workload=replace(job.workload, lengths=lengths))


def planned(job, cluster):
    """Plan with made-up profiles and memory."""
    return solve(job, cluster, profiles_for(job, cluster), estimate_memory=MEMORY)


def test_unasked_sequences_are_padded():
    """With the lengths of the data batches are padded, without them equal; what the user allows goes before both."""
    cluster = a_cluster()
    assert {each.batching for each in candidates(a_data_job(), cluster)} == {"padded"}
    assert {each.batching for each in candidates(a_job(), cluster)} == {"equal"}
    both = a_data_job(batchings=("padding_free", "padded"))
    assert {each.batching for each in candidates(both, cluster)} == {"padded", "padding_free"}


def test_every_way_to_batch_keeps_the_global_batch():
    """No configuration, padded or not, trains another number of sequences in a step than was asked for."""
    job = a_data_job(batchings=("equal", "padded", "padding_free"))
    for num_devices in (1, 2, 4, 8):
        for each in candidates(job, a_cluster(num_devices)):
            assert each.global_batch_sequences == 16
            assert each.per_device_train_batch_size * each.gradient_accumulation_steps * num_devices == 16


def test_packed_rows_are_not_compared_with_sequences():
    """A step of as many packed rows is another step: packed is planned alone, and its rows are counted."""
    for others in (("padded",), ("equal", "padding_free")):
        with pytest.raises(InputError, match="several times as many sequences"):
            candidates(a_data_job(batchings=("packed", *others)), a_cluster())
    made = planned(a_data_job(batchings=("packed",)), a_cluster())
    rows = packed_rows(DATA, 2048)
    assert made.configuration.global_batch_sequences == 16
    assert made.epoch.mean_sequences == pytest.approx(16 * rows.mean_sequences)
    assert made.epoch.num_steps == math.ceil(rows.num_rows / 16)


def test_an_answer_says_that_packing_changes_the_step():
    """Beside a plan of sequences packed rows train another number in a step, which is said; padding_free the same."""
    made = planned(a_data_job(), a_cluster())
    for way, is_other in (("packed", True), ("padding_free", False)):
        other = planned(a_data_job(batchings=(way,)), a_cluster())
        console = Console(width=200, file=io.StringIO(), highlight=False)
        console.print(whatif_report(made, [Answer(words=way, plan=other, refused=None)], width=200))
        number = round(other.epoch.mean_sequences)
        said = "".join(console.file.getvalue().split())
        assert (f"{way}({number}sequencesastep,not16)" in said) is is_other


def test_packed_rows_and_rows_without_padding_are_one_code_path():
    """What is traced does not depend on whether somebody packed the rows before."""
    ways = [required_regimes(a_data_job(batchings=(way,)), a_cluster()) for way in ("packed", "padding_free")]
    assert ways[0] == ways[1]
    assert {regime.batching for regime in ways[0]} == {"packed"}


def test_memory_is_for_the_longest_batch():
    """Whatever the lengths are, memory is that of sequences all as long as the longest that can occur."""
    job = a_data_job(batchings=("padded",))
    cluster, short = a_cluster(), a_distribution([5] * 2990 + [9000] * 10)
    every = [
        planned(replace(job, workload=replace(job.workload, lengths=lengths)), cluster) for lengths in (DATA, short)
    ]
    alone = replace(job, workload=replace(job.workload, lengths=None))
    for made in every:
        same = estimate(alone, cluster, profiles_for(job, cluster), made.configuration, estimate_memory=MEMORY)
        assert made.memory == same.memory
        assert made.time.step_seconds < same.time.step_seconds


def test_the_cheaper_way_to_batch_is_chosen():
    """Allowed both, a plan leaves padding out where that is faster, and says what padding would take."""
    made = planned(a_data_job(batchings=("padded", "padding_free"), micro_batch_sequences=(4,)), a_cluster())
    assert made.configuration.batching == "padding_free"
    assert any(reason.startswith("batching padding_free: padded would") for reason in made.reasons)


def test_with_one_length_nothing_is_padded():
    """Where all sequences are of one length, every way to batch takes as long, and the plainest is taken."""
    job = a_data_job(cut=512, lengths=a_distribution([512] * 100), batchings=("padding_free", "padded"))
    made = planned(job, a_cluster())
    assert made.configuration.batching == "padded"
    assert made.epoch.padding_fraction == pytest.approx(0, abs=1e-9)
    assert made.time.tokens_per_second * made.time.step_seconds == pytest.approx(16 * 512)


@pytest.mark.parametrize("global_batch", [1, 16, 3000, 4096])
def test_an_epoch_trains_every_sequence_once(global_batch):
    """An epoch has as many steps as pieces of a global batch the data is cut into, and all tokens that are left."""
    made = planned(a_data_job(global_batch=global_batch), a_cluster(1))
    assert made.epoch.num_steps == len([*range(0, 3000, global_batch)])
    assert made.epoch.tokens == pytest.approx(np.minimum(LENGTHS, 2048).sum(), rel=0.001)
    assert made.epoch.seconds == made.epoch.num_steps * made.time.step_seconds
    assert made.epoch.dollars == pytest.approx(made.epoch.seconds / 3600 * 2.0)


def test_each_truncation_is_an_estimate_of_its_own():
    """What cutting elsewhere needs and takes is what an estimate for that length says; the planned one is in it."""
    job, cluster = a_data_job(), a_cluster()
    made = planned(job, cluster)
    cuts = [each.sequence_tokens for each in made.truncations]
    assert cuts == sorted(cuts)
    assert {512, 1024, 2048, 4096} <= {*cuts}
    assert max(cuts) <= LENGTHS.max()
    for each in made.truncations:
        other = replace(job, workload=replace(job.workload, sequence_tokens=each.sequence_tokens))
        same = estimate(other, cluster, profiles_for(job, cluster), made.configuration, estimate_memory=MEMORY)
        assert each.peak_allocated_bytes == same.memory.peak_allocated_bytes
        assert (each.epoch_seconds, each.epoch_dollars) == (same.epoch.seconds, same.epoch.dollars)
        kept = np.minimum(LENGTHS, each.sequence_tokens)
        assert each.tokens_lost_fraction == pytest.approx(1 - kept.sum() / LENGTHS.sum(), abs=0.002)
        assert each.sequences_cut_fraction == pytest.approx((each.sequence_tokens < LENGTHS).mean(), abs=0.005)


def test_a_length_with_another_code_path_is_left_out():
    """A length that a profile does not hold for has no truncation; the others stay."""
    job, cluster = a_data_job(), a_cluster()
    profiles = {
        regime: replace(made_up_profile(regime), min_sequence_tokens=1000) for regime in required_regimes(job, cluster)
    }
    made = solve(job, cluster, profiles, estimate_memory=MEMORY)
    assert min(each.sequence_tokens for each in made.truncations) >= 1000
    assert len(made.truncations) > 1


def test_no_length_is_asked_about_that_does_not_occur():
    """Of a plan for data it is not asked what longer sequences than the longest would need."""
    for cut, asked in ((1024, {512, 2048}), (int(LENGTHS.max()), {int(LENGTHS.max()) // 2})):
        made = planned(a_data_job(cut=cut), a_cluster())
        words = {change.words for change in counterfactuals(made) if change.kind == "length"}
        assert words == {f"sequences of {tokens:,} tokens" for tokens in asked}


def test_no_data_no_epoch():
    """Without the lengths of the data a plan has no epoch and no truncations."""
    made = planned(a_job(), a_cluster())
    assert (made.epoch, made.truncations) == (None, ())


def test_a_plan_for_data_comes_back_identical():
    """The distribution, the epoch and the truncations are read back as they were written."""
    made = planned(a_data_job(), a_cluster())
    assert from_json(to_json(made)) == made
    assert len(to_json(made).splitlines()) < 2000


def of_positions(num_positions):
    """Return a model with so many positions, in its own config or in that of its text part."""
    return [
        Model(name="m", config={"max_position_embeddings": num_positions}, origin="folder"),
        Model(name="m", config={"text_config": {"n_positions": num_positions}}, origin="folder"),
    ]


def test_the_planned_length_is_the_longest_that_can_occur():
    """The longest of the data, or the cut; the model's positions without one; a whole cut of a sample's data."""
    longest = int(LENGTHS.max())
    sample = replace(DATA, num_sequences=10**6)
    unbounded = Model(name="m", config={}, origin="folder")
    for model in (unbounded, *of_positions(2**20)):
        assert planned_tokens(DATA, None, model, packs=False) == longest
        assert planned_tokens(DATA, 512, model, packs=False) == 512
        assert planned_tokens(DATA, 10**6, model, packs=False) == longest
        assert planned_tokens(sample, 10**6, model, packs=False) == 10**6
        assert planned_tokens(sample, None, model, packs=False) == longest
        assert planned_tokens(DATA, 10**6, model, packs=True) == 10**6
    for model in of_positions(1024):
        assert planned_tokens(DATA, None, model, packs=False) == 1024
        assert planned_tokens(DATA, 2048, model, packs=False) == 2048
