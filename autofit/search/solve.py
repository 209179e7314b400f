"""From a job, a cluster and traced profiles to the plan: the cheapest configuration that fits, and its ladder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec
import numpy as np
from msgspec.structs import replace

from autofit.errors import InputError
from autofit.plan import Inputs, Plan, Rung
from autofit.search.allowed import allowed
from autofit.search.evaluate import Evaluated, Evaluator, MemoryEstimator, stage_misfit
from autofit.search.nothing_fits import Search, changes, refusal
from autofit.search.rank import Ranking
from autofit.search.rules import Site, broken_rule, rules_for_given
from autofit.search.settle import Settled, evaluator_of, nearest_row, settled
from autofit.search.table import Rows, Table, tabulate
from autofit.search.truncate import truncations
from autofit.search.words import (
    allocator_reasons,
    attention_reasons,
    calibration_reasons,
    cheaper_rivals,
    count_reasons,
    describe,
    evaluation_reasons,
    knob_reasons,
    no_time_reason,
    objective_reason,
    precision_reason,
    routing_reasons,
    stage_words,
)
from autofit.spec.configuration import Configuration
from autofit.spec.estimate import STAGES
from autofit.spec.hardware import Cluster
from autofit.spec.job import Job
from autofit.spec.profile import ProfileSet, Regime, RegimeProfile
from autofit.timing import estimate_cost, run_cost
from autofit.timing.batches import estimate_epoch


def required_regimes(job: Job, cluster: Cluster) -> tuple[Regime, ...]:
    """Return the code paths that have to be traced before `solve`.

    Raises:
        InputError: see `candidates`; or every configuration falls to a rule.
    """
    return allowed(job, cluster).regimes(cluster)


def explaining_regimes(job: Job, cluster: Cluster) -> tuple[Regime, ...]:
    """Return further code paths that a refusal can be explained with, in case nothing fits.

    Given their profiles too, `solve` also checks other methods and more devices before it names them as a way out.
    """
    regimes: dict[Regime, None] = {}
    for change in changes(job, cluster):
        try:
            left = allowed(change.job(job), change.cluster(cluster))
        except InputError:
            continue
        regimes.update(dict.fromkeys(left.regimes(cluster)))
    known = set(required_regimes(job, cluster))
    return tuple(regime for regime in regimes if regime not in known)


def solve(
    job: Job,
    cluster: Cluster,
    profiles: ProfileSet,
    *,
    estimate_memory: MemoryEstimator | None = None,
    num_cores: int = 1,
) -> Plan:
    """Choose the cheapest configuration that fits.

    Args:
        job: what is trained, and what the user leaves free.
        cluster: what it is trained on.
        profiles: of `required_regimes`; a configuration whose profile is not there is left out, and counted.
        estimate_memory: takes the place of the memory model; for tests.
        num_cores: how many processes may work; with more than 1 this one is copied, see `autofit.search.ahead`.

    Raises:
        InputError: the job and the cluster do not go together.
        NothingFitsError: no configuration fits; says what would.
    """
    left = allowed(job, cluster)
    evaluator = evaluator_of(job, cluster, profiles, left.blocks, estimate_memory)
    table = tabulate(left, evaluator, num_cores=num_cores)
    if not len(table):
        raise _nothing_evaluated(job, table)
    ranking = Ranking(table, job.restrictions.objective)
    with evaluator.looking_ahead(_expected(table, ranking, evaluator) if num_cores > 1 else (), num_cores):
        table, chosen = settled(table, np.arange(len(table)), evaluator, ranking)
        if chosen is None:
            row = nearest_row(table, np.arange(len(table)))
            nearest = replace(evaluator.evaluate(table.configuration(row)), misfit=table.misfit_of(row))
            if nearest.misfit not in {
                "device memory",
                "host memory",
            }:  # it was seen, of this or of another, in a replay
                nearest = replace(nearest, memory=evaluator.replay(nearest.configuration))
            raise refusal(job, cluster, nearest, len(table), _search_of_smallest(profiles, estimate_memory))
        alternatives = []
        methods = table.knob("method")
        for method in dict.fromkeys(methods.tolist()):
            if method != chosen.configuration.method:
                rows = np.flatnonzero(methods == method)
                table, found = settled(table, rows, evaluator, ranking)
                alternatives.append(found or Settled(row := nearest_row(table, rows), table.configuration(row)))
        fallbacks = ranking.ladder(chosen.row, _smaller(table, chosen.row))
        return _plan(
            job,
            cluster,
            replace(evaluator.evaluate(chosen.configuration), memory=evaluator.replay(chosen.configuration)),
            evaluator,
            fallbacks=_descending(chosen.configuration, map(table.configuration, fallbacks), evaluator),
            alternatives=[
                _rung(each.configuration, evaluator, fits=bool(table.fits[each.row])) for each in alternatives
            ],
            reasons=(
                objective_reason(job, cluster, chosen.configuration, evaluator.missing_figures(chosen.configuration)),
                *count_reasons(table, left),
                *knob_reasons(chosen.row, table, ranking, evaluator),
                precision_reason(job, chosen.configuration, cluster),
                *attention_reasons(job, chosen.configuration, evaluator.versions(chosen.configuration)),
                *routing_reasons(job, evaluator.profile(chosen.configuration)),
                *allocator_reasons(job, chosen.configuration, evaluator),
                *evaluation_reasons(chosen.configuration, evaluator),
            ),
        )


def estimate(
    job: Job,
    cluster: Cluster,
    profiles: ProfileSet,
    configuration: Configuration,
    *,
    estimate_memory: MemoryEstimator | None = None,
) -> Plan:
    """Estimate one given configuration, whether it fits or not. Nothing is searched.

    Raises:
        InputError: a library refuses the configuration, it trains another global batch, or it was not traced.
    """
    _refuse_broken(job, cluster, configuration)
    evaluator = Evaluator(
        cluster, job.workload, profiles, (configuration.per_device_train_batch_size,), estimate_memory
    )
    if evaluator.profile(configuration) is None:
        raise InputError(
            f"{job.model.name} has no traced profile for {describe(configuration)}.", to_fix="trace it first"
        )
    evaluated = evaluator.evaluate(configuration)
    evaluated = replace(evaluated, memory=evaluator.replay(configuration))
    missing = evaluator.missing_figures(configuration)
    unknown = (no_time_reason(cluster, missing),) if missing else ()
    attention = attention_reasons(job, configuration, evaluator.versions(configuration))
    stage = stage_misfit(evaluated.memory, cluster, STAGES)
    burst = () if stage is None else (f"Beside the steady steps, {stage_words(evaluated.memory, stage)}: too much.",)
    routing = routing_reasons(job, evaluator.profile(configuration))
    reasons = ("You gave this configuration; nothing was searched.", *burst, *attention, *routing, *unknown)
    return _plan(job, cluster, evaluated, evaluator, fallbacks=(), alternatives=(), reasons=reasons)


def profile_key(profile: RegimeProfile) -> str:
    """Identify a traced profile by what it was traced from."""
    traced = msgspec.json.encode((profile.model, profile.regime, sorted(profile.versions.items())))
    return f"{profile.model}-{hashlib.sha256(traced).hexdigest()[:12]}"


def _refuse_broken(job: Job, cluster: Cluster, configuration: Configuration) -> None:
    """Refuse what a library refuses; what a rule only avoids was asked for."""
    site = Site(cluster=cluster, config=job.model.config)
    rule = broken_rule(configuration, site, rules_for_given(cluster.software))
    if rule is not None:
        raise InputError(
            f"{describe(configuration)} cannot run: {rule.reason} ({rule.library} {rule.releases}; {rule.source}).",
            to_fix=f"change what the rule {rule.name} is about",
        )
    if configuration.num_processes not in cluster.parts:
        raise InputError(
            f"{describe(configuration)} runs {configuration.num_processes} processes on {cluster.num_devices} devices.",
            to_fix=f"give a number of processes from {', '.join(map(str, cluster.parts))}",
        )
    if configuration.global_batch_sequences != job.workload.global_batch_sequences:
        raise InputError(
            f"{describe(configuration)} trains {configuration.global_batch_sequences} sequences a step on "
            f"{configuration.num_processes} devices, not {job.workload.global_batch_sequences}.",
            to_fix="make micro-batch x accumulation x devices equal to the global batch",
        )


def _nothing_evaluated(job: Job, table: Table) -> InputError:
    if table.unmodelled and not table.num_untraced:
        return InputError(
            f"{job.model.name}: {'; '.join(table.unmodelled)} is not modelled.",
            to_fix="leave it out, or choose another",
        )
    return InputError(
        f"{job.model.name} has no traced profile for any configuration.",
        to_fix="trace it first, or allow a method and a precision that were traced",
    )


def _expected(table: Table, ranking: Ranking, evaluator: Evaluator) -> list[Configuration]:
    """Return what `solve` will look at more closely, if what is best of each method fits as it is.

    What needs most comes first: where a device is nearly full the least that would do is searched for, which takes
    longest, and should not be what all others wait for.
    """
    fitting = np.flatnonzero(table.fits)
    if not fitting.size:
        return []
    chosen, methods = ranking.best(fitting), table.knob("method")
    of_methods = [fitting[methods[fitting] == method] for method in dict.fromkeys(methods[fitting].tolist())]
    rows = [chosen, *(ranking.best(rows) for rows in of_methods if methods[rows[0]] != methods[chosen])]
    rungs = ranking.ladder(chosen, _smaller(table, chosen))
    expected = dict.fromkeys((row, False) for row in [*rows, *cheaper_rivals(chosen, table, ranking)])
    expected |= dict.fromkeys((row, True) for row in rungs)
    return [
        evaluator.evaluating_less(table.configuration(row)) if is_rung else table.configuration(row)
        for row, is_rung in sorted(expected, key=lambda each: -table.needed_bytes[each[0]])
    ]


def _search_of_smallest(profiles: ProfileSet, estimate_memory: MemoryEstimator | None) -> Search:
    """Return a search of the smallest micro-batch alone: enough to show that something fits."""

    def search(job: Job, cluster: Cluster) -> tuple[Configuration, int] | None:
        left = allowed(job, cluster).of_smallest_micro_batch()
        evaluator = evaluator_of(job, cluster, profiles, left.blocks, estimate_memory)
        table = tabulate(left, evaluator)
        if not len(table):
            return None
        _, found = settled(table, np.arange(len(table)), evaluator, Ranking(table, "cost"))
        return None if found is None else (found.configuration, evaluator.replay(found.configuration).needed_bytes)

    return search


def _smaller(table: Table, chosen: int) -> Rows:
    """Return what fits, has the method that was chosen, and needs less."""
    methods = table.knob("method")
    less = table.needed_bytes < table.needed_bytes[chosen]
    return np.flatnonzero(table.fits & less & (methods == methods[chosen]))


def _descending(chosen: Configuration, rungs: Iterable[Configuration], evaluator: Evaluator) -> tuple[Rung, ...]:
    """Keep of a ladder what needs less than all before it also when every allocation is replayed.

    A rung evaluates less at a time too: it may have been an evaluation that ran out of memory.
    """
    kept, lowest = [], evaluator.replay(chosen)
    for configuration, misfit in (evaluator.as_it_fits(evaluator.evaluating_less(rung)) for rung in rungs):
        memory = evaluator.replay(configuration)
        is_less = memory.peak_allocated_bytes < lowest.peak_allocated_bytes
        if is_less and memory.needed_bytes < lowest.needed_bytes and misfit == "none":
            kept.append(_rung(configuration, evaluator, fits=True))
            lowest = memory
    return tuple(kept)


def _plan(
    job: Job,
    cluster: Cluster,
    chosen: Evaluated,
    evaluator: Evaluator,
    *,
    fallbacks: Iterable[Rung],
    alternatives: Iterable[Rung],
    reasons: tuple[str, ...],
) -> Plan:
    profile = evaluator.profile(chosen.configuration)
    assert profile is not None, "what was evaluated has a profile"
    calibration = evaluator.calibration(chosen.configuration)
    plain = evaluator.uncalibrated(chosen.configuration)
    cost = estimate_cost(chosen.time, cluster, job.workload, chosen.configuration)
    epoch = estimate_epoch(chosen.time, cost, job.workload, chosen.configuration)
    return Plan(
        inputs=Inputs(job=job, cluster=cluster, profile_key=profile_key(profile)),
        configuration=chosen.configuration,
        memory=chosen.memory,
        time=chosen.time,
        cost=cost,
        epoch=epoch,
        run=None
        if job.run is None
        else run_cost(job.run, chosen.time, cost, epoch, chosen.configuration.num_processes),
        truncations=truncations(job, cluster, chosen.configuration, evaluator),
        fallbacks=tuple(fallbacks),
        alternatives=tuple(alternatives),
        reasons=(*reasons, *calibration_reasons(calibration, plain, chosen.memory, chosen.time)),
        versions=dict(profile.versions),
        uncalibrated=plain,
    )


def _rung(configuration: Configuration, evaluator: Evaluator, *, fits: bool) -> Rung:
    """Show a configuration with the figures that a plan of its own would have; of what does not fit, the least."""
    evaluated = evaluator.evaluate(configuration)
    memory = evaluator.replay(configuration) if fits else evaluator.known_replay(configuration) or evaluated.memory
    return Rung(
        configuration=configuration,
        peak_allocated_bytes=memory.peak_allocated_bytes,
        needed_bytes=memory.needed_bytes,
        step_seconds=evaluated.time.step_seconds,
        fits=fits,
    )
