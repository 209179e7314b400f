"""Measures one rank: the most memory that training held, step by step, and how long a step takes."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from autofit.runtime.live_bytes import LiveBytes
from autofit.runtime.peak_memory import process_peak_bytes

NUM_STEPS_TOLD = 5
"""Steps that get an event of their own; later ones only count in the summary."""


class Meter(Protocol):
    """A device's memory counters."""

    def held_bytes(self) -> int:
        """Return what is allocated now."""

    def peak_bytes(self) -> int:
        """Return the most that was allocated since the last reset."""

    def reset_peak(self) -> None:
        """Begin a new peak."""

    def device_figures(self) -> dict[str, int]:
        """Return what only this kind of device knows."""


@dataclass(frozen=True, slots=True)
class CpuMeter:
    """Live tensor storages of this process."""

    live: LiveBytes

    def held_bytes(self) -> int:
        """Return what tensors hold now."""
        return self.live.now_bytes

    def peak_bytes(self) -> int:
        """Return the most that tensors held since the last reset."""
        return self.live.peak_bytes

    def reset_peak(self) -> None:
        """Begin a new peak."""
        self.live.reset_peak()

    def device_figures(self) -> dict[str, int]:
        """Return the high-water mark of the whole process, libraries and loading included, where it is known."""
        peak_bytes = process_peak_bytes()
        return {} if peak_bytes is None else {"process_peak_bytes": peak_bytes}


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

    def reset_peak(self) -> None:
        """Reset both of torch's peaks, keeping the larger reserved one."""
        import torch

        self._peak_reserved_bytes = max(self._peak_reserved_bytes, torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()

    def device_figures(self) -> dict[str, int]:
        """Return the reserved peak, what the device has in use by all processes, and the allocator's retries."""
        import torch

        free, total = torch.cuda.mem_get_info()
        return {
            "peak_reserved_bytes": max(self._peak_reserved_bytes, torch.cuda.max_memory_reserved()),
            "device_used_bytes": total - free,
            "num_alloc_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0),
        }


@contextlib.contextmanager
def metering(*, on_cpu: bool, limit_bytes: int) -> Iterator[Meter]:
    """Count memory while the block runs. A CPU rank's budget is its device: beyond it the counter raises."""
    if not on_cpu:
        yield CudaMeter()
        return
    with LiveBytes(limit_bytes=limit_bytes) as live:
        live.count_existing(_would_be_on_device)
        yield CpuMeter(live)


def _would_be_on_device(tensor: Any) -> bool:
    """Tell what a GPU would hold of the tensors made before training: not the token ids that wait on the host."""
    import torch

    return tensor.dtype != torch.int64


@dataclass(slots=True, kw_only=True)
class Record:
    """What was measured, growing as training goes on."""

    meter: Meter
    before_training_peak_bytes: int | None = None
    """While the engine and the optimizer were made; None until training begins."""
    before_step_bytes: int | None = None
    """Held when the first step began."""
    between_steps_peak_bytes: int = 0
    """While logging, evaluating, saving and fetching batches."""
    step_peaks_bytes: list[int] = field(default_factory=list)
    after_steps_bytes: list[int] = field(default_factory=list)
    steps_seconds: list[float] = field(default_factory=list)
    longest_batch_tokens: int | None = None
    """Tokens of a row of the longest micro-batch that the model trained on."""
    _began_seconds: float = 0.0

    @property
    def num_steps(self) -> int:
        """Steps that were taken."""
        return len(self.steps_seconds)

    def begin_training(self) -> None:
        """Note what preparing took, and begin the peak of training."""
        self.before_training_peak_bytes = self.meter.peak_bytes()
        self.meter.reset_peak()

    def saw_batch(self, tokens: int) -> None:
        """Note the tokens of a row of a micro-batch."""
        self.longest_batch_tokens = max(tokens, self.longest_batch_tokens or 0)

    def begin_step(self) -> None:
        """Begin the peak of one step."""
        if self.before_step_bytes is None:
            self.before_step_bytes = self.meter.held_bytes()
        self.between_steps_peak_bytes = max(self.between_steps_peak_bytes, self.meter.peak_bytes())
        self.meter.reset_peak()
        self._began_seconds = time.perf_counter()

    def end_step(self) -> dict[str, Any]:
        """Note one step and return what there is to tell of it."""
        self.steps_seconds.append(time.perf_counter() - self._began_seconds)
        self.step_peaks_bytes.append(self.meter.peak_bytes())
        self.after_steps_bytes.append(self.meter.held_bytes())
        self.meter.reset_peak()
        return {
            "step": len(self.steps_seconds),
            "seconds": self.steps_seconds[-1],
            "peak_bytes": self.step_peaks_bytes[-1],
            "after_step_bytes": self.after_steps_bytes[-1],
        }

    def figures(self) -> dict[str, Any]:
        """Sum up; the peak is of training steps, a running one included, so that it compares with a prediction."""
        peaks = [*self.step_peaks_bytes, self.meter.peak_bytes()]
        return {
            "peak_bytes": max(peaks) if self.before_training_peak_bytes is not None else None,
            "between_steps_peak_bytes": self.between_steps_peak_bytes or None,
            "before_training_peak_bytes": self.before_training_peak_bytes,
            "before_step_bytes": self.before_step_bytes,
            "after_step_bytes": self.after_steps_bytes[-1] if self.after_steps_bytes else None,
            "num_steps": len(self.steps_seconds),
            "longest_batch_tokens": self.longest_batch_tokens,
            "step_seconds": statistics.median(self.steps_seconds[1:]) if len(self.steps_seconds) > 1 else None,
            **self.meter.device_figures(),
        }
