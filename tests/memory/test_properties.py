"""What must hold of every estimate, on a traced model."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from autofit.memory.assemble import estimate_memory
from autofit.profile.trace import trace
from autofit.spec.configuration import Configuration
from autofit.spec.estimate import MemoryEstimate
from autofit.spec.hardware import Cluster
from autofit.spec.job import Workload
from autofit.spec.profile import RegimeProfile
from autofit.spec.regimes import regime_of
from tests.plans import A100, CPU_RANK, TINY_LLAMA, a_configuration

pytestmark = pytest.mark.slow
DEVICES = {"cuda": A100, "cpu": CPU_RANK}
TRACED: dict[Any, RegimeProfile] = {}
KNOBS: dict[str, Any] = {
    "method": ("full", "lora", "qlora"),
    "sharding": ("ddp", "zero1", "zero2", "zero3"),
    "optim": ("adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit"),
    "gradient_accumulation_steps": (1, 2, 8),
    "gradient_checkpointing": (False, True),
    "per_device_train_batch_size": (1, 2, 3, 8, 64),
    "num_processes": (2, 4, 8, 64),
}
TOKENS = st.sampled_from([1, 7, 64, 100, 128, 512])


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    """Draw a configuration that is one of the planner's."""
    chosen = {name: draw(st.sampled_from(values), label=name) for name, values in KNOBS.items()}
    is_engine = chosen["sharding"].startswith("zero")
    dtype = "float32" if chosen["method"] == "full" and not is_engine else "bfloat16"
    return a_configuration(**chosen, weights_dtype=dtype, mixed_precision="bf16")


def estimate(configuration: Configuration, tokens: int, kind: str, *, replays: bool = False) -> MemoryEstimate:
    """Estimate a configuration, tracing its code path at the first use."""
    regime = regime_of(configuration, DEVICES[kind])
    if regime not in TRACED:
        TRACED[regime] = trace("tiny", TINY_LLAMA, regime)
    cluster = Cluster(device=DEVICES[kind], num_devices_per_node=configuration.num_processes)
    workload = Workload(sequence_tokens=tokens, global_batch_sequences=configuration.global_batch_sequences)
    return estimate_memory(TRACED[regime], configuration, cluster, workload, replays=replays)


@settings(deadline=None, max_examples=150)
@given(configurations(), TOKENS, st.sampled_from(["cuda", "cpu"]))
def test_an_estimate_adds_up(configuration, tokens, kind):
    """Each phase is the sum of its terms, the peak is the highest phase, and between steps no more is held."""
    found = estimate(configuration, tokens, kind)
    assert all(phase.bytes == sum(phase.terms.values()) for phase in found.phases)
    assert all(num_bytes > 0 for phase in found.phases for num_bytes in phase.terms.values())
    assert found.peak_allocated_bytes == max(phase.bytes for phase in found.phases)
    assert 0 < found.after_step_allocated_bytes <= found.peak_allocated_bytes
    assert len({phase.name for phase in found.phases}) == len(found.phases)


@settings(deadline=None, max_examples=100)
@given(configurations(), TOKENS, st.sampled_from(["cuda", "cpu"]))
def test_a_larger_micro_batch_never_needs_less(configuration, tokens, kind):
    """One more sequence at a time: no phase shrinks."""
    larger = replace(configuration, per_device_train_batch_size=configuration.per_device_train_batch_size + 1)
    before, after = (estimate(each, tokens, kind) for each in (configuration, larger))
    later = {phase.name: phase.bytes for phase in after.phases}
    assert all(later[phase.name] >= phase.bytes for phase in before.phases)


@settings(deadline=None, max_examples=100)
@given(configurations(), TOKENS, st.sampled_from(["cuda", "cpu"]))
def test_longer_sequences_never_need_less(configuration, tokens, kind):
    """Twice the tokens: the peak does not shrink."""
    short, long = (estimate(configuration, each, kind).peak_allocated_bytes for each in (tokens, 2 * tokens))
    assert long >= short


@settings(deadline=None, max_examples=100)
@given(configurations(), st.sampled_from([64, 100, 512]), st.sampled_from(["cuda", "cpu"]))
def test_checkpointing_never_needs_more(configuration, tokens, kind):
    """Dropping activations and computing them again costs time, not memory: of all but the shortest sequences, where
    the random state that each layer keeps (5 kB) is more than its activations.
    """
    plain, checkpointed = (
        estimate(replace(configuration, gradient_checkpointing=each), tokens, kind).peak_allocated_bytes
        for each in (False, True)
    )
    assert checkpointed <= plain


@settings(deadline=None, max_examples=100)
@given(configurations(), TOKENS, st.sampled_from(["cuda", "cpu"]))
def test_more_ranks_never_need_more(configuration, tokens, kind):
    """With twice the ranks, and the same micro-batch on each, no rank holds more."""
    doubled = replace(configuration, num_processes=2 * configuration.num_processes)
    before, after = (estimate(each, tokens, kind).peak_allocated_bytes for each in (configuration, doubled))
    assert after <= before


@settings(deadline=None, max_examples=60)
@given(configurations(), st.sampled_from([64, 100, 512]))
def test_what_is_reserved_covers_what_is_allocated(configuration, tokens):
    """A replay of the step reserves at least what it allocates, and allocates at least what the phases add up to."""
    assume(configuration.per_device_train_batch_size <= 8)
    plain, replayed = (estimate(configuration, tokens, "cuda", replays=each) for each in (False, True))
    assert plain.peak_reserved_bytes is None
    assert replayed.peak_allocated_bytes >= plain.peak_allocated_bytes
    assert replayed.peak_reserved_bytes >= replayed.peak_allocated_bytes
    assert replayed.process_bytes > replayed.peak_reserved_bytes
    assert replayed.peak_allocated_bytes == max(phase.bytes for phase in replayed.phases)


def test_a_cpu_rank_has_no_allocator_and_no_context():
    """A figure that a CPU rank does not have is None, not 0."""
    found = estimate(a_configuration(), 64, "cpu", replays=True)
    assert found.peak_reserved_bytes is None
    assert found.process_bytes is None
