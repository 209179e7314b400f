"""Writes an FSDP step down for the caching allocator: shards, gathers and reductions on the streams that they run on.

Source of the streams: torch v2.13 distributed/fsdp/_fully_shard/_fsdp_param_group.py (`get_all_gather_streams`,
`foreach_reduce`) for FSDP2, distributed/fsdp/_runtime_utils.py (`_unshard`, `_reduce_grad`) for FSDP1. A block of one
stream never serves another. What FSDP1 gathered is free only when the device is done with it (`record_stream`), and the
host may be some units ahead of that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from autofit.memory.fsdp import FsdpModel, logits_gradient
from autofit.memory.fsdp_script import Give, GiveGradients, Key, Operation, Play, Retain, Take
from autofit.memory.inputs import further_inputs
from autofit.memory.optimizers import OPTIMIZERS
from autofit.memory.program import Events, Program
from autofit.memory.static import optimizer_bytes
from autofit.memory.tape import BIRTH_FIELDS
from autofit.memory.unroll import DeepTape
from autofit.spec.configuration import Configuration
from autofit.units import BYTES_PER_ELEMENT

COMPUTES, GATHERS, REDUCES, COPIES = 0, 1, 2, 3
"""FSDP1 copies shards into another dtype on a stream of its own (`_pre_unshard_stream`)."""
MAX_UNITS_AHEAD = 2
"""Before FSDP1 gathers a unit, the host waits for the oldest of those that it freed, once there are so many.

Source: torch v2.13 distributed/fsdp/_limiter_utils.py, `_max_num_inflight_all_gathers`; _runtime_utils.py, `_unshard`
(`limit_all_gathers`, accelerate's and torch's default)."""


class FsdpWriter:
    """Writes down what one process of an FSDP run allocates.

    Args:
        tape: the traced step at full depth.
        configuration: what runs, under `fsdp1` or `fsdp2`.
        model: the same configuration's units and script.
        sequence_tokens: tokens of every sequence.
        workspaces: of the thread that runs forward, and of the one that runs backward.
        is_ahead: whether FSDP1's host is as far ahead of the device as it may be, so that what was gathered is free as
            late as it can be; otherwise it is free at once, as it is where an allocation would fail and torch waits
            (CUDACachingAllocator.cpp, `release_cached_blocks`).
    """

    def __init__(
        self,
        tape: DeepTape,
        configuration: Configuration,
        model: FsdpModel,
        sequence_tokens: int,
        workspaces: Sequence[int],
        *,
        is_ahead: bool = False,
    ) -> None:
        self._tape, self._configuration, self._model = tape, configuration, model
        self._workspaces = dict(zip(tape.first_products(), workspaces, strict=False))
        micro_batch = configuration.per_device_train_batch_size
        self._micro_step = tape.at(micro_batch, sequence_tokens)
        self._gradient_events = self._micro_step.gradients
        added = self._gradient_events + 1, self._micro_step.number_of[self._gradient_events]
        self._played = {False: self._micro_step.playable(), True: self._micro_step.playable(added)}
        """By whether gradients are added to others at once."""
        element = BYTES_PER_ELEMENT[tape.profile.regime.weights_dtype]
        self._input_bytes = micro_batch * sequence_tokens * tape.profile.hidden_size * element
        accumulation = configuration.gradient_accumulation_steps
        self._waiting = further_inputs(tape.profile, micro_batch, sequence_tokens, accumulation)
        self._units = dict(model.units(configuration).named())
        self._program = Program()
        self._first_number = 0
        self._held: dict[Key, list[int]] = {}
        self._gradients: dict[Key, list[int]] = {}
        self._kept: list[int] = []
        self._frees_late = is_ahead and configuration.sharding == "fsdp1"
        self._late: deque[list[int]] = deque()
        """What FSDP1 freed and the device may still read, by unit."""

    def write(self, num_steps: int) -> Events:
        """Return the program."""
        units = self._model.units(self._configuration)
        self._program.hold(units.replicated.values())
        if self._configuration.offload == "none":
            self._program.hold(part.shard for unit in units.all() for part in unit.parts)
        self._program.end_loading()
        for step in range(num_steps):
            inputs = self._program.hold(self._waiting)
            for operation in self._model.operations(self._configuration):
                self._do(operation)
            self._step(is_first=step == 0)
            self._program.drop(inputs)
        return self._program.written()

    def _do(self, operation: Operation) -> None:
        match operation:
            case Take():
                stream = self._stream(operation.key)
                if stream == GATHERS and len(self._late) >= MAX_UNITS_AHEAD:
                    self._program.drop(self._late.popleft())
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
        elif self._frees_late and self._stream(key) == GATHERS:
            self._late.append(numbers)
        else:
            self._program.drop(numbers)

    def _stream(self, key: Key) -> int:
        return _stream(key, is_second=self._configuration.sharding == "fsdp2")

    def _play(self, play: Play) -> None:
        if play.index == 0:
            self._first_number = self._program.new_numbers(self._micro_step.num_tensors)
        if play.index in self._workspaces:
            self._program.allocate(self._workspaces.pop(play.index))
        begin, end = self._stretch(play)
        self._program.play(self._played[play.adds], begin, end, self._first_number)
        if not play.adds:
            first, last = np.searchsorted(self._gradient_events, (begin, end))
            numbers = self._first_number + self._micro_step.number_of[self._gradient_events[first:last]]
            self._gradients.setdefault(play.unit, []).extend(numbers.tolist())

    def _stretch(self, play: Play) -> tuple[int, int]:
        """Return the first event that is played, and the first after it that is not."""
        begin, end = self._micro_step.starts[play.index : play.index + 2].tolist()
        if play.part == "whole":
            return begin, end
        real = self._tape.real_segments()[play.index]
        split = logits_gradient(self._tape.profile, real)
        num_births = sum(len(event) == BIRTH_FIELDS for event in real.events[:split])
        births = begin + np.flatnonzero(self._micro_step.is_birth[begin:end])
        cut = int(births[num_births]) if num_births < len(births) else end
        return (begin, cut) if play.part == "loss" else (cut, end)

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
    if what in {"cast", "fetched"}:
        return GATHERS if is_second else COPIES
    if what == "gathered" or (what == "whole" and not is_second):
        return GATHERS
    return REDUCES if what in {"reduced", "kept"} else COMPUTES
