"""Sends the allocations of real steps through the caching allocator's policy: what torch reserves for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autofit.memory.alloc_conf import refuse_small_split_size
from autofit.memory.allocator import (
    ROUND_LARGE_BYTES,
    AllocatorSettings,
    CachingAllocator,
    OutOfMemoryInSimulationError,
)
from autofit.memory.engines import Layout, Terms
from autofit.memory.fsdp import FsdpModel
from autofit.memory.loading import buckets, write_broadcast, write_loading
from autofit.memory.optimizers import OPTIMIZERS
from autofit.memory.program import Program
from autofit.memory.replay_fsdp import FsdpWriter
from autofit.memory.static import optimizer_bytes
from autofit.memory.tape import StepEvent, bucket_gradient_bytes, returned_logits_bytes, unroll
from autofit.memory.tensors import Tensor
from autofit.spec.configuration import Configuration
from autofit.spec.profile import GRADIENT, RegimeProfile
from autofit.units import MIB

NUM_STEPS = 2
"""The first makes the optimizer's state; the second is like all later ones."""
MAX_MICRO_STEPS = 2
"""The second finds gradients already there; later ones are like it."""
MAX_PRESSURE_REPLAYS = 5
"""The smallest capacity is found to within a 32nd of what fragmentation costs, rounded up."""
DDP_BUCKET_BYTES = (MIB, 25 * MIB)
"""The first bucket is small, to be sent early.

Source: torch v2.13 nn/parallel/distributed.py; torch/csrc/distributed/c10d/reducer.hpp, kDefaultFirstBucketBytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
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
    num_retries: int
    """How often the device of the given capacity had to return cached memory, which costs time."""


def replay_step(
    profile: RegimeProfile,
    configuration: Configuration,
    sequence_tokens: int,
    plan: Layout,
    model: tuple[Tensor, ...],
    workspaces: Sequence[int],
    *,
    capacity_bytes: int | None,
) -> Replayed:
    """Replay loading and two optimizer steps.

    What dies after an optimizer step (the loss, kept outputs) is in the tape's last segment.

    Where `capacity_bytes` is reached, cached memory is returned and the allocation tried again, as torch does; where
    even that fails, the figure is what would have been reserved on a larger device.

    Args:
        profile: the traced step.
        configuration: what runs.
        sequence_tokens: tokens of every sequence.
        plan: how the configuration lays out weights, gradients and state.
        model: every parameter and buffer.
        workspaces: of the thread that runs forward, and of the one that runs backward; each is taken at the thread's
            first matrix product.
        capacity_bytes: what can be reserved on the device; None: no bound.
    """
    written = _Writer(profile, configuration, plan, model, workspaces).write(sequence_tokens, capacity_bytes)
    return _settle(written, allocator_settings(configuration), capacity_bytes)


def replay_fsdp_step(
    profile: RegimeProfile,
    configuration: Configuration,
    sequence_tokens: int,
    model: FsdpModel,
    workspaces: Sequence[int],
    *,
    capacity_bytes: int | None,
) -> Replayed:
    """Replay two optimizer steps of an FSDP run, from its shards on; see `replay_step`.

    Args:
        profile: the traced step.
        configuration: what runs.
        sequence_tokens: tokens of every sequence.
        model: the configuration's units and script.
        workspaces: of the two threads that multiply.
        capacity_bytes: what can be reserved on the device; None: no bound.
    """
    writer = FsdpWriter(profile, configuration, model, sequence_tokens, workspaces)
    program, end_of_loading = writer.write(NUM_STEPS)
    return _settle(_Written(program, end_of_loading), allocator_settings(configuration), capacity_bytes)


def _settle(written: _Written, settings: AllocatorSettings, capacity_bytes: int | None) -> Replayed:
    """Run with room, and where the device has less than would be kept, as tightly as it goes."""
    roomy = _run(written, settings, None)
    assert roomy is not None, "an allocator without a bound does not run out of memory"
    if capacity_bytes is None or roomy.most_reserved_bytes <= capacity_bytes:
        return _replayed(roomy, None)
    kept = _run(written, settings, capacity_bytes)
    suffices = roomy.most_reserved_bytes if kept is None else capacity_bytes
    fails = max(capacity_bytes, roomy.peak_allocated_bytes) if kept is None else roomy.peak_allocated_bytes
    return _replayed(kept or roomy, _least_capacity(written, settings, fails, suffices))


def _replayed(ran: _Ran, needed_bytes: int | None) -> Replayed:
    return Replayed(
        peak_allocated_bytes=ran.peak_allocated_bytes,
        peak_reserved_bytes=ran.peak_reserved_bytes,
        needed_bytes=needed_bytes,
        loading_reserved_bytes=ran.loading_reserved_bytes,
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


@dataclass(frozen=True, slots=True)
class _Ran:
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    loading_reserved_bytes: int
    num_retries: int

    @property
    def most_reserved_bytes(self) -> int:
        return max(self.peak_reserved_bytes, self.loading_reserved_bytes)


@dataclass(frozen=True, slots=True)
class _Written:
    program: Program
    end_of_loading: int


def _run(written: _Written, settings: AllocatorSettings, capacity_bytes: int | None) -> _Ran | None:
    """Run under a capacity; None where it does not suffice."""
    allocator = CachingAllocator(capacity_bytes, settings)
    try:
        written.program.run(allocator, 0, written.end_of_loading)
        loading = allocator.peak_reserved_bytes
        allocator.reset_peaks()
        written.program.run(allocator, written.end_of_loading)
    except OutOfMemoryInSimulationError:
        return None
    return _Ran(allocator.peak_allocated_bytes, allocator.peak_reserved_bytes, loading, allocator.num_retries)


def _least_capacity(written: _Written, settings: AllocatorSettings, fails: int, suffices: int) -> int:
    """Search for the smallest capacity that suffices, between one that does not and one that does."""
    low, high = fails // ROUND_LARGE_BYTES, -(-suffices // ROUND_LARGE_BYTES)
    for _ in range(MAX_PRESSURE_REPLAYS):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        if _run(written, settings, middle * ROUND_LARGE_BYTES) is None:
            low = middle
        else:
            high = middle
    return high * ROUND_LARGE_BYTES


class _Writer:
    """Writes loading and the steps down as one program."""

    def __init__(
        self,
        profile: RegimeProfile,
        configuration: Configuration,
        plan: Layout,
        model: tuple[Tensor, ...],
        workspaces: Sequence[int],
    ) -> None:
        self._profile, self._configuration, self._plan, self._model = profile, configuration, plan, model
        self._workspaces = dict(zip(("forward", "backward"), workspaces, strict=False))
        self._bucket_bytes = bucket_gradient_bytes(profile)
        self._program = Program()
        self._alive: dict[int, int] = {}
        self._gradients: dict[int, int] = {}
        self._gradient_sizes: list[int] = []
        self._ddp_buckets: list[int] = []
        self._waiting: int | None = None
        self._returned: dict[int, int] = {}

    def write(self, sequence_tokens: int, device_bytes: int | None) -> _Written:
        configuration = self._configuration
        segments = unroll(self._profile, configuration.per_device_train_batch_size, sequence_tokens)
        real = [each for each in self._profile.segments for _ in range(self._profile.repeats(each))]
        kinds = [each.kind if any(each.matmul_flops) else None for each in real]
        last_forward = max(n for n, each in enumerate(real) if each.kind == "forward")
        if self._plan.clones_outputs:
            sizes = returned_logits_bytes(self._profile, configuration.per_device_train_batch_size, sequence_tokens)
            self._returned = {last_forward: int(sizes[0])}
        self._load(device_bytes)
        end_of_loading = len(self._program)
        for step in range(NUM_STEPS):
            for micro_step in range(min(configuration.gradient_accumulation_steps, MAX_MICRO_STEPS)):
                if micro_step:
                    self._play(segments[-1])
                self._micro_step(segments[:-1], kinds)
                self._rebuild_ddp_buckets(is_first=step == 0 and micro_step == 0)
            if configuration.uses_deepspeed:
                self._drop_gradients()
            self._step(is_first=step == 0)
            self._play(segments[-1])
            self._drop_gradients()
        return _Written(self._program, end_of_loading)

    def _load(self, device_bytes: int | None) -> None:
        if self._holds_whole_tensors:
            write_loading(self._program, self._profile, device_bytes or 2**62)
            if self._plan.resident.get("communication_buckets"):
                write_broadcast(self._program, self._profile)
                sizes = [tensor.num_bytes for tensor in self._model if tensor.trains]
                self._ddp_buckets = self._program.hold(buckets(sizes[::-1], DDP_BUCKET_BYTES))
            return
        self._program.hold(size for name, size in self._plan.resident.items() if name != "optimizer_state")

    @property
    def _holds_whole_tensors(self) -> bool:
        return self._configuration.sharding in {"none", "ddp"}

    def _micro_step(self, segments: Sequence[Sequence[StepEvent]], kinds: Sequence[str | None]) -> None:
        held = self._program.hold(self._plan.forward.values())
        has_gradients = False
        for number, (segment, kind) in enumerate(zip(segments, kinds, strict=False)):
            if not has_gradients and any(event.category == GRADIENT for event in segment):
                held += self._program.hold(self._plan.backward.values())
                has_gradients = True
            if kind in self._workspaces:
                self._program.allocate(self._workspaces.pop(kind))
            self._play(segment)
            if number in self._returned:  # the tape has let go of the output by now; its clone was there beside it
                self._program.drop(self._program.hold([self._returned[number]] * 2))
        self._end_waiting()
        self._program.drop(held)

    def _rebuild_ddp_buckets(self, *, is_first: bool) -> None:
        """After the first backward DDP's buckets are made anew, in the order in which gradients became ready.

        Source: torch v2.13 torch/csrc/distributed/c10d/reducer.cpp, rebuild_buckets.
        """
        if is_first and self._ddp_buckets:
            self._program.drop(self._ddp_buckets)
            self._ddp_buckets = self._program.hold(buckets(self._gradient_sizes, DDP_BUCKET_BYTES))

    def _drop_gradients(self) -> None:
        self._program.drop(self._gradients.values())
        self._gradients.clear()

    def _play(self, events: Iterable[StepEvent]) -> None:
        allocate, release, alive = self._program.allocate, self._program.release, self._alive
        for event in events:
            num_bytes, number, is_birth, category = event
            if category == GRADIENT:
                self._play_gradient(event)
            elif is_birth:
                if num_bytes:
                    alive[number] = allocate(num_bytes)
            elif number in alive:
                release(alive.pop(number))

    def _play_gradient(self, event: StepEvent) -> None:
        """The first micro-step's gradient stays until the optimizer is done; a later one is added to it and freed.

        DeepSpeed takes each into its bucket at once, and one that is too large when the next is made.
        """
        if not event.is_birth:
            return
        self._gradient_sizes.append(event.num_bytes)
        block = self._program.allocate(event.num_bytes)
        self._end_waiting()
        if self._plan.gradients == "kept" and event.number_of not in self._gradients:
            self._gradients[event.number_of] = block
        elif self._plan.gradients not in {"kept", "used"} and event.num_bytes > self._bucket_bytes:
            self._waiting = block
        else:
            self._program.release(block)

    def _end_waiting(self) -> None:
        """Reduce the gradient that was too large for DeepSpeed's bucket."""
        if self._waiting is not None:
            self._program.release(self._waiting)
            self._waiting = None

    def _step(self, *, is_first: bool) -> None:
        """State is made tensor by tensor before anything is computed.

        Source: torch/optim/adam.py, `_init_group`; bitsandbytes/optim/optimizer.py, `step`. DeepSpeed makes its
        state while the partition's gradients are there.
        """
        temporaries: list[int] = []
        if not self._holds_whole_tensors:
            temporaries = self._program.hold(_largest_step(self._plan).values())
        if is_first and self._holds_whole_tensors:
            self._program.hold(_state_sizes(self._configuration, self._model))
        elif is_first:
            self._program.hold([self._plan.resident.get("optimizer_state", 0)])
        if self._holds_whole_tensors:
            temporaries = self._program.hold(_temporary_sizes(self._configuration, self._model))
        self._program.drop(temporaries)


def _state_sizes(configuration: Configuration, model: tuple[Tensor, ...]) -> list[int]:
    state = OPTIMIZERS[configuration.optim].state
    return [size for t in model if t.trains for size in state(t).device]


def _temporary_sizes(configuration: Configuration, model: tuple[Tensor, ...]) -> Sequence[int]:
    """What the optimizer's step holds at its highest moment, all at once."""
    optimizer = optimizer_bytes(model, configuration.optim, "cuda")
    return () if optimizer.in_backward else optimizer.temporaries


def _largest_step(plan: Layout) -> Terms:
    return max((*plan.reduction, *plan.step), key=lambda terms: sum(terms.values()))
