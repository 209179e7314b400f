"""Says in sentences what a search did: what fell to what, and why each knob has its value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from autofit.search.evaluate import HEADROOM_FRACTION, Evaluated, Evaluator, usable_bytes
from autofit.search.rank import Cost, cheapest
from autofit.search.rules import Rule
from autofit.spec.calibration import Calibration, Uncalibrated
from autofit.spec.configuration import Configuration
from autofit.spec.estimate import MemoryEstimate, TimeEstimate
from autofit.spec.hardware import Cluster
from autofit.spec.job import Job
from autofit.units import format_bytes, format_seconds

KNOBS = (
    "method",
    "num_processes",
    "sharding",
    "offload",
    "gradient_checkpointing",
    "optim",
    "batching",
    "per_device_train_batch_size",
)


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
        *([f"{configuration.batching} batches"] if configuration.batching != "equal" else []),
    ]
    return ", ".join(parts)


def count_reasons(evaluated: Sequence[Evaluated], fallen: Counter[Rule], num_untraced: int) -> tuple[str, ...]:
    """Say how many configurations there were and where they went."""
    num_fitting = sum(each.fits for each in evaluated)
    num = len(evaluated) + fallen.total() + num_untraced
    usable = format_bytes(usable_bytes(evaluated[0].memory))
    whole = (
        f"{num} configurations: {fallen.total()} fell to rules, {len(evaluated) - num_fitting} do not fit {usable} "
        f"({1 - HEADROOM_FRACTION:.0%} of the device's memory), {num_fitting} fit"
        + (f", {num_untraced} have no traced profile and were not considered." if num_untraced else ".")
    )
    return (
        whole,
        *(f"{num} fell to {rule.name}: {rule.reason} ({rule.source})." for rule, num in fallen.most_common()),
    )


def objective_reason(job: Job, cluster: Cluster, chosen: Evaluated, missing: Sequence[str]) -> str:
    """Say what decided."""
    methods, objective = job.restrictions.methods, job.restrictions.objective
    among = f"of the methods you allowed ({', '.join(methods)})" if methods else "of full, lora and qlora"
    least = {
        "cost": "the least work per trained token" if missing else "the cheapest per trained token",
        "time": "the least work" if missing else "the fastest",
        "memory": "what needs the least memory on each device",
        "quality": "the least approximate that fits",
    }[objective]
    default = ", the default" if objective == "cost" else ""
    said = (
        f"{chosen.configuration.method} is {least} {among} (--objective {objective}{default}); "
        "ties go to the simpler setup."
    )
    return f"{said} {no_time_reason(cluster, missing)}" if missing else said


def allocator_reasons(job: Job, configuration: Configuration, evaluator: Evaluator) -> tuple[str, ...]:
    """Say why segments grow where nobody asked for it."""
    if not configuration.expandable_segments or job.restrictions.expandable_segments:
        return ()
    needed = evaluator.replay(replace(configuration, expandable_segments=False)).needed_bytes
    return (f"allocator expandable_segments: without it fragmentation would need {format_bytes(needed)}.",)


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
    return f"No source gives {cluster.device.name}'s {', '.join(missing)}: no time and no cost is shown."


def precision_reason(job: Job, configuration: Configuration, cluster: Cluster) -> str:
    """Say why the dtypes are what they are."""
    asked = job.restrictions.precision
    if asked != "auto":
        return f"precision {_precision(configuration)}: you asked for {asked}."
    name = cluster.device.name
    because = {
        "bf16": f"{name} multiplies bfloat16",
        "fp16": f"{name} does not multiply bfloat16",
        "fp32": f"{name} is a CPU rank, which trains in fp32 unless you ask for another",
    }[_precision(configuration)]
    return f"precision {_precision(configuration)}: {because}."


def knob_reasons(chosen: Evaluated, evaluated: Sequence[Evaluated], cost: Cost) -> tuple[str, ...]:
    """Say of each knob what its other values would need and take, everything else chosen best for them."""
    return tuple(sentence for knob in KNOBS if (sentence := _knob_reason(knob, chosen, evaluated, cost)))


def _knob_reason(knob: str, chosen: Evaluated, evaluated: Sequence[Evaluated], cost: Cost) -> str | None:
    rivals = (
        evaluated if knob == "method" else [e for e in evaluated if _value(e, "method") == _value(chosen, "method")]
    )
    others = sorted({_value(each, knob) for each in rivals} - {_value(chosen, knob)}, key=lambda v: (str(type(v)), v))
    if not others:
        return None
    if knob == "per_device_train_batch_size":
        others = _neighbours(others, chosen.configuration.per_device_train_batch_size)
    compared = [_compared(knob, value, chosen, rivals, cost) for value in others]
    return f"{knob} {_spelt(_value(chosen, knob))}: {'; '.join(compared)}."


def _compared(knob: str, value: object, chosen: Evaluated, rivals: Sequence[Evaluated], cost: Cost) -> str:
    group = [each for each in rivals if _value(each, knob) == value]
    fitting = [each for each in group if each.fits]
    if not fitting:
        least = min(group, key=lambda each: each.needed_bytes)
        return f"{_spelt(value)} would need {format_bytes(least.needed_bytes)} at least, {_too_much(least)}"
    best = cheapest(fitting, cost)
    needs = f"{_spelt(value)} would need {format_bytes(best.needed_bytes)}"
    if best.configuration.num_processes == chosen.configuration.num_processes:
        return f"{needs} and {_slower(_seconds(best) / _seconds(chosen) - 1, knows_time=_knows_time(best))}"
    return f"{needs}, {_dearer(best, chosen)} and {_slower(_seconds(best) / _seconds(chosen) - 1, knows_time=True)}"


def _dearer(best: Evaluated, chosen: Evaluated) -> str:
    """Say what another number of devices costs: the time of all of them."""
    devices = best.configuration.num_processes / chosen.configuration.num_processes
    excess = devices * _seconds(best) / _seconds(chosen) - 1
    return "cost as much" if abs(excess) < 0.005 else f"cost {abs(excess):.0%} {'more' if excess > 0 else 'less'}"


def _seconds(each: Evaluated) -> float:
    """Return the time of a step, or where it is not known what orders them."""
    return each.time.step_seconds if each.time.step_seconds is not None else each.relative_work


def _knows_time(each: Evaluated) -> bool:
    return each.time.step_seconds is not None


def _too_much(least: Evaluated) -> str:
    if least.misfit == "host memory":
        return "and more host memory than there is"
    if least.misfit == "fragmentation":
        return "which does not fit as torch's allocator lays it out"
    return f"{format_bytes(least.needed_bytes - usable_bytes(least.memory))} too much"


def _slower(excess_fraction: float, *, knows_time: bool) -> str:
    verb, more, less = ("take", "longer", "less long") if knows_time else ("be", "more work", "less work")
    if abs(excess_fraction) < 0.005:
        return f"{verb} as {'long' if knows_time else 'much work'}"
    return f"{verb} {abs(excess_fraction):.0%} {more if excess_fraction > 0 else less}"


def _neighbours(values: Sequence[object], chosen: int) -> list[object]:
    """Keep the next smaller and the next larger one: those between which the choice was made."""
    numbers = [value for value in values if isinstance(value, int)]
    below, above = [n for n in numbers if n < chosen], [n for n in numbers if n > chosen]
    return [*below[-1:], *above[:1]]


def _value(each: Evaluated, knob: str) -> object:
    value: object = getattr(each.configuration, knob)
    return value


def _spelt(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _precision(configuration: Configuration) -> str:
    if configuration.mixed_precision != "no":
        return configuration.mixed_precision
    if configuration.weights_dtype == "float32":
        return "tf32" if configuration.tf32 else "fp32"
    return "pure-bf16" if configuration.weights_dtype == "bfloat16" else "pure-fp16"
