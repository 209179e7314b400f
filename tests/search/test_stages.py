"""What has to fit besides the steady steps: loading, engines, the first step, evaluation, saving."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from autofit.errors import InputError, NothingFitsError
from autofit.options import SearchWish, restrictions
from autofit.report.plan import unknowns
from autofit.search import estimate, solve
from autofit.search.evaluate import stage_misfit, usable_bytes
from autofit.spec.configuration import Evaluation
from autofit.spec.estimate import STAGES, Stage, Stages
from autofit.units import GIB
from autofit.writers.training_arguments import training_arguments
from tests.search.worlds import PlausibleMemory, a_cluster, a_job, an_estimate, profiles_for

BUDGET = 80 * GIB


class StagedMemory(PlausibleMemory):
    """The rule of thumb, half as much again in the first step, and whole models in host memory while loading."""

    def __call__(self, profile, configuration, cluster, workload, *, replays=False):
        """Estimate, with stages where every allocation is replayed."""
        steady = super().__call__(profile, configuration, cluster, workload)
        whole = 0 if configuration.zero_stage == 3 else 20 * GIB * cluster.num_devices_per_node
        stages = Stages(
            loading=Stage(device_bytes=0, host_bytes=whole),
            first_step=Stage(device_bytes=steady.needed_bytes * 3 // 2, host_bytes=0),
        )
        return replace(steady, stages=stages if replays else None)


def planned(cluster, memory, sequence_tokens=512, **wishes):
    """Return the plan of a small job."""
    job = a_job(8, sequence_tokens, **wishes)
    return solve(job, cluster, profiles_for(job, cluster), estimate_memory=memory)


def test_the_first_step_of_a_plan_and_of_every_rung_fits():
    """Half as much again as the steady steps has room; without being held it would not, and a larger one is chosen."""
    cluster, memory = a_cluster(2), StagedMemory(8 * 10**9)
    held = planned(cluster, memory, sequence_tokens=4096, methods=("full",))
    needed = [held.memory.needed_bytes, *(rung.needed_bytes for rung in held.fallbacks)]
    assert max(needed) * 3 // 2 <= usable_bytes(BUDGET)
    free = planned(cluster, memory, sequence_tokens=4096, methods=("full",), held_stages=())
    assert free.memory.needed_bytes * 3 // 2 > usable_bytes(BUDGET)


def test_every_rank_of_a_node_loads_into_the_same_host_memory():
    """Two copies of 20 GiB do not fit a host of 32 GiB, so that the model is built in parts; they fit 64 GiB."""
    memory = StagedMemory(10**8)
    assert planned(a_cluster(2, host_memory_bytes=32 * GIB), memory).configuration.sharding == "zero3"
    assert planned(a_cluster(2, host_memory_bytes=64 * GIB), memory).configuration.sharding != "zero3"
    small = a_cluster(2, host_memory_bytes=32 * GIB)
    assert planned(small, memory, held_stages=("first_step",)).configuration.sharding != "zero3"


def test_a_refusal_says_which_stage_has_no_room():
    """It names what the stage needs and what there is, and how to plan without it."""
    cluster = a_cluster(2, host_memory_bytes=32 * GIB)
    with pytest.raises(NothingFitsError) as refused:
        planned(cluster, StagedMemory(10**8), shardings=("ddp",))
    assert "while the model is loaded it needs 0.00 GiB of the device and 40.00 GiB" in refused.value.message
    assert "32.00 GiB" in refused.value.message
    assert "--hold" in refused.value.message


def test_a_stage_shares_the_device_with_the_context():
    """What is left of the device beside context and buffers is what a stage may allocate."""
    steady = replace(an_estimate(GIB, BUDGET), peak_reserved_bytes=GIB, process_bytes=3 * GIB)
    room = usable_bytes(BUDGET) - 2 * GIB
    for beyond, expected in ((0, None), (1, "evaluation")):
        memory = replace(steady, stages=Stages(evaluation=Stage(device_bytes=room + beyond, host_bytes=None)))
        assert stage_misfit(memory, a_cluster(1), STAGES) == expected
        assert stage_misfit(memory, a_cluster(1), ("loading",)) is None


def test_what_is_held_is_asked_for_by_name():
    """Unasked all stages are held; none is a word of its own."""
    assert restrictions(SearchWish()).held_stages == STAGES
    assert restrictions(SearchWish(hold=["saving", "loading"])).held_stages == ("saving", "loading")
    assert restrictions(SearchWish(hold=["none"])).held_stages == ()
    for wrong in (["none", "saving"], ["training"]):
        with pytest.raises(InputError, match="--hold"):
            restrictions(SearchWish(hold=wrong))


class EvaluatingMemory(PlausibleMemory):
    """The rule of thumb, and 15 GiB for each sequence of an evaluation's batch."""

    def __call__(self, profile, configuration, cluster, workload, *, replays=False):
        """Estimate, with an evaluation where every allocation is replayed."""
        steady = super().__call__(profile, configuration, cluster, workload)
        needed = 15 * GIB * configuration.per_device_eval_batch_size
        stages = Stages(evaluation=Stage(device_bytes=needed, host_bytes=None))
        return replace(steady, stages=stages if replays else None)


def test_an_evaluation_runs_on_the_micro_batch_where_the_usual_batch_does_not_fit():
    """Eight sequences need 120 of 80 GiB: unasked it is the batch of training, in the plan and in its rungs."""
    plan = planned(a_cluster(2), EvaluatingMemory(10**8))
    for configuration in (plan.configuration, *(rung.configuration for rung in plan.fallbacks)):
        assert configuration.per_device_eval_batch_size == configuration.per_device_train_batch_size <= 4
    assert training_arguments(plan)["per_device_eval_batch_size"] == plan.configuration.per_device_train_batch_size
    assert any(reason.startswith("per_device_eval_batch_size") and "120.00 GiB" in reason for reason in plan.reasons)
    free = planned(a_cluster(2), EvaluatingMemory(10**8), held_stages=())
    assert free.configuration.per_device_eval_batch_size == 8


def test_a_rung_evaluates_less_than_what_ran_out_of_memory():
    """It may have been an evaluation: where eight sequences fit, rungs have no more than their micro-batch either."""
    plan = planned(a_cluster(2), PlausibleMemory(10**8))
    assert plan.configuration.per_device_eval_batch_size == 8
    assert plan.fallbacks
    for rung in plan.fallbacks:
        assert rung.configuration.per_device_eval_batch_size == rung.configuration.per_device_train_batch_size < 8


def test_the_least_memory_is_not_asked_for_training_alone():
    """Where memory decides, evaluations run on the micro-batch though eight fit; a batch that is given stays."""
    plan = planned(a_cluster(2), PlausibleMemory(10**8), objective="memory")
    assert plan.configuration.per_device_eval_batch_size == plan.configuration.per_device_train_batch_size < 8
    given = {"evaluation": Evaluation(per_device_eval_batch_size=8)}
    plan = planned(a_cluster(2), PlausibleMemory(10**8), objective="memory", **given)
    assert plan.configuration.per_device_eval_batch_size == 8


class BurstingMemory(PlausibleMemory):
    """The rule of thumb, and a first step that no device holds where layers are checkpointed."""

    def __call__(self, profile, configuration, cluster, workload, *, replays=False):
        """Estimate, with the first step where every allocation is replayed."""
        steady = super().__call__(profile, configuration, cluster, workload)
        needed = 2 * BUDGET if configuration.gradient_checkpointing else 0
        stages = Stages(first_step=Stage(device_bytes=needed, host_bytes=None))
        return replace(steady, stages=stages if replays else None)


def test_a_rung_whose_first_step_bursts_is_left_out():
    """Its steady steps need less than all before it, and it would end in its first."""
    asked = {"gradient_checkpointing": None}
    rungs = planned(a_cluster(2), BurstingMemory(10**8), **asked).fallbacks
    assert not any(rung.configuration.gradient_checkpointing for rung in rungs)
    free = planned(a_cluster(2), BurstingMemory(10**8), held_stages=(), **asked).fallbacks
    assert any(rung.configuration.gradient_checkpointing for rung in free)


class BothMemory(EvaluatingMemory):
    """The same, and steps that fit only with segments that grow."""

    def __call__(self, profile, configuration, cluster, workload, *, replays=False):
        """Estimate seven tenths of the device, and more than all of it where segments do not grow."""
        bursts = replays and not configuration.expandable_segments
        steady = an_estimate(int(BUDGET * (1.1 if bursts else 0.7)), BUDGET)
        return replace(
            steady, stages=super().__call__(profile, configuration, cluster, workload, replays=replays).stages
        )


def test_a_smaller_evaluation_and_growing_segments_may_both_be_needed():
    """A plan that fits with both alone is found."""
    plan = planned(a_cluster(2), BothMemory(10**8))
    assert plan.configuration.expandable_segments
    assert plan.configuration.per_device_eval_batch_size == plan.configuration.per_device_train_batch_size


def test_a_batch_that_is_given_is_kept():
    """Six sequences do not fit, so that nothing does; five do."""
    asked = {"evaluation": Evaluation(per_device_eval_batch_size=5)}
    assert planned(a_cluster(2), EvaluatingMemory(10**8), **asked).configuration.per_device_eval_batch_size == 5
    with pytest.raises(NothingFitsError, match="in an evaluation it needs 90") as refused:
        planned(a_cluster(2), EvaluatingMemory(10**8), evaluation=Evaluation(per_device_eval_batch_size=6))
    assert "--per-device-eval-batch-size" in (refused.value.to_fix or "")


def test_logits_of_a_number_that_nobody_knows_are_not_guessed():
    """A plan that has to hold them is refused; one that has not plans the rest, and says that it does not know."""
    asked = {"evaluation": Evaluation(keeps_predictions=True)}
    with pytest.raises(InputError, match="compute_metrics"):
        planned(a_cluster(2), PlausibleMemory(10**8), **asked)
    plan = planned(a_cluster(2), PlausibleMemory(10**8), held_stages=("first_step",), **asked)
    assert any("logits" in words for words in unknowns(plan))


def test_an_estimate_says_what_bursts_beside_the_steady_steps():
    """Its steps fit, its evaluation does not: a figure alone would not tell a reader so."""
    job, cluster = a_job(8), a_cluster(2)
    configuration = planned(cluster, EvaluatingMemory(10**8), held_stages=()).configuration
    profiles = profiles_for(job, cluster)
    given = estimate(job, cluster, profiles, configuration, estimate_memory=EvaluatingMemory(10**8))
    assert given.memory.fits
    assert any("in an evaluation it needs 120.00 GiB" in reason for reason in given.reasons)
