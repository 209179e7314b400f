"""What to say when nothing fits: how near it was, and which changes were checked to make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from msgspec import Struct
from msgspec.structs import replace

from autofit.errors import InputError, NothingFitsError
from autofit.search.evaluate import HEADROOM_FRACTION, Evaluated, usable_bytes
from autofit.search.space import METHODS
from autofit.search.words import STAGE_WORDS, describe, stage_words
from autofit.spec.configuration import Configuration
from autofit.spec.hardware import Cluster
from autofit.spec.job import Job, Restrictions
from autofit.units import format_bytes

SHORTEST_TOKENS = 128
"""Below this a shorter sequence is no longer the same job."""
NUM_DEVICES_TRIED = 8
"""Devices of one node; more are another kind of purchase."""

Search = Callable[[Job, Cluster], tuple[Configuration, int] | None]
"""Finds the cheapest of the smallest micro-batches of a job that fits a cluster, and the bytes that it needs."""
_EVALUATE_LESS = (
    "evaluate in smaller batches (--per-device-eval-batch-size), keep less of the logits (--eval-accumulation-steps, "
    "or a preprocess_logits_for_metrics in the script), or plan without the evaluation (--hold); or else "
)


class Change(Struct, frozen=True, kw_only=True):
    """Something a user can do differently."""

    words: str
    """As the end of "it fits with"."""
    kind: str
    """Of several of a kind the first that helps is the smallest change."""
    job: Callable[[Job], Job] = lambda job: job
    cluster: Callable[[Cluster], Cluster] = lambda cluster: cluster


def refusal(job: Job, cluster: Cluster, nearest: Evaluated, num_evaluated: int, search: Search) -> NothingFitsError:
    """Describe the configuration that came nearest of so many, and what was checked to help."""
    found = fixes(job, cluster, search)
    return NothingFitsError(
        f"{job.model.name} does not fit {_devices(cluster)} of {format_bytes(cluster.device.memory_bytes)}: none of "
        f"{num_evaluated} configurations does.\n{_nearest_words(nearest, cluster)}",
        to_fix=(_EVALUATE_LESS if nearest.misfit == "evaluation" else "") + _fix_words(found),
        hint="autofit estimate prints every term of one configuration",
    )


def fixes(job: Job, cluster: Cluster, search: Search) -> tuple[str, ...]:
    """Return the changes, or failing that the pairs of changes, after which something was found to fit."""
    every = tuple(changes(job, cluster))
    singles = _helping([(change,) for change in every], job, cluster, search)
    return singles or _helping([pair for pair in combinations(every, 2) if _differ(pair)], job, cluster, search)


def changes(job: Job, cluster: Cluster) -> Iterator[Change]:
    """Yield what could be done differently, of each kind the smallest change first."""
    yield from _other_methods(job.restrictions)
    yield from _lifted_restrictions(job.restrictions)
    yield from _shorter_sequences(job)
    yield from _more_devices(job, cluster)


def _helping(groups: Sequence[tuple[Change, ...]], job: Job, cluster: Cluster, search: Search) -> tuple[str, ...]:
    found: dict[tuple[str, ...], str] = {}
    for group in groups:
        kinds = tuple(change.kind for change in group)
        if kinds not in found and (words := _checked(group, job, cluster, search)):
            found[kinds] = words
    return tuple(found.values())


def _checked(group: tuple[Change, ...], job: Job, cluster: Cluster, search: Search) -> str | None:
    for change in group:
        job, cluster = change.job(job), change.cluster(cluster)
    try:
        found = search(job, cluster)
    except InputError:
        return None
    if found is None:
        return None
    configuration, needed_bytes = found
    words = " and ".join(change.words for change in group)
    return f"{words} ({describe(configuration)}: {format_bytes(needed_bytes)})"


def _differ(pair: tuple[Change, ...]) -> bool:
    return pair[0].kind != pair[1].kind


def _other_methods(restrictions: Restrictions) -> Iterator[Change]:
    for method in METHODS:
        if restrictions.methods and method not in restrictions.methods:
            yield Change(words=f"method {method}", kind=f"method {method}", job=_with(methods=(method,)))
    if restrictions.precision not in {"pure-bf16", "fp32"} and "full" in (restrictions.methods or METHODS):
        yield Change(
            words="precision pure-bf16 (weights and Adam's state in bf16: lower quality)",
            kind="precision",
            job=_with(precision="pure-bf16"),
        )


def _lifted_restrictions(restrictions: Restrictions) -> Iterator[Change]:
    for field, words in (
        ("optims", "another optimizer"),
        ("shardings", "another sharding"),
        ("micro_batch_sequences", "a smaller micro-batch"),
    ):
        if getattr(restrictions, field):
            yield Change(words=words, kind=field, job=_with(**{field: ()}))
    if restrictions.gradient_checkpointing is False:
        yield Change(words="gradient checkpointing", kind="checkpointing", job=_with(gradient_checkpointing=None))


def _shorter_sequences(job: Job) -> Iterator[Change]:
    tokens = job.workload.sequence_tokens // 2
    while tokens >= SHORTEST_TOKENS:
        yield Change(words=f"sequences of {tokens} tokens", kind="length", job=_of_length(tokens))
        tokens //= 2


def _more_devices(job: Job, cluster: Cluster) -> Iterator[Change]:
    if cluster.num_nodes > 1:
        return
    for num_devices in range(cluster.num_devices_per_node + 1, NUM_DEVICES_TRIED + 1):
        if job.workload.global_batch_sequences % num_devices == 0:
            yield Change(
                words=f"{num_devices} devices",
                kind="devices",
                job=_with(num_processes=()),
                cluster=lambda on, num=num_devices: replace(on, num_devices_per_node=num),  # type: ignore[misc]
            )


def _with(**fields: object) -> Callable[[Job], Job]:
    return lambda job: replace(job, restrictions=replace(job.restrictions, **fields))


def _of_length(tokens: int) -> Callable[[Job], Job]:
    return lambda job: replace(job, workload=replace(job.workload, sequence_tokens=tokens))


def _nearest_words(nearest: Evaluated, cluster: Cluster) -> str:
    memory = nearest.memory
    usable = usable_bytes(memory.budget_bytes)
    words = f"Nearest: {describe(nearest.configuration)}: it needs {format_bytes(nearest.needed_bytes)}"
    host = (
        "" if cluster.host_memory_bytes is None else f" (a node's host has {format_bytes(cluster.host_memory_bytes)})"
    )
    if nearest.misfit in STAGE_WORDS:
        return f"{words}, but {stage_words(memory, nearest.misfit)}{host}; --hold says which stages have to fit."
    if nearest.misfit == "host memory":
        return f"{words}, and {format_bytes(memory.host_bytes or 0)} of its node's host memory{host}."
    if nearest.misfit == "fragmentation":
        return f"{words}, which does not leave {HEADROOM_FRACTION:.0%} free as torch's allocator lays it out."
    over = f"{format_bytes(nearest.needed_bytes - usable)} more than the {format_bytes(usable)} that a plan may use"
    highest = max(nearest.memory.phases, key=lambda phase: phase.bytes, default=None)
    if highest is None or not highest.terms:
        return f"{words}, {over}."
    term, num_bytes = max(highest.terms.items(), key=lambda item: item[1])
    return (
        f"{words}, {over} ({HEADROOM_FRACTION:.0%} stays free); the peak is in phase {highest.name}, the largest term "
        f"{term} with {format_bytes(num_bytes)}."
    )


def _fix_words(found: Sequence[str]) -> str:
    if not found:
        return "use devices with more memory: no other method, length or number of devices that was checked fits"
    return "any of these was checked to fit: " + "; ".join(found)


def _devices(cluster: Cluster) -> str:
    return f"{cluster.num_devices} x {cluster.device.name}"
