"""Measures one rank: the most memory that each phase of a run held, and how long a step takes."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from autofit.runtime.live_bytes import LiveBytes
from autofit.runtime.peak_memory import process_peak_bytes, reset_process_peak
from autofit.spec.event import MeasuredPhaseName

NUM_STEPS_TOLD = 5
"""Steps that get an event of their own; later ones only count in the summary."""


class Meter(Protocol):
    """A device's memory counters."""

    def held_bytes(self) -> int:
        """Return what is allocated now."""

    def peak_bytes(self) -> int:
        """Return the most that was allocated since the last reset."""

    def reserved_peak_bytes(self) -> int | None:
        """Return the most that the allocator kept since the last reset; None where it keeps nothing."""

    def process_bytes(self) -> int | None:
        """Return what the process takes beyond tensors; None where that cannot be told for this stretch alone."""

    def reset_peak(self) -> None:
        """Begin new peaks."""

    def device_figures(self) -> dict[str, int]:
        """Return what only this kind of device knows."""


@dataclass(slots=True)
class CpuMeter:
    """Live tensor storages of this process, and its resident memory."""

    live: LiveBytes
    _tells_stretches: bool = True
    """Whether Linux let the process's own peak begin anew; the first stretch is from the process's begin."""
    _highest_process_bytes: int = 0

    def held_bytes(self) -> int:
        """Return what tensors hold now."""
        return self.live.now_bytes

    def peak_bytes(self) -> int:
        """Return the most that tensors held since the last reset."""
        return self.live.peak_bytes

    def reserved_peak_bytes(self) -> None:
        """Nothing is kept for later."""

    def process_bytes(self) -> int | None:
        """Return the high-water mark of the process since the last reset, libraries included."""
        return process_peak_bytes() if self._tells_stretches else None

    def reset_peak(self) -> None:
        """Begin new peaks."""
        self.live.reset_peak()
        self._highest_process_bytes = max(self._highest_process_bytes, process_peak_bytes() or 0)
        self._tells_stretches = reset_process_peak()

    def device_figures(self) -> dict[str, int]:
        """Return the high-water mark of the whole process, libraries and loading included, where it is known."""
        peak_bytes = max(self._highest_process_bytes, process_peak_bytes() or 0)
        return {"process_peak_bytes": peak_bytes} if peak_bytes else {}


class CudaMeter:
    """The counters of torch's caching allocator on the current device."""

    def __init__(self) -> None:
        self._peak_reserved_bytes = 0

    def held_bytes(self) -> int:
        """Return `torch.cuda.memory_allocated`."""
        import torch

        return torch.cuda.memory_allocated()

    def peak_bytes(self) -> int:
        """Return `torch.cuda.max_memory_allocated`."""
        import torch

        return torch.cuda.max_memory_allocated()

    def reserved_peak_bytes(self) -> int:
        """Return `torch.cuda.max_memory_reserved`."""
        import torch

        return torch.cuda.max_memory_reserved()

    def process_bytes(self) -> int:
        """Return what all processes have of the device now: nothing tells what they had meanwhile."""
        import torch

        free, total = torch.cuda.mem_get_info()
        return total - free

    def reset_peak(self) -> None:
        """Reset both of torch's peaks, keeping the larger reserved one."""
        import torch

        self._peak_reserved_bytes = max(self._peak_reserved_bytes, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()

    def device_figures(self) -> dict[str, int]:
        """Return the reserved peak, what the device has in use by all processes, and the allocator's retries."""
        import torch

        return {
            "peak_reserved_bytes": max(self._peak_reserved_bytes, torch.cuda.max_memory_reserved()),
            "device_used_bytes": self.process_bytes(),
            "num_alloc_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0),
        }


@contextlib.contextmanager
def metering(*, on_cpu: bool, limit_bytes: int) -> Iterator[Meter]:
    """Count memory while the block runs. A CPU rank's budget is its device: beyond it the counter raises."""
    if not on_cpu:
        yield CudaMeter()
        return
    with _counting(limit_bytes) as live:
        yield CpuMeter(live)


@contextlib.contextmanager
def metering_again(meter: Meter) -> Iterator[None]:
    """Count on while the block runs, after the meter's own block has ended; nothing is limited now."""
    if not isinstance(meter, CpuMeter):
        yield
        return
    with _counting() as live:
        meter.live = live
        yield


@contextlib.contextmanager
def loading_peak(on_cpu: bool) -> Iterator[Peak]:  # noqa: FBT001 - the only thing to say
    """Measure what a CPU rank holds while the block loads weights; torch's own counters see that on a GPU."""
    peak = Peak()
    if not on_cpu:
        yield peak
        return
    with _counting() as live:
        yield peak
        live.count_existing(_would_be_on_device)  # what other threads have made
        peak.allocated_bytes = live.peak_bytes


@contextlib.contextmanager
def _counting(limit_bytes: int | None = None) -> Iterator[LiveBytes]:
    with LiveBytes(limit_bytes=limit_bytes) as live:
        live.count_existing(_would_be_on_device)
        yield live


def _would_be_on_device(tensor: Any) -> bool:
    """Tell what a GPU would hold of the tensors made before training: not the token ids that wait on the host."""
    import torch

    return tensor.dtype != torch.int64


@dataclass(slots=True, kw_only=True)
class Peak:
    """The most that one phase of a run held, however often it was entered."""

    allocated_bytes: int = 0
    reserved_bytes: int | None = None
    process_bytes: int | None = None
    rows: int | None = None
    """Of the longest micro-batch that the model was given meanwhile; None: it was given none."""
    row_tokens: int | None = None

    def merge(self, other: Peak) -> None:
        """Take the larger of each figure."""
        self.allocated_bytes = max(self.allocated_bytes, other.allocated_bytes)
        self.reserved_bytes = _larger(self.reserved_bytes, other.reserved_bytes)
        self.process_bytes = _larger(self.process_bytes, other.process_bytes)
        if (other.row_tokens or 0, other.rows or 0) > (self.row_tokens or 0, self.rows or 0):
            self.rows, self.row_tokens = other.rows, other.row_tokens


def _larger(one: int | None, other: int | None) -> int | None:
    return max((each for each in (one, other) if each is not None), default=None)


@dataclass(slots=True, kw_only=True)
class Record:
    """What was measured, growing as a run goes on: it is in one phase at any time, or in none.

    Args:
        meter: counts memory.
        planned_row_tokens: of a row of the longest micro-batch that was planned for.
    """

    meter: Meter
    planned_row_tokens: int = 0
    peaks: dict[MeasuredPhaseName, Peak] = field(default_factory=dict)
    """Of each phase that the run has had."""
    before_step_bytes: int | None = None
    """Held when the first step began."""
    step_peaks_bytes: list[int] = field(default_factory=list)
    after_steps_bytes: list[int] = field(default_factory=list)
    steps_seconds: list[float] = field(default_factory=list)
    longest_batch_tokens: int | None = None
    """Tokens of a row of the longest micro-batch that the model trained on."""
    _phase: MeasuredPhaseName | None = None
    _batch: tuple[int, int] | None = None
    """Tokens and rows of the longest micro-batch of the phase."""
    _began_seconds: float = 0.0

    @property
    def num_steps(self) -> int:
        """Steps that were taken."""
        return len(self.steps_seconds)

    @property
    def has_begun(self) -> bool:
        """Whether training has begun: what is prepared is prepared."""
        return "preparing" in self.peaks

    @property
    def is_in_step(self) -> bool:
        """Whether a step is under way."""
        return self._phase == "steady_steps"

    def enter(self, phase: MeasuredPhaseName | None) -> None:
        """End the phase that the run is in, and begin another one."""
        if self._phase is not None:
            self._note(self._phase, self._peak())
        self.meter.reset_peak()
        self._phase, self._batch = phase, None

    @contextlib.contextmanager
    def during(self, phase: MeasuredPhaseName) -> Iterator[None]:
        """Be in a phase while the block runs, and then again in the one before it."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def begin_preparing(self, loading: Peak) -> None:
        """Note what loading took, of which the peak is known or is what is there now, and begin to prepare."""
        loading.merge(self._peak())
        self.peaks["loading"] = loading
        self.enter("preparing")

    def begin_training(self) -> None:
        """Note what preparing took."""
        self.enter("between_steps")

    def saw_batch(self, rows: int, tokens: int, *, trains: bool = True) -> None:
        """Note the size of a micro-batch that the model is given."""
        self._batch = max(self._batch or (0, 0), (tokens, rows))
        if trains:
            self.longest_batch_tokens = max(tokens, self.longest_batch_tokens or 0)

    def evaluates(self, batch: tuple[int, int] | None) -> None:
        """Note that a loop of the script's own gives the model a batch to evaluate: until the next step it does so."""
        if not self.has_begun:
            return
        if self._phase != "evaluation":
            self.enter("evaluation")
        if batch is not None:
            self.saw_batch(*batch, trains=False)

    def begin_step(self) -> None:
        """Begin one step, unless it is under way."""
        if self.is_in_step:
            return
        if self.before_step_bytes is None:
            self.before_step_bytes = self.meter.held_bytes()
        self.enter("steady_steps")
        self._began_seconds = time.perf_counter()

    def end_step(self) -> dict[str, Any]:
        """Note one step and return what there is to tell of it."""
        self.steps_seconds.append(time.perf_counter() - self._began_seconds)
        peak = self._peak()
        self.step_peaks_bytes.append(peak.allocated_bytes)
        self.after_steps_bytes.append(self.meter.held_bytes())
        if self.num_steps == 1:
            self._note("first_step", peak)
        else:
            self._note("steady_steps", peak)
            if (peak.row_tokens or 0) >= self.planned_row_tokens > 0:
                self._note("longest_batch", peak)
        self._phase = None
        self.enter("between_steps")
        return {
            "step": self.num_steps,
            "seconds": self.steps_seconds[-1],
            "peak_bytes": self.step_peaks_bytes[-1],
            "after_step_bytes": self.after_steps_bytes[-1],
        }

    def _peak(self) -> Peak:
        """Return the figures of the phase that the run is in, so far."""
        tokens, rows = self._batch or (None, None)
        return Peak(
            allocated_bytes=self.meter.peak_bytes(),
            reserved_bytes=self.meter.reserved_peak_bytes(),
            process_bytes=self.meter.process_bytes(),
            rows=rows,
            row_tokens=tokens,
        )

    def _note(self, phase: MeasuredPhaseName, peak: Peak) -> None:
        self.peaks.setdefault(phase, Peak()).merge(peak)

    def figures(self) -> dict[str, Any]:
        """Sum up; the peak is of training steps, a running one included, so that it compares with a prediction."""
        running = [self.meter.peak_bytes()] if self.is_in_step else []
        outside = [
            self.peaks[name].allocated_bytes for name in ("between_steps", "evaluation", "saving") if name in self.peaks
        ]
        return {
            "peak_bytes": max([*self.step_peaks_bytes, *running], default=None),
            "between_steps_peak_bytes": max(outside, default=None),
            "before_training_peak_bytes": self.peaks["preparing"].allocated_bytes if self.has_begun else None,
            "before_step_bytes": self.before_step_bytes,
            "after_step_bytes": self.after_steps_bytes[-1] if self.after_steps_bytes else None,
            "num_steps": self.num_steps,
            "longest_batch_tokens": self.longest_batch_tokens,
            "step_seconds": statistics.median(self.steps_seconds[1:]) if self.num_steps > 1 else None,
            "phases": {name: asdict(peak) for name, peak in self.peaks.items()},
            **self.meter.device_figures(),
        }
