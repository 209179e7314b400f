"""Says in sentences what a search did: what fell to what, and why each knob has its value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from autofit.search.allowed import Allowed
from autofit.search.evaluate import HEADROOM_FRACTION, Evaluator, Misfit
from autofit.search.rank import SAFETY_FRACTION, TIE_FRACTION, Ranking
from autofit.search.rules.engines import routes
from autofit.search.space import USUAL_EVAL_BATCH
from autofit.search.table import Rows, Table, Values
from autofit.spec.calibration import Calibration, Uncalibrated
from autofit.spec.configuration import Configuration
from autofit.spec.estimate import MemoryEstimate, Stage, StageName, TimeEstimate
from autofit.spec.hardware import Cluster
from autofit.spec.job import Job
from autofit.spec.profile import RegimeProfile
from autofit.units import format_bytes, format_seconds

KNOBS = (
    "method",
    "quantization",
    "adapter",
    "num_processes",
    "sharding",
    "offload",
    "num_replicas",
    "precision",
    "attention",
    "loss",
    "gradient_checkpointing",
    "optim",
    "batching",
    "per_device_train_batch_size",
)

LEAST_SHOWN_FRACTION = 0.005
"""Less is written as no difference."""
STAGE_WORDS: dict[StageName, str] = {
    "loading": "while the model is loaded",
    "preparing": "while the engine is made",
    "first_step": "in the first step",
    "evaluation": "in an evaluation",
    "saving": "while a checkpoint is saved",
}


def describe(configuration: Configuration) -> str:
    """Name a configuration by what a reader would change in it."""
    parts = [
        configuration.method,
        _precision(configuration),
        configuration.optim,
        f"micro-batch {configuration.per_device_train_batch_size} x {configuration.gradient_accumulation_steps}",
        *([f"{configuration.sharding} on {configuration.num_processes}"] if configuration.num_processes > 1 else []),
        *([f"{configuration.offload.replace('_', ' ')} on the host"] if configuration.offload != "none" else []),
        *(["checkpointing"] if configuration.gradient_checkpointing else []),
        *([f"{configuration.loss} loss"] if configuration.loss != "stock" else []),
        *([f"{configuration.batching} batches"] if configuration.batching != "equal" else []),
    ]
    return ", ".join(parts)


def count_reasons(table: Table, left: Allowed) -> tuple[str, ...]:
    """Say how many configurations there were and where they went."""
    unmodelled = left.unmodelled + table.unmodelled
    num_fitting = int(table.fits.sum())
    num = len(table) + left.fallen.total() + unmodelled.total() + table.num_untraced
    whole = (
        f"{num} configurations: {left.fallen.total()} fell to rules, {len(table) - num_fitting} do not fit "
        f"{format_bytes(table.usable_bytes)} ({1 - HEADROOM_FRACTION:.0%} of the device's memory), {num_fitting} fit"
        + (f", {unmodelled.total()} are not modelled" if unmodelled else "")
        + (f", {table.num_untraced} have no traced profile and were not considered." if table.num_untraced else ".")
    )
    return (
        whole,
        *(f"{num} fell to {rule.name}: {rule.reason} ({rule.source})." for rule, num in left.fallen.most_common()),
        *(f"{num} left out: {knob} is not modelled." for knob, num in unmodelled.most_common()),
    )


def objective_reason(job: Job, cluster: Cluster, chosen: Configuration, missing: Sequence[str]) -> str:
    """Say what decided."""
    objective = job.restrictions.objective
    has_price = cluster.device.dollars_per_hour is not None
    priced = "the cheapest per trained token" if has_price else "the cheapest in device time per trained token"
    least = {
        "cost": "the least work per trained token" if missing else priced,
        "time": "the least work" if missing else "the fastest",
        "memory": "what needs the least memory on each device",
        "quality": "the least approximate that fits",
    }[objective]
    default = ", the default" if objective == "cost" else ""
    then = {
        "memory": f", or of what needs less than {TIE_FRACTION:.0%} more the cheapest",
        "quality": ", and of equally approximate ones the cheapest",
    }.get(objective, "")
    said = (
        f"{_among(job, chosen, least)} (--objective {objective}{default}){then}; "
        f"ties go to the simpler setup, and up to {SAFETY_FRACTION:.0%} more is paid for one that fits if memory is "
        "off as far as any published run's was."
    )
    return f"{said} {no_time_reason(cluster, missing)}" if missing else said


def _among(job: Job, chosen: Configuration, least: str) -> str:
    """Say what the chosen one is the least of, and who decided among which methods."""
    methods = job.restrictions.methods
    if not methods:
        return f"{chosen.method} is {least} of full, lora and qlora"
    if len(methods) > 1:
        return f"{chosen.method} is {least} of the methods you allowed ({', '.join(methods)})"
    whose = "the script's own method; --method allows others" if "methods" in job.script_decides else "as you asked"
    return f"this is {least} with {chosen.method}, {whose}"


def allocator_reasons(job: Job, configuration: Configuration, evaluator: Evaluator) -> tuple[str, ...]:
    """Say why segments grow where nobody asked for it."""
    if not configuration.expandable_segments or job.restrictions.expandable_segments:
        return ()
    needed = evaluator.replay(replace(configuration, expandable_segments=False)).needed_bytes
    return (f"allocator expandable_segments: without it fragmentation would need {format_bytes(needed)}.",)


def evaluation_reasons(configuration: Configuration, evaluator: Evaluator) -> tuple[str, ...]:
    """Say why evaluations run on a smaller batch than they would unasked."""
    if not evaluator.frees_evaluation or configuration.per_device_eval_batch_size >= USUAL_EVAL_BATCH:
        return ()
    usual = replace(configuration.evaluation, per_device_eval_batch_size=USUAL_EVAL_BATCH)
    memory = evaluator.replay(replace(configuration, evaluation=usual))
    if memory.stages is None or memory.stages.evaluation is None:
        return ()
    needed = stage_words(memory, "evaluation")
    chosen = configuration.per_device_eval_batch_size
    return (f"per_device_eval_batch_size {chosen}: with transformers' default of {USUAL_EVAL_BATCH}, {needed}.",)


def calibration_reasons(
    calibration: Calibration | None, plain: Uncalibrated | None, memory: MemoryEstimate, time: TimeEstimate
) -> tuple[str, ...]:
    """Say of a calibrated plan how many runs it is calibrated on, and how far they moved each figure."""
    if calibration is None or plain is None:
        return ()
    versions = ", ".join(f"{name} {version}" for name, version in calibration.versions.items())
    factors = (("static", calibration.static), ("per token", calibration.per_token), ("time", calibration.time))
    moved = [
        f"allocated {_moved(plain.peak_allocated_bytes, memory.peak_allocated_bytes)}",
        f"needed {_moved(plain.needed_bytes, memory.needed_bytes)}",
    ]
    if plain.step_seconds is not None and time.step_seconds is not None:
        moved.append(f"a step from {format_seconds(plain.step_seconds)} to {format_seconds(time.step_seconds)}")
    return (
        f"calibrated on {calibration.num_runs} runs of {calibration.device_name} with {versions}: "
        + ", ".join(f"{name} x{each.factor:.4f} (from {each.num_runs})" for name, each in factors)
        + f"; that moved {', '.join(moved)}. --no-calibration leaves it out.",
    )


def _moved(before_bytes: int, after_bytes: int) -> str:
    return f"from {format_bytes(before_bytes)} to {format_bytes(after_bytes)} ({after_bytes / before_bytes - 1:+.2%})"


def no_time_reason(cluster: Cluster, missing: Sequence[str]) -> str:
    """Say which figures are not known, and so that no time is given."""
    said = f"Not known of {cluster.device.name}: {', '.join(missing)}; so no time and no cost is shown."
    if cluster.device.kind == "cpu":
        return said
    return f"{said} --gpus takes what you know of it, by the key in brackets: {cluster.device.name}:KEY=NUMBER."


def precision_reason(job: Job, configuration: Configuration, cluster: Cluster) -> str:
    """Say why the dtypes are what they are."""
    asked = job.restrictions.precision
    if isinstance(asked, tuple):
        return f"precision {_precision(configuration)}: you allowed {', '.join(asked)}."
    if asked != "auto":
        who = "the script asks" if "precision" in job.script_decides else "you asked"
        return f"precision {_precision(configuration)}: {who} for {asked}."
    name = cluster.device.name
    because = {
        "bf16": f"{name} multiplies bfloat16",
        "fp16": f"{name} does not multiply bfloat16",
        "fp32": f"{name} is a CPU rank, which trains in fp32 unless you ask for another",
    }[_precision(configuration)]
    return f"precision {_precision(configuration)}: {because}."


def attention_reasons(job: Job, configuration: Configuration, versions: Mapping[str, str]) -> tuple[str, ...]:
    """Say why a model does not get the attention that most get, where none was asked for."""
    if job.restrictions.attention != "auto" or configuration.attention == "sdpa":
        return ()
    release = f"transformers {versions.get('transformers', '')}".strip()
    return (f"attention {configuration.attention}: {release} has no sdpa for {job.model.config['model_type']}.",)


def routing_reasons(job: Job, profile: RegimeProfile | None) -> tuple[str, ...]:
    """Say of routed experts which routing the figures are of.

    Source: docs/architectures.md, "Routed experts".
    """
    if profile is None or not routes(job.model.config):
        return ()
    if profile.routes_evenly:
        said = (
            "routing even: experts run one after the other, each with an equal share of the tokens; what is kept for "
            "backward is the same however they are routed, one expert's temporaries grow with its share."
        )
    else:
        said = (
            "routing even or worst, memory is the same: a row for each choice of each token, whichever expert gets it; "
            "time is of an even one."
        )
    return (said,)


def knob_reasons(chosen: int, table: Table, ranking: Ranking, evaluator: Evaluator) -> tuple[str, ...]:
    """Say of each knob what its other values would take, everything else chosen best for them.

    What one needs is said where it was replayed, and of each that is cheaper: with what its own plan says.
    `autofit.search.why` replays all of them.
    """
    return tuple(
        f"{knob} {spelt(mine)}: "
        + "; ".join(_compared(value, chosen, rows, table, ranking, evaluator) for value, rows in others)
        + "."
        for knob, mine, others in rivals(chosen, table)
    )


def cheaper_rivals(chosen: int, table: Table, ranking: Ranking) -> Iterator[int]:
    """Yield the rows that `knob_reasons` looks at more closely."""
    for _, _, others in rivals(chosen, table):
        for _, group in others:
            fitting = group[table.fits[group]]
            if fitting.size and _is_cheaper(best := ranking.best(fitting), chosen, ranking):
                yield best


def rivals(chosen: int, table: Table) -> Iterator[tuple[str, object, list[tuple[object, Rows]]]]:
    """Yield each knob that has other values, with its own value and each other one's rows, of the same method."""
    methods = table.knob("method")
    for knob in KNOBS:
        values = table.knob(knob)
        comparable = np.flatnonzero((methods == methods[chosen]) | (knob == "method"))
        mine = values[chosen].item()
        others = sorted(_distinct(values[comparable]) - {mine}, key=lambda value: (str(type(value)), value))
        if knob == "per_device_train_batch_size":
            others = _neighbours(others, mine)
        if others:
            yield knob, mine, [(value, comparable[values[comparable] == value]) for value in others]


def _distinct(values: Values) -> set[Any]:
    """Return each value once, as `np.unique` would: that imports numpy's masked arrays."""
    ordered = np.sort(values)
    return {*ordered[:1].tolist(), *ordered[1:][ordered[1:] != ordered[:-1]].tolist()}


def _compared(value: object, chosen: int, group: Rows, table: Table, ranking: Ranking, evaluator: Evaluator) -> str:
    fitting = group[table.fits[group]]
    if not fitting.size:
        least = int(group[np.argmin(table.needed_bytes[group])])
        return f"{spelt(value)} would not fit{_too_much(table, least)}"
    best = ranking.best(fitting)
    configuration = table.configuration(best)
    devices, spent = table.knob("num_processes"), ranking.spent
    if _is_cheaper(best, chosen, ranking):
        configuration, misfit = evaluator.as_it_fits(configuration)
        if misfit != "none":
            return f"{spelt(value)} would not fit {misfit_words(misfit)}"
    replayed = evaluator.known_replay(configuration)
    parts = [
        *([] if replayed is None else [f"need {format_bytes(replayed.needed_bytes)}"]),
        *([] if devices[best] == devices[chosen] else [_dearer(float(spent[best] / spent[chosen]) - 1)]),
        _slower(float(table.seconds[best] / table.seconds[chosen]) - 1, knows_time=table.knows_time),
    ]
    return f"{spelt(value)} would {', '.join(parts[:-1])}{' and ' if parts[1:] else ''}{parts[-1]}"


def _is_cheaper(row: int, chosen: int, ranking: Ranking) -> bool:
    """Whether one costs less than what was chosen: it was not taken for what it needs."""
    return bool(ranking.spent[row] < (1 - LEAST_SHOWN_FRACTION) * ranking.spent[chosen])


def _dearer(excess_fraction: float) -> str:
    """Say what another number of devices costs: the time of all of them."""
    if abs(excess_fraction) < LEAST_SHOWN_FRACTION:
        return "cost as much"
    return f"cost {abs(excess_fraction):.0%} {'more' if excess_fraction > 0 else 'less'}"


def _too_much(table: Table, least: int) -> str:
    misfit = table.misfit_of(least)
    if misfit == "device memory":
        return f": {format_bytes(int(table.needed_bytes[least]) - table.usable_bytes)} too much before fragmentation"
    return f" {misfit_words(misfit)}"


def misfit_words(misfit: Misfit) -> str:
    """Say what of a configuration does not fit, as the end of "does not fit"."""
    if misfit in STAGE_WORDS:
        return STAGE_WORDS[misfit]
    return {"host memory": "the host's memory", "fragmentation": "as torch's allocator lays it out"}.get(misfit, "")


def stage_words(memory: MemoryEstimate, name: StageName) -> str:
    """Say what a stage needs, of a device and of a node's host."""
    stage: Stage = getattr(memory.stages, name)
    on_host = stage.host_bytes or 0
    host = f" and {format_bytes(on_host)} of its node's host memory" if on_host > stage.device_bytes // 100 else ""
    return f"{STAGE_WORDS[name]} it needs {format_bytes(stage.device_bytes)} of the device{host}"


def _slower(excess_fraction: float, *, knows_time: bool) -> str:
    verb, more, less = ("take", "longer", "less long") if knows_time else ("be", "more work", "less work")
    if abs(excess_fraction) < LEAST_SHOWN_FRACTION:
        return f"{verb} as {'long' if knows_time else 'much work'}"
    return f"{verb} {abs(excess_fraction):.0%} {more if excess_fraction > 0 else less}"


def _neighbours(values: Sequence[object], chosen: int) -> list[object]:
    """Keep the next smaller and the next larger one: those between which the choice was made."""
    numbers = [value for value in values if isinstance(value, int)]
    below, above = [n for n in numbers if n < chosen], [n for n in numbers if n > chosen]
    return [*below[-1:], *above[:1]]


def spelt(value: object) -> str:
    """Write the value of a knob."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _precision(configuration: Configuration) -> str:
    if configuration.mixed_precision != "no":
        return configuration.mixed_precision
    if configuration.weights_dtype == "float32":
        return "tf32" if configuration.tf32 else "fp32"
    return "pure-bf16" if configuration.weights_dtype == "bfloat16" else "pure-fp16"
