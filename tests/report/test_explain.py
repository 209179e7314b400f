"""An explanation adds up to the estimate that it explains, and every term says where it is from."""

from __future__ import annotations

import ast
import io
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console

from autofit.memory.assemble import MemoryModel
from autofit.memory.explain import explain_phases, symbols_of
from autofit.memory.terms import TERM_SOURCES
from autofit.profile.trace import trace
from autofit.report.explain import stage_bar, tensors_table
from autofit.spec.hardware import Cluster
from autofit.spec.regimes import regime_of
from tests.plans import A100, TINY_LLAMA, a_configuration

MEMORY = Path(__file__).resolve().parents[2] / "autofit" / "memory"
TOKENS = 64
CONFIGURATIONS = {
    "plain": a_configuration(method="full", sharding="none", num_processes=1, gradient_accumulation_steps=1),
    "checkpoints": a_configuration(
        method="full", sharding="none", num_processes=1, gradient_accumulation_steps=1, gradient_checkpointing=True
    ),
    "ddp": a_configuration(method="lora", sharding="ddp", num_processes=2, gradient_accumulation_steps=1),
    "zero1": a_configuration(method="full", sharding="zero1", num_processes=4),
    "zero2": a_configuration(method="full", sharding="zero2", num_processes=4, gradient_accumulation_steps=2),
    "zero3": a_configuration(method="qlora", sharding="zero3", num_processes=4),
    "fsdp1": a_configuration(method="full", sharding="fsdp1", num_processes=4),
    "fsdp2": a_configuration(method="lora", sharding="fsdp2", num_processes=4),
}


@cache
def explained(name):
    """Trace, estimate and explain a configuration of a tiny model."""
    configuration = CONFIGURATIONS[name]
    profile = trace("tiny", TINY_LLAMA, regime_of(configuration, A100))
    cluster = Cluster(device=A100, num_devices_per_node=configuration.num_processes)
    model = MemoryModel(profile, TOKENS, (configuration.per_device_train_batch_size,))
    memory = model.estimate(configuration, cluster)
    return memory, explain_phases(memory, profile, configuration, TOKENS), symbols_of(profile, configuration, TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "checkpoints", "ddp"])
def test_the_tensors_that_are_named_are_the_activations(name):
    """Played tensor by tensor at full depth, what is alive in each phase is the phase's term, to the byte."""
    memory, phases, _ = explained(name)
    with_activations = 0
    for phase, estimated in zip(phases, memory.phases, strict=True):
        held = sum(tensors.total_bytes for tensors in phase.activations)
        assert held == estimated.terms.get("activations", 0), phase.name
        with_activations += held > 0
    assert with_activations >= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_terms_of_a_phase_are_its_bytes(name):
    """Every phase is the sum of its terms, and each of them has a meaning, a formula and a source."""
    memory, phases, _ = explained(name)
    for phase, estimated in zip(phases, memory.phases, strict=True):
        assert {term.name: term.bytes for term in phase.terms} == estimated.terms
        assert all(term.meaning and term.formula and term.sources for term in phase.terms)


@pytest.mark.slow
def test_only_the_engine_in_effect_is_cited():
    """Under DDP no source is DeepSpeed's or FSDP's; under ZeRO-3 DeepSpeed's are there."""
    cited = {name: {s for p in explained(name)[1] for t in p.terms for s in t.sources} for name in ("ddp", "zero3")}
    assert not any("deepspeed" in source or "fsdp" in source for source in cited["ddp"])
    assert any("reducer.cpp" in source for source in cited["ddp"])
    assert any("deepspeed/runtime/zero/stage3.py" in source for source in cited["zero3"])


@pytest.mark.slow
def test_a_table_names_the_peak_and_the_largest_tensors():
    """The phase of the peak is marked, and a polynomial says how each tensor grows."""
    phase = max(explained("plain")[1], key=lambda phase: phase.bytes)
    console = Console(width=80, file=io.StringIO())
    console.print(tensors_table(phase, is_peak=True))
    text = console.file.getvalue()
    assert "the peak" in text
    assert "b s" in text
    assert max(map(len, text.splitlines())) <= 80


def test_every_term_that_the_memory_model_writes_is_documented():
    """Each name that is a key of a term's bytes anywhere in the memory package stands in the registry."""
    written = {key for path in MEMORY.glob("*.py") if path.name != "terms.py" for key in term_keys(path)}
    assert {"weights", "gradients", "activations", "optimizer_state"} <= written
    assert written <= TERM_SOURCES.keys()


def term_keys(path):
    """Yield the string keys of dictionaries that have a known term among their keys."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict):
            keys = {key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
            if keys & TERM_SOURCES.keys():
                yield from keys


def test_a_bar_is_as_long_as_its_peak(plan):
    """The largest peak fills the cells, half of it half of them, and every byte is somebody's."""
    peak = max(phase.bytes for phase in plan.memory.phases)
    assert len(stage_bar(plan, cells_of_largest=40, largest_bytes=peak)) == 40
    assert len(stage_bar(plan, cells_of_largest=40, largest_bytes=2 * peak)) == 20
