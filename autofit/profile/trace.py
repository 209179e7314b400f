"""Traces one training step of a regime at a few sizes and folds them into a `RegimeProfile`."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

from msgspec import Struct
from msgspec.structs import replace
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from autofit.errors import InputError
from autofit.profile import kernels
from autofit.profile.batching import arrange
from autofit.profile.between import holds_at
from autofit.profile.deepen import LayersDifferError, Stretch, deepen, deepen_tensors
from autofit.profile.fakes import (
    believing_it_is_real,
    fill_with_fakes,
    masks_without_holes,
    no_layer_dropped,
    sets_sorted,
)
from autofit.profile.fit import Point, StructureDiffersError, by_tokens, fit, inverse
from autofit.profile.inputs import a_batch, feeding, input_bytes
from autofit.profile.layers import Depth, watch_layers
from autofit.profile.loops import (
    MAX_OPERATORS,
    MAX_OPERATORS_OF_SEVERAL,
    SHORT_LENGTHS,
    Growth,
    TooManyOperatorsError,
    refuse_long_loop,
)
from autofit.profile.models import build, build_plain, choose_depth, load_config, num_experts, width
from autofit.profile.packed import refuse_awq_elsewhere, shortest_sequence_tokens
from autofit.profile.parameters import fold_layers, static_tensors
from autofit.profile.parts import text_config
from autofit.profile.quantized import unpacking_as_an_operator
from autofit.profile.recorder import RawSegment, Recorder
from autofit.profile.refusals import ValuesNeededError, check_structure, values_refused
from autofit.profile.routing import even_routing
from autofit.profile.sequence_parallel import import_ulysses, shared_lengths
from autofit.profile.step import checkpoint, run_step
from autofit.profile.windows import Lengths, lengths_to_trace, one_length, planned_length
from autofit.profile.zero3_linear import linear_as_in_zero3
from autofit.spec.libraries import installed_versions
from autofit.spec.profile import Polynomial, Regime, RegimeProfile, Segment, StaticTensor

Progress = Callable[[int, int], None]


def trace_points(lengths: Sequence[int], *, one_row: bool = False) -> tuple[Point, ...]:
    """Sizes to trace: two batches of each length, none of which is a special case (one sequence is).

    Args:
        lengths: three, on one code path; or one, which is all that is asked for.
        one_row: whether a micro-batch is always one row; then three lengths of it are enough.
    """
    return tuple((b, s) for b in ((1,) if one_row else (2, 3)) for s in lengths)


def trace(
    model_name: str,
    config: dict[str, Any],
    regime: Regime,
    *,
    sequence_tokens: int | None = None,
    at_one_length: bool = False,
    progress: Progress = lambda _done, _total: None,
) -> RegimeProfile:
    """Trace a model under a regime.

    Where layers repeat, a shallower model is traced; if its tape shows that they do not after all, every layer is.
    Where the step at two lengths does not allocate the same tensors (it loops over tokens), or cannot be run at others
    than the planned one, that length alone is traced.

    Args:
        model_name: for messages and the profile's label.
        config: content of config.json.
        regime: what the step does.
        sequence_tokens: length that is planned: attention windows make the path depend on it. None: about 1,024.
        at_one_length: whether to trace the planned length alone at once; for a model that is known to loop.
        progress: called with (traces done, traces in all).

    Raises:
        InputError: the installed libraries cannot build or run the model, its step is no tape of fixed structure, or
            it loops over more tokens than are traced.
    """
    whole = load_config(config, None, regime)
    text = text_config(whole)
    subject = _Subject(config=config, whole=whole, regime=regime, chosen=_chosen_depth(config, whole, regime))
    refuse_awq_elsewhere(regime, sequence_tokens)
    shortest = shortest_sequence_tokens(regime.quantization)
    planned = max(planned_length(text, sequence_tokens), regime.image_tokens, shortest)
    lengths = _lengths(whole, regime, sequence_tokens)
    lengths = replace(lengths, min_sequence_tokens=max(lengths.min_sequence_tokens, shortest))
    if regime.sequence_parallel_size > 1:
        tape = _tape_of_shares(subject, lengths, progress)
    else:
        tries_several = not at_one_length and planned >= lengths.min_sequence_tokens
        several = _tape_of_lengths(subject, lengths, planned, progress) if tries_several else None
        if several is not None and not planned % several.multiple_tokens:
            tape = several
        elif several is not None and regime.masks_one_row:
            tape = _tape_of_rows(subject, lengths, progress)
        else:
            tape, lengths = _tape_of_one_length(subject, planned, progress), one_length(planned)
    return RegimeProfile(
        model=model_name,
        regime=regime,
        num_layers=tape.num_layers,
        num_traced_layers=tape.num_traced_layers,
        hidden_size=width(whole),
        vocab_size=text.vocab_size,
        tensors=tape.tensors,
        sizes=tape.sizes,
        segments=tape.segments,
        input_bytes=tape.input_bytes,
        min_sequence_tokens=lengths.min_sequence_tokens,
        max_sequence_tokens=lengths.max_sequence_tokens,
        attends_causally=tape.attends_causally,
        routes_evenly=tape.routes_evenly,
        multiple_tokens=tape.multiple_tokens,
        versions=installed_versions(),
    )


def _lengths(config: Any, regime: Regime, sequence_tokens: int | None) -> Lengths:
    """Choose the lengths to trace: what one process has of each sequence."""
    if regime.sequence_parallel_size > 1:
        return shared_lengths(config, regime, sequence_tokens)
    masks_windows = regime.attention != "flash_attention_2"
    return lengths_to_trace(
        text_config(config), sequence_tokens, masks_windows=masks_windows, image_tokens=regime.image_tokens
    )


class _Subject(Struct, frozen=True, kw_only=True):
    """What is traced, at whatever sizes."""

    config: dict[str, Any]
    """Content of config.json."""
    whole: Any
    """Its config object, of every layer."""
    regime: Regime
    chosen: tuple[Any, str, Depth] | None
    """A config of few layers that stand for all, where there is one: see `choose_depth`."""

    @property
    def model_class(self) -> str:
        """The name of transformers' class, for messages."""
        return type(build_plain(self.whole, self.regime)).__name__

    def fewest_layers(self) -> nn.Module:
        """Build the shallowest model that has the whole one's pattern."""
        return build(self.chosen[0] if self.chosen else self.whole, self.regime)


def _chosen_depth(config: dict[str, Any], whole: Any, regime: Regime) -> tuple[Any, str, Depth] | None:
    """Choose a depth, unless layers are frozen by their number."""
    return choose_depth(config, whole, regime) if regime.freeze is None else None


def _tape_of_lengths(subject: _Subject, lengths: Lengths, planned_tokens: int, progress: Progress) -> _Tape | None:
    """Trace several lengths; None where only the planned one can say what its step does.

    Raises:
        InputError: the step cannot be traced at any length, or would have too many operators at the planned one.
    """
    points = trace_points(lengths.traced, one_row=subject.regime.masks_one_row)
    try:
        return _tape(subject, points, progress, between=lengths.between, max_operators=MAX_OPERATORS_OF_SEVERAL)
    except InputError:
        raise
    except StructureDiffersError as error:
        growth = error.growth
    except TooManyOperatorsError:
        growth = _growth_of_short(subject)
    except Exception:  # noqa: BLE001 - some models run at some lengths only; the planned one's error is told
        growth = None
    if growth is not None:
        refuse_long_loop(subject.model_class, planned_tokens, growth)
    return None


def _tape_of_shares(subject: _Subject, lengths: Lengths, progress: Progress) -> _Tape:
    """Trace what one process of several has of each sequence, at several lengths.

    Raises:
        InputError: the step is not the same at all of them.
    """
    try:
        return _tape(subject, trace_points(lengths.traced, one_row=subject.regime.masks_one_row), progress)
    except (StructureDiffersError, TooManyOperatorsError) as error:
        raise InputError(
            error.message, to_fix="plan without sequence parallelism, or choose a model without such a loop"
        ) from error


def _growth_of_short(subject: _Subject) -> Growth | None:
    """Run two lengths that are short enough for any loop; None where images leave no room for them."""
    if subject.regime.image_tokens:
        return None
    try:
        trace_model(subject.fewest_layers(), subject.regime, trace_points(SHORT_LENGTHS)[:2], lambda *_: None)
    except StructureDiffersError as error:
        return error.growth
    return None


def _tape_of_rows(subject: _Subject, lengths: Lengths, progress: Progress) -> _Tape:
    """Trace packed rows of lengths that pad most: how long a row is depends on the micro-batch, so any is counted so.

    Too high by what fewer than 8 columns of a mask take, and where no padding is needed by the copy that it makes.
    """
    return _tape(subject, trace_points(lengths.odd.traced, one_row=True), progress)


def _tape_of_one_length(subject: _Subject, planned_tokens: int, progress: Progress) -> _Tape:
    """Trace one length, whose sizes depend on the batch alone.

    Raises:
        InputError: the step is not the same at two batches, or has too many operators.
    """
    if subject.regime.masks_one_row:
        raise _refuse_rows(subject)
    points = trace_points((planned_tokens,))
    try:
        try:
            short = max(min(SHORT_LENGTHS[0], planned_tokens), subject.regime.image_tokens)
            tape = _tape(subject, points, progress, warm_up_tokens=short)
        except StructureDiffersError:  # it made something once at this length, and had made it at the other
            tape = _tape(subject, points, progress)
    except TooManyOperatorsError as error:
        raise InputError(
            f"{subject.model_class} loops over its tokens: at {planned_tokens:,} tokens {error.message}",
            to_fix="plan for shorter sequences (--seq-len), or choose a model without such a loop",
        ) from error
    except StructureDiffersError as error:
        if subject.regime.batching == "packed":
            raise _refuse_rows(subject) from error
        raise InputError(
            error.message, to_fix="its memory is no function of the sizes that can be traced; choose another model"
        ) from error
    return replace(tape, sizes=tuple(by_tokens(size, planned_tokens) for size in tape.sizes))


def _refuse_rows(subject: _Subject) -> InputError:
    return InputError(
        f"{subject.model_class} does not allocate the same tensors for every length of a row, and how long a packed "
        "row is depends on the micro-batch",
        to_fix="plan for sequences of equal length (batching equal) or padded ones",
    )


def _tape(subject: _Subject, points: Sequence[Point], progress: Progress, **options: Any) -> _Tape:
    """Trace as few layers as stand for all, or every one; for the options see `trace_model`.

    A model that decides by the values of its batch is given some: a text without padding, whose last token ends it.
    """
    try:
        return _shallow_tape(subject, points, progress, options) or _whole_tape(subject, points, progress, options)
    except ValuesNeededError:
        options["knows_values"] = True
        return _shallow_tape(subject, points, progress, options) or _whole_tape(subject, points, progress, options)


class _Tape(Struct, frozen=True, kw_only=True):
    """What of a profile comes from the steps."""

    num_layers: int
    num_traced_layers: int
    tensors: tuple[StaticTensor, ...]
    sizes: tuple[Polynomial, ...]
    segments: tuple[Segment, ...]
    attends_causally: bool
    routes_evenly: bool
    input_bytes: Polynomial | None
    multiple_tokens: int


def _whole_tape(subject: _Subject, points: Sequence[Point], progress: Progress, options: Mapping[str, Any]) -> _Tape:
    """Trace every layer."""
    traced = trace_model(build(subject.whole, subject.regime), subject.regime, points, progress, **options)
    sizes, segments = fold(traced.steps, points)
    num_layers = len({segment.layer for segment in segments if segment.layer is not None})
    return _Tape(
        num_layers=num_layers,
        num_traced_layers=num_layers,
        tensors=tuple(tensor for _, tensor in traced.tensors),
        sizes=sizes,
        segments=segments,
        attends_causally=traced.attends_causally,
        routes_evenly=traced.routes_evenly,
        input_bytes=traced.input_bytes,
        multiple_tokens=traced.multiple_tokens,
    )


def _shallow_tape(
    subject: _Subject, points: Sequence[Point], progress: Progress, options: Mapping[str, Any]
) -> _Tape | None:
    """Trace few layers that stand for all; None where only the whole model shows what it does."""
    if subject.chosen is None:
        return None
    _, stack, depth = subject.chosen
    traced = trace_model(subject.fewest_layers(), subject.regime, points, progress, **options)
    sizes, segments = fold(traced.steps, points)
    name, first = traced.stack(stack)
    stretch = Stretch(depth=depth, first=first)
    try:
        deep = deepen(segments, stretch)
        tensors = deepen_tensors(traced.tensors, name, depth)
    except LayersDifferError:
        return None
    if depth.is_uniform and len({s.layer for s in segments if s.layer is not None}) == depth.num_traced:
        return _Tape(
            num_layers=depth.num_layers,
            num_traced_layers=depth.num_traced,
            tensors=fold_layers(traced.tensors, name),
            sizes=sizes,
            segments=segments,
            attends_causally=traced.attends_causally,
            routes_evenly=traced.routes_evenly,
            input_bytes=traced.input_bytes,
            multiple_tokens=traced.multiple_tokens,
        )
    num_layers = len({segment.layer for segment in deep if segment.layer is not None})
    return _Tape(
        num_layers=num_layers,
        num_traced_layers=num_layers,
        tensors=tuple(tensor for _, tensor in tensors),
        sizes=sizes,
        segments=deep,
        attends_causally=traced.attends_causally,
        routes_evenly=traced.routes_evenly,
        input_bytes=traced.input_bytes,
        multiple_tokens=traced.multiple_tokens,
    )


class Traced(Struct, frozen=True, kw_only=True):
    """Steps of one model, one for each point, and what it holds all the time."""

    steps: list[list[RawSegment]]
    tensors: list[tuple[str, StaticTensor]]
    input_bytes: Polynomial | None
    """Of a micro-batch with images."""
    first_indices: dict[str, int]
    """By dotted name of a stack that ran: the index of its first layer."""
    attends_causally: bool
    routes_evenly: bool
    multiple_tokens: int = 1
    """For multiples of how many tokens the polynomials through the points hold; 1 where that was not asked."""

    def stack(self, name: str) -> tuple[str, int]:
        """Return a stack's name, which an adapter prefixes, and the index of its first layer."""
        return next((ours, first) for ours, first in self.first_indices.items() if f".{ours}".endswith(f".{name}"))


def trace_steps(
    config: Any, regime: Regime, points: Sequence[Point], progress: Progress = lambda _done, _total: None
) -> tuple[list[list[RawSegment]], list[tuple[str, StaticTensor]]]:
    """Run micro-steps on fake tensors; return each point's segments, and the model's named static tensors."""
    traced = trace_model(build(config, regime), regime, points, progress)
    return traced.steps, traced.tensors


def trace_model(
    model: nn.Module,
    regime: Regime,
    points: Sequence[Point],
    progress: Progress,
    *,
    between: Mapping[int, int] = MappingProxyType({}),
    warm_up_tokens: int | None = None,
    max_operators: int = MAX_OPERATORS,
    knows_values: bool = False,
) -> Traced:
    """Run micro-steps of a model that was built on the meta device.

    A step before the first is not kept: what libraries make once (rotary tables, masks) is there afterwards.

    Args:
        model: on the meta device.
        regime: what the step does.
        points: sizes to trace.
        progress: called with (points done, points in all).
        between: lengths at which to check that polynomials through the points hold, and the multiple of tokens for
            which they do if they do there; the first that does is taken, or what all points are multiples of.
        warm_up_tokens: length of the step that is not kept; by default the first of `between`, or of the points.
        max_operators: of a step.
        knows_values: whether the batch's integers have values, and what is computed from them alone.

    Raises:
        ValuesNeededError: the step needs the values of tensors.
        StructureDiffersError: it is not the same at every size.
        TooManyOperatorsError: it has more operators than are traced.
    """
    import_ulysses(regime)  # before tensors are fake: modules keep what they make when they are imported
    num_sequences, tokens = points[0]
    first = (num_sequences, warm_up_tokens or next(iter(between), tokens))
    evenly = even_routing(num_experts(model.config))
    with ExitStack() as stack:
        routing = evenly or nullcontext()
        for each in (FakeTensorMode(allow_non_fake_inputs=True), environment(regime), routing, sets_sorted(model)):
            stack.enter_context(each)
        fill_with_fakes(model)
        model.train()
        feed = stack.enter_context(feeding(model, regime, knows_values=knows_values))
        temporaries, substitutes = kernels.temporaries(regime), kernels.substitutes(regime)
        recorder = Recorder(temporaries, substitutes, max_operators=max_operators)
        if regime.gradient_checkpointing:
            checkpoint(model, regime, recorder)
        recorder.ignore([*model.parameters(), *model.buffers()])
        watch = watch_layers(model, recorder)
        steps: list[list[RawSegment]] = []

        def step_at(point: Point) -> list[RawSegment]:
            recorder.restart()
            run_step(model, recorder, regime, point, feed)
            return recorder.finished()

        with recorder, values_refused(model):
            warm_up = step_at(first)
            for done, point in enumerate(points):
                progress(done, len(points))
                steps.append(step_at(point))
                check_structure(model, steps, points)
            holding = (
                multiple
                for length, multiple in between.items()
                for point in [(num_sequences, length)]
                if (point == first and holds_at(warm_up, point, steps, points))
                or holds_at(step_at(point), point, steps, points)
            )
            multiple_tokens = next(holding, math.gcd(*(length for _, length in points)) if between else 1)
        has_images = feed is not None and feed.images is not None
        inputs = arrange(a_batch(points[0], model, regime, feed), regime) if has_images else None
        return Traced(
            steps=steps,
            tensors=static_tensors(model, regime.stores_fp32_beside),
            first_indices=watch.first_indices(),
            attends_causally=recorder.attends_causally,
            routes_evenly=evenly is not None and evenly.was_asked,
            input_bytes=None if inputs is None else input_bytes(inputs, points[0]),
            multiple_tokens=multiple_tokens,
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


def fold(
    traces: Sequence[Sequence[RawSegment]], points: Sequence[Point]
) -> tuple[tuple[Polynomial, ...], tuple[Segment, ...]]:
    """Turn the same step, traced at each of `points`, into one whose sizes are polynomials.

    Raises:
        StructureDiffersError: the traces do not allocate the same tensors in the same order.
    """
    inverted = inverse(points)
    index_of: dict[tuple[int, ...], int] = {}
    sizes: list[Polynomial] = []

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
