"""A few traced layers stand for all of them, and a few traced sizes for every size."""

from __future__ import annotations

import itertools

import pytest

from autofit.memory.tape import phase_peaks
from autofit.memory.unroll import unroll
from autofit.profile.fit import evaluate
from autofit.profile.trace import trace
from tests.profile.tiny import CONFIGS, REGIMES, every_layer_traced, highest_alive, tool

SIZES = [(1, 384), (5, 257)]
"""None was traced: one sequence alone, and a length that is no multiple of anything."""
LABEL_BYTES = 8
"""Of a token. With one sequence the shifted labels are a slice of one row, which is contiguous and not copied."""
MOST_ERROR = 0.005
FAST = [("llama", "full"), ("gpt2", "autocast, checkpointing")]
SLOW = [("qwen3", "eager lora"), ("llama", "qlora, checkpointing"), ("qwen3", "autocast, checkpointing")]


def assert_assembled_equals_traced(model: str, regime: str) -> None:
    """Compare the assembled peak with a trace of all layers at sizes that were not traced."""
    profile = trace(model, CONFIGS[model], REGIMES[regime])
    assert profile.num_traced_layers < profile.num_layers
    for size, segments in zip(SIZES, every_layer_traced(CONFIGS[model], REGIMES[regime], SIZES), strict=True):
        batch, tokens = size
        assembled = max(peak.kept[0] for peak in phase_peaks(profile, [batch], tokens))
        excess = LABEL_BYTES * tokens if batch == 1 else 0
        assert -1e-5 <= assembled / highest_alive(segments) - 1 <= 1e-5 + excess / assembled, size


@pytest.mark.parametrize(("model", "regime"), FAST)
def test_the_assembled_peak_is_that_of_a_trace_of_every_layer(model, regime):
    """Six traced layers give the peak of eight to 0.001 %, also for one sequence and an odd length."""
    assert_assembled_equals_traced(model, regime)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "regime"), SLOW)
def test_the_assembled_peak_is_that_of_a_trace_of_every_layer_in_every_regime(model, regime):
    """The same for each architecture with each method."""
    assert_assembled_equals_traced(model, regime)


depths = tool("compare_depths")
LEFT_OUT = {"gemma3_text", "gpt_neo", "granite", "mistral", "olmo2", "phi", "qwen2", "qwen3", "qwen3_next"}
"""Slow ones, and those like another: the page has them, and tools/compare_depths.py makes them anew."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in depths.ARCHITECTURES if name not in LEFT_OUT])
def test_the_assembled_peak_is_that_of_a_trace_of_every_layer_whatever_the_architecture(name):
    """Dense, routed, windowed, state-space or encoding: the error is what the page says, and 0.5 % at most."""
    page = depths.PAGE.read_text(encoding="utf-8").split(depths.BEGIN)[1].split(depths.END)[0]
    (row,) = depths.compare([name])
    assert abs(row.relative_error) <= MOST_ERROR
    assert depths.line(row) in page


def test_an_unrolled_step_is_a_trace_of_every_layer():
    """Written out at full depth, the tape has a full trace's births, frees the same tensors and does the same work."""
    size = (5, 257)
    profile = trace("llama", CONFIGS["llama"], REGIMES["full"])
    (whole,) = every_layer_traced(CONFIGS["llama"], REGIMES["full"], [size])
    unrolled = unroll(profile, *size).segments()
    births = [event.num_bytes for segment in unrolled for event in segment if event.is_birth]
    assert births == [event[0] for segment in whole for event in segment.events if len(event) == 2]
    firsts = [0, *itertools.accumulate(segment.num_births for segment in whole)]
    freed = [sorted(event.number_of for event in segment if not event.is_birth) for segment in unrolled]
    assert freed == [sorted(firsts[e[2]] + e[3] for e in segment.events if len(e) > 2) for segment in whole]
    flops = sum(profile.repeats(segment) * evaluate(segment.matmul_flops, size) for segment in profile.segments)
    assert flops == pytest.approx(sum(segment.matmul_flops for segment in whole), rel=1e-9)
    kernels = sum(profile.repeats(segment) * segment.num_kernels for segment in profile.segments)
    assert kernels == sum(segment.num_kernels for segment in whole)
