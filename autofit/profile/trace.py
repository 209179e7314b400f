"""Traces one training step of a regime at a few sizes and folds them into a `RegimeProfile`."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autofit.profile import kernels
from autofit.profile.deepen import Stretch, deepen, deepen_tensors
from autofit.profile.fakes import (
    believing_it_is_real,
    fill_with_fakes,
    masks_without_holes,
    no_layer_dropped,
    routed_evenly,
)
from autofit.profile.fit import Point, StructureDiffersError, evaluate, fit, inverse
from autofit.profile.layers import watch_layers
from autofit.profile.models import build, choose_depth, load_config, num_experts, text_config, width
from autofit.profile.parameters import fold_layers, static_tensors
from autofit.profile.quantized import unpacking_as_an_operator
from autofit.profile.recorder import RawSegment, Recorder
from autofit.profile.refusals import refuse_other_structure, values_refused
from autofit.profile.routing import even_routing
from autofit.profile.step import checkpoint, run_step
from autofit.profile.windows import lengths_to_trace
from autofit.profile.zero3_linear import linear_as_in_zero3
from autofit.spec.libraries import installed_versions
from autofit.spec.profile import Polynomial, Regime, RegimeProfile, Segment, StaticTensor

Progress = Callable[[int, int], None]


def trace_points(lengths: Sequence[int], *, one_row: bool = False) -> tuple[Point, ...]:
    """Sizes to trace: two batches of each length, none of which is a special case.

    One sequence is: what transposes or cuts one row leaves it contiguous, and its copy is not made.

    Args:
        lengths: three, on one code path.
        one_row: whether a micro-batch is always one row; then three lengths of it are enough.
    """
    return tuple((b, s) for b in ((1,) if one_row else (2, 3)) for s in lengths)


def trace(
    model_name: str,
    config: dict[str, Any],
    regime: Regime,
    *,
    sequence_tokens: int | None = None,
    progress: Progress = lambda _done, _total: None,
) -> RegimeProfile:
    """Trace a model under a regime.

    Where layers repeat, a shallower model is traced; if its tape shows that they do not after all, every layer is.

    Args:
        model_name: for messages and the profile's label.
        config: content of config.json.
        regime: what the step does.
        sequence_tokens: length that is planned: attention windows make the path depend on it. None: about 1,024.
        progress: called with (traces done, traces in all).

    Raises:
        InputError: the installed libraries cannot build or run the model, or its step is no tape of fixed structure.
    """
    whole = load_config(config, None, regime)
    masks_windows = regime.attention != "flash_attention_2"
    lengths = lengths_to_trace(text_config(whole), sequence_tokens, masks_windows=masks_windows)
    points = _Points(
        trace_points(lengths.traced, one_row=regime.masks_one_row),
        () if regime.masks_one_row else trace_points(lengths.traced, one_row=True),
    )
    tape = _shallow_tape(config, whole, regime, points, progress) or _whole_tape(whole, regime, points, progress)
    return RegimeProfile(
        model=model_name,
        regime=regime,
        num_layers=tape.num_layers,
        num_traced_layers=tape.num_traced_layers,
        hidden_size=width(whole),
        vocab_size=text_config(whole).vocab_size,
        tensors=tape.tensors,
        sizes=tape.sizes,
        segments=tape.segments,
        min_sequence_tokens=lengths.min_sequence_tokens,
        max_sequence_tokens=lengths.max_sequence_tokens,
        attends_causally=tape.attends_causally,
        versions=installed_versions(),
    )


@dataclass(frozen=True, slots=True)
class _Points:
    """Sizes to trace."""

    general: tuple[Point, ...]
    one_row: tuple[Point, ...]
    """Of one sequence, where that is a case of its own."""

    @property
    def all(self) -> tuple[Point, ...]:
        """Those, then these."""
        return (*self.general, *self.one_row)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tape:
    """What of a profile comes from the steps."""

    num_layers: int
    num_traced_layers: int
    tensors: tuple[StaticTensor, ...]
    sizes: tuple[Polynomial, ...]
    segments: tuple[Segment, ...]
    attends_causally: bool


def _whole_tape(config: Any, regime: Regime, points: _Points, progress: Progress) -> _Tape:
    """Trace every layer."""
    traced = trace_model(build(config, regime), regime, points.all, progress)
    folded = _folded(traced.steps, points)
    sizes, segments = folded.sizes, folded.paired(folded.segments, folded.one_row)
    num_layers = len({segment.layer for segment in segments if segment.layer is not None})
    return _Tape(
        num_layers=num_layers,
        num_traced_layers=num_layers,
        tensors=tuple(tensor for _, tensor in traced.tensors),
        sizes=sizes,
        segments=segments,
        attends_causally=traced.attends_causally,
    )


def _shallow_tape(
    config: dict[str, Any], whole: Any, regime: Regime, points: _Points, progress: Progress
) -> _Tape | None:
    """Trace few layers that stand for all; None where only the whole model shows what it does."""
    chosen = choose_depth(config, whole, regime) if regime.freeze is None else None  # its layers differ
    if chosen is None:
        return None
    shallow, stack, depth = chosen
    traced = trace_model(build(shallow, regime), regime, points.all, progress)
    folded = _folded(traced.steps, points)
    segments = folded.paired(folded.segments, folded.one_row)
    name, first = traced.stack(stack)
    stretch = Stretch(depth=depth, first=first)
    try:
        deep = folded.paired(deepen(folded.segments, stretch), deepen(folded.one_row, stretch))
        tensors = deepen_tensors(traced.tensors, name, depth)
    except StructureDiffersError:
        return None
    if depth.is_uniform and len({s.layer for s in segments if s.layer is not None}) == depth.num_traced:
        return _Tape(
            num_layers=depth.num_layers,
            num_traced_layers=depth.num_traced,
            tensors=fold_layers(traced.tensors, name),
            sizes=folded.sizes,
            segments=segments,
            attends_causally=traced.attends_causally,
        )
    num_layers = len({segment.layer for segment in deep if segment.layer is not None})
    return _Tape(
        num_layers=num_layers,
        num_traced_layers=num_layers,
        tensors=tuple(tensor for _, tensor in tensors),
        sizes=folded.sizes,
        segments=deep,
        attends_causally=traced.attends_causally,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """Steps of one model, one for each point, and what it holds all the time."""

    steps: list[list[RawSegment]]
    tensors: list[tuple[str, StaticTensor]]
    first_indices: dict[str, int]
    """By dotted name of a stack that ran: the index of its first layer."""
    attends_causally: bool

    def stack(self, name: str) -> tuple[str, int]:
        """Return a stack's name, which an adapter prefixes, and the index of its first layer."""
        return next((ours, first) for ours, first in self.first_indices.items() if f".{ours}".endswith(f".{name}"))


def trace_steps(
    config: Any, regime: Regime, points: Sequence[Point], progress: Progress = lambda _done, _total: None
) -> tuple[list[list[RawSegment]], list[tuple[str, StaticTensor]]]:
    """Run micro-steps on fake tensors; return each point's segments, and the model's named static tensors."""
    traced = trace_model(build(config, regime), regime, points, progress)
    return traced.steps, traced.tensors


def trace_model(model: nn.Module, regime: Regime, points: Sequence[Point], progress: Progress) -> Traced:
    """Run micro-steps of a model that was built on the meta device.

    A step before the first is not kept: what libraries make once (rotary tables, masks) is there afterwards.

    Raises:
        InputError: the step needs the values of tensors, or is not the same at every length.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), environment(regime), even_routing(model):
        fill_with_fakes(model)
        model.train()
        recorder = Recorder(kernels.temporaries(regime), kernels.substitutes(regime))
        if regime.gradient_checkpointing:
            checkpoint(model, regime, recorder)
        recorder.ignore([*model.parameters(), *model.buffers()])
        watch = watch_layers(model, recorder)
        steps: list[list[RawSegment]] = []
        with recorder, values_refused(model), routed_evenly(num_experts(model.config)):
            run_step(model, recorder, regime, points[0])
            for done, point in enumerate(points):
                progress(done, len(points))
                recorder.restart()
                run_step(model, recorder, regime, point)
                steps.append(recorder.finished())
                refuse_other_structure(model, steps, points)
        return Traced(
            steps=steps,
            tensors=static_tensors(model),
            first_indices=watch.first_indices(),
            attends_causally=recorder.attends_causally,
        )


@contextmanager
def environment(regime: Regime) -> Iterator[None]:
    """The libraries take the branches of a real run on the regime's device, and garbage waits."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(believing_it_is_real())
        stack.enter_context(no_layer_dropped())
        if regime.batching == "equal":
            stack.enter_context(masks_without_holes())
        if regime.quantization is not None:
            stack.enter_context(unpacking_as_an_operator())
        if regime.zero3_linear:
            stack.enter_context(linear_as_in_zero3())
        stack.enter_context(kernels.kernels_of(regime))
        gc.collect()
        gc.disable()
        try:
            yield
        finally:
            gc.enable()


@dataclass(frozen=True, slots=True)
class _Folded:
    """Steps with polynomials for sizes."""

    sizes: tuple[Polynomial, ...]
    """Those that only one row has come last."""
    segments: tuple[Segment, ...]
    one_row: tuple[Segment, ...]
    points: _Points

    def paired(self, segments: Sequence[Segment], one_row: Sequence[Segment]) -> tuple[Segment, ...]:
        """Put what one row does beside what more do, where it is something else."""
        values = [_values(size, self.points.one_row) for size in self.sizes]

        def seen(segment: Segment) -> list[tuple[object, ...]]:
            return [(values[event[0]], *event[1:]) for event in segment.events]

        return tuple(
            segment if seen(segment) == seen(alone) else replace(segment, one_row_events=alone.events)
            for segment, alone in zip(segments, one_row, strict=True)
        )


def _folded(steps: Sequence[Sequence[RawSegment]], points: _Points) -> _Folded:
    num_general = len(points.general)
    sizes, segments = fold(steps[:num_general], points.general)
    if not points.one_row:
        return _Folded(sizes, segments, segments, points)
    sizes, one_row = fold(steps[num_general:], points.one_row, sizes)
    return _Folded(sizes, segments, one_row, points)


def _values(size: Polynomial, points: Sequence[Point]) -> tuple[int, ...]:
    return tuple(round(evaluate(size, point)) for point in points)


def fold(
    traces: Sequence[Sequence[RawSegment]], points: Sequence[Point], known: Sequence[Polynomial] = ()
) -> tuple[tuple[Polynomial, ...], tuple[Segment, ...]]:
    """Turn the same step, traced at each of `points`, into one whose sizes are polynomials.

    Args:
        traces: one for each point.
        points: sizes that determine a polynomial.
        known: polynomials that are taken where they hold; they come first in what is returned.

    Raises:
        StructureDiffersError: the traces do not allocate the same tensors in the same order.
    """
    inverted = inverse(points)
    sizes = list(known)
    index_of: dict[tuple[int, ...], int] = {}
    for index, size in enumerate(sizes):
        index_of.setdefault(_values(size, points), index)

    def size_index(values: tuple[int, ...]) -> int:
        if values not in index_of:
            index_of[values] = len(sizes)
            sizes.append(fit(inverted, values))
        return index_of[values]

    def fitted(variants: Sequence[RawSegment], name: str) -> Polynomial:
        return fit(inverted, [getattr(variant, name) for variant in variants])

    folded = tuple(_fold_segment(variants, size_index, fitted) for variants in zip(*traces, strict=True))
    return tuple(sizes), folded


def _fold_segment(
    variants: Sequence[RawSegment],
    size_index: Callable[[tuple[int, ...]], int],
    fitted: Callable[[Sequence[RawSegment], str], Polynomial],
) -> Segment:
    first = variants[0]
    shapes = [[event[1:] for event in variant.events] for variant in variants]
    if any(shape != shapes[0] for shape in shapes) or any(
        v.name != first.name or v.layer != first.layer for v in variants
    ):
        raise StructureDiffersError(f"segment {first.name} {first.layer} allocates differently at different sizes")
    events = tuple((size_index(tuple(v.events[n][0] for v in variants)), *shapes[0][n]) for n in range(len(shapes[0])))
    return Segment(
        name=first.name,
        kind=first.kind,
        layer=first.layer,
        events=events,
        matmul_flops=fitted(variants, "matmul_flops"),
        matmul_bytes=fitted(variants, "matmul_bytes"),
        other_bytes=fitted(variants, "other_bytes"),
        num_kernels=first.num_kernels,
        dequantized_elements=first.dequantized_elements,
    )
