"""The plan: one frozen, versioned document of which everything downstream is a function."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from autofit.errors import InputError
from autofit.spec.calibration import Uncalibrated
from autofit.spec.configuration import Configuration
from autofit.spec.estimate import (
    STAGES,
    CostEstimate,
    EpochEstimate,
    MemoryEstimate,
    RunCost,
    Stages,
    TimeEstimate,
    Truncation,
)
from autofit.spec.hardware import Cluster
from autofit.spec.job import Job

SCHEMA_VERSION = 1


class Inputs(Struct, frozen=True, kw_only=True):
    """What the plan was made from."""

    job: Job
    cluster: Cluster
    profile_key: str
    """Identifies the traced profile: architecture, regime and library versions."""


class Rung(Struct, frozen=True, kw_only=True):
    """Another configuration beside the chosen one: a fallback, or the best of another method."""

    configuration: Configuration
    peak_allocated_bytes: int
    needed_bytes: int
    step_seconds: float | None
    fits: bool = True
    """False: of its method nothing fits, and this comes nearest."""


class Plan(Struct, frozen=True, kw_only=True):
    """What will be run, why, and what it is expected to need."""

    schema_version: int = SCHEMA_VERSION
    inputs: Inputs
    configuration: Configuration
    memory: MemoryEstimate
    time: TimeEstimate
    cost: CostEstimate
    epoch: EpochEstimate | None = None
    """None where the lengths of the data are not known."""
    run: RunCost | None = None
    """None where nobody has said how much is trained."""
    truncations: tuple[Truncation, ...] = ()
    """Of the chosen configuration, shortest first; the length that is planned is one of them."""
    fallbacks: tuple[Rung, ...]
    """Strictly descending in needed bytes; each keeps the global batch."""
    alternatives: tuple[Rung, ...]
    """The best configuration of each other method that is allowed, for comparison."""
    reasons: tuple[str, ...]
    """Why each knob has its value, and how many candidates fell to what."""
    versions: dict[str, str]
    """Library versions that the figures hold for."""
    uncalibrated: Uncalibrated | None = None
    """The figures without the calibration of `inputs.cluster`; None: no calibration was applied."""

    @property
    def used(self) -> Cluster:
        """The part of the cluster that the configuration runs on."""
        return self.inputs.cluster.using(self.configuration.num_processes)


def planned_rows(plan: Plan) -> tuple[int, int]:
    """Return rows and tokens of a row of the longest planned micro-batch.

    Without padding all sequences are in one row; a pair of answers is two.
    """
    workload, sequences = plan.inputs.job.workload, plan.configuration.per_device_train_batch_size
    if plan.configuration.batching in {"padding_free", "packed"}:
        return 1, sequences * workload.sequence_tokens
    num_rows = workload.num_rows_per_sequence
    return sequences * num_rows, workload.sequence_tokens // num_rows


def planned_batches(plan: Plan) -> dict[str, tuple[int, int]]:
    """Return rows and tokens of a row of the longest planned micro-batch of each phase that has one, by its name."""
    evaluated = plan.configuration.per_device_eval_batch_size
    evaluates = replace(plan, configuration=replace(plan.configuration, per_device_train_batch_size=evaluated))
    trained = planned_rows(plan)
    return {"first_step": trained, "longest_batch": trained, "evaluation": planned_rows(evaluates)}


def predicted_phases(plan: Plan, *, calibrated: bool = True) -> dict[str, int]:
    """Return the bytes that a phase is predicted to hold, by its `MeasuredPhaseName`; one that is not is absent.

    A CPU rank's device is the host: what is offloaded is there too.

    Args:
        plan: what is run.
        calibrated: whether with what a calibration of the plan has moved.
    """
    memory, plain = plan.memory, None if calibrated else plan.uncalibrated
    stages = (memory.stages if plain is None else plain.stages) or Stages()
    found = {name: stage.device_bytes for name in STAGES if (stage := getattr(stages, name)) is not None}
    cluster = plan.inputs.cluster
    on_host = (memory.host_bytes or 0) // cluster.num_devices_per_node if cluster.device.kind == "cpu" else 0
    return found | {"longest_batch": (plain or memory).peak_allocated_bytes + on_host}


def adaptation(plan: Plan) -> str | None:
    """Say that a plan trains otherwise than its script does by itself, and who wanted that; None: it does not."""
    job = plan.inputs.job
    own, planned = job.script_method, plan.configuration.method
    if own is None or own == planned:
        return None
    allowed = job.restrictions.methods
    why = (
        f"nothing that trains as the script does fits, and --method allows {planned}"
        if own in allowed
        else f"you asked for --method {' or '.join(allowed)}"
    )
    return f"The script by itself {_DOES[own]}. This plan {_DOES[planned]} instead: {why}."


_DOES = {
    "full": "trains all weights",
    "freeze": "trains the last layers",
    "lora": "trains a LoRA adapter",
    "qlora": "trains a LoRA adapter on quantised weights",
}


def to_json(document: Any) -> str:
    """Write a plan, an estimate or any spec object as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(document), indent=2).decode()


def from_json(text: str | bytes, *, origin: str = "plan") -> Plan:
    """Read a plan back, identical to the one written.

    Raises:
        InputError: not JSON, not a plan, or written by a release with another schema.
    """
    try:
        version = msgspec.json.decode(text, type=dict[str, Any]).get("schema_version")
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"{origin} is not JSON: {error}", to_fix="give a plan.json that autofit wrote") from error
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{origin} has schema_version {version!r}; this release of autofit reads version {SCHEMA_VERSION}.",
            to_fix="make the plan anew with this release, or use the release that wrote it",
        )
    try:
        plan = msgspec.json.decode(text, type=Plan)
    except msgspec.ValidationError as error:
        raise InputError(f"{origin} is not a plan: {error}", to_fix="give a plan.json that autofit wrote") from error
    if (nonsense := next(_nonsense(plan), None)) is not None:
        raise InputError(f"{origin} is not a plan: {nonsense}.", to_fix="give a plan.json that autofit wrote")
    return plan


def _nonsense(plan: Plan) -> Iterator[str]:
    """Yield what has the right type and is still no plan: counts that are none, choices among nothing."""
    job, cluster = plan.inputs.job, plan.inputs.cluster
    counts = {
        "num_nodes": cluster.num_nodes,
        "num_devices_per_node": cluster.num_devices_per_node,
        "memory_bytes": cluster.device.memory_bytes,
        "budget_bytes": plan.memory.budget_bytes,
        "sequence_tokens": job.workload.sequence_tokens,
        "global_batch_sequences": job.workload.global_batch_sequences,
    }
    yield from (f"{name} is {count}" for name, count in counts.items() if not 0 < count < 2**63)
    restricted = job.restrictions
    choices = ("precision", "attention", "loss", "lora", "quantization", "num_replicas")
    yield from (f"{name} allows nothing" for name in choices if getattr(restricted, name) == ())
    for each in (plan.configuration, *(rung.configuration for rung in (*plan.fallbacks, *plan.alternatives))):
        yield from _nonsense_of(each, job)


def _nonsense_of(configuration: Configuration, job: Job) -> Iterator[str]:
    adapts, quantises = configuration.method in {"lora", "qlora"}, configuration.method == "qlora"
    if (configuration.lora is not None) is not adapts or (configuration.quantization is not None) is not quantises:
        yield f"{configuration.method} has an adapter or quantised weights too many, or too few"
    split = configuration.per_device_train_batch_size, configuration.gradient_accumulation_steps
    if min(*split, configuration.num_processes, configuration.sequence_parallel_size, configuration.num_replicas) < 1:
        yield "a configuration does not train"
    elif configuration.global_batch_sequences != job.workload.global_batch_sequences:
        yield f"{configuration.global_batch_sequences} sequences a step are another global batch than the job's"


def load_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        InputError: the file is missing, unreadable, or not a plan.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read the plan {str(path)!r}: {error.strerror}", to_fix="give the path of a plan.json"
        ) from error
    return from_json(text, origin=str(path))
