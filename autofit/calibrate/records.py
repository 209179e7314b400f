"""A run as it is remembered and shared: its configuration, and predicted beside measured. No path, no name of a person.

Of a model the class of its architecture is kept, and its name only where it is a public one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Struct, field

from autofit.errors import InputError
from autofit.plan import Plan, planned_batches, planned_rows, predicted_phases
from autofit.search.calibrated import token_bytes
from autofit.spec.calibration import calibrated_device_name, plain_versions
from autofit.spec.configuration import Configuration
from autofit.spec.event import Event, MeasuredPhaseName

RECORD_SCHEMA_VERSION = 1
MAX_TEXT = 200
Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**60)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**60)]
Seconds = Annotated[float, msgspec.Meta(ge=0, lt=1e12)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]


class PredictedRun(Struct, frozen=True, kw_only=True):
    """What was predicted, without any calibration. None: not predicted."""

    peak_allocated_bytes: Bytes | None
    after_step_allocated_bytes: Bytes | None
    token_bytes: Bytes | None
    """What of the peak grows with the tokens of a micro-batch."""
    peak_reserved_bytes: Bytes | None
    process_bytes: Bytes | None
    phases_bytes: dict[Text, Bytes]
    """The peak of each stretch of a step."""
    step_seconds: Seconds | None
    run_phases_bytes: dict[Text, Bytes] = field(default_factory=dict)
    """What is allocated in each phase of a run, by the names of those that ranks measure; one that is not predicted is
    absent."""
    batches: dict[Text, tuple[Count, Count]] = field(default_factory=dict)
    """Rows, and tokens of a row, of the longest micro-batch of each phase that has one."""


class MeasuredPhase(Struct, frozen=True, kw_only=True):
    """The most that a rank held in one phase of its run. None: not measured."""

    allocated_bytes: Bytes | None = None
    reserved_bytes: Bytes | None = None
    """By the caching allocator; a CPU rank has none."""
    process_bytes: Bytes | None = None
    """Of a CPU rank the most that its process had meanwhile, libraries included; of a GPU what all processes had of it
    when the phase ended."""
    rows: Count | None = None
    row_tokens: Count | None = None
    """Of the longest micro-batch that the model was given meanwhile; None: it was given none."""


class MeasuredRank(Struct, frozen=True, kw_only=True):
    """What one rank measured. None: not measured."""

    rank: Count
    peak_allocated_bytes: Bytes | None
    """Of training steps."""
    before_training_peak_bytes: Bytes | None
    """While the engine and the optimizer were made."""
    between_steps_peak_bytes: Bytes | None
    """While logging, evaluating and saving."""
    after_step_allocated_bytes: Bytes | None
    peak_reserved_bytes: Bytes | None
    device_used_bytes: Bytes | None
    """What all processes had of the device at the end of training."""
    process_peak_bytes: Bytes | None
    """Of a CPU rank: the whole process, libraries included."""
    step_seconds: Seconds | None
    """Median of all steps but the first."""
    num_steps: Count
    longest_batch_tokens: Count | None
    """Tokens of a row of the longest micro-batch that the model was given."""
    phases: dict[Text, MeasuredPhase] = field(default_factory=dict)
    """By their names; one that the run did not have is absent."""


class RunRecord(Struct, frozen=True, kw_only=True):
    """One rung of one launch."""

    schema_version: Literal[1] = 1
    id: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{8,64}$")]
    """Random; tells a record from its copy."""
    ended_at: Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    autofit_version: Text
    device: Text
    num_devices: Count
    versions: dict[Text, Text]
    """Of the libraries whose behaviour was traced."""
    architecture: Text
    model: Text | None
    """None: not a public one."""
    configuration: Configuration
    row_tokens: Count
    """Of a row of the longest micro-batch that was planned for."""
    averages_lengths: bool
    """Whether the time is that of an average batch of measured data; otherwise of one of the planned length."""
    is_probe: bool
    rung: Count
    failure: Text
    """`none`, or why the run ended."""
    in_effect: bool = True
    """Whether each rank found every planned setting in effect; without that the prediction is of another run."""
    predicted: PredictedRun
    ranks: tuple[MeasuredRank, ...]

    @property
    def peak_allocated_bytes(self) -> int | None:
        """Of the most loaded rank."""
        return max((r.peak_allocated_bytes for r in self.ranks if r.peak_allocated_bytes is not None), default=None)

    @property
    def phases(self) -> tuple[PhaseOutcome, ...]:
        """Predicted beside measured, phase by phase; nothing in a record that is older than that was kept."""
        return phase_outcomes(self.predicted.run_phases_bytes, self.ranks, self.predicted.batches)

    @property
    def step_seconds(self) -> float | None:
        """Of the slowest rank."""
        return max((rank.step_seconds for rank in self.ranks if rank.step_seconds is not None), default=None)


class PhaseOutcome(Struct, frozen=True, kw_only=True):
    """One phase of a run: what was predicted to be allocated beside what was, on the rank that held most."""

    phase: str
    predicted_bytes: int | None
    measured_bytes: int | None
    rows: int | None
    row_tokens: int | None
    """Of the longest micro-batch; None: the model was given none."""
    is_comparable: bool
    """Whether both are known, and of the same micro-batch."""

    @property
    def error_fraction(self) -> float | None:
        """How far off the prediction is; None where the two do not compare."""
        if not self.is_comparable or not self.predicted_bytes or not self.measured_bytes:
            return None
        return self.predicted_bytes / self.measured_bytes - 1


def phase_outcomes(
    predicted: Mapping[str, int], ranks: Sequence[MeasuredRank], planned: Mapping[str, tuple[int, int]]
) -> tuple[PhaseOutcome, ...]:
    """Put what was predicted of each phase beside what was measured, in the order in which a run has them.

    A phase that no rank had is left out, and so is what is between steps, which nothing predicts.

    Args:
        predicted: allocated bytes by the names of phases.
        ranks: what each measured.
        planned: rows, and tokens of a row, of the micro-batch that a prediction is for, by the name of the phase.
    """
    return tuple(
        _outcome(name, predicted.get(name), had, planned.get(name))
        for name in get_args(MeasuredPhaseName)
        if (had := [rank.phases[name] for rank in ranks if name in rank.phases]) and name != "between_steps"
    )


def _outcome(
    name: str, predicted: int | None, had: Sequence[MeasuredPhase], planned: tuple[int, int] | None
) -> PhaseOutcome:
    most = max(had, key=lambda phase: phase.allocated_bytes or 0)
    batch = None if most.rows is None or most.row_tokens is None else (most.rows, most.row_tokens)
    return PhaseOutcome(
        phase=name,
        predicted_bytes=predicted,
        measured_bytes=most.allocated_bytes,
        rows=most.rows,
        row_tokens=most.row_tokens,
        is_comparable=predicted is not None and batch in {None, planned},
    )


class Ending(Struct, frozen=True, kw_only=True):
    """Which rung of a launch it was, and how it ended."""

    rung: int
    failure: str
    is_probe: bool = False
    in_effect: bool = True


def record_of(
    plan: Plan, events: Sequence[Event], ending: Ending, *, record_id: str, ended_at: str, autofit_version: str
) -> RunRecord:
    """Make the record of one rung from its plan and from what its ranks told."""
    job, cluster = plan.inputs.job, plan.inputs.cluster
    architectures = job.model.config.get("architectures") or ["unknown"]
    return RunRecord(
        id=record_id,
        ended_at=ended_at,
        autofit_version=autofit_version,
        device=calibrated_device_name(cluster.device.name, cluster.device.kind),
        num_devices=cluster.num_devices,
        versions=plain_versions(plan.versions),
        architecture=str(architectures[0])[:MAX_TEXT],
        model=job.model.name[:MAX_TEXT] if job.model.origin in {"catalogue", "hub"} else None,
        configuration=plan.configuration,
        row_tokens=planned_rows(plan)[1],
        averages_lengths=job.workload.lengths is not None,
        is_probe=ending.is_probe,
        rung=ending.rung,
        failure=ending.failure,
        in_effect=ending.in_effect,
        predicted=_predicted(plan, ending.rung),
        ranks=measured_ranks(events),
    )


def _predicted(plan: Plan, rung: int) -> PredictedRun:
    """Take the figures as they are without a calibration; of a fallback of a calibrated plan they were not kept."""
    memory, plain = plan.memory, plan.uncalibrated
    is_known = plain is None or rung == 0
    return PredictedRun(
        peak_allocated_bytes=(plain.peak_allocated_bytes if plain else memory.peak_allocated_bytes)
        if is_known
        else None,
        after_step_allocated_bytes=(plain or memory).after_step_allocated_bytes if is_known else None,
        token_bytes=(plain.token_bytes if plain else token_bytes(memory)) if is_known else None,
        peak_reserved_bytes=memory.peak_reserved_bytes if plain is None else None,
        process_bytes=memory.process_bytes if plain is None else None,
        phases_bytes={phase.name: phase.bytes for phase in memory.phases} if plain is None else {},
        step_seconds=(plain or plan.time).step_seconds if is_known else None,
        run_phases_bytes=predicted_phases(plan, calibrated=False) if is_known else {},
        batches=planned_batches(plan),
    )


def measured_ranks(events: Iterable[Event]) -> tuple[MeasuredRank, ...]:
    """Return what each rank measured, as it said it last."""
    last = {event.rank: event.detail for event in events if event.kind == "memory"}
    return tuple(_rank(rank, detail) for rank, detail in sorted(last.items()))


def _rank(rank: int, detail: Mapping[str, Any]) -> MeasuredRank:
    return MeasuredRank(
        rank=rank,
        peak_allocated_bytes=detail.get("peak_bytes"),
        before_training_peak_bytes=detail.get("before_training_peak_bytes"),
        between_steps_peak_bytes=detail.get("between_steps_peak_bytes"),
        after_step_allocated_bytes=detail.get("after_step_bytes"),
        peak_reserved_bytes=detail.get("peak_reserved_bytes"),
        device_used_bytes=detail.get("device_used_bytes"),
        process_peak_bytes=detail.get("process_peak_bytes"),
        step_seconds=detail.get("step_seconds"),
        num_steps=detail.get("num_steps") or 0,
        longest_batch_tokens=detail.get("longest_batch_tokens"),
        phases=msgspec.convert(detail.get("phases", {}), dict[str, MeasuredPhase]),
    )


def encode(record: RunRecord) -> bytes:
    """Write a record as one line, without its end."""
    return msgspec.json.encode(record)


def decode(line: bytes) -> RunRecord:
    """Read a record from a line.

    Raises:
        msgspec.DecodeError: it is none, or one of another schema.
    """
    return msgspec.json.decode(line, type=RunRecord)


def export_text(records: Sequence[RunRecord]) -> str:
    """Write records as one JSON document, to be shared."""
    document = {"schema_version": RECORD_SCHEMA_VERSION, "records": records}
    return msgspec.json.format(msgspec.json.encode(document), indent=1).decode() + "\n"


def import_text(text: bytes, *, origin: str) -> tuple[RunRecord, ...]:
    """Read what `export_text` wrote: all of it, or nothing.

    Raises:
        InputError: it is not that, or one of its records is not valid; names the first.
    """
    to_fix = "give a file that `autofit runs --export` wrote"
    try:
        document = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{origin} is not JSON: {error}", to_fix=to_fix) from error
    if not isinstance(document, dict) or not isinstance(document.get("records"), list):
        raise InputError(f"{origin} holds no records.", to_fix=to_fix)
    if document.get("schema_version") != RECORD_SCHEMA_VERSION:
        raise InputError(
            f"{origin} has schema_version {document.get('schema_version')!r}; this release reads "
            f"{RECORD_SCHEMA_VERSION}.",
            to_fix="export it anew with this release of autofit",
        )
    records = []
    for number, each in enumerate(document["records"], start=1):
        try:
            records.append(msgspec.convert(each, RunRecord))
        except msgspec.ValidationError as error:
            raise InputError(f"record {number} of {origin} is not valid: {error}", to_fix=to_fix) from error
    return tuple(records)
