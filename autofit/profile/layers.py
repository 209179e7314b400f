"""Finds a model's repeated layers, cuts the step at them, and says which of them are alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from msgspec import Struct
from torch import nn
from torch.utils import _pytree as pytree

from autofit.errors import InputError
from autofit.profile.parts import language_model
from autofit.profile.recorder import Recorder
from autofit.spec.profile import MIDDLE_LAYER

SMALLEST_STACK_FRACTION = 0.1
"""Of the largest stack's parameters: a list of modules with fewer (heads, adapters, norms) is not cut at."""
LONGEST_PERIOD = 12
_DEPTHS = ("num_hidden_layers", "decoder_layers", "encoder_layers", "num_decoder_layers", "num_layers", "n_layer")
"""What configs call the number of layers; a layer that keeps it scales by it, and is no other in a shallower model."""
Signature = tuple[Any, ...]


def layer_stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Return the lists of layers that read tokens, by dotted name, the one with most parameters first.

    A list inside a layer (the experts of one) is not one. An encoder-decoder has two. Those of a vision tower are left
    out: it runs before the first layer, as embeddings do.

    Raises:
        InputError: the model has no list of layers.
    """
    inside = set(language_model(model).modules())
    lists = [(name, layers) for name, layers in _outermost_lists(model, "") if layers in inside]
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no list of layers to cut the step at", to_fix="give a transformer"
        )
    sizes = [sum(p.numel() for p in layers.parameters()) for _, layers in lists]
    ranked = sorted(zip(sizes, lists, strict=True), key=lambda pair: -pair[0])
    return [pair for size, pair in ranked if size >= SMALLEST_STACK_FRACTION * ranked[0][0]]


def _outermost_lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len(child):
            yield prefix + name, child
        else:
            yield from _outermost_lists(child, f"{prefix}{name}.")


def watch_layers(model: nn.Module, recorder: Recorder) -> LayerWatch:
    """Cut the step where a layer begins, in forward and in backward.

    A layer's index is the number of layers that ran before it in the step: a stack after another counts on, and a
    layer that runs several times (shared weights) has as many indices.
    """
    stacks = dict(layer_stacks(model))
    watch = LayerWatch(recorder, stacks)
    for layers in stacks.values():
        for layer in layers:
            layer.register_forward_pre_hook(watch.before, with_kwargs=True)
            layer.register_forward_hook(watch.after)
    model.register_forward_pre_hook(watch.restart)
    return watch


class LayerWatch:
    """The hooks of one model: they only mark where segments begin.

    How many layers run before the head is known from the second step on; the first is not kept.
    """

    def __init__(self, recorder: Recorder, stacks: Mapping[str, nn.ModuleList]) -> None:
        self._recorder = recorder
        self._stacks = stacks
        self._num_layers: int | None = None
        self._indices: dict[nn.Module, list[int]] = {}
        self._num_begun = 0

    def first_indices(self) -> dict[str, int]:
        """Return, by its dotted name, the index of each stack's first layer in the last step, if it ran."""
        ran = {name: self._indices.get(layers[0]) for name, layers in self._stacks.items()}
        return {name: indices[0] for name, indices in ran.items() if indices}

    def restart(self, _model: nn.Module, _args: Any) -> None:
        """Begin to count at the model's first layer again."""
        if self._is("forward"):
            self._num_layers = self._num_begun or None
            self._indices, self._num_begun = {}, 0

    def before(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        """A layer begins."""
        if not self._is("forward"):
            return
        index = self._num_begun
        self._num_begun += 1
        self._indices.setdefault(layer, []).append(index)
        self._recorder.mark("layer", "forward", index)
        hidden = _first_float([*args, kwargs.get("hidden_states")])
        if index == 0 and hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda _grad: self._begin_backward(None))

    def after(self, layer: nn.Module, _args: Any, output: Any) -> None:
        """A layer ends; in backward, it was computed again."""
        indices = self._indices.get(layer, [])
        if not indices:
            return
        if not self._is("forward"):
            current = self._recorder.segments[-1].layer
            self._begin_backward(current if current in indices else indices[-1])
            return
        index = indices[-1]
        hidden = _first_float(output)
        if hidden is not None and hidden.requires_grad:
            hidden.register_hook(lambda _grad: self._begin_backward(index))
        if self._num_begun == self._num_layers:
            self._recorder.mark("head", "forward")

    def _is(self, kind: str) -> bool:
        return bool(self._recorder.segments) and self._recorder.segments[-1].kind == kind

    def _begin_backward(self, index: int | None) -> None:
        name = "embedding_backward" if index is None else "layer_backward"
        if self._is("backward") and self._recorder.segments[-1].layer != index:
            self._recorder.mark(name, "backward", index)


def _first_float(tree: Any) -> torch.Tensor | None:
    leaves = pytree.tree_leaves(tree)
    return next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()), None)


def signatures(layers: nn.ModuleList, config: Any, every: int = 1) -> list[Signature]:
    """Describe each layer by all that could make its step differ from another's.

    Its modules' classes, shapes and settings, and what lists of the config hold for it; not what numbers the layers.

    Args:
        layers: on any device.
        config: the stack's config.
        every: how many layers go from one checkpoint to the next.
    """
    own = [_settings(layer) for layer in layers]
    counting = _counting(own)
    lists = [
        values for values in vars(config).values() if isinstance(values, (list, tuple)) and len(values) == len(layers)
    ]
    return [
        (
            tuple((key, value) for key, value in settings.items() if key not in counting),
            tuple(str(values[index]) for values in lists),
            index % every,
        )
        for index, settings in enumerate(own)
    ]


def _counting(own: Sequence[Mapping[tuple[str, str], Any]]) -> set[tuple[str, str]]:
    """Find the settings that number the layers, or those of one kind: what hybrid models give some of their layers."""
    found = set()
    for key in {key: None for settings in own for key in settings}:
        having = [(index, settings[key]) for index, settings in enumerate(own) if key in settings]
        values = [value for _, value in having]
        if len(having) == len(own) > 1 and len(set(values)) == len(own):
            found.add(key)
        elif len(having) > 1 and all(type(value) is int for value in values):
            from_index = {value - index for index, value in having}
            steps = {after - before for before, after in pairwise(values)}
            found |= {key} if len(from_index) == 1 or steps == {1} else set()
    return found


def _settings(layer: nn.Module) -> dict[tuple[str, str], Any]:
    found: dict[tuple[str, str], Any] = {}
    for name, module in layer.named_modules():
        found[name, "class"] = type(module).__qualname__
        for key, value in vars(module).items():
            if key not in _DEPTHS and (isinstance(value, (bool, int, str)) or value is None):
                found[name, key] = value
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        found[name, "tensor"] = (tuple(tensor.shape), str(tensor.dtype))
    return found


class Depth(Struct, frozen=True, kw_only=True):
    """How a model of few layers stands for a deeper one: `period` layers from `start` on are repeated.

    The next `period` layers are their twins, traced to show that they are alike.
    """

    num_layers: int
    num_traced: int
    start: int
    period: int

    def real_order(self) -> list[int]:
        """Return the traced layer that each layer of the real model is a copy of."""
        end = self.start + self.period
        repeats = (self.num_layers - self.num_traced) // self.period
        middle = [*range(self.start, end)] * (repeats + 1)
        return [*range(self.start), *middle, *range(end, self.num_traced)]

    @property
    def is_uniform(self) -> bool:
        """Whether one layer is repeated, the third: the profile then holds each layer's segments once."""
        return self.period == 1 and self.start == MIDDLE_LAYER


def shallow_depth(kinds: Sequence[Signature]) -> Depth | None:
    """Return the least depth that has every neighbourhood of the whole model, None where only the whole has.

    Its first layers must be the model's first, as a config is cut to them; two layers stand at each end. The first
    layer of each kind is not repeated, if that can be: in backward it is the last that needs what those of its kind
    share (rotary tables, masks), and frees it.
    """
    number_of = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    numbers = [number_of[kind] for kind in kinds]
    periods = range(1, min(LONGEST_PERIOD, len(kinds) // 2) + 1)
    for repeats_firsts in (False, True):
        found = [_depth_with(numbers, period, repeats_firsts=repeats_firsts) for period in periods]
        if any(found):
            return min((depth for depth in found if depth is not None), key=lambda depth: depth.num_traced)
    return None


def _depth_with(kinds: list[int], period: int, *, repeats_firsts: bool) -> Depth | None:
    total, ends = len(kinds), 2
    for traced in range(ends + 2 * period + ends, total):
        if (total - traced) % period:
            continue
        for start in range(ends, traced - 2 * period - ends + 1):
            depth = Depth(num_layers=total, num_traced=traced, start=start, period=period)
            if not repeats_firsts and not set(kinds[start : start + period]) <= set(kinds[:start]):
                continue
            if [kinds[layer] for layer in depth.real_order()] == kinds and _twins(kinds, depth):
                return depth
    return None


def _twins(kinds: list[int], depth: Depth) -> bool:
    """Whether the next period is like the repeated one, and so are the layers beside each."""
    order = depth.real_order()
    traced = [kinds[order.index(layer)] for layer in range(depth.num_traced)]
    start, end, period = depth.start, depth.start + depth.period, depth.period
    return traced[start - 1 : end + 1] == traced[end - 1 : end + period + 1]
