"""What a configuration needs: bytes by term and phase, seconds, money. A figure not computed is None."""

from __future__ import annotations

from typing import Literal, get_args

from msgspec import Struct


class Phase(Struct, frozen=True, kw_only=True):
    """One stretch of a training step at the moment of its highest allocation."""

    name: str
    bytes: int
    """The phase's peak: the sum of its terms."""
    terms: dict[str, int]
    """Bytes by what they hold, for instance `weights`, `gradients`, `activations`."""


class Stage(Struct, frozen=True, kw_only=True):
    """A part of a run that is not a steady training step."""

    device_bytes: int
    """The most that is allocated on the device."""
    host_bytes: int | None
    """Host memory of one node; None for CPU ranks, whose device it is, except under FSDP, which is meant for GPUs."""


StageName = Literal["loading", "preparing", "first_step", "evaluation", "saving"]
STAGES: tuple[StageName, ...] = get_args(StageName)


class Stages(Struct, frozen=True, kw_only=True):
    """Parts of a run that are not steady training steps, by `StageName`. None: not known."""

    loading: Stage | None = None
    """`from_pretrained`, and moving the model to the device."""
    preparing: Stage | None = None
    """accelerate's `prepare`: DDP's buckets, DeepSpeed's engine, FSDP's shards."""
    first_step: Stage | None = None
    evaluation: Stage | None = None
    """`Trainer.evaluate` between two steps, with training's micro-batch, and no predictions kept."""
    saving: Stage | None = None
    """Writing a checkpoint."""


class MemoryEstimate(Struct, frozen=True, kw_only=True):
    """Memory of the most loaded device."""

    peak_allocated_bytes: int
    """What tensors need: torch.cuda.max_memory_allocated; of a CPU rank, the tensor storages alive."""
    peak_reserved_bytes: int | None
    """What torch's caching allocator holds: torch.cuda.max_memory_reserved."""
    process_bytes: int | None
    """Reserved, CUDA context and communication buffers: what nvidia-smi shows."""
    after_step_allocated_bytes: int | None
    """What is still allocated between two steps."""
    host_bytes: int | None
    """Host memory of one node for offloaded and paged state."""
    budget_bytes: int
    """What the device has."""
    phases: tuple[Phase, ...]
    needed_reserved_bytes: int | None = None
    """What the caching allocator cannot do with less than: it keeps more while there is room, and returns it when
    there is none."""
    peak_allocated_interval_bytes: tuple[int, int] | None = None
    """Where the figure lies if it is off as published runs of the same sort were; see autofit.memory.uncertainty."""
    peak_reserved_interval_bytes: tuple[int, int] | None = None
    """The same for `peak_reserved_bytes`."""
    process_interval_bytes: tuple[int, int] | None = None
    """The same for `process_bytes`."""
    stages: Stages | None = None
    """What the run needs outside its steady steps; a plan holds those that its restrictions name."""

    @property
    def needed_bytes(self) -> int:
        """The widest figure that was computed: what decides whether the configuration fits.

        Memory that the allocator keeps, and would return before it fails, is not needed.
        """
        if self.process_bytes and self.peak_reserved_bytes and self.needed_reserved_bytes:
            return self.process_bytes - self.peak_reserved_bytes + self.needed_reserved_bytes
        return self.process_bytes or self.peak_reserved_bytes or self.peak_allocated_bytes

    @property
    def fits(self) -> bool:
        """Whether the widest figure is within the budget."""
        return self.needed_bytes <= self.budget_bytes


class TimeEstimate(Struct, frozen=True, kw_only=True):
    """Time of one optimizer step over all devices, and what bounds it."""

    step_seconds: float | None
    step_seconds_lower: float | None
    """Everything overlaps perfectly."""
    step_seconds_upper: float | None
    """Nothing overlaps."""
    tokens_per_second: float | None
    """Over all devices."""
    tokens_per_second_lower: float | None
    tokens_per_second_upper: float | None
    terms: dict[str, float]
    """Seconds of a step by what they are spent on, as if nothing overlapped."""
    model_flops_utilization_fraction: float | None = None
    """FLOPs of the model, without recomputation, over the dense peak of the data sheet; see docs/time_model.md."""


class EpochEstimate(Struct, frozen=True, kw_only=True):
    """Training every sequence of a data set once."""

    num_steps: int
    """Optimizer steps; the last may hold fewer sequences than the others."""
    tokens: int
    """Of the data, without padding."""
    mean_sequences: float
    """Sequences of the data in one step; of packed rows more than there are rows."""
    padding_fraction: float
    """Share of padding, and of waiting for the slowest rank, among the tokens that a step takes the time of."""
    seconds: float | None
    dollars: float | None


class Truncation(Struct, frozen=True, kw_only=True):
    """What cutting sequences at a length loses, and what the chosen configuration then needs and takes."""

    sequence_tokens: int
    sequences_cut_fraction: float
    tokens_lost_fraction: float
    peak_allocated_bytes: int
    epoch_seconds: float | None
    epoch_dollars: float | None


class CostEstimate(Struct, frozen=True, kw_only=True):
    """Price of training tokens."""

    dollars_per_million_tokens: float | None
    """None where the device has no price."""
    device_hours_per_million_tokens: float | None
    dollars_per_device_hour: float | None
    """The price it was computed with."""


class RunCost(Struct, frozen=True, kw_only=True):
    """Time and price of a whole run; None where the speed or the price is not known."""

    tokens: float
    hours: float | None
    device_hours: float | None
    dollars: float | None
