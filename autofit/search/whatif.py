"""What a plan would be if one thing about it were another, and what holds it back as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from msgspec import Struct
from msgspec.structs import replace

from autofit.errors import InputError, NothingFitsError
from autofit.plan import Plan
from autofit.search.evaluate import HEADROOM_FRACTION
from autofit.search.nothing_fits import Change
from autofit.spec.configuration import Lora
from autofit.spec.hardware import Cluster, Device
from autofit.spec.job import Job
from autofit.timing.binding import binding_resource
from autofit.units import format_bytes

LARGER_RANK = 64
USUAL_NODE_DEVICES = 8
"""Devices of a node as most are built: more are taken to share its links all the same."""
SMALLEST_SHARE = 0.05
"""Of a step's time; what takes less is not named."""
TERM_WORDS = {
    "matmul": "matrix products",
    "attention": "attention",
    "memory": "kernels bound by memory bandwidth",
    "dequantization": "unpacking quantised weights",
    "launch": "issuing kernels",
    "optimizer": "the optimizer's step",
    "paging": "pages to and from the host",
    "offload": "offloaded state to and from the host",
    "communication": "communication",
}

Solve = Callable[[Job, Cluster], Plan]


class Answer(Struct, frozen=True, kw_only=True):
    """The best plan after a change, or why there is none."""

    words: str
    """What was changed."""
    plan: Plan | None
    refused: str | None


def answers(job: Job, cluster: Cluster, changes: Iterable[Change], solve: Solve) -> tuple[Answer, ...]:
    """Plan anew after each change, everything else that was left open chosen best for it."""
    return tuple(_answer(job, cluster, change, solve) for change in changes)


def _answer(job: Job, cluster: Cluster, change: Change, solve: Solve) -> Answer:
    try:
        plan = solve(change.job(job), change.cluster(cluster))
    except (InputError, NothingFitsError) as error:
        return Answer(words=change.words, plan=None, refused=error.message)
    return Answer(words=change.words, plan=plan, refused=None)


def counterfactuals(made: Plan, other_sizes: Sequence[Device] = ()) -> Iterator[Change]:
    """Yield what is worth asking of any plan: more devices, other lengths, a larger adapter, the device's other sizes.

    Args:
        made: the plan.
        other_sizes: the same device with other amounts of memory.
    """
    job, cluster = made.inputs.job, made.inputs.cluster
    yield from _other_counts(job, cluster.using(made.configuration.num_processes))
    tokens, lengths = job.workload.sequence_tokens, job.workload.lengths
    for other in (tokens // 2, tokens * 2):
        if other and (lengths is None or other < lengths.max_tokens):
            yield Change(words=f"sequences of {other:,} tokens", kind="length", job=_of_length(other))
    if made.configuration.lora is not None and made.configuration.lora.r != LARGER_RANK:
        larger = replace(made.configuration.lora, r=LARGER_RANK)
        yield Change(words=f"LoRA rank {LARGER_RANK}", kind="rank", job=_with_adapter(larger))
    for device in other_sizes:
        yield Change(
            words=f"{cluster.num_devices} x {device.name}",
            kind="device",
            cluster=lambda on, device=device: replace(on, device=device),  # type: ignore[misc]
        )


def _other_counts(job: Job, used: Cluster) -> Iterator[Change]:
    """Yield the next number of devices that the global batch divides over, and the one before; all of them are used."""
    now, batch = used.num_devices_per_node, job.workload.global_batch_sequences
    divides = [n for n in range(1, batch // used.num_nodes + 1) if batch % (n * used.num_nodes) == 0]
    fewer, more = [n for n in divides if n < now], [n for n in divides if n > now]
    for number in (*more[:1], *fewer[-1:]):
        yield Change(
            words=_devices_words(used.num_nodes, number) + _skipped(now, number, batch),
            kind="devices",
            job=_on_all_devices,
            cluster=lambda _, number=number: replace(used, num_devices_per_node=number),  # type: ignore[misc]
        )


def _devices_words(num_nodes: int, number: int) -> str:
    """Name so many devices a node, and that it is one node where few are built so."""
    nodes = f"{num_nodes} nodes of " if num_nodes > 1 else ""
    alone = " of one node" if num_nodes == 1 and number > USUAL_NODE_DEVICES else ""
    return f"{nodes}{number} {'devices' if number > 1 else 'device'}{alone}"


def _on_all_devices(job: Job) -> Job:
    return replace(job, restrictions=replace(job.restrictions, num_processes=()))


def _skipped(now: int, number: int, batch: int) -> str:
    """Say why it is not one device more or less."""
    return "" if abs(number - now) == 1 else f" (to share {batch} sequences)"


def _of_length(tokens: int) -> Callable[[Job], Job]:
    return lambda job: replace(job, workload=replace(job.workload, sequence_tokens=tokens))


def _with_adapter(lora: Lora) -> Callable[[Job], Job]:
    return lambda job: replace(job, restrictions=replace(job.restrictions, lora=lora))


def binding_reasons(made: Plan) -> tuple[str, ...]:
    """Say what takes the step's time and what decides its memory."""
    return tuple(reason for reason in (_time_reason(made), _memory_reason(made)) if reason)


def _time_reason(made: Plan) -> str:
    total = sum(made.time.terms.values())
    if not total:
        return ""
    shares = sorted(((seconds / total, name) for name, seconds in made.time.terms.items()), reverse=True)
    named = [f"{share:.0%} {TERM_WORDS.get(name, name)}" for share, name in shares if share >= SMALLEST_SHARE]
    bound = binding_resource(made.time.terms, made.configuration, made.inputs.cluster)
    return f"time: bound by {bound}. Of what runs, nothing overlapped: {', '.join(named)}."


def _memory_reason(made: Plan) -> str:
    memory = made.memory
    usable = int(memory.budget_bytes * (1 - HEADROOM_FRACTION))
    peak = max(memory.phases, key=lambda phase: phase.bytes, default=None)
    if peak is None or not peak.terms:
        return ""
    term, num_bytes = max(peak.terms.items(), key=lambda item: item[1])
    left = usable - memory.needed_bytes
    room = f"{format_bytes(left)} are left" if left >= 0 else f"{format_bytes(-left)} too much"
    return (
        f"memory: highest in {peak.name.replace('_', ' ')}, where {term.replace('_', ' ')} are the most with "
        f"{format_bytes(num_bytes)}; of {format_bytes(usable)} that a plan may use {room}."
    )
