"""Writes an FSDP step down for the caching allocator: shards, gathers and reductions on the streams that they run on.

Source of the streams: torch v2.13 distributed/fsdp/_fully_shard/_fsdp_param_group.py (`get_all_gather_streams`,
`foreach_reduce`) for FSDP2, distributed/fsdp/_runtime_utils.py (`_unshard`, `_reduce_grad`) for FSDP1. A block of one
stream never serves another. FSDP1 frees what it gathered only when the device is done with it; here that is at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from autofit.memory.fsdp import FsdpModel, Give, GiveGradients, Key, Operation, Play, Retain, Take, logits_gradient
from autofit.memory.optimizers import OPTIMIZERS
from autofit.memory.program import Program
from autofit.memory.static import optimizer_bytes
from autofit.memory.tape import BIRTH_FIELDS, StepEvent, unroll
from autofit.spec.configuration import Configuration
from autofit.spec.profile import GRADIENT, RegimeProfile
from autofit.units import BYTES_PER_ELEMENT

COMPUTES, GATHERS, REDUCES = 0, 1, 2


class FsdpWriter:
    """Writes down what one process of an FSDP run allocates.

    Args:
        profile: the traced step.
        configuration: what runs, under `fsdp1` or `fsdp2`.
        model: the same configuration's units and script.
        sequence_tokens: tokens of every sequence.
        workspaces: of the thread that runs forward, and of the one that runs backward.
    """

    def __init__(
        self,
        profile: RegimeProfile,
        configuration: Configuration,
        model: FsdpModel,
        sequence_tokens: int,
        workspaces: Sequence[int],
    ) -> None:
        self._profile, self._configuration, self._model = profile, configuration, model
        self._workspaces = dict(zip(("forward", "backward"), workspaces, strict=False))
        micro_batch = configuration.per_device_train_batch_size
        self._segments = unroll(profile, micro_batch, sequence_tokens)
        self._real = [each for each in profile.segments for _ in range(profile.repeats(each))]
        element = BYTES_PER_ELEMENT[profile.regime.weights_dtype]
        self._input_bytes = micro_batch * sequence_tokens * profile.hidden_size * element
        self._units = dict(model.units(configuration).named())
        self._program = Program()
        self._held: dict[Key, list[int]] = {}
        self._alive: dict[int, int] = {}
        self._gradients: dict[Key, list[int]] = {}
        self._kept: list[int] = []

    def write(self, num_steps: int) -> tuple[Program, int]:
        """Return the program and where loading ends in it."""
        units = self._model.units(self._configuration)
        self._program.hold(units.replicated.values())
        if self._configuration.offload == "none":
            self._program.hold(part.shard for unit in units.all() for part in unit.parts)
        end_of_loading = len(self._program)
        for step in range(num_steps):
            for operation in self._model.operations(self._configuration):
                self._do(operation)
            self._step(is_first=step == 0)
        return self._program, end_of_loading

    def _do(self, operation: Operation) -> None:
        match operation:
            case Take():
                stream = _stream(operation.key, is_second=self._configuration.sharding == "fsdp2")
                sizes = self._sizes(operation)
                numbers = [self._program.allocate(size, stream) for size in sizes if size]
                self._held.setdefault(operation.key, []).extend(numbers)
            case Give():
                self._give(operation.key)
            case Retain():
                sizes = [self._input_bytes] * operation.num_tensors
                self._held.setdefault(operation.key, []).extend(self._program.hold(sizes))
            case GiveGradients():
                self._program.drop(self._gradients.pop(operation.unit, []))
            case Play():
                self._play(operation)

    def _sizes(self, take: Take) -> list[int]:
        """What is copied out of FSDP2's buffer is one tensor for each parameter; all else is one tensor."""
        if self._configuration.sharding == "fsdp2" and isinstance(take.key, tuple) and take.key[0] == "whole":
            return [part.whole for part in self._units[take.key[1]].parts]
        return [take.num_bytes]

    def _give(self, key: Key) -> None:
        """Free; what the optimizer will find stays until it is done."""
        numbers = self._held.pop(key, [])
        if isinstance(key, tuple) and key[0] == "kept" and self._configuration.offload == "none":
            self._kept.extend(numbers)
        else:
            self._program.drop(numbers)

    def _play(self, play: Play) -> None:
        events, real = self._segments[play.index], self._real[play.index]
        if play.part != "whole":
            split = logits_gradient(self._profile, real)
            num_births = sum(len(event) == BIRTH_FIELDS for event in real.events[:split])
            cut = _after_births(events, num_births)
            events = events[:cut] if play.part == "loss" else events[cut:]
        if real.kind in self._workspaces and any(real.matmul_flops):
            self._program.allocate(self._workspaces.pop(real.kind))
        for event in events:
            self._event(event, play)

    def _event(self, event: StepEvent, play: Play) -> None:
        if event.category == GRADIENT:
            if event.is_birth:
                number = self._program.allocate(event.num_bytes)
                if play.adds:
                    self._program.release(number)
                else:
                    self._gradients.setdefault(play.unit, []).append(number)
        elif event.is_birth:
            if event.num_bytes:
                self._alive[event.number_of] = self._program.allocate(event.num_bytes)
        elif event.number_of in self._alive:
            self._program.release(self._alive.pop(event.number_of))

    def _step(self, *, is_first: bool) -> None:
        if self._configuration.offload == "none":
            state = self._model.units(self._configuration).state
            if is_first:
                describe = OPTIMIZERS[self._configuration.optim].state
                self._program.hold(size for tensor in state for size in describe(tensor).device)
            optimizer = optimizer_bytes(state, self._configuration.optim, "cuda")
            self._program.drop(self._program.hold(() if optimizer.in_backward else optimizer.temporaries))
        self._program.drop(self._kept)
        self._kept.clear()
        for unit in list(self._gradients):
            self._program.drop(self._gradients.pop(unit))


def _stream(key: Key, *, is_second: bool) -> int:
    what = key[0] if isinstance(key, tuple) else key
    if what in {"gathered", "cast"} or (what == "whole" and not is_second):
        return GATHERS
    return REDUCES if what in {"reduced", "kept"} else COMPUTES


def _after_births(events: Sequence[StepEvent], num_births: int) -> int:
    """Where the birth after so many lies."""
    births = [n for n, event in enumerate(events) if event.is_birth]
    return births[num_births] if num_births < len(births) else len(events)
