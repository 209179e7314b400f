"""What FSDP gathers together, and what of it a rank holds.

A unit is a layer, or what lies outside the layers. Sources, unless said otherwise: torch v2.13
distributed/fsdp/_fully_shard (`_fsdp_param.py`) for FSDP2, and distributed/fsdp/_flat_param.py for FSDP1; what is
wrapped: accelerate 1.15 utils/fsdp_utils.py (`fsdp2_prepare_model`) and accelerator.py (`prepare_model`).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

from msgspec import Struct
from msgspec.structs import replace

from autofit.memory.engines import Layout, Terms
from autofit.memory.host import fsdp_buffers
from autofit.memory.static import optimizer_bytes, rounded
from autofit.memory.tensors import Tensor, in_model_order, tensors
from autofit.spec.configuration import Configuration, Optim
from autofit.spec.hardware import DeviceKind
from autofit.spec.profile import RegimeProfile, StaticTensor
from autofit.units import BYTES_PER_ELEMENT

MASTER_BYTES = 4
"""Under mixed precision what trains is stored in fp32, whatever it was loaded in.

Source: accelerate/utils/fsdp_utils.py 1.15, fsdp2_prepare_model ("Upcast to fp32 master weights");
accelerate/accelerator.py, prepare_model (`_flat_param`, "upcasting")."""


class Part(Struct, frozen=True, kw_only=True):
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


class Unit(Struct, frozen=True, kw_only=True):
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


class Units(Struct, frozen=True, kw_only=True):
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
        return self.loaded_bytes(tensor)

    def loaded_bytes(self, tensor: StaticTensor) -> int:
        """Bytes of an element of a parameter that is not quantised, as it is loaded."""
        return BYTES_PER_ELEMENT["float32" if tensor.loaded_in_fp32 else self._configuration.weights_dtype]

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


class Sharded(Struct, frozen=True, kw_only=True):
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
            loaded = sharder.loaded_bytes(tensor)
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


def host_bytes(configuration: Configuration, optim: Optim, units: Units, device: DeviceKind) -> int:
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
