"""FSDP on one device: which tensors are gathered, reduced and freed around each unit of the traced step.

A unit is what is gathered together: a layer, or what lies outside the layers. `script` writes a step down as a list of
operations between the tape's segments; `peaks` counts what is alive at each of them. Sources, unless said otherwise:
torch v2.13 distributed/fsdp/_fully_shard (`_fsdp_param_group.py`, `_fsdp_collectives.py`) for FSDP2, and
distributed/fsdp/_runtime_utils.py, _flat_param.py for FSDP1; what is wrapped: accelerate 1.15 utils/fsdp_utils.py
(`fsdp2_prepare_model`) and accelerator.py (`prepare_model`).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from autofit.errors import InputError
from autofit.memory.engines import Layout, Terms, with_optimizer
from autofit.memory.evaluation import EngineForward
from autofit.memory.host import fsdp_buffers
from autofit.memory.static import OptimizerBytes, optimizer_bytes, rounded
from autofit.memory.tape import BIRTH_FIELDS, PER_TOKEN, Bytes, size_table
from autofit.memory.tensors import Tensor, in_model_order, tensors
from autofit.spec.configuration import Configuration, Optim
from autofit.spec.hardware import DeviceKind
from autofit.spec.profile import GRADIENT, ON_HOST, Event, RegimeProfile, Segment, StaticTensor
from autofit.units import BYTES_PER_ELEMENT

MASTER_BYTES = 4
"""Under mixed precision what trains is stored in fp32, whatever it was loaded in.

Source: accelerate/utils/fsdp_utils.py 1.15, fsdp2_prepare_model ("Upcast to fp32 master weights");
accelerate/accelerator.py, prepare_model (`_flat_param`, "upcasting")."""
INNER_CHECKPOINTS_RELEASE = (4, 50)
"""Up to 4.48 a model checkpoints the call of a layer, and so of the unit around it; in 5 the layer checkpoints itself.

Source: transformers 4.48 models/llama/modeling_llama.py, `_gradient_checkpointing_func(decoder_layer.__call__, ...)`;
transformers 5.23 modeling_layers.py, GradientCheckpointingLayer."""
MAX_MICRO_STEPS = 3
"""The first makes gradients, one in the middle finds them and keeps them, the last reduces them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A parameter, or those that FSDP1 flattens into one, as a unit handles it; bytes as the device rounds them."""

    shard: int
    """Held by this rank, in the dtype that is stored."""
    whole: int
    """Gathered, with padding, in the dtype that computes."""
    cast: int = 0
    """This rank's shard in the dtype that computes, where that is another one."""
    gradient: int = 0
    """The gradient of the whole, 0 where it does not train."""
    reduced: int = 0
    """This rank's share of the gradient, in the dtype that is sent."""
    kept: int = 0
    """The same in the dtype that is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What is gathered together."""

    name: str
    parts: tuple[Part, ...]

    def total(self, name: str) -> int:
        """Add up one figure of the parts."""
        return sum(getattr(part, name) for part in self.parts)

    @property
    def trains(self) -> bool:
        """Whether any of it has a gradient."""
        return any(part.gradient for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """The units of a model."""

    root: Unit
    """Gathered when forward begins, until backward ends."""
    embedding: Unit | None
    """By itself (FSDP2, not tied to the head)."""
    layers: tuple[Unit, ...]
    tail: Unit | None
    """The head, gathered from its forward to its backward; or tied to the embedding, from that one's forward on."""
    tail_embeds: bool
    replicated: Terms
    """What is not sharded."""
    state: tuple[Tensor, ...]
    """This rank's shards of all that trains, as the optimizer sees them."""

    def all(self) -> Iterator[Unit]:
        """Every unit, in the order of the model."""
        yield from (unit for unit in (self.root, self.embedding, *self.layers, self.tail) if unit is not None)

    def named(self) -> Iterator[tuple[str, Unit]]:
        """Every unit with the name that a script's keys have for it."""
        yield "root", self.root
        if self.embedding is not None:
            yield "embedding", self.embedding
        for index, unit in enumerate(self.layers):
            yield f"layer {index}", unit
        if self.tail is not None:
            yield "tail", self.tail

    def total(self, name: str) -> int:
        """Add up one figure of all parts."""
        return sum(unit.total(name) for unit in self.all())


def num_shards(configuration: Configuration) -> int:
    """Ranks that share a copy of the model; the others hold the same again (hybrid shard)."""
    return configuration.num_processes // configuration.num_replicas


class _Sharder:
    """Turns parameters into parts of units under one configuration."""

    def __init__(self, configuration: Configuration, profile: RegimeProfile) -> None:
        self._configuration = configuration
        self._profile = profile
        self._ranks = num_shards(configuration)
        self._device: DeviceKind = profile.regime.device
        self._is_mixed = configuration.mixed_precision != "no"
        self._is_quantized = configuration.quantization is not None

    def stored_bytes(self, tensor: StaticTensor) -> int:
        """Bytes of an element as it is stored.

        FSDP2 leaves a quantised model's trainable parameters as they are: peft makes them fp32.
        """
        traced = BYTES_PER_ELEMENT.get(tensor.dtype, 1)
        if not self._is_mixed or tensor.kind == "quantized":
            return traced
        if tensor.trains:
            return MASTER_BYTES
        quantization = self._configuration.quantization
        if quantization is not None and quantization.prepares_kbit:
            return MASTER_BYTES
        return BYTES_PER_ELEMENT[self._configuration.weights_dtype]

    def shard_elements(self, tensor: StaticTensor) -> int:
        """Elements of the largest shard: FSDP2 cuts along the first dimension, FSDP1 anywhere."""
        if self._configuration.sharding == "fsdp1":
            return -(-tensor.num_elements // self._ranks)
        rows = _rows(tensor)
        return -(-rows // self._ranks) * (tensor.num_elements // rows)

    def first_parts(self, members: Sequence[StaticTensor]) -> dict[str, int]:
        """Elements of each that the first rank holds where FSDP1 flattens all of them in order; of FSDP2 nothing."""
        if self._configuration.sharding != "fsdp1":
            return {}
        left = -(-sum(tensor.num_elements for tensor in members) // self._ranks)
        found: dict[str, int] = {}
        for tensor in members:
            found[tensor.name] = min(tensor.num_elements, left)
            left -= found[tensor.name]
        return found

    def parts(self, members: Sequence[StaticTensor]) -> tuple[Part, ...]:
        """Cut the parameters of a unit."""
        if self._configuration.sharding == "fsdp2":
            return tuple(self._part([tensor]) for tensor in members)
        adapter = [tensor for tensor in members if tensor.kind == "adapter"]
        rest = [tensor for tensor in members if tensor.kind != "adapter"]
        return tuple(self._part(each) for each in (rest, adapter) if each)

    def _part(self, members: Sequence[StaticTensor]) -> Part:
        elements = sum(self.shard_elements(tensor) for tensor in members)
        stored = max(self.stored_bytes(tensor) for tensor in members)
        computes = max(BYTES_PER_ELEMENT.get(tensor.dtype, 1) for tensor in members)
        if self._is_mixed and members[0].kind == "adapter":
            computes = BYTES_PER_ELEMENT[self._configuration.weights_dtype]
        trains = any(tensor.trains for tensor in members)
        whole = sum(tensor.num_elements for tensor in members)
        return Part(
            shard=self._rounded(elements * stored),
            whole=self._rounded(elements * self._ranks * computes),
            cast=elements * computes if stored != computes else 0,
            gradient=self._rounded(whole * computes) if trains else 0,
            reduced=elements * computes if trains else 0,
            kept=elements * stored if trains else 0,
        )

    def _rounded(self, num_bytes: int) -> int:
        return rounded(num_bytes, self._device)


def _rows(tensor: StaticTensor) -> int:
    """The first dimension; of a vector its length, which the profile does not tell from a matrix of one row.

    Adapters of rank 1 are such matrices, and no adapter is a vector.
    """
    if tensor.rows > 1 or tensor.kind == "adapter":
        return tensor.rows
    return tensor.num_elements


def _layer_of(name: str) -> tuple[str, int] | None:
    """The list of layers that a dotted name lies in, and the layer."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return None if place is None else (".".join(parts[:place]), int(parts[place]))


def _cut_lists(profile: RegimeProfile) -> set[str]:
    """The lists whose layers the tape is cut at: the largest that has as many as the tape, else all (of two stacks).

    A vision tower's run before the first of the tape's layers, and are no units here.
    """
    layers: dict[str, set[int]] = {}
    elements: Counter[str] = Counter()
    for tensor in profile.tensors:
        found = _layer_of(tensor.name)
        if found is not None:
            layers.setdefault(found[0], set()).add(found[1])
            elements[found[0]] += tensor.num_elements
    whole = [name for name, indices in layers.items() if len(indices) == profile.num_layers]
    return {max(whole, key=lambda name: elements[name])} if whole else set(layers)


def make_units(configuration: Configuration, profile: RegimeProfile) -> Units:
    """Divide a model into units, as accelerate wraps it with TRANSFORMER_BASED_WRAP.

    FSDP1 leaves all that lies outside the layers in the root. FSDP2 gives the embedding a unit of its own and the
    final norm and the head another; where they are tied, all three are one.
    """
    sharder = _Sharder(configuration, profile)
    sharded = [tensor for tensor in profile.tensors if _is_sharded(tensor, configuration)]
    real_layers = _real_layers(profile)
    outside = [t for t in sharded if not t.repeats and t.name not in real_layers]
    names = _outside_units(outside) if configuration.sharding == "fsdp2" else {}

    def unit(name: str) -> Unit:
        return Unit(name=name, parts=sharder.parts([t for t in outside if names.get(t.name, "root") == name]))

    head = [t for t in outside if names.get(t.name) == "tail"]
    return Units(
        root=unit("root"),
        embedding=unit("embedding") if "embedding" in names.values() else None,
        layers=_layer_units(sharder, sharded, profile),
        tail=unit("tail") if head else None,
        tail_embeds=any(t.embeds for t in head),
        replicated=_replicated(profile, configuration),
        state=tuple(_state_tensors(sharder, sharded, profile)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharded:
    """One parameter that FSDP shards."""

    unit: str
    """By the name that `Units.named` has for it; of FSDP1 an adapter's is its own."""
    num_elements: int
    shard_elements: int
    """Of the largest shard."""
    loaded_bytes: int
    """Of an element as it was loaded."""
    stored_bytes: int
    """Of an element of a shard."""
    trains: bool

    @property
    def whole(self) -> int:
        """Bytes of all of it, as it is stored."""
        return self.num_elements * self.stored_bytes

    @property
    def loaded(self) -> int:
        """Bytes of all of it, as it was loaded."""
        return self.num_elements * self.loaded_bytes

    @property
    def shard(self) -> int:
        """Bytes of a shard, as it is stored."""
        return self.shard_elements * self.stored_bytes


def sharded(configuration: Configuration, profile: RegimeProfile) -> list[Sharded]:
    """List what FSDP shards in the order of the model's modules; FSDP1 wraps the root last."""
    sharder = _Sharder(configuration, profile)
    real_layers = _real_layers(profile)
    of_first = configuration.sharding == "fsdp1"
    taken = [(t, layer) for t, layer in in_model_order(profile) if _is_sharded(t, configuration)]
    outside = [t for t, layer in taken if layer is None and t.name not in real_layers]
    names = {} if of_first else _outside_units(outside)

    def one(tensor: StaticTensor, layer: int | None) -> Sharded:
        index = layer if layer is not None else real_layers.get(tensor.name)
        unit = names.get(tensor.name, "root") if index is None else f"layer {index}"
        stored = sharder.stored_bytes(tensor)
        loaded = stored
        if tensor.kind == "parameter" and configuration.quantization is None:
            loaded = BYTES_PER_ELEMENT[configuration.weights_dtype]
        return Sharded(
            unit=f"{unit} adapter" if of_first and tensor.kind == "adapter" else unit,
            num_elements=tensor.num_elements,
            shard_elements=sharder.shard_elements(tensor),
            loaded_bytes=loaded,
            stored_bytes=stored,
            trains=tensor.trains,
        )

    found = [one(tensor, layer) for tensor, layer in taken]
    return sorted(found, key=lambda each: each.unit.startswith("root")) if of_first else found


def _is_sharded(tensor: StaticTensor, configuration: Configuration) -> bool:
    """Parameters are; accelerate leaves packed weights that are not stored in a floating dtype whole on every rank."""
    if tensor.kind in {"buffer", "quant_state"}:
        return False
    quantization = configuration.quantization
    return tensor.kind != "quantized" or quantization is None or quantization.storage_dtype not in {"uint8", "int32"}


def _real_layers(profile: RegimeProfile) -> dict[str, int]:
    """The layer of each tensor that no other layer repeats, by the tensor's name."""
    if profile.num_layers != profile.num_traced_layers:
        return {}
    lists = _cut_lists(profile)
    found = {tensor.name: _layer_of(tensor.name) for tensor in profile.tensors}
    return {name: place[1] for name, place in found.items() if place is not None and place[0] in lists}


def _outside_units(outside: Sequence[StaticTensor]) -> dict[str, str]:
    """Say in which of FSDP2's units a parameter outside the layers is: by name, those not named in the root."""
    embedding = next((t for t in outside if t.embeds), None)
    heads = [t for t in outside if not t.embeds and t.rows > 1 and t.kind == "parameter"]
    if embedding is None:
        return {}
    table = {t.name: "embedding" for t in outside if t.embeds and t.num_elements == embedding.num_elements}
    is_tied = not heads
    if is_tied:
        return dict.fromkeys(table, "tail")
    return table | {t.name: "tail" for t in heads if t.num_elements == embedding.num_elements}


def _layer_units(sharder: _Sharder, sharded: Sequence[StaticTensor], profile: RegimeProfile) -> tuple[Unit, ...]:
    if profile.num_layers != profile.num_traced_layers:
        same = Unit(name="layer", parts=sharder.parts([t for t in sharded if t.repeats]))
        return (same,) * profile.num_layers
    by_layer: list[list[StaticTensor]] = [[] for _ in range(profile.num_layers)]
    real_layers = _real_layers(profile)
    for tensor in sharded:
        index = real_layers.get(tensor.name)
        if tensor.repeats:
            for members in by_layer:
                members.append(tensor)
        elif index is not None:
            by_layer[min(index, profile.num_layers - 1)].append(tensor)
    return tuple(Unit(name="layer", parts=sharder.parts(members)) for members in by_layer)


def _state_tensors(sharder: _Sharder, sharded: Sequence[StaticTensor], profile: RegimeProfile) -> Iterator[Tensor]:
    """This rank's parts of what trains: the first rank's, whose part of FSDP1's flat root begins with the embedding."""
    real_layers = _real_layers(profile)
    outside = sharder.first_parts([t for t in sharded if not t.repeats and t.name not in real_layers])
    for tensor in sharded:
        num_elements = outside.get(tensor.name, sharder.shard_elements(tensor))
        if tensor.trains and num_elements:
            one = tensors(replace(profile, tensors=(replace(tensor, repeats=False),)))[0]
            shard = replace(one, num_elements=num_elements, bytes_per_element=sharder.stored_bytes(tensor))
            yield from [shard] * (profile.num_layers if tensor.repeats else 1)


def _replicated(profile: RegimeProfile, configuration: Configuration) -> Terms:
    """Buffers, scales of quantised weights (never parameters), and packed weights that FSDP does not take."""
    device = profile.regime.device
    terms = {"buffers": 0, "quantized_weights": 0}
    whole = [tensor for tensor in profile.tensors if not _is_sharded(tensor, configuration)]
    for static in whole:
        count = profile.num_layers if static.repeats else 1
        tensor = tensors(replace(profile, tensors=(replace(static, repeats=False),)))[0]
        term = "buffers" if static.kind == "buffer" else "quantized_weights"
        terms[term] += count * rounded(tensor.num_bytes, device)
    return terms


def between_steps(configuration: Configuration, units: Units) -> Terms:
    """Return what is held between two steps and freed when forward begins: FSDP1's gradients.

    With `use_orig_params` they stay in its flat parameters until the next forward resets them: zero_grad only takes
    the views away. Source: torch v2.13 distributed/fsdp/_flat_param.py, `_reset_flat_param_grad_info_if_needed`.
    """
    stay = configuration.sharding == "fsdp1" and configuration.offload == "none"
    return {"gradients": units.total("kept")} if stay else {}


def shard_layout(configuration: Configuration, units: Units) -> Layout:
    """Lay out all that does not depend on the optimizer; what the host holds where it updates is not in it.

    Offloaded, all of it is on the host, and the optimizer steps there. Between steps FSDP1 keeps the gradients too.
    Source: torch v2.13 distributed/fsdp/_fully_shard/_fsdp_api.py, `CPUOffloadPolicy`; distributed/fsdp/api.py,
    `CPUOffload`.
    """
    if configuration.offload != "none":
        return Layout(resident=units.replicated, step=({},))
    return Layout(
        resident={**units.replicated, "weights": units.total("shard"), "optimizer_state": 0},
        step=({"gradients": units.total("kept"), "optimizer_temporaries": 0},),
        updated="shards",
    )


def _host_bytes(configuration: Configuration, optim: Optim, units: Units, device: DeviceKind) -> int:
    """Of one process whose shards, gradients and optimizer are on the host.

    When FSDP1 gathers a layer again it finds the last step's gradients exposed and none of its own, and makes zeros of
    that size, which it lets go of when the layer's backward begins: by then it has gathered the next one early.
    Source: torch v2.13 distributed/fsdp/_flat_param.py, `_writeback_orig_params`, `prepare_gradient_for_backward`.
    """
    parts = [part for unit in units.all() for part in unit.parts]
    optimizer = optimizer_bytes(units.state, optim, "cpu")
    shards = [part.shard for part in parts]
    if configuration.sharding == "fsdp2":
        return fsdp_buffers(shards, [part.kept for part in parts], optimizer.state + optimizer.step).num_bytes(device)
    zeros = [unit.total("kept") for unit in (*units.layers, units.root)]
    passing = max(optimizer.step, *(first + second for first, second in itertools.pairwise(zeros)))
    return fsdp_buffers(shards, shards, optimizer.state + passing).num_bytes(device)


Key = Hashable


@dataclass(frozen=True, slots=True)
class Take:
    """Hold bytes under a key."""

    key: Key
    term: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Give:
    """Free what is held under a key."""

    key: Key


@dataclass(frozen=True, slots=True)
class Play:
    """Play a segment of the tape, or a part of it."""

    index: int
    """Of the step's segments at full depth."""
    unit: Key
    """Whose gradients are made."""
    adds: bool = False
    """Whether they are added to others at once, instead of staying."""
    part: Literal["whole", "loss", "head"] = "whole"
    """`loss`: up to the gradient of the logits; `head`: from there on."""


@dataclass(frozen=True, slots=True)
class Retain:
    """Hold as many tensors of the size of a layer's input under a key."""

    key: Key
    num_tensors: int


@dataclass(frozen=True, slots=True)
class GiveGradients:
    """Free the gradients that a unit's segments made."""

    unit: Key


@dataclass(frozen=True, slots=True)
class Enter:
    """What follows belongs to a phase."""

    phase: str


Operation = Take | Give | Play | Retain | GiveGradients | Enter


@dataclass(frozen=True, slots=True)
class _Real:
    """A segment of the step at full depth."""

    traced: int
    layer: int | None


def real_segments(profile: RegimeProfile) -> list[_Real]:
    """The step's segments at full depth, in the order of `tape.unroll`."""
    found: list[_Real] = []
    forward, backward = 0, profile.num_layers - 1
    for index, segment in enumerate(profile.segments):
        for _ in range(profile.repeats(segment)):
            if segment.layer is None:
                found.append(_Real(index, None))
            elif segment.kind == "forward":
                found.append(_Real(index, forward))
                forward += 1
            else:
                found.append(_Real(index, backward))
                backward -= 1
    return found


class _Script:
    """Writes the operations of one optimizer step's forwards and backwards.

    Unshard, gather, reshard and reduce are those of the two implementations' hooks, in the order in which the host runs
    them: an allocator counts at that moment, whatever stream the work is on.
    """

    def __init__(self, configuration: Configuration, profile: RegimeProfile, units: Units) -> None:
        self._units = units
        self._profile = profile
        self._real = real_segments(profile)
        self._is_second = configuration.sharding == "fsdp2"
        self._reshards = configuration.reshard_after_forward
        self._is_hybrid = configuration.num_replicas > 1
        self._offloads = configuration.offload != "none"
        self._recomputes_by_itself = configuration.gradient_checkpointing and configuration.use_reentrant
        self._retained: list[str] = []
        self._copies_sent = profile.regime.device == "cpu"
        self._ranks = num_shards(configuration)
        self._num_micro_steps = min(configuration.gradient_accumulation_steps, MAX_MICRO_STEPS)
        self._operations: list[Operation] = []
        self._unsharded: set[str] = set()
        self._gathered: set[str] = set()
        self._held_to_the_end: set[str] = set()
        self._last_gathered: str | None = None
        self._last_sent: str | None = None

    def write(self) -> list[Operation]:
        """Write every kind of micro-step; what the optimizer then finds is freed at the end."""
        self._free_last_gradients()
        for micro_step in range(self._num_micro_steps):
            self._micro_step(is_first=micro_step == 0, is_last=micro_step == self._num_micro_steps - 1)
        return self._operations

    def write_forwards(self, num_forwards: int) -> list[Operation]:
        """Write forward passes alone, without gradients."""
        for _ in range(num_forwards):
            self._forward()
        return self._operations

    def _take(self, key: Key, term: str, num_bytes: int) -> None:
        if num_bytes:
            self._operations.append(Take(key, term, num_bytes))

    def _give(self, key: Key) -> None:
        self._operations.append(Give(key))

    def _free_last_gradients(self) -> None:
        """Of the step before; see `between_steps`."""
        if not self._is_second and not self._offloads:
            self._operations.append(Enter("embedding"))
            self._take("last gradients", "gradients", self._units.total("kept"))
            self._give("last gradients")

    def _micro_step(self, *, is_first: bool, is_last: bool) -> None:
        self._forward()
        self._backward(is_first=is_first, is_last=is_last)

    def _unit(self, name: str) -> Unit:
        return dict(self._units.named())[name]

    def _forward(self) -> None:
        units = dict(self._units.named())
        self._operations.append(Enter("embedding"))
        self._unshard("root", units["root"])
        seen_layers = False
        for index, real in enumerate(self._real):
            segment = self._profile.segments[real.traced]
            if segment.kind != "forward":
                break
            self._operations.append(Enter(segment.name))
            name = self._forward_unit(real, seen_layers=seen_layers)
            seen_layers = seen_layers or real.layer is not None
            if name in units:
                self._unshard(name, units[name])
            self._operations.append(Play(index, name))
            if name in units and self._reshards and name not in {"root", "tail"}:
                self._free_whole(name)
        self._free_gathered()

    def _forward_unit(self, real: _Real, *, seen_layers: bool) -> str:
        if real.layer is not None:
            return f"layer {real.layer}"
        if seen_layers or self._units.tail_embeds:
            return "tail"
        return "embedding"

    def _unshard(self, name: str, unit: Unit) -> None:
        """Gather a unit for forward.

        FSDP2 gathers into one buffer and copies out of it; the buffer lives until the next unit is copied out.
        """
        is_there = name in self._unsharded or not unit.parts
        self._gather(name, unit)
        if self._is_second and not is_there:
            self._copy_out(name, unit)
            self._free_gathered()
            self._last_gathered = name

    def _gather(self, name: str, unit: Unit) -> None:
        """Gather a unit unless it is; FSDP1 fetches an offloaded shard again all the same.

        Source: torch v2.13 distributed/fsdp/_flat_param.py, `pre_unshard`.
        """
        if name in self._unsharded and self._offloads and not self._is_second:
            for copy in self._copy_to_gather(name, unit):
                self._give(copy)
        if name in self._gathered or name in self._unsharded or not unit.parts:
            return
        copies = self._copy_to_gather(name, unit)
        self._take(("gathered" if self._is_second else "whole", name), "gathered_weights", unit.total("whole"))
        for copy in copies:
            self._give(copy)
        if self._is_second:
            self._gathered.add(name)
        else:
            self._unsharded.add(name)

    def _copy_to_gather(self, name: str, unit: Unit) -> list[Key]:
        """Copy this rank's shards into the dtype that computes, if they are stored in another one.

        An offloaded shard is first copied to the device as it is stored, one parameter at a time; one that needs no
        other dtype stays until the unit is gathered. Source: torch v2.13 _fully_shard/_fsdp_param.py,
        `all_gather_inputs`; _flat_param.py, `_use_low_precision_shard`, `pre_unshard`.
        """
        if not self._offloads:
            self._take(("cast", name), "gathered_weights", unit.total("cast"))
            return [("cast", name)]
        kept: list[Key] = []
        for number, part in enumerate(unit.parts):
            fetched, cast = ("fetched", name, number), ("cast", name, number)
            self._take(fetched, "gathered_weights", part.shard)
            self._take(cast, "gathered_weights", part.cast)
            if part.cast:
                self._give(fetched)
            kept.append(cast if part.cast else fetched)
        return kept

    def _copy_out(self, name: str, unit: Unit) -> None:
        self._take(("whole", name), "gathered_weights", unit.total("whole"))
        self._gathered.discard(name)
        self._unsharded.add(name)

    def _free_gathered(self) -> None:
        if self._last_gathered is not None:
            self._give(("gathered", self._last_gathered))
            self._last_gathered = None

    def _free_whole(self, name: str) -> None:
        if name in self._unsharded:
            self._give(("whole", name))
            self._unsharded.discard(name)

    def _backward(self, *, is_first: bool, is_last: bool) -> None:
        units = dict(self._units.named())
        order = [name for name in units if name not in {"root", "tail"}]
        is_outermost = True
        frozen: str | None = None
        for index, real in enumerate(self._real):
            segment = self._profile.segments[real.traced]
            if segment.kind != "backward":
                continue
            if segment.name == "end":
                self._operations += [Enter("end"), Play(index, "root")]
                continue
            if real.layer is None and is_outermost:
                is_outermost = False
                self._loss(index, units, order, adds=self._is_second and not is_first)
                if "tail" in units and not self._units.tail_embeds:
                    self._end_unit("tail", units["tail"], is_first=is_first, is_last=is_last)
                continue
            self._operations.append(Enter(segment.name))
            name = self._backward_unit(real)
            if name in order:
                self._unshard_again(name, units[name])
                self._prefetch(order, order.index(name), units)
                if frozen is not None:
                    self._free_whole(frozen)
                    frozen = None
            adds = self._is_second and not is_first
            self._operations.append(Play(index, name if name in units else "root", adds=adds))
            if name in order:
                if not self._is_second and not _trains_but_adapters(units[name]):
                    frozen = self._end_frozen(name, units[name], is_first=is_first, is_last=is_last)
                else:
                    self._end_unit(name, units[name], is_first=is_first, is_last=is_last)
        self._end(units, is_first=is_first, is_last=is_last)

    def _backward_unit(self, real: _Real) -> str:
        if real.layer is not None:
            return f"layer {real.layer}"
        return "tail" if self._units.tail_embeds else "embedding"

    def _loss(self, index: int, units: dict[str, Unit], order: list[str], *, adds: bool) -> None:
        """The head's hook gathers the last layer; FSDP1's root does so when the loss itself has its gradient."""
        unit = "tail" if "tail" in units else "root"
        last = order[-1]
        self._operations.append(Enter("loss_backward"))
        if not self._is_second and not self._recomputes_by_itself:
            self._gather(last, units[last])
        self._operations.append(Play(index, unit, adds=adds, part="loss"))
        self._operations.append(Enter("head_backward"))
        if self._is_second:
            self._gather(last, units[last])
        self._operations.append(Play(index, unit, adds=adds, part="head"))

    def _unshard_again(self, name: str, unit: Unit) -> None:
        self._gather(name, unit)
        if self._is_second and name not in self._unsharded:
            self._copy_out(name, unit)
            self._give(("gathered", name))

    def _end_frozen(self, name: str, unit: Unit, *, is_first: bool, is_last: bool) -> str | None:
        """End a layer of FSDP1 whose own weights are frozen; return it if it is freed only after the next is there.

        Its hook waits for the gradient of the layer's input, through that input's accumulator, and is forgotten when
        backward ends. A reentrant checkpoint made the input a leaf: the accumulator keeps it and its gradient.
        Source: torch v2.13 distributed/fsdp/_runtime_utils.py, `_register_post_backward_reshard_only_hook`,
        `_finalize_params`; autograd/graph.py, `register_multi_grad_hook`.
        """
        if self._recomputes_by_itself:
            self._end_unit(name, unit, is_first=is_first, is_last=is_last)
            # The gradient of its input is in the tape until the layer below has used it.
            self._operations.append(Retain(("input", name), 2 if self._retained else 1))
            self._retained.append(name)
            return None
        self._reduce_first(name, unit, is_first=is_first, is_last=is_last)
        return name

    def _prefetch(self, order: list[str], position: int, units: dict[str, Unit]) -> None:
        """Gather the next unit early. FSDP1 looks for one whose output has a hook: not a reentrant checkpoint.

        Source: torch v2.13 distributed/fsdp/_runtime_utils.py, `_get_handle_to_prefetch`.
        """
        if position and not (self._recomputes_by_itself and not self._is_second):
            before = order[position - 1]
            self._gather(before, units[before])

    def _end_unit(self, name: str, unit: Unit, *, is_first: bool, is_last: bool) -> None:
        if self._is_second:
            self._end_second(name, unit, is_first=is_first, is_last=is_last)
        else:
            self._end_first(name, unit, is_first=is_first, is_last=is_last)

    def _end_second(self, name: str, unit: Unit, *, is_first: bool, is_last: bool) -> None:
        """Reshard; then copy the gradients together, scatter, and convert this rank's share.

        The buffer that was sent lives until the next unit's gradients are copied together.
        """
        gradient = unit.total("gradient")
        self._free_whole(name)
        if not is_last:
            if is_first:
                self._operations.append(GiveGradients(name))
                self._take(("gradients", name), "gradients", gradient)
            return
        self._free_sent()
        if not unit.trains:
            return
        sent = unit.total("reduced") * self._ranks
        self._take(("sent", name), "communication_buckets", sent)
        self._operations.append(GiveGradients(name))
        if not is_first:
            self._give(("gradients", name))
        # The last gradient of the list is still a variable of the loop that counted them.
        self._take(("last", name), "gradients", next(p.gradient for p in reversed(unit.parts) if p.gradient))
        self._scatter(name, unit, sent)
        self._give(("last", name))
        self._last_sent = name

    def _free_sent(self) -> None:
        if self._last_sent is not None:
            self._give(("sent", self._last_sent))
            self._last_sent = None

    def _scatter(self, name: str, unit: Unit, sent: int) -> None:
        """Receive this rank's share and convert it; gloo copies what it sends, NCCL does not.

        A hybrid shard's all-reduce keeps the unconverted share to the end of backward.
        """
        reduced, kept = unit.total("reduced"), unit.total("kept")
        self._take(("reduced", name), "communication_buckets", reduced)
        if self._copies_sent:
            self._take(("copied", name), "communication_buckets", sent)
            self._give(("copied", name))
        if kept == reduced:
            self._give(("reduced", name))
            self._take(("kept", name), "gradients", kept)
        else:
            self._take(("kept", name), "gradients", kept)
            if self._is_hybrid and self._is_second:
                self._held_to_the_end.add(name)
            else:
                self._give(("reduced", name))
        if self._offloads and self._is_second:
            self._give(("kept", name))

    def _end_first(self, name: str, unit: Unit, *, is_first: bool, is_last: bool) -> None:
        self._reduce_first(name, unit, is_first=is_first, is_last=is_last, frees=self._reshards or is_last)

    def _reduce_first(self, name: str, unit: Unit, *, is_first: bool, is_last: bool, frees: bool = False) -> None:
        """Concatenate the gradients into a flat one; then reshard, scatter, and convert this rank's share.

        A flat parameter is seen by autograd as split into its parameters, whose gradients it therefore concatenates.
        """
        flat = ("flat", name) if is_first else ("flat again", name)
        if unit.trains:
            self._take(flat, "gradients", unit.total("gradient"))
            self._operations.append(GiveGradients(name))
            if not is_first:
                self._give(flat)
        if frees:
            self._free_whole(name)
        if unit.trains and is_last:
            self._scatter(name, unit, unit.total("gradient"))
            self._give(("flat", name))

    def _end(self, units: dict[str, Unit], *, is_first: bool, is_last: bool) -> None:
        """The final callback: what no hook ended."""
        self._operations.append(Enter("end"))
        for name in list(units):
            if name in self._gathered:
                self._give(("gathered", name))
                self._gathered.discard(name)
        if self._units.tail_embeds:
            self._end_unit("tail", units["tail"], is_first=is_first, is_last=is_last)
        if units["root"].parts:
            self._end_unit("root", units["root"], is_first=is_first, is_last=is_last)
        for name in list(self._unsharded):
            self._free_whole(name)
        self._free_sent()
        for name in sorted(self._held_to_the_end):
            self._give(("reduced", name))
        self._held_to_the_end.clear()
        for name in self._retained:
            self._give(("input", name))
        self._retained.clear()
        if is_last:
            for name, unit in units.items():
                if unit.trains and not (self._offloads and self._is_second):
                    self._give(("kept", name))


def _trains_but_adapters(unit: Unit) -> bool:
    """Whether a unit of FSDP1 trains by its own weights: adapters in it are units of their own."""
    return bool(unit.parts) and bool(unit.parts[0].gradient)


def forward_in_evaluation(configuration: Configuration, profile: RegimeProfile, units: Units) -> EngineForward:
    """Return what a forward pass of an evaluation gathers, after another one: the root and the head stay gathered.

    A backward pass, or a save, frees them. FSDP2 hands outputs on in the dtype that computes.
    Source: torch v2.13 distributed/fsdp/_runtime_utils.py, `_post_forward_reshard` (`_is_root`);
    _fully_shard/_fsdp_state.py, `_post_forward` (`reshard_after_forward`);
    accelerate 1.15 utils/dataclasses.py, `set_mixed_precision` (`output_dtype`).
    """
    held: dict[Key, int] = {}
    moments: dict[int, tuple[int, int]] = {}
    highest = 0
    for operation in _Script(configuration, profile, units).write_forwards(num_forwards=2):
        match operation:
            case Take():
                held[operation.key] = operation.num_bytes
                highest = max(highest, sum(held.values()))
            case Give():
                held.pop(operation.key, None)
            case Play():
                traced = real_segments(profile)[operation.index].traced
                before, during = moments.get(traced, (0, 0))
                moments[traced] = max(before, highest), max(during, sum(held.values()))
                highest = 0
            case _:
                pass
    halves = configuration.sharding == "fsdp2" and configuration.mixed_precision != "no"
    return EngineForward(moments, left=sum(held.values()), halves_outputs=halves)


def script(configuration: Configuration, profile: RegimeProfile, units: Units) -> list[Operation]:
    """Write an optimizer step's forwards and backwards down."""
    return _Script(configuration, profile, units).write()


@dataclass(frozen=True, slots=True)
class _Curve:
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
        return _host_bytes(configuration, optim, units, self._profile.regime.device)

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


@dataclass(frozen=True, slots=True)
class _Made:
    units: Units
    operations: list[Operation]
