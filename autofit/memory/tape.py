"""Reads a traced tape at given sizes: what is alive, at most, in each phase of forward and backward."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from autofit.memory.fused_losses import bound_on
from autofit.spec.profile import GRADIENT, MONOMIALS, ON_HOST, Event, RegimeProfile, Segment
from autofit.units import BYTES_PER_ELEMENT

Bytes = npt.NDArray[np.float64]
"""One figure for each micro-batch asked for."""

PER_TOKEN = MONOMIALS.index((1, 1))
"""Where in a polynomial the bytes of each token of each sequence stand."""
BIRTH_FIELDS = 2
"""A birth has this many fields, a death more."""
CUDA_BLOCK_BYTES = 512
"""torch's caching allocator rounds every allocation up to this.

Source: torch v2.13 c10/cuda/CUDACachingAllocator.h, kMinBlockSize."""


class PhasePeak(Struct, frozen=True):
    """The highest moment of a phase, for each way that gradients can be treated."""

    name: str
    has_gradients: bool
    """Whether the first gradient of the micro-step has been made: before it, engines hold no bucket for gradients."""
    kept: Bytes
    """Activations and gradients, where gradients stay until the step: their highest sum."""
    kept_gradients: Bytes
    """What of `kept` is gradients."""
    handed_over: Bytes
    """Activations and the newest gradient, where each is taken away or added to another at once: the highest sum."""
    bucketed: Bytes
    """The same, where a gradient too large for DeepSpeed's bucket waits to be reduced until the next one is made."""
    at_gradients: Bytes
    """The same as `handed_over`, at the births of gradients alone: then what came before is reduced."""
    reducing: Bytes
    """The same, at those births alone that find a gradient waiting, 0 if none does. What waits is not in it."""
    reduced: Bytes
    """The largest gradient that is reduced at such a birth."""
    cloning: Bytes
    """Activations, the newest gradient and a copy of it, where it is too large for the bucket; 0 if none is."""
    large_kept: Bytes
    """Activations and the newest gradient, where copies of all that are too large for the bucket stay: the highest."""
    updated_gradients: npt.NDArray[np.int64]
    """Bytes of each gradient made in the phase, in order."""
    at_updates: Bytes
    """Of each of them: activations and it, at the moment when it is used up at once; shape (gradients, micro-batches).

    By then what made it has freed its inputs: an autocast gradient that was converted is gone.
    """


_HIGHEST_BY_ITSELF = ("handed_over", "bucketed", "at_gradients", "reducing", "reduced", "cloning", "large_kept")


def size_table(profile: RegimeProfile, micro_batches: npt.ArrayLike, sequence_tokens: int) -> Bytes:
    """Evaluate every size of the tape, rounded as the device's allocator does: (num_sizes, num_micro_batches)."""
    sizes = _unrounded(profile, micro_batches, sequence_tokens)
    if profile.regime.loss != "stock":
        sizes = np.minimum(sizes, _bounds(profile, micro_batches, sequence_tokens))
    if profile.regime.device == "cuda":
        sizes = np.ceil(sizes / CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES
    return sizes


def _unrounded(profile: RegimeProfile, micro_batches: npt.ArrayLike, sequence_tokens: int) -> Bytes:
    """Evaluate every size, without a matrix product: those wake threads, which a copied process has not."""
    polynomials = np.asarray(profile.sizes, dtype=np.float64)
    sizes: Bytes = np.einsum("sm,mb->sb", polynomials, _powers(profile, micro_batches, sequence_tokens))
    return sizes


def _bounds(profile: RegimeProfile, micro_batches: npt.ArrayLike, sequence_tokens: int) -> Bytes:
    """The most bytes of each size, infinite for all but the buffers of a fused loss."""
    asked = np.atleast_1d(np.asarray(micro_batches, dtype=np.int64)).tolist()
    rows = [profile.regime.rows(batch, sequence_tokens) for batch in asked]
    bounds = [[bound_on(size, profile, int(b * s)) for b, s in rows] for size in profile.sizes]
    return np.asarray([[np.inf if bound is None else bound for bound in row] for row in bounds], dtype=np.float64)


def _powers(profile: RegimeProfile, micro_batches: npt.ArrayLike, sequence_tokens: int) -> Bytes:
    asked = np.atleast_1d(np.asarray(micro_batches, dtype=np.int64)).tolist()
    b, s = np.asarray([profile.regime.rows(batch, sequence_tokens) for batch in asked], dtype=np.float64).T
    return np.stack([b**i * s**j for i, j in MONOMIALS])


def phase_peaks(
    profile: RegimeProfile, micro_batches: npt.ArrayLike, sequence_tokens: int, bucket_elements: int = 0
) -> tuple[PhasePeak, ...]:
    """Walk the step once, the middle layers as often as the model has them, and keep each phase's peak.

    What is alive at a layer's start grows by the same bytes with every middle layer, so the first and the last of them
    bound all between.

    Args:
        profile: the traced step.
        micro_batches: one column for each.
        sequence_tokens: tokens of every sequence.
        bucket_elements: of DeepSpeed's bucket; larger gradients go by themselves. Nothing of `kept` depends on it.
    """
    sizes = size_table(profile, micro_batches, sequence_tokens)
    activations = np.zeros(sizes.shape[1])
    gradients = np.zeros(sizes.shape[1])
    waiting = np.zeros(sizes.shape[1])
    large = np.zeros(sizes.shape[1])
    bucket_bytes = bucket_gradient_bytes(profile, bucket_elements)
    found: dict[tuple[str, bool], list[PhasePeak]] = {}
    has_gradients = False
    for segment in profile.segments:
        count = profile.repeats(segment)
        if not count:
            continue
        for stretch in _stretches(segment, has_gradients=has_gradients):
            has_gradients = stretch.has_gradients
            num_meant = _nums_meant(profile, segment, stretch.events)
            curves = _curves(stretch.events, sizes, num_meant, bucket_bytes)
            for repeat in {0, count - 1}:
                start = _Start(
                    activations + repeat * curves.net_activations,
                    gradients + repeat * curves.net_gradients,
                    waiting if repeat == 0 else curves.left_waiting(waiting),
                    large + repeat * curves.net_large,
                )
                found.setdefault((stretch.name, has_gradients), []).append(_peak(stretch, curves, start))
            waiting = curves.left_waiting(waiting)
            activations = activations + count * curves.net_activations
            gradients = gradients + count * curves.net_gradients
            large = large + count * curves.net_large
    return tuple(_highest(peaks) for peaks in found.values())


def kept_outputs_bytes(profile: RegimeProfile, micro_batches: npt.ArrayLike, sequence_tokens: int) -> Bytes:
    """Return what of a step's outputs a loop keeps until it has those of the next; 0 where it keeps none.

    It dies in the tape's last segment; it is alive in the optimizer's step and in the next forward.
    """
    kept = kept_by_the_loss_bytes(profile, micro_batches, sequence_tokens)
    return kept if profile.regime.keeps_outputs else np.zeros_like(kept)


def kept_by_the_loss_bytes(profile: RegimeProfile, micro_batches: npt.ArrayLike, sequence_tokens: int) -> Bytes:
    """Return what dies in the tape's last segment: all that the loss, or the output that has it, keeps alive.

    Backward frees what its graph has saved, but not what it holds otherwise: the input of checkpointed layers and its
    gradient, where that input is a leaf.
    """
    sizes = size_table(profile, micro_batches, sequence_tokens)
    kept: Bytes = np.zeros(sizes.shape[1])
    for event in profile.segments[-1].events:
        if len(event) > BIRTH_FIELDS and event[1] not in {ON_HOST, GRADIENT}:
            kept = kept + sizes[event[0]] * _num_meant(profile, profile.segments[-1], event)
    return kept


def returned_logits_bytes(profile: RegimeProfile, micro_batches: npt.ArrayLike, sequence_tokens: int) -> Bytes:
    """Return the bytes of the logits that forward returns; 0 where it returns none, or a few for each sequence.

    They are among what dies last in forward's last segment, when the loop lets go of the output.
    """
    sizes = size_table(profile, micro_batches, sequence_tokens)
    events = [segment for segment in profile.segments if segment.kind == "forward"][-1].events
    last_birth = max((n for n, event in enumerate(events) if len(event) == BIRTH_FIELDS), default=-1)
    dtype = "float32" if profile.regime.autocast != "no" else profile.regime.weights_dtype
    least = profile.vocab_size * BYTES_PER_ELEMENT[dtype]
    dying = {event[0] for event in events[last_birth + 1 :] if profile.sizes[event[0]][PER_TOKEN] >= least}
    return sizes[min(dying, key=lambda size: profile.sizes[size])] if dying else np.zeros(sizes.shape[1])


def left_by_forward_bytes(
    profile: RegimeProfile, micro_batches: npt.ArrayLike, sequence_tokens: int
) -> tuple[Bytes, Bytes]:
    """Return what is alive when the head begins, and between forward and backward, the model's output not counted."""
    sizes = size_table(profile, micro_batches, sequence_tokens)
    before = left = np.zeros(sizes.shape[1])
    for segment in (segment for segment in profile.segments if segment.kind == "forward"):
        before = left
        if segment.events:
            events = _columns(segment.events, _nums_meant(profile, segment, segment.events))
            changes = np.where((events.category == GRADIENT)[:, None], 0.0, _changes(events, sizes))
            left = left + profile.repeats(segment) * np.cumsum(changes, axis=0)[-1]
    return before, left


def offloaded_bytes(profile: RegimeProfile, micro_batches: npt.ArrayLike, sequence_tokens: int) -> Bytes:
    """Return the most bytes that one micro-step keeps in host memory: the activations that checkpoints offload.

    They are born in forward and die in backward, so the most is their sum. For a GPU they are pinned, and each takes
    the next power of two. Source: torch v2.13 aten/src/ATen/core/CachingHostAllocator.h (`PowerOf2Ceil`).
    """
    counts = np.zeros(len(profile.sizes))
    for segment in profile.segments:
        for event in segment.events:
            if len(event) == BIRTH_FIELDS and event[1] == ON_HOST:
                counts[event[0]] += profile.repeats(segment)
    sizes = _unrounded(profile, micro_batches, sequence_tokens)
    if profile.regime.device == "cuda":
        sizes = 2 ** np.ceil(np.log2(np.maximum(sizes, 1)))
    kept: Bytes = np.sum(counts[:, None] * sizes, axis=0)
    return kept


def bucket_gradient_bytes(profile: RegimeProfile, bucket_elements: int) -> int:
    """Return the largest gradient that fits DeepSpeed's bucket, in the dtype that trains, rounded as sizes are."""
    element = max((BYTES_PER_ELEMENT[tensor.dtype] for tensor in profile.tensors if tensor.trains), default=0)
    num_bytes = element * bucket_elements
    return -(-num_bytes // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES if profile.regime.device == "cuda" else num_bytes


def _nums_meant(profile: RegimeProfile, segment: Segment, events: tuple[Event, ...]) -> list[int]:
    if segment.layer is not None:
        return [1] * len(events)
    return [_num_meant(profile, segment, event) for event in events]


def _num_meant(profile: RegimeProfile, segment: Segment, event: Event) -> int:
    """How many tensors of the real model an event stands for.

    Outside the layers, the death of a middle layer's tensor is one in every middle layer.
    """
    if len(event) == BIRTH_FIELDS or segment.layer is not None:
        return 1
    born_in = profile.segments[event[2]]
    return 1 if born_in.layer is None else profile.repeats(born_in)


class _Stretch(Struct, frozen=True):
    name: str
    has_gradients: bool
    events: tuple[Event, ...]


def _stretches(segment: Segment, *, has_gradients: bool) -> list[_Stretch]:
    """Cut the segment in which the first gradient is born in two."""
    if has_gradients:
        return [_Stretch(segment.name, has_gradients, segment.events)]
    births = [n for n, event in enumerate(segment.events) if event[1] == GRADIENT and len(event) == BIRTH_FIELDS]
    if not births:
        return [_Stretch(segment.name, has_gradients, segment.events)]
    name = "head_backward" if segment.name == "loss_backward" else segment.name
    before, after = segment.events[: births[0]], segment.events[births[0] :]
    return [_Stretch(segment.name, False, before), _Stretch(name, True, after)]


class _Curves(Struct, frozen=True):
    """Bytes alive above the segment's start, after each event: shape (num_events, num_micro_batches)."""

    activations: Bytes
    gradients: Bytes
    newest_gradient: Bytes
    net_activations: Bytes
    net_gradients: Bytes
    waiting: Bytes
    """The gradient before, where it is larger than DeepSpeed's bucket; 0 up to the stretch's first."""
    has_none_before: npt.NDArray[np.bool_]
    """Whether no gradient of the stretch was made before an event: shape (num_events, 1)."""
    last_waiting: Bytes | None
    """What the stretch's last gradient leaves waiting; None where the stretch makes none."""
    newest_large: Bytes
    """The newest gradient, where it is too large for the bucket."""
    large: Bytes
    """All those, the newest included."""
    net_large: Bytes
    births: npt.NDArray[np.int64]
    """Indices of the events that are a gradient's birth."""
    at_updates: Bytes
    """At each of them: activations and the gradient when what made it is done."""
    is_quiet: bool = False
    """Whether no gradient is made or freed."""

    def left_waiting(self, waiting: Bytes) -> Bytes:
        """Return what waits after the stretch, if `waiting` did before it."""
        return waiting if self.last_waiting is None else self.last_waiting


class _Start(Struct, frozen=True):
    """What a stretch finds."""

    activations: Bytes
    gradients: Bytes
    waiting: Bytes
    large: Bytes


class _Columns(Struct, frozen=True):
    """Events as arrays."""

    size: npt.NDArray[np.int64]
    category: npt.NDArray[np.int64]
    is_birth: npt.NDArray[np.bool_]
    num_meant: npt.NDArray[np.int64]


def _columns(events: tuple[Event, ...], num_meant: list[int]) -> _Columns:
    size, category, *_ = zip(*events, strict=False)  # as far as the shortest goes, which is a birth
    return _Columns(
        size=np.array(size),
        category=np.array(category),
        is_birth=np.array(list(map(len, events))) == BIRTH_FIELDS,
        num_meant=np.array(num_meant),
    )


def _changes(events: _Columns, sizes: Bytes) -> Bytes:
    """By how much each event changes what is alive on the device."""
    sign = np.where(events.is_birth, 1.0, -1.0) * events.num_meant
    return sizes[events.size] * np.where(events.category == ON_HOST, 0.0, sign)[:, None]


def _curves(events: tuple[Event, ...], sizes: Bytes, num_meant: list[int], bucket_bytes: int) -> _Curves:
    if not events:
        return _quiet(np.zeros((1, sizes.shape[1])))
    columns = _columns(events, num_meant)
    is_birth, changes = columns.is_birth, _changes(columns, sizes)
    is_gradient = (columns.category == GRADIENT)[:, None]
    if not is_gradient.any():
        return _quiet(np.cumsum(changes, axis=0))
    activations = np.cumsum(np.where(is_gradient, 0.0, changes), axis=0)
    gradients = np.cumsum(np.where(is_gradient, changes, 0.0), axis=0)
    newest = np.where(is_gradient & is_birth[:, None], changes, 0.0)
    waiting = np.where(newest > bucket_bytes, newest, 0.0)
    births = np.flatnonzero(is_gradient[:, 0] & is_birth)
    num_before = np.searchsorted(births, np.arange(len(events)))
    before = births[np.maximum(num_before - 1, 0)] if births.size else np.zeros(len(events), dtype=int)
    large = np.cumsum(waiting, axis=0)
    has_none_before = (num_before == 0)[:, None]
    return _Curves(
        activations,
        gradients,
        newest,
        activations[-1],
        gradients[-1],
        np.where(has_none_before, 0.0, waiting[before]),
        has_none_before,
        waiting[births[-1]] if births.size else None,
        waiting,
        large,
        large[-1],
        births,
        newest[births] + _after_backward_of(births, is_birth, activations),
    )


def _quiet(activations: Bytes) -> _Curves:
    """Return the curves of a stretch in which no gradient is made or freed."""
    nothing = np.zeros((1, activations.shape[1]))
    return _Curves(
        activations,
        nothing,
        nothing,
        activations[-1],
        nothing[0],
        nothing,
        np.array([[True]]),
        None,
        nothing,
        nothing,
        nothing[0],
        np.zeros(0, dtype=np.int64),
        nothing[:0],
        is_quiet=True,
    )


def _quiet_peak(stretch: _Stretch, curves: _Curves, start: _Start) -> PhasePeak:
    """Return what `_peak` would, where all that gradients add is what is there before."""
    highest, nothing = np.max(curves.activations, axis=0), curves.net_gradients
    alive = highest + start.activations
    return PhasePeak(
        name=stretch.name,
        has_gradients=stretch.has_gradients,
        kept=alive + start.gradients,
        kept_gradients=start.gradients,
        handed_over=alive,
        bucketed=highest + start.waiting + start.activations,
        at_gradients=nothing,
        reducing=nothing,
        reduced=nothing,
        cloning=nothing,
        large_kept=alive + start.large,
        updated_gradients=curves.births,
        at_updates=curves.at_updates,
    )


def _after_backward_of(births: npt.NDArray[np.int64], is_birth: npt.NDArray[np.bool_], activations: Bytes) -> Bytes:
    """Return the activations alive when each gradient has been accumulated, which is when hooks see it.

    What made a gradient frees its inputs first. It may make other gradients after this one; if nothing dies before the
    next birth, they are taken to be there, unless more was alive without them.
    Source: torch v2.13 csrc/autograd/engine.cpp, Engine::evaluate_function.
    """
    ends = np.append(np.flatnonzero(is_birth[1:] & ~is_birth[:-1]), len(is_birth) - 1)
    after = activations[ends[np.searchsorted(ends, births)]]
    dies_next = ~is_birth[np.minimum(births + 1, len(is_birth) - 1)]
    highest: Bytes = np.where(dies_next[:, None], after, np.maximum(after, activations[births]))
    return highest


def _peak(stretch: _Stretch, curves: _Curves, start: _Start) -> PhasePeak:
    if curves.is_quiet:
        return _quiet_peak(stretch, curves, start)
    totals = curves.activations + curves.gradients
    highest = np.argmax(totals, axis=0)
    columns = np.arange(totals.shape[1])
    handed_over = curves.activations + curves.newest_gradient
    waiting = np.where(curves.has_none_before, start.waiting, curves.waiting)
    alive = (handed_over + start.activations)[curves.births]
    waits = waiting[curves.births]
    clones = curves.newest_large[curves.births]
    return PhasePeak(
        name=stretch.name,
        has_gradients=stretch.has_gradients,
        kept=totals[highest, columns] + start.activations + start.gradients,
        kept_gradients=curves.gradients[highest, columns] + start.gradients,
        handed_over=np.max(handed_over, axis=0) + start.activations,
        bucketed=np.max(handed_over + waiting, axis=0) + start.activations,
        at_gradients=np.max(alive, axis=0, initial=0.0),
        reducing=np.max(np.where(waits > 0, alive, 0.0), axis=0, initial=0.0),
        reduced=np.max(waits, axis=0, initial=0.0),
        cloning=np.max(np.where(clones > 0, alive + clones, 0.0), axis=0, initial=0.0),
        large_kept=np.max(handed_over + curves.large, axis=0) + start.activations + start.large,
        updated_gradients=curves.newest_gradient[curves.births, 0].astype(np.int64),
        at_updates=curves.at_updates + start.activations,
    )


def _highest(peaks: list[PhasePeak]) -> PhasePeak:
    kept = np.stack([peak.kept for peak in peaks])
    highest, columns = np.argmax(kept, axis=0), np.arange(kept.shape[1])
    return PhasePeak(
        name=peaks[0].name,
        has_gradients=peaks[0].has_gradients,
        kept=kept[highest, columns],
        kept_gradients=np.stack([peak.kept_gradients for peak in peaks])[highest, columns],
        updated_gradients=np.concatenate([peak.updated_gradients for peak in peaks]),
        at_updates=np.concatenate([peak.at_updates for peak in peaks]),
        **{name: np.max(np.stack([getattr(peak, name) for peak in peaks]), axis=0) for name in _HIGHEST_BY_ITSELF},
    )
