"""Profile and configuration to bytes: the peak is the largest sum over one phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from autofit.errors import InputError
from autofit.memory.adapter_casts import without_adapter_casts
from autofit.memory.engines import Layout, Terms, layout
from autofit.memory.fsdp import FsdpModel
from autofit.memory.limits import refuse_absurd_numbers, refuse_unmodelled
from autofit.memory.overheads import context_bytes, workspace_bytes, workspace_sizes
from autofit.memory.phases import Run, stages
from autofit.memory.replay import MAX_MICRO_STEPS, Replayed, Replayer
from autofit.memory.static import static_bytes
from autofit.memory.tape import (
    Bytes,
    PhasePeak,
    kept_by_the_loss_bytes,
    kept_outputs_bytes,
    left_by_forward_bytes,
    offloaded_bytes,
    phase_peaks,
    returned_logits_bytes,
)
from autofit.memory.tensors import Tensor, tensors
from autofit.memory.uncertainty import Figure, RunKind, interval, run_kind
from autofit.spec.configuration import Configuration
from autofit.spec.estimate import MemoryEstimate, Phase
from autofit.spec.hardware import Cluster, Device
from autofit.spec.job import Workload
from autofit.spec.profile import RegimeProfile
from autofit.units import format_bytes

PHASE_NAMES = {"layer": "layer_forward", "head": "head_and_loss"}
FORWARD_NAMES = ("embedding", "layer", "head")
TOKEN_ID_BYTES = 8
NUM_INPUT_TENSORS = {"equal": (2, 1), "padded": (3, 2), "packed": (3, 2)}
"""Ids, labels, and a mask or positions; of these, as many as the trace makes itself (ids are its labels).

Trainer moves those of all micro-steps to the device before the first.
Source: transformers/trainer.py, get_batch_samples."""


MAX_REPLAYED_BYTES = 2**46
"""64 TiB: what needs more on one device is a slip of the pen, and no allocator has addresses for it."""


class MemoryModel:
    """Assembles configurations of one profile and sequence length; what depends on neither is worked out once.

    Args:
        profile: the traced step.
        sequence_tokens: tokens of every sequence.
        micro_batches: the micro-batches that will be asked for.
        whole: of another one of the same profile, to share what no length changes.

    Raises:
        InputError: a number is beyond all reason.
        ValueError: a micro-batch is asked for that was not announced.
    """

    def __init__(
        self,
        profile: RegimeProfile,
        sequence_tokens: int,
        micro_batches: Sequence[int],
        *,
        whole: WholeModel | None = None,
    ) -> None:
        refuse_absurd_numbers(sequence_tokens, *micro_batches)
        self.profile = profile
        self.sequence_tokens = sequence_tokens
        self.whole = whole or WholeModel(profile)
        self._micro_batches = tuple(micro_batches)
        self._column = {batch: n for n, batch in enumerate(micro_batches)}
        self._of_one_row: MemoryModel | None = None
        if 1 in micro_batches and self.whole.one_row is not self.whole:
            one_row = self.whole.one_row
            self._of_one_row = MemoryModel(one_row.profile, sequence_tokens, (1,), whole=one_row)

    @cached_property
    def _tape(self) -> _SizedTape:
        return _SizedTape.of(self.profile, np.asarray(self._micro_batches), self.sequence_tokens)

    @cached_property
    def _fsdp(self) -> FsdpModel:
        return FsdpModel(self.whole.gathered, self._micro_batches, self.sequence_tokens)

    def estimate(self, configuration: Configuration, cluster: Cluster, *, replays: bool = False) -> MemoryEstimate:
        """Estimate the memory of the most loaded device.

        Args:
            configuration: must take the code path of the profile's regime.
            cluster: what it runs on.
            replays: whether to send every allocation through the caching allocator's policy (tenths of a second) for
                `peak_reserved_bytes`, and to work out the stages apart from steady steps; otherwise those are None.

        Raises:
            InputError: a knob of the configuration is not modelled; or it is to be replayed, and is beyond any device.
        """
        if configuration.per_device_train_batch_size == 1 and self._of_one_row is not None:
            return self._of_one_row.estimate(configuration, cluster, replays=replays)
        refuse_unmodelled(configuration)
        plan = self._layout(configuration, cluster.device)
        phases = self._phases(plan, configuration, cluster.device)
        if replays:
            _refuse_absurd(phases)
        replayed = self._replay(plan, configuration, cluster) if replays else None
        if replayed is not None:
            phases = _with_rounding(phases, replayed.peak_allocated_bytes)
        peak = max(phase.bytes for phase in phases)
        context = context_bytes(cluster.device, cluster.num_devices)
        host = plan.host + int(self._tape.offloaded[self._column[configuration.per_device_train_batch_size]])
        return MemoryEstimate(
            peak_allocated_bytes=peak,
            peak_reserved_bytes=replayed.peak_reserved_bytes if replayed else None,
            process_bytes=None if context is None else context + (replayed.peak_reserved_bytes if replayed else peak),
            needed_reserved_bytes=replayed.needed_bytes if replayed else None,
            **(self._intervals(peak, replayed, context, configuration) if replays else {}),
            after_step_allocated_bytes=self._between_steps(plan, configuration, cluster.device),
            host_bytes=host * cluster.num_devices_per_node or None,
            budget_bytes=cluster.device.memory_bytes,
            phases=phases,
            stages=stages(self._run(plan, configuration, cluster, phases)) if replays else None,
        )

    def _run(self, plan: Layout, configuration: Configuration, cluster: Cluster, phases: tuple[Phase, ...]) -> Run:
        return Run(
            profile=self.profile,
            configuration=configuration,
            cluster=cluster,
            plan=plan,
            model=self.whole.tensors,
            phases=phases,
            always_bytes=sum(self._always(plan, cluster.device).values()),
            sequence_tokens=self.sequence_tokens,
        )

    def _intervals(
        self, allocated: int, replayed: Replayed | None, context: int | None, configuration: Configuration
    ) -> dict[str, tuple[int, int] | None]:
        """How far off each figure may be; published runs say nothing about figures that were not replayed."""
        kind = run_kind(self.profile.regime, is_sharded=configuration.num_processes > 1)
        figures: dict[Figure, int | None] = {"peak_allocated": allocated, "peak_reserved": None, "process": None}
        if replayed is not None and context is not None:
            reserved = replayed.peak_reserved_bytes
            figures |= {"peak_reserved": reserved, "process": reserved + context}
        return {f"{figure}_interval_bytes": _around(figure, size, kind) for figure, size in figures.items()}

    def _layout(self, configuration: Configuration, device: Device) -> Layout:
        return self._fsdp.layout(configuration) if configuration.uses_fsdp else self.whole.layout(configuration, device)

    def _always(self, plan: Layout, device: Device) -> Terms:
        return {**plan.resident, "workspaces": workspace_bytes(device)}

    def _between_steps(self, plan: Layout, configuration: Configuration, device: Device) -> int:
        later = self._fsdp.between_steps(configuration) if configuration.uses_fsdp else {}
        return sum([*self._always(plan, device).values(), *later.values()])

    def _phases(self, plan: Layout, configuration: Configuration, device: Device) -> tuple[Phase, ...]:
        column = self._column[configuration.per_device_train_batch_size]
        always = {**self._always(plan, device), "batch": self._batch_bytes(configuration)}
        outputs = {"outputs": int(self._tape.outputs[column])}
        accumulates = configuration.gradient_accumulation_steps > 1
        if configuration.uses_fsdp:
            found = self._fsdp.peaks(configuration, column)
            phases = [_phase(PHASE_NAMES.get(name, name), [always, terms]) for name, terms in found.items()]
        else:
            phases = [
                self._phase(peak, column, plan, always, outputs, accumulates=accumulates) for peak in self._tape.peaks
            ]
            if plan.clones_outputs:
                returned = {"activations": int(self._tape.left[column] + 2 * self._tape.logits[column])}
                gradients = {"gradients": plan.accumulated_gradients if accumulates else 0}
                phases.append(_phase("head_and_loss", [always, plan.forward, returned, gradients]))
        later = [("gradient_reduction", held) for held in plan.reduction] + [("optimizer_step", h) for h in plan.step]
        if plan.gathering_bytes:
            gathering = {"activations": int(self._tape.before_head[column]), "gathered_weights": plan.gathering_bytes}
            phases.append(_phase("head_and_loss", [always, plan.forward, gathering]))
        loss = {"activations": self._held_in_the_step(configuration, column)}
        return _highest_of_each_name([*phases, *(_phase(name, [always, outputs, loss, held]) for name, held in later)])

    def _held_in_the_step(self, configuration: Configuration, column: int) -> int:
        """What the loss keeps alive besides outputs: DeepSpeed steps inside `accelerator.backward`, before it is gone.

        Source: accelerate/utils/deepspeed.py 1.15, DeepSpeedEngineWrapper.backward.
        """
        kept = self._tape.kept_by_the_loss[column] - self._tape.outputs[column]
        return int(kept) if configuration.uses_deepspeed else 0

    def _phase(
        self, peak: PhasePeak, column: int, plan: Layout, always: Terms, outputs: Terms, *, accumulates: bool
    ) -> Phase:
        name = PHASE_NAMES.get(peak.name, peak.name)
        held = [always, plan.forward, plan.backward] if peak.has_gradients else [always, plan.forward]
        if peak.name in FORWARD_NAMES:
            held.append(outputs)
        variants = []
        if plan.gradients == "kept":
            gradients = int(peak.kept_gradients[column])
            variants.append({"activations": int(peak.kept[column]) - gradients, "gradients": gradients})
        if plan.gradients == "used":
            variants.append({"activations": int(peak.handed_over[column])})
        elif plan.gradients == "bucketed":
            variants.append({"activations": _bucketed(peak, column, plan)})
        elif plan.gradients == "offloaded":
            variants.append({"activations": max(_bucketed(peak, column, plan), int(peak.cloning[column]))})
            variants.append(_offloaded_but_kept(peak, column, plan))
        elif accumulates:
            variants.append({"activations": int(peak.handed_over[column]), "gradients": plan.accumulated_gradients})
        return max((_phase(name, [*held, variant]) for variant in variants), key=lambda phase: phase.bytes)

    def _batch_bytes(self, configuration: Configuration) -> int:
        """Inputs besides the ids that the trace itself made."""
        micro = configuration.per_device_train_batch_size * self.sequence_tokens * TOKEN_ID_BYTES
        num_tensors, num_traced = NUM_INPUT_TENSORS[self.profile.regime.batching]
        return micro * (num_tensors * configuration.gradient_accumulation_steps - num_traced)

    def _replay(self, plan: Layout, configuration: Configuration, cluster: Cluster) -> Replayed | None:
        if cluster.device.kind != "cuda":
            return None
        context = context_bytes(cluster.device, cluster.num_devices) or 0
        if configuration.uses_fsdp:
            return self.whole.fsdp_replayer.fsdp_step(
                configuration,
                self.sequence_tokens,
                self._fsdp,
                workspace_sizes(cluster.device),
                capacity_bytes=cluster.device.memory_bytes - context,
            )
        return self.whole.replayer.step(
            configuration,
            self.sequence_tokens,
            plan,
            workspace_sizes(cluster.device),
            capacity_bytes=cluster.device.memory_bytes - context,
        )


@dataclass(frozen=True, slots=True)
class _SizedTape:
    """What is read off a tape for one length, a figure for each micro-batch."""

    peaks: tuple[PhasePeak, ...]
    offloaded: Bytes
    left: Bytes
    before_head: Bytes
    logits: Bytes
    kept_by_the_loss: Bytes
    outputs: Bytes

    @classmethod
    def of(cls, profile: RegimeProfile, micro_batches: npt.ArrayLike, sequence_tokens: int) -> _SizedTape:
        """Read a tape."""
        return cls(
            peaks=phase_peaks(profile, micro_batches, sequence_tokens),
            offloaded=offloaded_bytes(profile, micro_batches, sequence_tokens),
            left=left_by_forward_bytes(profile, micro_batches, sequence_tokens),
            before_head=left_by_forward_bytes(profile, micro_batches, sequence_tokens, with_head=False),
            logits=returned_logits_bytes(profile, micro_batches, sequence_tokens),
            kept_by_the_loss=kept_by_the_loss_bytes(profile, micro_batches, sequence_tokens),
            outputs=kept_outputs_bytes(profile, micro_batches, sequence_tokens),
        )


class WholeModel:
    """What of a profile depends on no length and no micro-batch."""

    def __init__(self, profile: RegimeProfile) -> None:
        self.profile = profile
        self.tensors: tuple[Tensor, ...] = tensors(profile)
        self._static = static_bytes(self.tensors, profile.regime.device)
        self._layouts: dict[Configuration, Layout] = {}

    @cached_property
    def one_row(self) -> WholeModel:
        """The same model with the tape of one sequence; itself where that is the same."""
        tape = self.profile.at_rows(1)
        return self if tape is self.profile else WholeModel(tape)

    @cached_property
    def gathered(self) -> RegimeProfile:
        """The tape under FSDP."""
        return without_adapter_casts(self.profile)

    @cached_property
    def replayer(self) -> Replayer:
        """Replays the profile's step."""
        return Replayer(self.profile, self.tensors)

    @cached_property
    def fsdp_replayer(self) -> Replayer:
        """Replays it as it is under FSDP."""
        return Replayer(self.gathered, self.tensors)

    def layout(self, configuration: Configuration, device: Device) -> Layout:
        """Lay out a configuration, once for all micro-batches: only whether it accumulates matters."""
        accumulates = min(configuration.gradient_accumulation_steps, MAX_MICRO_STEPS)
        same = replace(configuration, per_device_train_batch_size=1, gradient_accumulation_steps=accumulates)
        if same not in self._layouts:
            self._layouts[same] = layout(same, self.tensors, self._static, self.profile.hidden_size, device.kind)
        return self._layouts[same]


def _refuse_absurd(phases: Sequence[Phase]) -> None:
    highest = max(phase.bytes for phase in phases)
    if highest > MAX_REPLAYED_BYTES:
        raise InputError(
            f"{format_bytes(highest)} would have to be on one device.",
            to_fix=f"check length and micro-batch: what needs more than {format_bytes(MAX_REPLAYED_BYTES)} is a slip",
        )


def _bucketed(peak: PhasePeak, column: int, plan: Layout) -> int:
    """Activations and gradients on their way through DeepSpeed's bucket, with what their reduction takes."""
    highest = max(peak.bucketed[column], peak.at_gradients[column] + plan.reduction_bytes)
    if plan.reduction_fraction:
        highest = max(highest, peak.reducing[column] + peak.reduced[column] * (1 + plan.reduction_fraction))
    return int(highest)


def _offloaded_but_kept(peak: PhasePeak, column: int, plan: Layout) -> Terms:
    """A micro-step before the last, whose gradients too large for the bucket stay on the device until it ends.

    Only those of this process's partition do: at most its bytes.
    """
    without = int(max(peak.bucketed[column], peak.cloning[column]))
    kept = int(min(peak.large_kept[column] - without, plan.accumulated_gradients)) if plan.accumulated_gradients else 0
    return {"activations": without, "gradients": max(0, kept)}


def _around(figure: Figure, num_bytes: int | None, kind: RunKind) -> tuple[int, int] | None:
    found = None if num_bytes is None else interval(figure, kind)
    return None if found is None or num_bytes is None else found.around(num_bytes)


def _highest_of_each_name(phases: Sequence[Phase]) -> tuple[Phase, ...]:
    highest: dict[str, Phase] = {}
    for phase in phases:
        if phase.name not in highest or phase.bytes > highest[phase.name].bytes:
            highest[phase.name] = phase
    return tuple(highest.values())


def _with_rounding(phases: tuple[Phase, ...], allocated_bytes: int) -> tuple[Phase, ...]:
    """Add to the highest phase what the allocator counts above the tensors' own bytes."""
    highest = max(phases, key=lambda phase: phase.bytes)
    rounding = allocated_bytes - highest.bytes
    if rounding <= 0:
        return phases
    terms = {**highest.terms, "allocator_rounding": rounding}
    widened = replace(highest, bytes=allocated_bytes, terms=terms)
    return tuple(widened if phase is highest else phase for phase in phases)


def _phase(name: str, parts: Sequence[Terms]) -> Phase:
    terms: Terms = {}
    for part in parts:
        for term, num_bytes in part.items():
            terms[term] = terms.get(term, 0) + num_bytes
    return Phase(name=name, bytes=sum(terms.values()), terms={term: n for term, n in terms.items() if n})


def estimate_memory(
    profile: RegimeProfile, configuration: Configuration, cluster: Cluster, workload: Workload, *, replays: bool = False
) -> MemoryEstimate:
    """Estimate the memory of one configuration; see `MemoryModel.estimate`."""
    model = MemoryModel(profile, workload.sequence_tokens, (configuration.per_device_train_batch_size,))
    return model.estimate(configuration, cluster, replays=replays)
