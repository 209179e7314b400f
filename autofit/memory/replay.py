"""Sends the allocations of real steps through the caching allocator's policy: what torch reserves for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from autofit.memory.alloc_conf import refuse_small_split_size
from autofit.memory.allocator import (
    ROUND_LARGE_BYTES,
    AllocatorSettings,
    CachingAllocator,
    OutOfMemoryInSimulationError,
)
from autofit.memory.engines import Layout, Terms
from autofit.memory.fsdp import FsdpModel
from autofit.memory.inputs import further_inputs
from autofit.memory.loading import buckets, write_broadcast, write_loading
from autofit.memory.optimizers import OPTIMIZERS
from autofit.memory.program import Events, Program
from autofit.memory.replay_fsdp import FsdpWriter
from autofit.memory.static import optimizer_bytes
from autofit.memory.tape import bucket_gradient_bytes, returned_logits_bytes
from autofit.memory.tensors import Model
from autofit.memory.unroll import DeepTape, Playable, Releases, Step
from autofit.spec.configuration import Configuration, Optim
from autofit.spec.deepspeed import bucket_settings
from autofit.spec.profile import RegimeProfile
from autofit.units import MIB

NUM_STEPS = 2
"""The first makes the optimizer's state; the second is like all later ones."""
MAX_MICRO_STEPS = 2
"""The second finds gradients already there; later ones are like it."""
MAX_BUCKETED_MICRO_STEPS_AT_FIRST = 1
"""The same for the first step of an engine that takes gradients away at once: there micro-steps are all alike.

The last step's two show whether anything is left to grow. With two in the first step as well, 3,019 configurations of
shipped models drawn at random reserved the same to the byte; what must at least be there to reserve was up to 0.5 %
more in five of those that nearly fill a device, and 3.4 % in one."""
MAX_PRESSURE_REPLAYS = 5
"""The smallest capacity is found to within a 32nd of what fragmentation costs, rounded up."""
NEARLY_FULL_FRACTION = 0.9
"""Beyond this share of the device, what the allocator would keep is told from what it cannot do without."""
DDP_BUCKET_BYTES = (MIB, 25 * MIB)
"""The first bucket is small, to be sent early.

Source: torch v2.13 nn/parallel/distributed.py; torch/csrc/distributed/c10d/reducer.hpp, kDefaultFirstBucketBytes."""


class Replayed(Struct, frozen=True, kw_only=True):
    """What the caching allocator counts at its highest, from before the first step on."""

    peak_allocated_bytes: int
    """Above the tensors' own bytes by what blocks are too large to be worth splitting."""
    peak_reserved_bytes: int
    """What is kept, on the device that was asked for: torch returns cached memory only where it needs it."""
    needed_bytes: int | None
    """What must at least be there to reserve: with less, an allocation fails after all cached memory was returned.

    None where the device has room for all that is kept: then it was not looked for."""
    loading_reserved_bytes: int
    """The most that was reserved while the model was loaded."""
    left_over_bytes: int
    """How much larger than what was asked for the blocks are that are held between steps."""
    num_retries: int
    """How often the device of the given capacity had to return cached memory, which costs time."""


class Replayer:
    """Replays steps of one traced profile.

    Rows that differ in the device alone make the same program: of one that was just run, nothing is run again.
    """

    def __init__(self, profile: RegimeProfile, model: Model) -> None:
        self._tape = DeepTape(profile)
        self._model = model
        self._last: _Trials | None = None
        self._written: tuple[tuple[object, ...], Events] | None = None
        self._loaded: dict[tuple[int, bool], Program] = {}
        self._updates: dict[Optim, _Update] = {}

    def step(
        self,
        configuration: Configuration,
        sequence_tokens: int,
        plan: Layout,
        workspaces: Sequence[int],
        *,
        capacity_bytes: int | None,
    ) -> Replayed:
        """Replay loading and two optimizer steps.

        What dies after an optimizer step (the loss, kept outputs) is in the tape's last segment.

        Where `capacity_bytes` is reached, cached memory is returned and the allocation tried again, as torch does;
        where even that fails, the figure is what would have been reserved on a larger device.

        Args:
            configuration: what runs.
            sequence_tokens: tokens of every sequence.
            plan: how the configuration lays out weights, gradients and state.
            workspaces: of the thread that runs forward, and of the one that runs backward; each is taken at the
                thread's first matrix product.
            capacity_bytes: what can be reserved on the device; None: no bound.
        """
        trials = self._trials(configuration, sequence_tokens, plan, workspaces, capacity_bytes)
        return _settle(trials, capacity_bytes)

    def suffices(
        self,
        configuration: Configuration,
        sequence_tokens: int,
        plan: Layout,
        workspaces: Sequence[int],
        *,
        capacity_bytes: int,
        reserved_bytes: int,
    ) -> bool:
        """Tell whether the same steps run where no more than `reserved_bytes` of the device can be reserved.

        That is soon known where they do not, and where they do, `step` begins with what was seen.
        """
        trials = self._trials(configuration, sequence_tokens, plan, workspaces, capacity_bytes)
        return trials.run(reserved_bytes) is not None

    def fsdp_step(
        self,
        configuration: Configuration,
        sequence_tokens: int,
        model: FsdpModel,
        workspaces: Sequence[int],
        *,
        capacity_bytes: int | None,
    ) -> Replayed:
        """Replay two optimizer steps of an FSDP run, from its shards on; see `step`.

        What is kept is that of a host as far ahead of the device as FSDP1 lets it be. What is needed is not: before an
        allocation fails, torch waits for what the device still reads.
        Source: torch v2.13 c10/cuda/CUDACachingAllocator.cpp, `release_cached_blocks` (`synchronize_and_free_events`).

        Args:
            configuration: what runs.
            sequence_tokens: tokens of every sequence.
            model: the configuration's units and script.
            workspaces: of the two threads that multiply.
            capacity_bytes: what can be reserved on the device; None: no bound.
        """
        writer = FsdpWriter(self._tape, configuration, model, sequence_tokens, workspaces)
        trials = self._trials_of(writer.write(NUM_STEPS), configuration, capacity_bytes)
        replayed = _settle(trials, capacity_bytes)
        if configuration.sharding != "fsdp1":
            return replayed
        writer = FsdpWriter(self._tape, configuration, model, sequence_tokens, workspaces, is_ahead=True)
        ahead = _Trials(writer.write(NUM_STEPS), allocator_settings(configuration), None).run(math.inf)
        assert ahead is not None, "an allocator without a bound does not run out of memory"
        return _with_kept(replayed, ahead.peak_reserved_bytes, capacity_bytes)

    def _begun(self, configuration: Configuration, plan: Layout, device_bytes: int | None) -> Program:
        """Return a program that has loaded the model, if the device holds all of it."""
        if not holds_whole_tensors(configuration):
            return Program()
        key = (device_bytes or 2**62, "communication_buckets" in plan.resident)
        if key not in self._loaded:
            program = self._loaded[key] = Program()
            write_loading(program, self._tape.profile, key[0])
            if key[1]:
                write_broadcast(program, self._tape.profile)
        return self._loaded[key].copy()

    def _update(self, optim: Optim) -> _Update:
        if optim not in self._updates:
            self._updates[optim] = _Update.of(self._model, optim)
        return self._updates[optim]

    def _trials(
        self,
        configuration: Configuration,
        sequence_tokens: int,
        plan: Layout,
        workspaces: Sequence[int],
        capacity_bytes: int | None,
    ) -> _Trials:
        """Return the trials of a configuration's program; how segments grow is the allocator's, not the program's."""
        same = replace(configuration.training_alone, expandable_segments=False)
        key = same, sequence_tokens, tuple(workspaces), capacity_bytes
        if self._written is None or self._written[0] != key:
            program = self._begun(configuration, plan, capacity_bytes)
            writer = _Writer(program, self._tape, configuration, plan, self._model, self._update(configuration.optim))
            self._written = key, writer.write(sequence_tokens, workspaces)
        return self._trials_of(self._written[1], configuration, capacity_bytes)

    def _trials_of(self, events: Events, configuration: Configuration, capacity_bytes: int | None) -> _Trials:
        settings = allocator_settings(configuration)
        if self._last is None or not self._last.are_of(events, settings):
            self._last = _Trials(events, settings, capacity_bytes)
        return self._last


def _with_kept(replayed: Replayed, kept_bytes: int, capacity_bytes: int | None) -> Replayed:
    """Keep more than a replay did, as far as the device has it; all that the replay kept is then enough to run."""
    at_most = math.inf if capacity_bytes is None else capacity_bytes
    if kept_bytes <= replayed.peak_reserved_bytes or replayed.peak_reserved_bytes > at_most:
        return replayed
    is_nearly_full = kept_bytes > NEARLY_FULL_FRACTION * at_most
    needed_bytes = replayed.peak_reserved_bytes if is_nearly_full else None
    return replace(
        replayed,
        peak_reserved_bytes=int(min(kept_bytes, at_most)),
        needed_bytes=needed_bytes if replayed.needed_bytes is None else replayed.needed_bytes,
    )


def _settle(trials: _Trials, capacity_bytes: int | None) -> Replayed:
    """Run with room, and where that would nearly fill the device or more, as tightly as it goes."""
    roomy = trials.run(math.inf)
    assert roomy is not None, "an allocator without a bound does not run out of memory"
    if capacity_bytes is None or roomy.most_reserved_bytes <= NEARLY_FULL_FRACTION * capacity_bytes:
        return _replayed(roomy, None)
    if roomy.most_reserved_bytes <= capacity_bytes:
        return _replayed(roomy, _least_capacity(trials, roomy.peak_allocated_bytes, roomy.most_reserved_bytes))
    kept = trials.run(capacity_bytes)
    suffices = roomy.most_reserved_bytes if kept is None else capacity_bytes
    fails = max(capacity_bytes, roomy.peak_allocated_bytes) if kept is None else roomy.peak_allocated_bytes
    return _replayed(kept or roomy, _least_capacity(trials, fails, suffices))


def _replayed(ran: _Ran, needed_bytes: int | None) -> Replayed:
    return Replayed(
        peak_allocated_bytes=ran.peak_allocated_bytes,
        peak_reserved_bytes=ran.peak_reserved_bytes,
        needed_bytes=needed_bytes,
        loading_reserved_bytes=ran.loading_reserved_bytes,
        left_over_bytes=ran.left_over_bytes,
        num_retries=ran.num_retries,
    )


def allocator_settings(configuration: Configuration) -> AllocatorSettings:
    """Return the policy that a configuration's PYTORCH_ALLOC_CONF selects.

    Raises:
        InputError: torch would refuse it.
    """
    limit = configuration.max_split_size_mb
    refuse_small_split_size(limit)
    return AllocatorSettings(
        expandable_segments=configuration.expandable_segments,
        max_split_size_bytes=None if limit is None else limit * MIB,
    )


class _Ran(Struct, frozen=True):
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    loading_reserved_bytes: int
    left_over_bytes: int
    num_retries: int

    @property
    def most_reserved_bytes(self) -> int:
        return max(self.peak_reserved_bytes, self.loading_reserved_bytes)


class _Outcome(Struct, frozen=True):
    """What came of a run."""

    ran: _Ran | None
    """None: the capacity does not suffice."""
    most_reserved_bytes: float
    least_refused_bytes: float

    def holds_for(self, capacity_bytes: float) -> bool:
        """Whether a run under a capacity would be this one: whether it allows what was allowed and refuses the rest."""
        allows = self.most_reserved_bytes <= capacity_bytes
        return allows and (capacity_bytes < self.least_refused_bytes or self.least_refused_bytes == math.inf)


class _Trials:
    """Runs a program under one capacity after another; what was seen once is not run again.

    Args:
        events: the program.
        settings: the allocator's policy.
        capacity_bytes: the device's; None: only a device without a bound will be tried.
    """

    def __init__(self, events: Events, settings: AllocatorSettings, capacity_bytes: int | None) -> None:
        self._settings = settings
        self._events = events
        self._codes: list[int] = events.codes.tolist()
        self._least_bytes = events.peak_allocated_bytes()
        self._copies_beyond_bytes = math.inf if capacity_bytes is None else max(capacity_bytes, self._least_bytes)
        self._outcomes: list[_Outcome] = []
        self._copies: list[tuple[CachingAllocator, int | None]] = []
        """Of the allocator without a bound, with what loading reserved where it was over."""

    def are_of(self, events: Events, settings: AllocatorSettings) -> bool:
        """Whether that is the program and the policy."""
        return settings == self._settings and events.is_same(self._events)

    def run(self, capacity_bytes: float) -> _Ran | None:
        """Run under a capacity; None where it does not suffice."""
        if capacity_bytes < self._least_bytes:
            return None
        for outcome in self._outcomes:
            if outcome.holds_for(capacity_bytes):
                return outcome.ran
        allocator, loading_bytes = self._begin(capacity_bytes)
        ran, end_of_loading = None, self._events.end_of_loading
        try:
            position = self._position(allocator)
            codes = islice(self._codes, position, None)
            if loading_bytes is None:
                allocator.run(islice(codes, end_of_loading - position))
                self._keep_copies(allocator, None)
                loading_bytes = allocator.peak_reserved_bytes
                allocator.reset_peak()
                position = end_of_loading
            self._run_steps(allocator, codes, position)
            self._keep_copies(allocator, loading_bytes)
            ran = _Ran(
                self._events.peak_allocated_bytes(allocator.left_over_bytes),
                allocator.peak_reserved_bytes,
                loading_bytes,
                self._events.kept_left_over_bytes(allocator.left_over_bytes),
                allocator.num_retries,
            )
        except OutOfMemoryInSimulationError:
            pass
        most_bytes = max(loading_bytes or 0, allocator.peak_reserved_bytes)
        self._outcomes.append(_Outcome(ran, most_bytes, allocator.least_refused_bytes))
        return ran

    def _run_steps(self, allocator: CachingAllocator, codes: Iterator[int], position: int) -> None:
        """Run all that is left; a stretch that comes again in the same state ends as it ended."""
        if self._events.repeat is None or position > self._events.repeat[0]:
            allocator.run(codes)
            return
        begin, end, again = self._events.repeat
        allocator.run(islice(codes, begin - position))
        begun = allocator.state()
        allocator.run(islice(codes, end - begin))
        ended = allocator.state()
        allocator.run(islice(codes, again - end))
        now = allocator.state()
        if begun and ended and now and begun.is_like(now) and begun[1:3] == ended[1:3]:
            allocator.repeat(begun, ended)
            codes = islice(codes, end - begin, None)
        allocator.run(codes)

    def _begin(self, capacity_bytes: float) -> tuple[CachingAllocator, int | None]:
        """Go on from the last copy that reserved no more than the capacity at any time, or begin anew."""
        for kept, loading_bytes in reversed(self._copies):
            if max(loading_bytes or 0, kept.peak_reserved_bytes) <= capacity_bytes:
                allocator = kept.copy()
                allocator.capacity_bytes = capacity_bytes
                return allocator, loading_bytes
        beyond = self._copies_beyond_bytes if capacity_bytes == math.inf else math.inf
        return CachingAllocator(capacity_bytes, self._settings, copies_beyond_bytes=beyond), None

    def _keep_copies(self, allocator: CachingAllocator, loading_bytes: int | None) -> None:
        self._copies += [(each, loading_bytes) for each in allocator.copies]
        allocator.copies = []

    def _position(self, allocator: CachingAllocator) -> int:
        """Where in the program an allocator stands, which is right before an allocation."""
        return int(self._events.allocations[allocator.num_allocations]) if allocator.num_allocations else 0


def _least_capacity(trials: _Trials, fails: int, suffices: int) -> int:
    """Search for the smallest capacity that suffices, between one that does not and one that does."""
    low, high = fails // ROUND_LARGE_BYTES, -(-suffices // ROUND_LARGE_BYTES)
    for _ in range(MAX_PRESSURE_REPLAYS):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        if trials.run(middle * ROUND_LARGE_BYTES) is None:
            low = middle
        else:
            high = middle
    return high * ROUND_LARGE_BYTES


def holds_whole_tensors(configuration: Configuration) -> bool:
    """Whether every device holds each parameter, its gradient and its state whole."""
    return configuration.sharding in {"none", "ddp"}


class _Update(Struct, frozen=True):
    """What an optimizer's step allocates where it updates whole tensors."""

    state: tuple[int, ...]
    """Made in the first step, tensor by tensor."""
    temporaries: tuple[int, ...]
    """What the step holds at its highest moment, all at once."""

    @classmethod
    def of(cls, model: Model, optim: Optim) -> _Update:
        """Describe an optimizer's step over a model's tensors."""
        trained, optimizer = model.trained, optimizer_bytes(model, optim, "cuda")
        made = {id(tensor): OPTIMIZERS[optim].state(tensor).device for tensor, _ in trained.counted}
        return cls(
            state=tuple(size for tensor in trained for size in made[id(tensor)]),
            temporaries=() if optimizer.in_backward else optimizer.temporaries,
        )


class _Writer:
    """Writes the steps down, after what is in the program already."""

    def __init__(
        self,
        program: Program,
        tape: DeepTape,
        configuration: Configuration,
        plan: Layout,
        model: Model,
        update: _Update,
    ) -> None:
        self._program, self._tape, self._configuration, self._plan = program, tape, configuration, plan
        self._model, self._update = model, update
        self._workspaces: dict[int, int] = {}
        self._returned_bytes = 0
        self._ddp_buckets: list[int] = []

    def write(self, sequence_tokens: int, workspaces: Sequence[int]) -> Events:
        micro_batch = self._configuration.per_device_train_batch_size
        step = self._tape.at(micro_batch, sequence_tokens)
        if self._plan.clones_outputs:
            self._returned_bytes = int(returned_logits_bytes(self._tape.profile, micro_batch, sequence_tokens)[0])
        kept, used = step.playable(), step.playable(self._released(step))
        self._workspaces = dict(zip(self._tape.first_products(), workspaces, strict=False))
        self._hold_always()
        self._program.end_loading()
        waiting = further_inputs(
            self._tape.profile, micro_batch, sequence_tokens, self._configuration.gradient_accumulation_steps
        )
        for is_first in (True, False):
            inputs = self._program.hold(waiting)
            gradients: list[int] = []
            first_number = 0
            began: list[int] = []
            ended: list[int] = []
            for micro_step in range(self._num_micro_steps(is_first=is_first)):
                if micro_step:
                    self._program.play(used, int(step.starts[-2]), int(step.starts[-1]), first_number)
                first_number = self._program.new_numbers(step.num_tensors)
                keeps = self._plan.gradients == "kept" and micro_step == 0
                began.append(self._program.position())
                self._micro_step(step, kept if keeps else used, first_number)
                ended.append(self._program.position())
                if keeps:
                    gradients = (first_number + step.number_of[step.gradients]).tolist()
                if is_first and micro_step == 0:
                    self._rebuild_ddp_buckets(step)
            if len(began) > 1:
                self._program.repeats(began[0], ended[0], began[1])
            if self._configuration.uses_deepspeed:
                self._program.drop(gradients)
            self._step(is_first=is_first)
            self._program.play(used, int(step.starts[-2]), int(step.starts[-1]), first_number)
            if not self._configuration.uses_deepspeed:
                self._program.drop(gradients)
            self._program.drop(inputs)
        return self._program.written()

    def _num_micro_steps(self, *, is_first: bool) -> int:
        is_short = is_first and self._plan.gradients == "bucketed"
        most = MAX_BUCKETED_MICRO_STEPS_AT_FIRST if is_short else MAX_MICRO_STEPS
        return min(self._configuration.gradient_accumulation_steps, most)

    def _hold_always(self) -> None:
        """What the engine holds from before the first step on; weights that are whole are there already."""
        resident = self._plan.resident
        if not holds_whole_tensors(self._configuration):
            self._program.hold(size for name, size in resident.items() if name != "optimizer_state")
        elif "communication_buckets" in resident:
            sizes = [tensor.num_bytes for tensor in self._model.trained]
            self._ddp_buckets = self._program.hold(buckets(sizes[::-1], DDP_BUCKET_BYTES))

    def _released(self, step: Step) -> Releases:
        """Say where gradients go that do not stay.

        A gradient is added to that of an earlier micro-step and freed, or used at once; DeepSpeed takes it into its
        bucket, and one that is too large for that when the next is made.
        """
        if self._plan.gradients in {"kept", "moved", "used"}:
            return step.gradients + 1, step.number_of[step.gradients]
        profile = self._tape.profile
        settings = bucket_settings(self._configuration, profile.hidden_size)
        too_large = bucket_gradient_bytes(profile, settings.reduce_bucket_size)
        released: list[tuple[int, int]] = []
        waiting: list[int] = []
        for event in step.gradients.tolist():
            released += [(event + 1, number) for number in waiting]
            number = int(step.number_of[event])
            waiting = [number] if step.num_bytes[event] > too_large else []
            released += [] if waiting else [(event + 1, number)]
        released += [(int(step.starts[-2]), number) for number in waiting]
        before, numbers = np.array(released, np.int64).reshape(-1, 2).T
        return before, numbers

    def _micro_step(self, step: Step, played: Playable, first_number: int) -> None:
        """Play all segments but the last, which ends the step."""
        held = self._program.hold(self._plan.forward.values())
        first_gradients, after_forward = step.first_with_gradients(), self._tape.after_forward()
        position = 0
        for segment in sorted({first_gradients, after_forward, *self._workspaces}):
            begin = int(step.starts[segment])
            self._program.play(played, position, begin, first_number)
            position = begin
            if segment == after_forward:  # the tape has let go of the output by now; its clone was there beside it
                self._program.drop(self._program.hold([self._returned_bytes] * 2))
            if segment == first_gradients:
                held += self._program.hold(self._plan.backward.values())
            if segment in self._workspaces:
                self._program.allocate(self._workspaces.pop(segment))
        self._program.play(played, position, int(step.starts[-2]), first_number)
        self._program.drop(held)

    def _rebuild_ddp_buckets(self, step: Step) -> None:
        """After the first backward DDP's buckets are made anew, in the order in which gradients became ready.

        Source: torch v2.13 torch/csrc/distributed/c10d/reducer.cpp, rebuild_buckets.
        """
        if self._ddp_buckets:
            self._program.drop(self._ddp_buckets)
            sizes = step.num_bytes[step.gradients].tolist()
            self._ddp_buckets = self._program.hold(buckets(sizes, DDP_BUCKET_BYTES))

    def _step(self, *, is_first: bool) -> None:
        """State is made tensor by tensor before anything is computed.

        Source: torch/optim/adam.py, `_init_group`; bitsandbytes/optim/optimizer.py, `step`. DeepSpeed makes its
        state while the partition's gradients are there.
        """
        if holds_whole_tensors(self._configuration):
            if is_first:
                self._program.hold(self._update.state)
            self._program.drop(self._program.hold(self._update.temporaries))
            return
        temporaries = self._program.hold(_largest_step(self._plan).values())
        if is_first:
            self._program.hold([self._plan.resident.get("optimizer_state", 0)])
        self._program.drop(temporaries)


def _largest_step(plan: Layout) -> Terms:
    return max((*plan.reduction, *plan.step), key=lambda terms: sum(terms.values()))
