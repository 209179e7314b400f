"""From a job, a cluster and traced profiles to the plan: the cheapest configuration that fits, and its ladder."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import msgspec

from autofit.errors import InputError
from autofit.plan import Inputs, Plan, Rung
from autofit.search.evaluate import Evaluated, Evaluator, MemoryEstimator, has_ample_room, leaves_headroom
from autofit.search.nothing_fits import Search, changes, refusal
from autofit.search.rank import best, cost_of, ladder
from autofit.search.rules import Rule, Site, broken_rule, rules_for, rules_for_given
from autofit.search.space import candidates
from autofit.search.truncate import truncations
from autofit.search.words import (
    allocator_reasons,
    calibration_reasons,
    count_reasons,
    describe,
    knob_reasons,
    no_time_reason,
    objective_reason,
    precision_reason,
)
from autofit.spec.configuration import Configuration, Method
from autofit.spec.hardware import Cluster
from autofit.spec.job import Job
from autofit.spec.profile import ProfileSet, Regime, RegimeProfile
from autofit.spec.regimes import regime_of
from autofit.timing import estimate_cost, run_cost
from autofit.timing.batches import estimate_epoch


def required_regimes(job: Job, cluster: Cluster) -> tuple[Regime, ...]:
    """Return the code paths that have to be traced before `solve`.

    Raises:
        InputError: see `candidates`; or every configuration falls to a rule.
    """
    return _regimes(_allowed(job, cluster).configurations, cluster)


def explaining_regimes(job: Job, cluster: Cluster) -> tuple[Regime, ...]:
    """Return further code paths that a refusal can be explained with, in case nothing fits.

    Given their profiles too, `solve` also checks other methods and more devices before it names them as a way out.
    """
    regimes: dict[Regime, None] = {}
    for change in changes(job, cluster):
        try:
            allowed = _allowed(change.job(job), change.cluster(cluster))
        except InputError:
            continue
        regimes.update(dict.fromkeys(_regimes(allowed.configurations, cluster)))
    known = set(required_regimes(job, cluster))
    return tuple(regime for regime in regimes if regime not in known)


def solve(job: Job, cluster: Cluster, profiles: ProfileSet, *, estimate_memory: MemoryEstimator | None = None) -> Plan:
    """Choose the cheapest configuration that fits.

    Args:
        job: what is trained, and what the user leaves free.
        cluster: what it is trained on.
        profiles: of `required_regimes`; a configuration whose profile is not there is left out, and counted.
        estimate_memory: takes the place of the memory model; for tests.

    Raises:
        InputError: the job and the cluster do not go together.
        NothingFitsError: no configuration fits; says what would.
    """
    allowed = _allowed(job, cluster)
    evaluator = _evaluator(job, cluster, profiles, allowed.configurations, estimate_memory)
    evaluated: Sequence[Evaluated] = _evaluate(allowed.configurations, evaluator)
    if not evaluated:
        raise InputError(
            f"{job.model.name} has no traced profile for any configuration.",
            to_fix="trace it first, or allow a method and a precision that were traced",
        )
    objective = job.restrictions.objective
    cost = cost_of(evaluated, objective)

    def choose(among: Sequence[Evaluated]) -> Evaluated:
        return best(among, objective, cost)

    evaluated, chosen = _settled(evaluated, evaluator, choose)
    if chosen is None:
        raise refusal(job, cluster, evaluated, _search_of_smallest(profiles, estimate_memory))
    alternatives: list[Evaluated] = []
    for method in dict.fromkeys(each.configuration.method for each in evaluated):
        if method != chosen.configuration.method:
            evaluated, found = _settled(evaluated, evaluator, choose, method)
            alternatives.append(found or _nearest(evaluated, method))
    replayed = evaluator.replay(chosen.configuration)
    smaller = [each for each in evaluated if each.fits and each.needed_bytes < replayed.needed_bytes]
    return _plan(
        job,
        cluster,
        replace(chosen, memory=replayed),
        evaluator,
        fallbacks=ladder(chosen, smaller, cost),
        alternatives=alternatives,
        reasons=(
            objective_reason(job, cluster, chosen, evaluator.missing_figures(chosen.configuration)),
            *count_reasons(evaluated, allowed.fallen, len(allowed.configurations) - len(evaluated)),
            *knob_reasons(chosen, evaluated, cost),
            precision_reason(job, chosen.configuration, cluster),
            *allocator_reasons(job, chosen.configuration, evaluator),
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
    evaluator = _evaluator(job, cluster, profiles, (configuration,), estimate_memory)
    if evaluator.profile(configuration) is None:
        raise InputError(
            f"{job.model.name} has no traced profile for {describe(configuration)}.", to_fix="trace it first"
        )
    evaluated = evaluator.evaluate(configuration)
    evaluated = replace(evaluated, memory=evaluator.replay(configuration))
    missing = evaluator.missing_figures(configuration)
    unknown = (no_time_reason(cluster, missing),) if missing else ()
    reasons = ("You gave this configuration; nothing was searched.", *unknown)
    return _plan(job, cluster, evaluated, evaluator, fallbacks=(), alternatives=(), reasons=reasons)


def profile_key(profile: RegimeProfile) -> str:
    """Identify a traced profile by what it was traced from."""
    traced = msgspec.json.encode((profile.model, profile.regime, sorted(profile.versions.items())))
    return f"{profile.model}-{hashlib.sha256(traced).hexdigest()[:12]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Allowed:
    configurations: tuple[Configuration, ...]
    fallen: Counter[Rule]


def _allowed(job: Job, cluster: Cluster) -> _Allowed:
    every = candidates(job, cluster)
    site, rules = Site(cluster=cluster, config=job.model.config), rules_for(cluster.software, job.restrictions)
    verdicts = [broken_rule(each, site, rules) for each in every]
    fallen = Counter(rule for rule in verdicts if rule is not None)
    allowed = tuple(each for each, rule in zip(every, verdicts, strict=True) if rule is None)
    if allowed:
        return _Allowed(configurations=allowed, fallen=fallen)
    raise InputError(
        f"{job.model.name} cannot be trained as asked on {cluster.device.name}: "
        + "; ".join(f"{rule.reason} ({rule.name})" for rule in fallen),
        to_fix="leave the precision, optimizer or attention open, or choose another",
    )


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


def _regimes(configurations: Iterable[Configuration], cluster: Cluster) -> tuple[Regime, ...]:
    return tuple(dict.fromkeys(regime_of(each, cluster.device) for each in configurations))


def _evaluator(
    job: Job,
    cluster: Cluster,
    profiles: ProfileSet,
    configurations: Iterable[Configuration],
    estimate_memory: MemoryEstimator | None,
) -> Evaluator:
    micro_batches = [each.per_device_train_batch_size for each in configurations]
    return Evaluator(cluster, job.workload, profiles, micro_batches, estimate_memory)


def _evaluate(configurations: Iterable[Configuration], evaluator: Evaluator) -> list[Evaluated]:
    return [evaluator.evaluate(each) for each in configurations if evaluator.profile(each) is not None]


def _search_of_smallest(profiles: ProfileSet, estimate_memory: MemoryEstimator | None) -> Search:
    """Return a search of the smallest micro-batch alone: enough to show that something fits."""

    def search(job: Job, cluster: Cluster) -> list[Evaluated]:
        allowed = _allowed(job, cluster).configurations
        smallest = min(each.per_device_train_batch_size for each in allowed)
        tried = [each for each in allowed if each.per_device_train_batch_size == smallest]
        return _evaluate(tried, _evaluator(job, cluster, profiles, tried, estimate_memory))

    return search


def _nearest(evaluated: Sequence[Evaluated], method: Method) -> Evaluated:
    """Return what needs least of a method of which nothing fits."""
    return min((e for e in evaluated if e.configuration.method == method), key=lambda each: each.needed_bytes)


def _settled(
    evaluated: Sequence[Evaluated],
    evaluator: Evaluator,
    choose: Callable[[Sequence[Evaluated]], Evaluated],
    method: Method | None = None,
) -> tuple[Sequence[Evaluated], Evaluated | None]:
    """Find the best, of one method or of all, that still fits when every allocation is replayed.

    One with ample room is taken without a replay. One that does not fit is marked, with those of its method that need
    as much or more. What the allocator cannot do without has to leave as much of the device free as tensors have.
    """
    while fitting := [each for each in evaluated if each.fits and method in {None, each.configuration.method}]:
        chosen = choose(fitting)
        settled = _as_it_fits(chosen, evaluator)
        if settled is not None:
            return evaluated, settled
        evaluated = [replace(e, misfit="fragmentation") if _fares_no_better(e, chosen) else e for e in evaluated]
    return evaluated, None


def _as_it_fits(best: Evaluated, evaluator: Evaluator) -> Evaluated | None:
    """Return a configuration as it fits when replayed: as it is, or with segments that grow; None if neither does."""
    if has_ample_room(best.memory) or leaves_headroom(evaluator.replay(best.configuration)):
        return best
    if evaluator.can_grow_segments:
        grown = replace(best, configuration=replace(best.configuration, expandable_segments=True))
        if leaves_headroom(evaluator.replay(grown.configuration)):
            return grown
    return None


def _fares_no_better(each: Evaluated, failed: Evaluated) -> bool:
    same_method = each.configuration.method == failed.configuration.method
    return each.fits and same_method and each.needed_bytes >= failed.needed_bytes


def _plan(
    job: Job,
    cluster: Cluster,
    chosen: Evaluated,
    evaluator: Evaluator,
    *,
    fallbacks: Iterable[Evaluated],
    alternatives: Iterable[Evaluated],
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
        fallbacks=tuple(_rung(each) for each in fallbacks),
        alternatives=tuple(_rung(each) for each in alternatives),
        reasons=(*reasons, *calibration_reasons(calibration, plain, chosen.memory, chosen.time)),
        versions=dict(profile.versions),
        uncalibrated=plain,
    )


def _rung(each: Evaluated) -> Rung:
    return Rung(
        configuration=each.configuration,
        peak_allocated_bytes=each.memory.peak_allocated_bytes,
        needed_bytes=each.needed_bytes,
        step_seconds=each.time.step_seconds,
        fits=each.fits,
    )
