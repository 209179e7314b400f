"""Writes a traced step out at full depth: every tensor of the real model that is born or freed on the device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from autofit.memory.allocator import MIN_BLOCK_BYTES
from autofit.memory.tape import BIRTH_FIELDS, size_table
from autofit.spec.profile import GRADIENT, MIDDLE_LAYER, ON_HOST, RegimeProfile, Segment

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Releases = tuple[Integers, Integers]
"""(right before which events of a step, which tensors), in order."""
NO_RELEASES: Releases = (np.zeros(0, np.int64), np.zeros(0, np.int64))


class StepEvent(NamedTuple):
    """A tensor born (`number_of` is its own) or freed (`number_of` is the one that dies) in the real model's step."""

    num_bytes: int
    number_of: int
    is_birth: bool
    category: int


class Playable(Struct, frozen=True):
    """What the allocator sees of a step."""

    requests: Integers
    """What is asked for, as the allocator rounds it; 0 for a release."""
    numbers: Integers
    """Which tensor."""
    positions: Integers
    """Where each event of the step is in it, and where it ends."""


class Step(Struct, frozen=True):
    """One micro-step of the real model, an entry for each event on the device."""

    num_bytes: Integers
    number_of: Integers
    is_birth: Flags
    category: Integers
    starts: Integers
    """Where each segment begins, and where the last ends."""
    num_tensors: int

    @property
    def gradients(self) -> Integers:
        """Where gradients are born, in order."""
        return np.flatnonzero(self.is_birth & (self.category == GRADIENT))

    def first_with_gradients(self) -> int:
        """Which segment's events are the first with a gradient; the number of segments if none has one."""
        found = np.flatnonzero(self.category == GRADIENT)
        return int(np.searchsorted(self.starts, found[0], side="right")) - 1 if found.size else len(self.starts) - 1

    def segments(self) -> list[list[StepEvent]]:
        """Return each segment's events one by one."""
        columns = (self.num_bytes, self.number_of, self.is_birth, self.category)
        events = [StepEvent(*event) for event in zip(*(column.tolist() for column in columns), strict=True)]
        return [events[begin:end] for begin, end in zip(self.starts[:-1], self.starts[1:], strict=True)]

    def playable(self, released: Releases = NO_RELEASES) -> Playable:
        """Return what the allocator sees; what has no bytes takes no memory.

        Args:
            released: where gradients are. The tape does not say: whoever uses them does it.
        """
        is_gradient = self.category == GRADIENT
        takes = self.is_birth & (is_gradient | (self.num_bytes > 0))
        is_released_here = np.zeros(self.num_tensors, np.bool_)
        is_released_here[self.number_of[takes & ~is_gradient]] = True
        played = takes | (~self.is_birth & ~is_gradient & is_released_here[self.number_of])
        requests = np.maximum(-(-self.num_bytes // MIN_BLOCK_BYTES), 1) * MIN_BLOCK_BYTES
        positions = np.append(0, np.cumsum(played))
        before, numbers = released
        return Playable(
            requests=np.insert(np.where(takes, requests, 0)[played], positions[before], 0),
            numbers=np.insert(self.number_of[played], positions[before], numbers),
            positions=positions + np.searchsorted(before, np.arange(len(positions)), side="right"),
        )


def unroll(profile: RegimeProfile, micro_batch: int, sequence_tokens: int) -> Step:
    """Write a micro-step out; see `DeepTape`."""
    return DeepTape(profile).at(micro_batch, sequence_tokens)


_Place = tuple[str, int | None]
"""Where a tensor is born: (kind of segment, layer of the real model), or (the segment's name, None)."""


class _Births(NamedTuple):
    """The tensors born in one place."""

    first: int
    """Number of the first; the others follow."""
    num_tensors: int


_NO_BIRTHS = _Births(0, 0)


class DeepTape:
    """A tape at full depth, its middle layers as often as the model has them.

    A death refers to a birth in another segment by where that lies: so many layers away, or outside the layers.
    """

    def __init__(self, profile: RegimeProfile) -> None:
        self.profile = profile
        births: dict[_Place, _Births] = {}
        num_tensors = 0
        parts = []
        for index, segment in enumerate(profile.segments):
            template = _Template(index, segment)
            for layer in self._real_layers(segment):
                births[_place(segment, layer)] = _Births(num_tensors, template.num_births)
                num_tensors += template.num_births
                places = [self._places(profile.segments[target], segment, layer) for target in template.targets]
                parts.append(template.events([[births.get(place, _NO_BIRTHS) for place in each] for each in places]))
        size, number_of, is_birth, category = (np.concatenate(column) for column in zip(*parts, strict=True))
        is_real = is_birth | _first_deaths(number_of, is_birth, num_tensors)
        kept = is_real & (category != ON_HOST)
        ends = np.cumsum([len(each[0]) for each in parts])
        self._size, self._number_of = size[kept], number_of[kept]
        self._is_birth, self._category = is_birth[kept], category[kept]
        self._starts = np.append(0, np.cumsum(kept)[ends - 1])
        self._num_tensors = num_tensors

    def at(self, micro_batch: int, sequence_tokens: int) -> Step:
        """Return the micro-step of so many sequences of so many tokens."""
        sizes = size_table(self.profile, micro_batch, sequence_tokens)[:, 0].astype(np.int64)
        return Step(
            num_bytes=sizes[self._size],
            number_of=self._number_of,
            is_birth=self._is_birth,
            category=self._category,
            starts=self._starts,
            num_tensors=self._num_tensors,
        )

    def real_segments(self) -> list[Segment]:
        """Return the traced segment that each segment of the step is, in its order."""
        return [each for each in self.profile.segments for _ in range(self.profile.repeats(each))]

    def first_products(self) -> list[int]:
        """Return which segment is the first with a matrix product, in forward and in backward."""
        real = self.real_segments()[:-1]
        kinds = [each.kind if any(each.matmul_flops) else None for each in real]
        return [kinds.index(kind) for kind in ("forward", "backward") if kind in kinds]

    def after_forward(self) -> int:
        """Return which segment is the first after all of forward."""
        return max(n for n, each in enumerate(self.real_segments(), start=1) if each.kind == "forward")

    def _real_layers(self, segment: Segment) -> list[int | None]:
        """The layers of the real model for which a traced segment stands, in the order in which they run."""
        if segment.layer is None:
            return [None]
        first = self._real(segment.layer)
        layers: list[int | None] = [first + k for k in range(self.profile.repeats(segment))]
        return layers if segment.kind == "forward" else layers[::-1]

    def _real(self, traced: int) -> int:
        beyond = self.profile.num_layers - self.profile.num_traced_layers
        return traced if traced <= MIDDLE_LAYER else traced + beyond

    def _places(self, born_in: Segment, segment: Segment, layer: int | None) -> list[_Place]:
        """Where the tensors are born that a segment's event means; outside the layers it may mean one in each."""
        if born_in.layer is None:
            layers: list[int | None] = [None]
        elif layer is not None and segment.layer is not None:
            layers = [layer + born_in.layer - segment.layer]
        elif self.profile.repeats(born_in) > 1:
            layers = self._real_layers(born_in)
        else:
            layers = [self._real(born_in.layer)]
        return [_place(born_in, each) for each in layers]


def _place(segment: Segment, layer: int | None) -> _Place:
    return (segment.name if layer is None else segment.kind, layer)


class _Template:
    """A traced segment's events as arrays."""

    def __init__(self, index: int, segment: Segment) -> None:
        births = itertools.count()
        rows = [
            (*event, 1, index, next(births)) if len(event) == BIRTH_FIELDS else (*event[:2], 0, *event[2:])
            for event in segment.events
        ]
        columns = np.array(rows, np.int64).reshape(-1, 5).T
        self._size, self._category, is_birth, target, self._ordinal = columns
        self._is_birth = is_birth.astype(np.bool_)
        self.num_births = next(births)
        unique, self._which = np.unique(target, return_inverse=True)
        self.targets: list[int] = unique.tolist()
        """The traced segments in which the tensors of the events are born."""

    def events(self, births: Sequence[Sequence[_Births]]) -> tuple[Integers, Integers, Flags, Integers]:
        """Return sizes, numbers, whether it is a birth, and categories; the number is -1 where there is no such tensor.

        Args:
            births: of each target, in every place that it stands for.
        """
        num_places = np.array([len(each) for each in births], np.int64)
        first, num_born = np.array([place for each in births for place in each], np.int64).reshape(-1, 2).T
        num_meant = num_places[self._which]
        event = np.repeat(np.arange(len(num_meant)), num_meant)
        nth = np.arange(len(event)) - np.repeat(np.cumsum(num_meant) - num_meant, num_meant)
        place = (np.cumsum(num_places) - num_places)[self._which[event]] + nth
        ordinal = self._ordinal[event]
        number_of = np.where(ordinal < num_born[place], first[place] + ordinal, -1)
        return self._size[event], number_of, self._is_birth[event], self._category[event]


def _first_deaths(number_of: Integers, is_birth: Flags, num_tensors: int) -> Flags:
    """Mark the deaths of tensors that are alive: an event for every layer names some twice."""
    born_at = np.full(num_tensors + 1, len(number_of))
    born_at[number_of[is_birth]] = np.flatnonzero(is_birth)
    deaths = np.flatnonzero(~is_birth)
    deaths = deaths[born_at[number_of[deaths]] < deaths]
    _, first = np.unique(number_of[deaths], return_index=True)
    marked = np.zeros(len(number_of), np.bool_)
    marked[deaths[first]] = True
    return marked
