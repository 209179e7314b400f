"""Traces one training step of a regime at a few sizes and folds them into a `RegimeProfile`."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from autofit.profile import kernels
from autofit.profile.fakes import believing_it_is_real, fill_with_fakes
from autofit.profile.fit import Point, StructureDiffersError, fit, inverse
from autofit.profile.layers import watch_layers
from autofit.profile.models import build, layers_differ, load_config
from autofit.profile.parameters import fold_layers, static_tensors
from autofit.profile.quantized import unpacking_as_an_operator
from autofit.profile.recorder import RawSegment, Recorder
from autofit.profile.step import checkpoint, run_step
from autofit.profile.zero3_linear import linear_as_in_zero3
from autofit.spec.libraries import installed_versions
from autofit.spec.profile import NUM_TRACED_LAYERS, Polynomial, Regime, RegimeProfile, Segment, StaticTensor

Progress = Callable[[int, int], None]


def trace_points(max_tokens: int | None, *, one_row: bool = False) -> tuple[Point, ...]:
    """Sizes to trace: two batches and three lengths, none of which is a special case (one sequence is).

    Args:
        max_tokens: the longest sequence that the model takes.
        one_row: whether a micro-batch is always one row; then three lengths of it are enough.
    """
    lengths = (
        (256, 512, 1024) if not max_tokens or max_tokens >= 1024 else (max_tokens // 4, max_tokens // 2, max_tokens)
    )
    return tuple((b, s) for b in ((1,) if one_row else (2, 3)) for s in lengths)


def trace(
    model_name: str, config: dict[str, Any], regime: Regime, *, progress: Progress = lambda _done, _total: None
) -> RegimeProfile:
    """Trace a model under a regime.

    Args:
        model_name: for messages and the profile's label.
        config: content of config.json.
        regime: what the step does.
        progress: called with (traces done, traces in all).

    Raises:
        InputError: the installed libraries cannot build or run the model.
    """
    full = load_config(config, None, regime)
    num_layers = full.num_hidden_layers
    points = trace_points(getattr(full, "max_position_embeddings", None), one_row=regime.masks_one_row)
    shallow = num_layers > NUM_TRACED_LAYERS and not layers_differ(full) and regime.checkpoint_every_n_layers == 1
    num_traced = NUM_TRACED_LAYERS if shallow else num_layers
    steps, tensors = trace_steps(load_config(config, num_traced, regime), regime, points, progress)
    sizes, segments = fold(steps, points)
    return RegimeProfile(
        model=model_name,
        regime=regime,
        num_layers=num_layers,
        num_traced_layers=num_traced,
        hidden_size=full.hidden_size,
        vocab_size=full.vocab_size,
        tensors=fold_layers(tensors, repeats=shallow),
        sizes=sizes,
        segments=segments,
        versions=installed_versions(),
    )


def trace_steps(
    config: Any, regime: Regime, points: Sequence[Point], progress: Progress = lambda _done, _total: None
) -> tuple[list[list[RawSegment]], list[tuple[str, StaticTensor]]]:
    """Run micro-steps on fake tensors; return each point's segments, and the model's named static tensors.

    A step before the first is not kept: what libraries make once (rotary tables, masks) is there afterwards.
    """
    model = build(config, regime)
    with FakeTensorMode(allow_non_fake_inputs=True), environment(regime):
        fill_with_fakes(model)
        model.train()
        recorder = Recorder(kernels.temporaries(regime), kernels.substitutes(regime))
        if regime.gradient_checkpointing:
            checkpoint(model, regime, recorder)
        recorder.ignore([*model.parameters(), *model.buffers()])
        watch_layers(model, recorder)
        steps = []
        with recorder:
            run_step(model, recorder, regime, points[0])
            for done, point in enumerate(points):
                progress(done, len(points))
                recorder.restart()
                run_step(model, recorder, regime, point)
                steps.append(recorder.finished())
        return steps, static_tensors(model)


@contextmanager
def environment(regime: Regime) -> Iterator[None]:
    """The libraries take the branches of a real run on the regime's device, and garbage waits."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(believing_it_is_real())
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
