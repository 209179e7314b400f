"""The order in which FSDP gathers, reduces and frees units around the segments of a traced step.

A script is a list of operations. Sources, unless said otherwise: torch v2.13 distributed/fsdp/_fully_shard
(`_fsdp_param_group.py`, `_fsdp_collectives.py`) for FSDP2, and distributed/fsdp/_runtime_utils.py, _flat_param.py for
FSDP1.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Literal

from msgspec import Struct

from autofit.memory.evaluation import EngineForward
from autofit.memory.fsdp_units import Unit, Units, num_shards
from autofit.spec.configuration import Configuration
from autofit.spec.profile import RegimeProfile

MAX_MICRO_STEPS = 3
"""The first makes gradients, one in the middle finds them and keeps them, the last reduces them."""

Key = Hashable


class Take(Struct, frozen=True):
    """Hold bytes under a key."""

    key: Key
    term: str
    num_bytes: int


class Give(Struct, frozen=True):
    """Free what is held under a key."""

    key: Key


class Play(Struct, frozen=True):
    """Play a segment of the tape, or a part of it."""

    index: int
    """Of the step's segments at full depth."""
    unit: Key
    """Whose gradients are made."""
    adds: bool = False
    """Whether they are added to others at once, instead of staying."""
    part: Literal["whole", "loss", "head"] = "whole"
    """`loss`: up to the gradient of the logits; `head`: from there on."""


class Retain(Struct, frozen=True):
    """Hold as many tensors of the size of a layer's input under a key."""

    key: Key
    num_tensors: int


class GiveGradients(Struct, frozen=True):
    """Free the gradients that a unit's segments made."""

    unit: Key


class Enter(Struct, frozen=True):
    """What follows belongs to a phase."""

    phase: str


Operation = Take | Give | Play | Retain | GiveGradients | Enter


class _Real(Struct, frozen=True):
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
