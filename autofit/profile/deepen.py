"""Writes the tape of a deep model from that of a shallower one whose layers repeat with a period.

Where layers are of several kinds (sliding and full attention, dense and routed), the profile holds every layer's
segments, though only a few were traced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from msgspec import Struct
from msgspec.structs import replace

from autofit.errors import AutofitError
from autofit.profile.layers import Depth
from autofit.profile.parameters import layer_index
from autofit.spec.profile import Event, Segment, StaticTensor

_BIRTH_FIELDS = 2
_Key = tuple[str, int]
"""(kind, index) of a layer's segment."""


class LayersDifferError(AutofitError):
    """Layers that should be alike do not make and free the same tensors."""


class Stretch(Struct, frozen=True, kw_only=True):
    """Which layers of a tape repeat: `depth` counts from the first of the stack, which ran as layer `first`."""

    depth: Depth
    first: int

    def traced(self, layer: int) -> int | None:
        """Number of a layer in its stack, None where it is of another."""
        inside = layer - self.first
        return inside if 0 <= inside < self.depth.num_traced else None

    def real(self, layer: int) -> list[int]:
        """Return the layers of the real model that a traced layer is copied to."""
        inside = self.traced(layer)
        if inside is None:
            beyond = self.depth.num_layers - self.depth.num_traced
            return [layer if layer < self.first else layer + beyond]
        return [self.first + real for real, copy in enumerate(self.depth.real_order()) if copy == inside]


def deepen(segments: Sequence[Segment], stretch: Stretch) -> tuple[Segment, ...]:
    """Repeat the segments of the layers that repeat, with every reference between them.

    A reference to a layer of the same stack means one so many layers away; to anything else, that very one.

    Raises:
        LayersDifferError: the tape shows that the layers are not alike, or hold on to each other in other ways.
    """
    keys = [_key(segment) for segment in segments]
    if max(Counter(key for key in keys if key is not None).values(), default=0) > 1:
        raise LayersDifferError("a layer has several segments")
    _check_twins(segments, stretch)
    order = _real_order(segments, stretch)
    index_of = {(number, real): new for new, (number, real) in enumerate(order)}
    of_layer = {key: number for number, key in enumerate(keys) if key is not None}
    out = tuple(
        replace(
            segments[number],
            layer=real,
            events=_ordered(
                [
                    event
                    for old in segments[number].events
                    for event in _copies(old, segments, number, real, stretch, of_layer, index_of)
                ]
            ),
        )
        for number, real in order
    )
    _check_lifetimes(segments, out, order)
    return out


def _key(segment: Segment) -> _Key | None:
    return None if segment.layer is None else (segment.kind, segment.layer)


def _real_order(segments: Sequence[Segment], stretch: Stretch) -> list[tuple[int, int | None]]:
    """Each segment of the deep tape: (traced segment it copies, layer of the real model)."""
    order: list[tuple[int, int | None]] = []
    numbered = list(enumerate(segments))
    for in_stack, run in groupby(
        numbered, lambda pair: pair[1].layer is not None and stretch.traced(pair[1].layer) is not None
    ):
        here = list(run)
        if not in_stack:
            order += [(number, None if seg.layer is None else stretch.real(seg.layer)[0]) for number, seg in here]
            continue
        copies = [(real, number) for number, seg in here for real in stretch.real(seg.layer or 0)]
        backward = here[0][1].kind == "backward"
        order += [(number, real) for real, number in sorted(copies, reverse=backward)]
        if {seg.layer for _, seg in here} != set(range(stretch.first, stretch.first + stretch.depth.num_traced)):
            raise LayersDifferError("the layers do not run one after another")
    return order


def _copies(
    event: Event,
    segments: Sequence[Segment],
    number: int,
    real: int | None,
    stretch: Stretch,
    of_layer: dict[_Key, int],
    index_of: dict[tuple[int, int | None], int],
) -> list[Event]:
    """Events of the deep tape that an event of the traced one stands for, in the copy of its segment at `real`."""
    if len(event) == _BIRTH_FIELDS:
        return [event]
    size, category, target, ordinal = event
    born_in, here = segments[target], segments[number]
    if born_in.layer is None:
        return [(size, category, index_of[target, None], ordinal)]
    inside = stretch.traced(born_in.layer)
    if inside is None or here.layer is None or stretch.traced(here.layer) is None or real is None:
        return [(size, category, index_of[target, layer], ordinal) for layer in stretch.real(born_in.layer)]
    wanted = real + born_in.layer - here.layer
    order = stretch.depth.real_order()
    if not 0 <= wanted - stretch.first < len(order):
        raise LayersDifferError("a layer frees what none of the real model made")
    source = of_layer[born_in.kind, stretch.first + order[wanted - stretch.first]]
    if source != target and _births(segments[source]) != _births(born_in):
        raise LayersDifferError("a layer frees what was made in a layer of another kind")
    return [(size, category, index_of[source, wanted], ordinal)]


def _births(segment: Segment) -> list[Event]:
    return [event for event in segment.events if len(event) == _BIRTH_FIELDS]


def _ordered(events: Sequence[Event]) -> tuple[Event, ...]:
    """Deaths at one moment come in the order of their births, as in a trace."""
    runs = groupby(events, key=lambda event: len(event) > _BIRTH_FIELDS)
    return tuple(event for died, run in runs for event in (sorted(run, key=lambda e: e[2:]) if died else run))


def _check_twins(segments: Sequence[Segment], stretch: Stretch) -> None:
    """The period after the repeated one makes and frees the same tensors, in the same order."""
    depth = stretch.depth
    layers = {_key(segment): segment for segment in segments if segment.layer is not None}
    for inside in range(depth.start, depth.start + depth.period):
        for kind in ("forward", "backward"):
            one = layers.get((kind, stretch.first + inside))
            other = layers.get((kind, stretch.first + inside + depth.period))
            if (one is None) != (other is None):
                raise LayersDifferError(f"layers {inside} and {inside + depth.period} are not alike")
            if one is not None and other is not None and _shape(one, segments) != _shape(other, segments):
                raise LayersDifferError(f"layers {inside} and {inside + depth.period} are not alike")


def _shape(segment: Segment, segments: Sequence[Segment]) -> list[tuple[object, ...]]:
    """What a layer's segment does, whichever layer it is."""

    def seen(event: Event) -> tuple[object, ...]:
        if len(event) == _BIRTH_FIELDS:
            return event
        born_in = segments[event[2]]
        away = None if born_in.layer is None or segment.layer is None else born_in.layer - segment.layer
        return (*event[:2], born_in.kind, born_in.name if away is None else away, event[3])

    return [seen(event) for event in segment.events]


def _check_lifetimes(traced: Sequence[Segment], deep: Sequence[Segment], order: list[tuple[int, int | None]]) -> None:
    """Each copy of a tensor dies once where the tensor did, and not where it did not."""
    dead, deaths = _deaths(traced), _deaths(deep)
    if any(count > 1 for count in deaths.values()):
        raise LayersDifferError("a tensor is freed twice")
    for new, (old, _) in enumerate(order):
        births = sum(len(event) == _BIRTH_FIELDS for event in traced[old].events)
        if any(((old, n) in dead) != ((new, n) in deaths) for n in range(births)):
            raise LayersDifferError("layers do not free what they make in the same way")


def _deaths(segments: Sequence[Segment]) -> Counter[tuple[int, int]]:
    return Counter((e[2], e[3]) for segment in segments for e in segment.events if len(e) > _BIRTH_FIELDS)


def deepen_tensors(
    named: Sequence[tuple[str, StaticTensor]], stack: str, depth: Depth
) -> tuple[tuple[str, StaticTensor], ...]:
    """Repeat the tensors of the layers that repeat.

    Args:
        named: by dotted name, a layer's together.
        stack: dotted name of the list of layers.
        depth: which of them repeat.

    Raises:
        LayersDifferError: two layers that should be alike have different tensors.
    """
    out: list[tuple[str, StaticTensor]] = []
    for in_stack, run in groupby(named, lambda pair: layer_index(pair[0], stack) is not None):
        here = list(run)
        if not in_stack:
            out += here
            continue
        by_layer: dict[int, list[tuple[str, StaticTensor]]] = {}
        for name, tensor in here:
            by_layer.setdefault(layer_index(name, stack) or 0, []).append((name, tensor))
        _check_tensor_twins(by_layer, stack, depth)
        for real, copied in enumerate(depth.real_order()):
            out += [_renamed(pair, stack, copied, real) for pair in by_layer.get(copied, [])]
    return tuple(out)


def _check_tensor_twins(by_layer: dict[int, list[tuple[str, StaticTensor]]], stack: str, depth: Depth) -> None:
    for layer in range(depth.start, depth.start + depth.period):
        twin = [_renamed(pair, stack, layer + depth.period, layer) for pair in by_layer.get(layer + depth.period, [])]
        if twin != by_layer.get(layer, []):
            raise LayersDifferError(f"layers {layer} and {layer + depth.period} do not have the same tensors")


def _renamed(pair: tuple[str, StaticTensor], stack: str, old: int, new: int) -> tuple[str, StaticTensor]:
    name = pair[0].replace(f"{stack}.{old}.", f"{stack}.{new}.", 1)
    return name, replace(pair[1], name=name)
