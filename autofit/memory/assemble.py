"""Profile and configuration to bytes: the peak is the largest sum over one phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from msgspec.structs import replace

from autofit.errors import InputError
from autofit.memory.adapter_casts import without_adapter_casts
from autofit.memory.engines import Layout, Terms, engine_layout, optimizer_on_device, with_optimizer
from autofit.memory.fsdp import FsdpModel
from autofit.memory.fsdp_script import MAX_MICRO_STEPS as FSDP_MICRO_STEPS
from autofit.memory.fsdp_stages import FsdpStages
from autofit.memory.inputs import TOKEN_ID_BYTES, later_inputs, untraced_bytes
from autofit.memory.limits import refuse_absurd_numbers, refuse_unmodelled
from autofit.memory.overheads import context_bytes, workspace_bytes, workspace_sizes
from autofit.memory.phases import Run, stages
from autofit.memory.replay import MAX_MICRO_STEPS, Replayed, Replayer, holds_whole_tensors
from autofit.memory.static import OptimizerBytes, Update, static_bytes
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
from autofit.memory.tensors import Model, tensors
from autofit.memory.uncertainty import Figure, RunKind, interval, run_kind
from autofit.spec.configuration import Configuration, Optim
from autofit.spec.deepspeed import bucket_settings
from autofit.spec.estimate import MemoryEstimate, Phase
from autofit.spec.hardware import Cluster, Device, DeviceKind
from autofit.spec.job import Workload
from autofit.spec.profile import RegimeProfile
from autofit.units import format_bytes

PHASE_NAMES = {"layer": "layer_forward", "head": "head_and_loss"}
FORWARD_NAMES = ("embedding", "layer", "head")


Columns = npt.NDArray[np.int64]
"""One figure for each split of the batch."""
Held = Mapping[str, int | Columns]
"""Bytes by what they hold; a single figure is that of every split."""
Split = tuple[int, int]
"""Micro-batch and accumulation steps."""


class Moment(Struct, frozen=True):
    """All that is alive at one moment of a step."""

    phase: str
    held: tuple[Held, ...]


class Needs(Struct, frozen=True, kw_only=True):
    """What configurations need that differ in optimizer (rows) and split of the batch (columns) alone."""

    device_bytes: Columns
    """As `MemoryEstimate.needed_bytes` without a replay."""
    host_bytes: Columns
    """Of one node."""


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
        InputError: the tokens do not divide over the processes that share a sequence.
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
        _refuse_unequal_parts(sequence_tokens, profile.regime.sequence_parallel_size)
        self.profile = profile
        self.sequence_tokens = sequence_tokens
        self._column = {batch: n for n, batch in enumerate(micro_batches)}
        self._micro_batches = np.asarray(micro_batches)
        self._peaks: dict[int, tuple[PhasePeak, ...]] = {}
        """For each size of DeepSpeed's bucket that was asked for."""
        self._offloaded = offloaded_bytes(profile, np.asarray(micro_batches), sequence_tokens)
        self._before_head, self._left = left_by_forward_bytes(profile, np.asarray(micro_batches), sequence_tokens)
        self._logits = returned_logits_bytes(profile, np.asarray(micro_batches), sequence_tokens)
        self._kept_by_the_loss = kept_by_the_loss_bytes(profile, np.asarray(micro_batches), sequence_tokens)
        self._outputs = kept_outputs_bytes(profile, np.asarray(micro_batches), sequence_tokens)
        self._replayed: dict[tuple[Configuration, Device, int], Replayed] = {}
        self.whole = whole or WholeModel(profile)
        self._fsdp = FsdpModel(self.whole.gathered, micro_batches, sequence_tokens)

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
        host = plan.host + int(self._offloaded[self._column[configuration.per_device_train_batch_size]])
        return MemoryEstimate(
            peak_allocated_bytes=peak,
            peak_reserved_bytes=replayed.peak_reserved_bytes if replayed else None,
            process_bytes=None if context is None else context + (replayed.peak_reserved_bytes if replayed else peak),
            needed_reserved_bytes=replayed.needed_bytes if replayed else None,
            **(self._intervals(peak, replayed, context, configuration) if replays else {}),
            after_step_allocated_bytes=self._between_steps(plan, configuration, cluster.device)
            + (replayed.left_over_bytes if replayed and holds_whole_tensors(configuration) else 0),
            host_bytes=host * cluster.num_devices_per_node or None,
            budget_bytes=cluster.device.memory_bytes,
            phases=phases,
            stages=stages(self._run(plan, configuration, cluster, phases)) if replays else None,
        )

    def needs(
        self, configuration: Configuration, cluster: Cluster, optims: Sequence[Optim], splits: Sequence[Split]
    ) -> Needs:
        """Return what `estimate` says, without a replay, of every optimizer with every split of the batch.

        No moment of a step depends on the optimizer but by its state, which is always there, and by its temporaries,
        which are in the update alone: each moment is added up once for all of them. One that works in backward is laid
        out for itself.

        Args:
            configuration: all else; nothing of it or of the optimizers is unmodelled.
            cluster: what it runs on.
            optims: one row for each.
            splits: one column for each.

        Raises:
            InputError: a combination of a knob with the traced libraries' releases is not modelled.
        """
        found = Needs(
            device_bytes=np.zeros((len(optims), len(splits)), dtype=np.int64),
            host_bytes=np.zeros((len(optims), len(splits)), dtype=np.int64),
        )
        context = context_bytes(cluster.device, cluster.num_devices) or 0
        offloaded = _whole(self._offloaded)
        for num_micro_steps, columns in _alike(
            splits, FSDP_MICRO_STEPS if configuration.uses_fsdp else MAX_MICRO_STEPS
        ):
            same = replace(configuration, per_device_train_batch_size=1, gradient_accumulation_steps=num_micro_steps)
            chosen = [splits[column] for column in columns]
            without = self._without_optimizer(same, cluster.device)
            *others, update = map(_total, self._moments(without, same, cluster.device, chosen))
            steady = np.maximum.reduce(others)
            on_host = offloaded[[self._column[micro_batch] for micro_batch, _ in chosen]]
            added = [self._optimizer(without, same, optim, cluster.device) for optim in optims]
            state, step, host = (
                np.array(amounts, dtype=np.int64)[:, None]
                for amounts in zip(*((each.state, each.step, hosted) for each, hosted in added), strict=True)
            )
            found.device_bytes[:, columns] = state + np.maximum(steady, update + step) + context
            found.host_bytes[:, columns] = (host + on_host) * cluster.num_devices_per_node
            for row, (optimizer, _) in enumerate(added):
                if optimizer.in_backward:
                    moments = self._moments(with_optimizer(without, optimizer), same, cluster.device, chosen)
                    found.device_bytes[row, columns] = np.maximum.reduce(list(map(_total, moments))) + context
        return found

    def _without_optimizer(self, configuration: Configuration, device: Device) -> Layout:
        if configuration.uses_fsdp:
            return self._fsdp.shard_layout(configuration)
        return self.whole.engine_layout(configuration, device)

    def _optimizer(
        self, without: Layout, configuration: Configuration, optim: Optim, device: Device
    ) -> tuple[OptimizerBytes, int]:
        """What an optimizer adds on the device, nothing where the host updates, and what a process has on the host."""
        if configuration.uses_fsdp:
            optimizer, host = self._fsdp.optimizer(configuration, optim), self._fsdp.host_bytes(configuration, optim)
        else:
            optimizer = self.whole.optimizer(without, optim, device.kind)
            host = without.host + (optimizer.host if optimizer else 0)
        return optimizer or OptimizerBytes(state=0, host=0, step=0), host

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
            fsdp=FsdpStages(configuration, self.whole.gathered) if configuration.uses_fsdp else None,
        )

    def _intervals(
        self, allocated: int, replayed: Replayed | None, context: int | None, configuration: Configuration
    ) -> dict[str, tuple[int, int] | None]:
        """How far off each figure may be; published runs say nothing about figures that were not replayed.

        What is allocated is reserved, and what is reserved is the process's: no lower bound is below the one before.
        """
        kind = run_kind(self.profile.regime, is_sharded=configuration.num_processes > 1)
        figures: dict[Figure, int | None] = {"peak_allocated": allocated, "peak_reserved": None, "process": None}
        if replayed is not None and context is not None:
            reserved = replayed.peak_reserved_bytes
            figures |= {"peak_reserved": reserved, "process": reserved + context}
        intervals: dict[str, tuple[int, int] | None] = {}
        least = 0
        for figure, num_bytes in figures.items():
            found = _around(figure, num_bytes, kind)
            if found is not None:
                least = max(least, found[0])
                found = least, found[1]
            intervals[f"{figure}_interval_bytes"] = found
        return intervals

    def _layout(self, configuration: Configuration, device: Device) -> Layout:
        return self._fsdp.layout(configuration) if configuration.uses_fsdp else self.whole.layout(configuration, device)

    def _always(self, plan: Layout, device: Device) -> Terms:
        return {**plan.resident, "workspaces": workspace_bytes(device)}

    def _between_steps(self, plan: Layout, configuration: Configuration, device: Device) -> int:
        later = self._fsdp.between_steps(configuration) if configuration.uses_fsdp else {}
        return sum([*self._always(plan, device).values(), *later.values()])

    def _phases(self, plan: Layout, configuration: Configuration, device: Device) -> tuple[Phase, ...]:
        split = configuration.per_device_train_batch_size, configuration.gradient_accumulation_steps
        moments = self._moments(plan, configuration, device, (split,))
        return _highest_of_each_name([_phase(each) for each in moments])

    def _moments(
        self, plan: Layout, configuration: Configuration, device: Device, splits: Sequence[Split]
    ) -> list[Moment]:
        """List the moments of a step that can be its highest, the optimizer's update last.

        Args:
            plan: what is held beside activations.
            configuration: as laid out; of its split of the batch only whether it accumulates counts.
            device: what it runs on.
            splits: one column for each.
        """
        columns = np.array([self._column[micro_batch] for micro_batch, _ in splits])
        batch = np.array([self._batch_bytes(*split) for split in splits], dtype=np.int64)
        always: Held = {**self._always(plan, device), "batch": batch}
        outputs: Held = {"outputs": _whole(self._outputs[columns])}
        accumulates = configuration.gradient_accumulation_steps > 1
        if configuration.uses_fsdp:
            moments = self._fsdp_moments(configuration, columns, always)
        else:
            moments = [
                moment
                for peak in self._peaks_with(configuration)
                for moment in _moments_of(peak, columns, plan, always, outputs, accumulates=accumulates)
            ]
            if plan.clones_outputs:
                returned = {"activations": _whole(self._left[columns] + 2 * self._logits[columns])}
                gradients = {"gradients": plan.accumulated_gradients if accumulates else 0}
                moments.append(Moment("head_and_loss", (always, plan.forward, returned, gradients)))
        if plan.gathering_bytes:
            before: Held = {"activations": _whole(self._before_head[columns]), "gathered_weights": plan.gathering_bytes}
            moments.append(Moment("head_and_loss", (always, plan.forward, before)))
        loss: Held = {"activations": self._held_in_the_step(configuration, columns)}
        inputs, next_inputs = self._later_inputs(splits)
        between = self._fsdp.between_steps(configuration) if configuration.uses_fsdp else {}
        moments.append(Moment("optimizer_step", (always, outputs, between, next_inputs)))
        later = [("gradient_reduction", held) for held in plan.reduction] + [("optimizer_step", h) for h in plan.step]
        return [*moments, *(Moment(name, (always, outputs, loss, inputs, held)) for name, held in later)]

    def _peaks_with(self, configuration: Configuration) -> tuple[PhasePeak, ...]:
        bucket = bucket_settings(configuration, self.profile.hidden_size).reduce_bucket_size
        if bucket not in self._peaks:
            self._peaks[bucket] = phase_peaks(self.profile, self._micro_batches, self.sequence_tokens, bucket)
        return self._peaks[bucket]

    def _fsdp_moments(self, configuration: Configuration, columns: Columns, always: Held) -> list[Moment]:
        found = [self._fsdp.peaks(configuration, column) for column in columns.tolist()]
        moments = []
        for name in found[0]:
            terms = dict.fromkeys(term for each in found for term in each[name])
            held = {term: np.array([each[name].get(term, 0) for each in found], dtype=np.int64) for term in terms}
            moments.append(Moment(PHASE_NAMES.get(name, name), (always, held)))
        return moments

    def _held_in_the_step(self, configuration: Configuration, columns: Columns) -> Columns:
        """What the loss keeps alive besides outputs: DeepSpeed steps inside `accelerator.backward`, before it is gone.

        Source: accelerate/utils/deepspeed.py 1.15, DeepSpeedEngineWrapper.backward.
        """
        kept = _whole(self._kept_by_the_loss[columns] - self._outputs[columns])
        return kept if configuration.uses_deepspeed else np.zeros_like(kept)

    def _batch_bytes(self, micro_batch: int, num_micro_steps: int) -> int:
        """Inputs of all micro-steps, which Trainer moves to the device before the first, besides those in the tape.

        Where processes share sequences, each moves its part of one micro-step's at a time: ids, shifted labels and
        positions.
        Source: transformers/trainer.py, get_batch_samples; deepspeed/runtime/sequence_parallel/ulysses_sp.py 0.19.8,
        refill.
        """
        if self.profile.regime.sequence_parallel_size > 1:
            sequences, tokens = self.profile.regime.rows(micro_batch, self.sequence_tokens)
            return int(sequences * tokens) * TOKEN_ID_BYTES
        return untraced_bytes(self.profile, micro_batch, self.sequence_tokens, num_micro_steps)

    def _later_inputs(self, splits: Sequence[Split]) -> tuple[Held, Held]:
        """Inputs that are held besides in the update, and when the next step's are fetched."""
        if self.profile.regime.sequence_parallel_size > 1:
            return {}, {}
        found = [later_inputs(self.profile, batch, self.sequence_tokens, steps) for batch, steps in splits]
        in_update, in_fetching = np.array(found, dtype=np.int64).T
        return {"batch": in_update}, {"batch": in_fetching}

    def _replay(self, plan: Layout, configuration: Configuration, cluster: Cluster) -> Replayed | None:
        """Replay a configuration's steps, once for all that differ in their evaluations alone."""
        if cluster.device.kind != "cuda":
            return None
        key = configuration.training_alone, cluster.device, cluster.num_devices
        if key not in self._replayed:
            self._replayed[key] = self._replay_anew(plan, configuration, cluster)
        return self._replayed[key]

    def suffices(self, configuration: Configuration, cluster: Cluster, usable_bytes: int) -> bool:
        """Tell whether a device on which so much may be needed holds a configuration, as the allocator lays it out.

        True also where only `estimate` with a replay tells. Raises as that does.
        """
        if cluster.device.kind != "cuda" or configuration.uses_fsdp:
            return True
        refuse_unmodelled(configuration)
        plan = self._layout(configuration, cluster.device)
        _refuse_absurd(self._phases(plan, configuration, cluster.device))
        context = context_bytes(cluster.device, cluster.num_devices) or 0
        return self.whole.replayer.suffices(
            configuration,
            self.sequence_tokens,
            plan,
            workspace_sizes(cluster.device),
            capacity_bytes=cluster.device.memory_bytes - context,
            reserved_bytes=usable_bytes - context,
        )

    def _replay_anew(self, plan: Layout, configuration: Configuration, cluster: Cluster) -> Replayed:
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


class WholeModel:
    """What of a profile depends on no length and no micro-batch."""

    def __init__(self, profile: RegimeProfile) -> None:
        self._profile = profile
        self.gathered = without_adapter_casts(profile)
        """The same under FSDP."""
        self.tensors: Model = tensors(profile)
        self._static = static_bytes(self.tensors, profile.regime.device)
        self._layouts: dict[Configuration, Layout] = {}
        self._without: dict[Configuration, Layout] = {}
        self._optimizers: dict[tuple[int, Optim], OptimizerBytes | None] = {}

    @cached_property
    def replayer(self) -> Replayer:
        """Replays the profile's step."""
        return Replayer(self._profile, self.tensors)

    @cached_property
    def fsdp_replayer(self) -> Replayer:
        """Replays it as it is under FSDP."""
        return Replayer(self.gathered, self.tensors)

    def layout(self, configuration: Configuration, device: Device) -> Layout:
        """Lay out a configuration, once for all micro-batches: only whether it accumulates matters."""
        same = _whatever_the_split(configuration)
        if same not in self._layouts:
            without = self.engine_layout(same, device)
            self._layouts[same] = with_optimizer(without, self.optimizer(without, same.optim, device.kind))
        return self._layouts[same]

    def engine_layout(self, configuration: Configuration, device: Device) -> Layout:
        """Lay out what does not depend on the optimizer, once for all of them."""
        same = replace(_whatever_the_split(configuration), optim="sgd")
        if same not in self._without:
            self._without[same] = engine_layout(
                same, self.tensors, self._static, self._profile.hidden_size, device.kind
            )
        return self._without[same]

    def optimizer(self, without: Layout, optim: Optim, device: DeviceKind) -> OptimizerBytes | None:
        """Return what an optimizer adds to a layout, once for all that hand it the same; None: the host updates."""
        if without.updated == "nothing":
            return None
        key = without.partition_elements, optim
        if key not in self._optimizers:
            self._optimizers[key] = optimizer_on_device(without, self.tensors, optim, device)
        return self._optimizers[key]


def _whatever_the_split(configuration: Configuration) -> Configuration:
    """Keep of the split of the batch only whether it accumulates."""
    accumulates = min(configuration.gradient_accumulation_steps, MAX_MICRO_STEPS)
    return replace(configuration, per_device_train_batch_size=1, gradient_accumulation_steps=accumulates)


def _alike(splits: Sequence[Split], most: int) -> Iterator[tuple[int, list[int]]]:
    """Group columns that do as many kinds of micro-steps, of `most` kinds at most."""
    nums = [min(num_micro_steps, most) for _, num_micro_steps in splits]
    for num in dict.fromkeys(nums):
        yield num, [column for column, each in enumerate(nums) if each == num]


def _refuse_absurd(phases: Sequence[Phase]) -> None:
    highest = max(phase.bytes for phase in phases)
    if highest > MAX_REPLAYED_BYTES:
        raise InputError(
            f"{format_bytes(highest)} would have to be on one device.",
            to_fix=f"check length and micro-batch: what needs more than {format_bytes(MAX_REPLAYED_BYTES)} is a slip",
        )


def _refuse_unequal_parts(sequence_tokens: int, num_processes: int) -> None:
    """Source: deepspeed/runtime/sequence_parallel/ulysses_sp.py 0.19.8, "isn't divisible by sp-size"."""
    if sequence_tokens % num_processes:
        nearest = sequence_tokens // num_processes * num_processes
        lengths = [str(tokens) for tokens in (nearest, nearest + num_processes) if tokens]
        raise InputError(
            f"sequences of {sequence_tokens:,} tokens do not divide over {num_processes} processes.",
            to_fix=f"pad or cut them to {' or '.join(lengths)} tokens, or choose another sequence_parallel_size",
        )


def _moments_of(
    peak: PhasePeak, columns: Columns, plan: Layout, always: Held, outputs: Held, *, accumulates: bool
) -> Iterator[Moment]:
    """Yield the highest moment of a phase of forward or backward for each way that gradients may stand in it."""
    held = [always, plan.forward, *([plan.backward] if peak.has_gradients else [])]
    if peak.name in FORWARD_NAMES:
        held.append(outputs)
    for variant in _variants(peak, columns, plan, accumulates=accumulates):
        yield Moment(PHASE_NAMES.get(peak.name, peak.name), (*held, variant))


def _variants(peak: PhasePeak, columns: Columns, plan: Layout, *, accumulates: bool) -> Iterator[Held]:
    if plan.gradients == "kept":
        gradients = _whole(peak.kept_gradients[columns])
        yield {"activations": _whole(peak.kept[columns]) - gradients, "gradients": gradients}
    if plan.gradients in {"moved", "used"}:
        yield {"activations": _whole(peak.handed_over[columns])}
        if plan.updates and peak.updated_gradients.size:
            yield _highest_update(peak, columns, plan.updates)
    elif plan.gradients == "bucketed":
        yield {"activations": _bucketed(peak, columns, plan)}
    elif plan.gradients == "offloaded":
        yield {"activations": np.maximum(_bucketed(peak, columns, plan), _whole(peak.cloning[columns]))}
        yield _offloaded_but_kept(peak, columns, plan)
    elif accumulates:
        yield {"activations": _whole(peak.handed_over[columns]), "gradients": plan.accumulated_gradients}


def _highest_update(peak: PhasePeak, columns: Columns, updates: Sequence[Update]) -> Held:
    """Return what is alive at the highest of the updates that are made in a phase of backward.

    Which tensor a gradient is of is told by its bytes, and by whether it is made in the embedding's backward.
    """
    steps = np.array([_update_bytes(size, peak.name, updates) for size in peak.updated_gradients.tolist()])
    activations = _whole(peak.at_updates[:, columns])
    highest = np.argmax(activations + steps[:, None], axis=0)
    return {"activations": activations[highest, np.arange(len(columns))], "optimizer_temporaries": steps[highest]}


def _update_bytes(gradient_bytes: int, phase: str, updates: Sequence[Update]) -> int:
    alike = [update for update in updates if update.gradient_bytes == gradient_bytes] or updates
    there = [update for update in alike if update.embeds == (phase == "embedding_backward")] or alike
    return max(update.step_bytes for update in there)


def _bucketed(peak: PhasePeak, columns: Columns, plan: Layout) -> Columns:
    """Activations and gradients on their way through DeepSpeed's bucket, with what their reduction takes."""
    highest = peak.bucketed[columns]
    if peak.has_gradients:
        highest = np.maximum(highest, peak.at_gradients[columns] + plan.reduction_bytes)
    if plan.reduction_fraction:
        copied = peak.reduced[columns] * (1 + plan.reduction_fraction)
        highest = np.maximum(highest, peak.reducing[columns] + copied)
    return _whole(highest)


def _offloaded_but_kept(peak: PhasePeak, columns: Columns, plan: Layout) -> Held:
    """A micro-step before the last, whose gradients too large for the bucket stay on the device until it ends.

    Only those of this process's partition do: at most its bytes.
    """
    without = _whole(np.maximum(peak.bucketed[columns], peak.cloning[columns]))
    kept = _whole(np.minimum(peak.large_kept[columns] - without, plan.accumulated_gradients))
    return {"activations": without, "gradients": np.maximum(0, kept)}


def _whole(num_bytes: Bytes) -> Columns:
    """Drop fractions of a byte."""
    return num_bytes.astype(np.int64)


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


def _phase(moment: Moment) -> Phase:
    """Read the only column of a moment."""
    terms: Terms = {}
    for part in moment.held:
        for term, amount in part.items():
            terms[term] = terms.get(term, 0) + (amount if isinstance(amount, int) else int(amount[0]))
    return Phase(name=moment.phase, bytes=sum(terms.values()), terms={term: n for term, n in terms.items() if n})


def _total(moment: Moment) -> Columns:
    """Add up a moment, for each column."""
    amounts = [amount for part in moment.held for amount in part.values()]
    alike = sum(amount for amount in amounts if isinstance(amount, int))
    total: Columns = np.sum([amount for amount in amounts if not isinstance(amount, int)], axis=0) + alike
    return total


def estimate_memory(
    profile: RegimeProfile, configuration: Configuration, cluster: Cluster, workload: Workload, *, replays: bool = False
) -> MemoryEstimate:
    """Estimate the memory of one configuration; see `MemoryModel.estimate`."""
    model = MemoryModel(profile, workload.sequence_tokens, (configuration.per_device_train_batch_size,))
    return model.estimate(configuration, cluster, replays=replays)
