"""FSDP on one device: what is alive at each moment of a step whose script `fsdp_script` writes down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from autofit.errors import InputError
from autofit.memory.engines import Layout, Terms, with_optimizer
from autofit.memory.fsdp_script import (
    MAX_MICRO_STEPS,
    Enter,
    Give,
    GiveGradients,
    Key,
    Operation,
    Play,
    Retain,
    Take,
    real_segments,
    script,
)
from autofit.memory.fsdp_units import Units, between_steps, host_bytes, make_units, shard_layout
from autofit.memory.static import OptimizerBytes, optimizer_bytes
from autofit.memory.tape import BIRTH_FIELDS, PER_TOKEN, Bytes, size_table
from autofit.spec.configuration import Configuration, Optim
from autofit.spec.profile import GRADIENT, ON_HOST, Event, RegimeProfile, Segment
from autofit.units import BYTES_PER_ELEMENT

INNER_CHECKPOINTS_RELEASE = (4, 50)
"""Up to 4.48 a model checkpoints the call of a layer, and so of the unit around it; in 5 the layer checkpoints itself.

Source: transformers 4.48 models/llama/modeling_llama.py, `_gradient_checkpointing_func(decoder_layer.__call__, ...)`;
transformers 5.23 modeling_layers.py, GradientCheckpointingLayer."""


class _Curve(Struct, frozen=True):
    """What a segment, or a part of it, holds above its start: one figure for each micro-batch asked for."""

    highest: Bytes
    """Activations and its gradients, where they stay."""
    gradients: Bytes
    """What of `highest` is gradients."""
    highest_adding: Bytes
    """Activations and the newest gradient, where each is added to another at once."""
    activations: Bytes
    """Left at the end."""
    kept_gradients: Bytes
    """Made by the end."""


class StepCurves:
    """The tape's segments at the sizes that will be asked for.

    Args:
        profile: the traced step.
        micro_batches: one column for each.
        sequence_tokens: tokens of every sequence.
    """

    def __init__(self, profile: RegimeProfile, micro_batches: Sequence[int], sequence_tokens: int) -> None:
        self._profile = profile
        self._sizes = size_table(profile, np.asarray(micro_batches), sequence_tokens)
        element = BYTES_PER_ELEMENT[profile.regime.weights_dtype]
        self.input_bytes = [batch * sequence_tokens * profile.hidden_size * element for batch in micro_batches]
        """Of a layer, for each micro-batch."""
        self._real = real_segments(profile)
        self._known: dict[tuple[int, str], _Curve] = {}

    def peaks(self, operations: Iterable[Operation], column: int) -> dict[str, Terms]:
        """Count a script for one micro-batch; return the terms of each phase's highest moment."""
        return _Count(self, column).run(operations)

    def curve(self, play: Play) -> _Curve:
        """Return what a played segment holds."""
        traced = self._real[play.index].traced
        key = (traced, play.part)
        if key not in self._known:
            segment = self._profile.segments[traced]
            split = logits_gradient(self._profile, segment) if play.part != "whole" else 0
            events = segment.events[:split] if play.part == "loss" else segment.events[split:]
            self._known[key] = self._curve(segment, events)
        return self._known[key]

    def _curve(self, segment: Segment, events: Sequence[Event]) -> _Curve:
        if not events:
            nothing = np.zeros(self._sizes.shape[1])
            return _Curve(nothing, nothing, nothing, nothing, nothing)
        born = np.array([len(event) == BIRTH_FIELDS for event in events])
        category = np.array([event[1] for event in events])
        nums = [1 if len(e) == BIRTH_FIELDS else self._num_meant(segment, e) for e in events]
        changes = self._sizes[[event[0] for event in events]] * (np.where(born, 1.0, -1.0) * nums)[:, None]
        is_gradient = category == GRADIENT
        on_device = (category != ON_HOST) & ~is_gradient
        activations = np.cumsum(np.where(on_device[:, None], changes, 0.0), axis=0)
        births = np.where((is_gradient & born)[:, None], changes, 0.0)
        gradients = np.cumsum(births, axis=0)
        highest = np.argmax(activations + gradients, axis=0)
        columns = np.arange(self._sizes.shape[1])
        return _Curve(
            np.maximum((activations + gradients)[highest, columns], 0.0),
            gradients[highest, columns],
            np.maximum(np.max(activations + births, axis=0), 0.0),
            activations[-1],
            gradients[-1],
        )

    def _num_meant(self, segment: Segment, event: Event) -> int:
        """Outside the layers, the death of a middle layer's tensor is one in every middle layer."""
        if segment.layer is not None:
            return 1
        born_in = self._profile.segments[event[2]]
        return 1 if born_in.layer is None else self._profile.repeats(born_in)


def logits_gradient(profile: RegimeProfile, segment: Segment) -> int:
    """Find where the gradient of the logits is complete: the first birth after the last tensor as large as them."""
    births = [n for n, event in enumerate(segment.events) if len(event) == BIRTH_FIELDS and event[1] != GRADIENT]
    large = [n for n in births if profile.sizes[segment.events[n][0]][PER_TOKEN] >= profile.vocab_size]
    last = large[-1] if large else -1
    later = (n for n, event in enumerate(segment.events) if n > last and len(event) == BIRTH_FIELDS)
    return next(later, len(segment.events))


class _Count:
    """Counts what is alive, operation by operation."""

    def __init__(self, curves: StepCurves, column: int) -> None:
        self._curves, self._column = curves, column
        self._held: dict[Key, Take] = {}
        self._levels: Terms = {}
        self._gradients: dict[Key, float] = {}
        self._activations = 0.0
        self._phase = "embedding"
        self._highest: dict[str, Terms] = {}

    def run(self, operations: Iterable[Operation]) -> dict[str, Terms]:
        """Count every operation; return the terms of each phase's highest moment."""
        for operation in operations:
            match operation:
                case Enter():
                    self._phase = operation.phase
                case Take():
                    self._take(operation)
                case Retain():
                    num_bytes = operation.num_tensors * self._curves.input_bytes[self._column]
                    self._take(Take(operation.key, "activations", num_bytes))
                case Give():
                    if (held := self._held.pop(operation.key, None)) is not None:
                        self._levels[held.term] -= held.num_bytes
                case GiveGradients():
                    self._gradients.pop(operation.unit, None)
                case Play():
                    self._play(operation)
        return self._highest

    def _take(self, take: Take) -> None:
        self._held[take.key] = take
        self._levels[take.term] = self._levels.get(take.term, 0) + take.num_bytes
        self._note(0.0, 0.0)

    def _play(self, play: Play) -> None:
        curve, n = self._curves.curve(play), self._column
        if play.adds:
            self._note(float(curve.highest_adding[n]), 0.0)
        else:
            self._note(float(curve.highest[n] - curve.gradients[n]), float(curve.gradients[n]))
            pending = self._gradients.get(play.unit, 0.0)
            self._gradients[play.unit] = pending + float(curve.kept_gradients[n])
        self._activations += float(curve.activations[n])

    def _note(self, activations: float, gradients: float) -> None:
        """Keep this moment if it is its phase's highest."""
        terms = dict(self._levels)
        terms["activations"] = terms.get("activations", 0) + int(self._activations + activations)
        terms["gradients"] = terms.get("gradients", 0) + int(sum(self._gradients.values()) + gradients)
        known = self._highest.get(self._phase)
        if known is None or sum(terms.values()) > sum(known.values()):
            self._highest[self._phase] = terms


class FsdpModel:
    """Assembles FSDP configurations of one profile.

    Args:
        profile: the traced step.
        micro_batches: the micro-batches that will be asked for.
        sequence_tokens: tokens of every sequence.
    """

    def __init__(self, profile: RegimeProfile, micro_batches: Sequence[int], sequence_tokens: int) -> None:
        self._profile = profile
        self._curves = StepCurves(profile, micro_batches, sequence_tokens)
        self._made: dict[Configuration, _Made] = {}

    def layout(self, configuration: Configuration) -> Layout:
        """Return what is held around the step."""
        laid_out = with_optimizer(self.shard_layout(configuration), self.optimizer(configuration, configuration.optim))
        return replace(laid_out, host=self.host_bytes(configuration, configuration.optim))

    def shard_layout(self, configuration: Configuration) -> Layout:
        """Return it without the optimizer."""
        return shard_layout(configuration, self._make(configuration).units)

    def optimizer(self, configuration: Configuration, optim: Optim) -> OptimizerBytes | None:
        """Return what an optimizer adds to it on the device; None where the host updates."""
        if configuration.offload != "none":
            return None
        return optimizer_bytes(self._make(configuration).units.state, optim, self._profile.regime.device)

    def host_bytes(self, configuration: Configuration, optim: Optim) -> int:
        """Return the host memory of one process."""
        optimizer = self.optimizer(configuration, optim)
        if optimizer is not None:
            return optimizer.host
        units = self._make(configuration).units
        return host_bytes(configuration, optim, units, self._profile.regime.device)

    def units(self, configuration: Configuration) -> Units:
        """Return what is gathered together."""
        return self._make(configuration).units

    def between_steps(self, configuration: Configuration) -> Terms:
        """Return what is held between two steps alone."""
        return between_steps(configuration, self._make(configuration).units)

    def operations(self, configuration: Configuration) -> list[Operation]:
        """Return the script of a step."""
        return self._make(configuration).operations

    def peaks(self, configuration: Configuration, column: int) -> dict[str, Terms]:
        """Return the terms of each phase's highest moment, without the layout's own, for one of the micro-batches."""
        return self._curves.peaks(self._make(configuration).operations, column)

    def _make(self, configuration: Configuration) -> _Made:
        """Make what all micro-batches and optimizers share, once."""
        micro_steps = min(configuration.gradient_accumulation_steps, MAX_MICRO_STEPS)
        same = replace(
            configuration, optim="sgd", per_device_train_batch_size=1, gradient_accumulation_steps=micro_steps
        )
        if same not in self._made:
            _refuse_inner_reentry(same, self._profile)
            units = make_units(same, self._profile)
            self._made[same] = _Made(units, script(same, self._profile, units))
        return self._made[same]


def _refuse_inner_reentry(configuration: Configuration, profile: RegimeProfile) -> None:
    """Refuse reentrant checkpoints where transformers puts them inside the unit: what is then kept was not looked into.

    Raises:
        InputError: the profile's transformers does.
    """
    release = tuple(int(part) for part in profile.versions.get("transformers", "0").split(".")[:2] if part.isdigit())
    if configuration.gradient_checkpointing and configuration.use_reentrant and release >= INNER_CHECKPOINTS_RELEASE:
        raise InputError(
            f"reentrant checkpointing under FSDP with transformers {profile.versions['transformers']} is not modelled.",
            to_fix="leave use_reentrant off",
        )


class _Made(Struct, frozen=True):
    units: Units
    operations: list[Operation]
