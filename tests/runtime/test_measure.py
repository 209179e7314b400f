"""What a rank writes down of its phases, with a meter whose figures are made up."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from autofit.runtime.measure import CpuMeter, CudaMeter, Peak, Record, loading_peak
from autofit.runtime.peak_memory import process_peak_bytes, reset_process_peak


@dataclass
class MadeUpMeter:
    """Holds what a test says."""

    now: int = 0
    peak: int = 0

    def hold(self, num_bytes: int) -> None:
        """Have so many bytes alive from now on."""
        self.now, self.peak = num_bytes, max(self.peak, num_bytes)

    def held_bytes(self) -> int:
        """Return what is alive."""
        return self.now

    def peak_bytes(self) -> int:
        """Return the most since the last reset."""
        return self.peak

    def reserved_peak_bytes(self) -> int:
        """Return twice that."""
        return self.peak * 2

    def process_bytes(self) -> int:
        """Return 1,000 bytes more than is alive."""
        return self.now + 1000

    def reset_peak(self) -> None:
        """Begin a new peak."""
        self.peak = self.now

    def device_figures(self) -> dict[str, int]:
        """Nothing else is known."""
        return {}


@pytest.fixture
def meter():
    """Return a meter that holds 10 bytes of weights."""
    made = MadeUpMeter()
    made.hold(10)
    return made


@pytest.fixture
def record(meter):
    """Return the record of a run that has prepared and is about to take its first step."""
    made = Record(meter=meter, planned_row_tokens=64)
    made.begin_preparing(Peak(allocated_bytes=14))
    meter.hold(30)
    meter.hold(20)
    made.begin_training()
    return made


def step(record, meter, peak, *, tokens):
    """Take a step of one micro-batch of two rows."""
    record.begin_step()
    record.saw_batch(2, tokens)
    meter.hold(peak)
    meter.hold(25)
    return record.end_step()


def allocated(record):
    """Return the bytes of each phase that the run has had."""
    return {name: figures["allocated_bytes"] for name, figures in record.figures()["phases"].items()}


def test_each_phase_has_its_own_peak(record, meter):
    """Loading is what was seen of it; the first step is apart; the longest batch is that of the planned length; what is
    evaluated and saved between steps is in neither, and a phase within another ends nothing.
    """
    step(record, meter, 50, tokens=64)
    step(record, meter, 70, tokens=64)
    step(record, meter, 60, tokens=32)
    with record.during("saving"):
        meter.hold(80)
        with record.during("saving"):
            meter.hold(90)
        meter.hold(25)
    with record.during("evaluation"):
        record.saw_batch(8, 128, trains=False)
        meter.hold(40)
        meter.hold(25)
    expected = {"loading": 14, "preparing": 30, "first_step": 50, "steady_steps": 70, "longest_batch": 70}
    assert allocated(record) == expected | {"saving": 90, "evaluation": 40, "between_steps": 25}
    figures = record.figures()
    assert (figures["peak_bytes"], figures["between_steps_peak_bytes"]) == (70, 90)
    assert (figures["before_training_peak_bytes"], figures["after_step_bytes"]) == (30, 25)
    assert (figures["longest_batch_tokens"], figures["num_steps"]) == (64, 3)
    phases = figures["phases"]
    assert (phases["evaluation"]["rows"], phases["evaluation"]["row_tokens"]) == (8, 128)
    assert (phases["steady_steps"]["rows"], phases["steady_steps"]["row_tokens"]) == (2, 64)
    assert (phases["saving"]["rows"], phases["saving"]["reserved_bytes"]) == (None, 180)
    assert phases["saving"]["process_bytes"] == 1090


def test_what_a_run_did_not_have_is_absent(record, meter):
    """Without an evaluation, a checkpoint, a second step or a long batch there is no such phase, not one of zero."""
    step(record, meter, 50, tokens=16)
    assert allocated(record).keys() == {"loading", "preparing", "between_steps", "first_step"}
    step(record, meter, 50, tokens=16)
    assert allocated(record).keys() == {"loading", "preparing", "between_steps", "first_step", "steady_steps"}


def test_what_was_prepared_counts_only_when_it_is_prepared(meter):
    """A run that ended while its engine was made has loaded, and has no peak of training."""
    record = Record(meter=meter)
    record.begin_preparing(Peak())
    meter.hold(99)
    assert allocated(record) == {"loading": 10}
    assert record.figures()["peak_bytes"] is None
    assert not record.has_begun


def test_a_step_that_memory_ended_counts_for_the_peak(record, meter):
    """The peak so far of a step under way is the run's, if it is the highest; what comes after the last step is not."""
    step(record, meter, 50, tokens=64)
    record.begin_step()
    meter.hold(300)
    assert record.figures()["peak_bytes"] == 300
    meter.hold(25)
    record.end_step()
    with record.during("saving"):
        meter.hold(999)
    assert record.figures()["peak_bytes"] == 300


def test_a_loop_evaluates_from_its_first_batch_to_the_next_step(record, meter):
    """A loop of the script's own says nothing of it: a model that is not in training is evaluated."""
    record.begin_step()
    record.saw_batch(2, 64)
    record.end_step()
    record.evaluates((8, 32))
    meter.hold(70)
    record.evaluates((8, 48))
    meter.hold(25)
    record.begin_step()
    record.begin_step()  # its second micro-batch
    meter.hold(60)
    record.end_step()
    assert allocated(record)["evaluation"] == 70
    assert allocated(record)["steady_steps"] == 60
    assert record.figures()["phases"]["evaluation"]["row_tokens"] == 48


def test_an_evaluation_before_training_is_none_of_the_run(meter):
    """What is predicted is an evaluation between two steps."""
    record = Record(meter=meter)
    record.begin_preparing(Peak())
    record.evaluates((8, 32))
    assert "evaluation" not in allocated(record)


def test_on_a_gpu_the_counters_of_torch_are_read_and_reset(monkeypatch):
    """Each phase reads torch's two peaks and then resets them; the highest reserved of all is kept."""
    import torch

    counters = {"allocated": 5, "reserved": 9}

    def reset():
        counters.update(allocated=1, reserved=2)

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: counters["allocated"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: counters["reserved"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40, 100))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_alloc_retries": 3})
    with loading_peak(on_cpu=False) as peak:
        pass
    record = Record(meter=CudaMeter())
    record.begin_preparing(peak)
    counters.update(allocated=7, reserved=8)
    record.begin_training()
    figures = record.figures()
    loading, preparing = figures["phases"]["loading"], figures["phases"]["preparing"]
    assert (loading["allocated_bytes"], loading["reserved_bytes"], loading["process_bytes"]) == (5, 9, 60)
    assert (preparing["allocated_bytes"], preparing["reserved_bytes"]) == (7, 8)
    assert (figures["peak_reserved_bytes"], figures["device_used_bytes"], figures["num_alloc_retries"]) == (9, 60, 3)


def test_on_a_cpu_the_process_is_told_stretch_by_stretch():
    """Memory that was touched and given back counts in its own stretch only, and in the whole run's figure."""
    import mmap

    from autofit.runtime.live_bytes import LiveBytes

    if not reset_process_peak():
        pytest.skip("this system does not let a process's peak begin anew")
    before, size = process_peak_bytes(), 2**27
    meter = CpuMeter(LiveBytes())
    with mmap.mmap(-1, size) as block:
        for offset in range(0, size, mmap.PAGESIZE):
            block[offset] = 1
    assert meter.process_bytes() >= before + size * 0.9
    meter.reset_peak()
    assert meter.process_bytes() < before + size * 0.5
    assert meter.device_figures()["process_peak_bytes"] >= before + size * 0.9
