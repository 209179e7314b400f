"""A dispatch mode that writes down every tensor born and freed, and the work between."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from autofit.profile.kernels import Substitute, TemporaryBytes
from autofit.profile.known import is_known
from autofit.profile.loops import MAX_OPERATORS, TooManyOperatorsError
from autofit.spec.profile import ACTIVATION, GRADIENT, INSIDE, SegmentKind

aten = torch.ops.aten
_JOINED = -1
"""In place of a birth's number: the one that stands for many."""
_FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_ALLOCATIONS = frozenset({aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided})
"""They move nothing."""
_IS_CAUSAL_ARGUMENT = {
    _FLASH: 4,
    aten._scaled_dot_product_flash_attention.default: 4,
    aten._scaled_dot_product_efficient_attention.default: 6,
    torch.ops.autofit.flex_attention.default: 3,
}
"""Fused attention, and where its arguments say that it leaves out what lies ahead."""


@dataclass(slots=True)
class RawSegment:
    """A segment of one trace at one size: numbers instead of polynomials."""

    name: str
    kind: SegmentKind
    layer: int | None
    events: list[tuple[int, ...]] = field(default_factory=list)
    """A birth (bytes, category), or a death (bytes, category, segment index, ordinal)."""
    num_births: int = 0
    known: set[int] = field(default_factory=set)
    """Ordinals of the births that are integers with known values."""
    matmul_flops: int = 0
    matmul_bytes: int = 0
    other_bytes: int = 0
    num_kernels: int = 0
    dequantized_elements: int = 0


@dataclass(slots=True)
class _Living:
    """Where a living tensor was born; a static one (a parameter, a buffer) was born in no segment."""

    num_bytes: int
    segment: int
    ordinal: int
    event: int


class Recorder(TorchDispatchMode):
    """Records every storage's birth and death, cut into segments by `mark`.

    Args:
        temporaries: bytes that kernels allocate inside, by operator.
        substitutes: what to call instead of an operator.
        max_operators: of a step.

    Raises:
        TooManyOperatorsError: from within a step that has more operators than are traced.
    """

    def __init__(
        self,
        temporaries: Mapping[Any, TemporaryBytes],
        substitutes: Mapping[Any, Substitute] | None = None,
        *,
        max_operators: int = MAX_OPERATORS,
    ) -> None:
        super().__init__()
        self._temporaries = temporaries
        self._substitutes = substitutes or {}
        self._living: dict[int, _Living] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._category = ACTIVATION
        self._num_operators = 0
        self._max_operators = max_operators
        self.segments: list[RawSegment] = []
        self.attends_causally = True
        """Whether every fused attention in a layer so far left out what lies ahead; a vision tower's is in none."""

    def mark(self, name: str, kind: SegmentKind, layer: int | None = None) -> None:
        """Begin a segment; what happens from now on is in it."""
        self.segments.append(RawSegment(name, kind, layer))

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take tensors that live for the whole step as known: their bytes are counted elsewhere."""
        for tensor in tensors:
            self._watch(tensor.untyped_storage(), _Living(tensor.untyped_storage().nbytes(), -1, -1, -1))

    def restart(self) -> None:
        """Forget the segments; what is alive becomes static."""
        self.segments = []
        self._num_operators = 0
        self._make_static()

    def finished(self) -> list[RawSegment]:
        """Return the segments; tensors that died at one moment come in the order of their birth, which repeats."""
        if any(segment.known for segment in self.segments):
            join_known_temporaries(self.segments)
        for segment in self.segments:
            segment.events = _ordered_deaths(segment.events)
        self._make_static()
        return self.segments

    def _make_static(self) -> None:
        for living in self._living.values():
            living.segment = living.ordinal = living.event = -1

    def call_gradients(self, tensors: Iterable[torch.Tensor]) -> None:
        """Say which of the tensors alive are parameters' gradients."""
        for tensor in tensors:
            living = self._living.get(tensor.untyped_storage()._cdata)
            if living is not None and living.segment >= 0:
                events = self.segments[living.segment].events
                events[living.event] = (events[living.event][0], GRADIENT)

    @contextmanager
    def bearing(self, category: int) -> Iterator[None]:
        """Take what is born inside for a tensor of that category."""
        before, self._category = self._category, category
        try:
            yield
        finally:
            self._category = before

    def launched(self, args: Sequence[Any], flops: int = 0) -> None:
        """Count a kernel that no dispatch sees: it moves each tensor it is given once, and may multiply matrices."""
        segment = self.segments[-1]
        segment.num_kernels += 1
        if flops:
            segment.matmul_flops += flops
            segment.matmul_bytes += _moved_bytes(args)
        else:
            segment.other_bytes += _moved_bytes(args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inside = self._temporaries.get(func)
        sizes = inside(*args, **kwargs) if inside else ()
        births = [self._bear(size, INSIDE) for size in sizes]
        out = self._substitutes.get(func, func)(*args, **kwargs)
        born = [self._see(tensor) for tensor in pytree.tree_leaves(out) if isinstance(tensor, torch.Tensor)]
        for birth in births:
            self._die(birth)
        if any(born) or func._schema.is_mutable:
            self._count_work(func, args, kwargs, out)
        return out

    def _see(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        if storage._cdata in self._living or not storage.nbytes():
            return False
        if is_known(tensor) and not tensor.is_floating_point():
            self.segments[-1].known.add(self.segments[-1].num_births)
        self._watch(storage, self._bear(storage.nbytes(), self._category))
        return True

    def _watch(self, storage: torch.UntypedStorage, living: _Living) -> None:
        key = storage._cdata
        if key in self._living:
            return
        self._living[key] = living
        self._references[key] = weakref.ref(storage, partial(self._forget, key))

    def _forget(self, key: int, _reference: object) -> None:
        self._references.pop(key, None)
        living = self._living.pop(key, None)
        if living is not None and living.segment >= 0:
            self._die(living)

    def _bear(self, num_bytes: int, category: int) -> _Living:
        segment = self.segments[-1]
        segment.events.append((num_bytes, category))
        segment.num_births += 1
        return _Living(num_bytes, len(self.segments) - 1, segment.num_births - 1, len(segment.events) - 1)

    def _die(self, living: _Living) -> None:
        category = self.segments[living.segment].events[living.event][1]
        self.segments[-1].events.append((living.num_bytes, category, living.segment, living.ordinal))

    def _count_work(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        self._num_operators += 1
        if self._num_operators > self._max_operators:
            raise TooManyOperatorsError(f"a step has more than {self._max_operators:,} operators")
        segment = self.segments[-1]
        segment.num_kernels += 1
        self.attends_causally &= segment.layer is None or _attends_causally(func, args)
        moved = 0 if func._overloadpacket in _ALLOCATIONS else _moved_bytes((args, kwargs, out))
        flops = _flops(func, args, kwargs, out)
        if flops:
            segment.matmul_flops += flops
            segment.matmul_bytes += moved
        else:
            segment.other_bytes += moved
        segment.dequantized_elements += _dequantized_elements(func, args)


def join_known_temporaries(segments: list[RawSegment]) -> None:
    """Let one tensor stand for all integers with known values that are born and die in a segment.

    Libraries make them in loops over sequences and images, as many as there are, and a step's tensors must be the same
    ones at every size. The one is as large as all of them at their highest moment, and is there from the segment's
    start to its end, which is a bound.
    """
    numbers: dict[tuple[int, ...], int] = {}
    for index, segment in enumerate(segments):
        named = list(zip(segment.events, _names(segment.events, index), strict=True))
        joined = {(index, number) for number in segment.known} & {name for event, name in named if len(event) > 2}
        rest = [(event, name) for event, name in named if name not in joined]
        if joined:
            size = _highest([event for event, name in named if name in joined])
            one = (index, _JOINED)
            rest = [((size, ACTIVATION), one), *rest, ((size, ACTIVATION, *one), one)]
        births = [name for event, name in rest if len(event) == 2]
        numbers |= {name: number for number, name in enumerate(births)}
        segment.events, segment.num_births = [event for event, _ in rest], len(births)
    for segment in segments:
        segment.events = [event if len(event) == 2 else (*event[:3], numbers[event[2:]]) for event in segment.events]


def _names(events: list[tuple[int, ...]], index: int) -> list[tuple[int, ...]]:
    """Of each event of a segment: the segment that its tensor was born in, and which of the births there it was."""
    births = itertools.count()
    return [(index, next(births)) if len(event) == 2 else event[2:] for event in events]


def _highest(events: Iterable[tuple[int, ...]]) -> int:
    return max(itertools.accumulate(event[0] if len(event) == 2 else -event[0] for event in events), default=0)


def num_operators(segments: Iterable[RawSegment]) -> int:
    """Count the operators of a step that make or change a tensor."""
    return sum(segment.num_kernels for segment in segments)


def _ordered_deaths(events: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    runs = itertools.groupby(events, key=lambda event: len(event) > 2)
    return [event for died, run in runs for event in (sorted(run, key=lambda e: e[2:]) if died else run)]


def _moved_bytes(tree: Any) -> int:
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    if func is _FLASH:
        return int(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    if func is _FLASH_BACKWARD:
        return int(sdpa_backward_flop_count(args[0].shape, args[1].shape, args[2].shape, args[3].shape))
    if func._overloadpacket in flop_registry:
        return int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
    if _is_quantized_product(func):
        return 2 * args[0].numel() * math.prod(args[2]) // args[0].shape[-1]
    if func._overloadpacket is getattr(torch.ops.aten, "_grouped_mm", None):
        return _grouped_flops(args[0].shape, args[1].shape)
    return 0


def _grouped_flops(left: torch.Size, right: torch.Size) -> int:
    """Count the FLOPs of experts' products in one operator, for which torch has no formula.

    What one side has by expert the other has as rows or columns that are split among the experts, so that each is
    multiplied by one of them; where neither has, the rows that are summed over are split.
    Source: torch 2.13 torch/_meta_registrations.py, _meta_grouped_mm_common.
    """
    if len(left) == len(right) == 3:
        return 2 * math.prod(left) * right[-1]
    rows, columns = left[-2], right[-1]
    return 2 * rows * left[-1] * columns


def _attends_causally(func: Any, args: Any) -> bool:
    position = _IS_CAUSAL_ARGUMENT.get(func)
    return position is None or (len(args) > position and bool(args[position]))


def _is_quantized_product(func: Any) -> bool:
    return str(func).startswith("bitsandbytes.gemm_4bit")


def _dequantized_elements(func: Any, args: Any) -> int:
    if _is_quantized_product(func):
        return math.prod(args[2])
    if str(func).startswith("bitsandbytes.dequantize_4bit"):
        return math.prod(args[4])
    return 0
