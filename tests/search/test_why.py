"""Why each knob has its value: what is said of another one is what a search for it finds."""

from __future__ import annotations

import io
import re

import pytest
from msgspec.structs import replace
from rich.console import Console

from autofit.errors import NothingFitsError
from autofit.report.explain import knobs_table
from autofit.search import solve
from autofit.search.why import knobs
from autofit.sources.hardware import parse_cluster
from autofit.sources.models import resolve_model
from autofit.spec.job import Job, Restrictions, Workload
from autofit.units import format_bytes
from tests.plans import shipped_profiles

MODEL = "meta-llama/Llama-3.1-8B"
FIELDS = {
    "method": "methods",
    "sharding": "shardings",
    "offload": "offload",
    "gradient_checkpointing": "gradient_checkpointing",
    "optim": "optims",
    "per_device_train_batch_size": "micro_batch_sequences",
}
SINGLE = ("offload", "gradient_checkpointing")
READ = {"on": True, "off": False}


@pytest.fixture(scope="module")
def profiles():
    """Return the shipped code paths of an 8B."""
    return {profile.regime: profile for profile in shipped_profiles(MODEL)}


def the_plan(gpus, batch, profiles, tokens=2048, **restrictions):
    """Search as a user would."""
    workload = Workload(sequence_tokens=tokens, global_batch_sequences=batch)
    job = Job(model=resolve_model(MODEL), workload=workload, restrictions=Restrictions(**restrictions))
    return solve(job, parse_cluster(gpus), profiles)


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "batch"), [("2xA100-80G", 8), ("RTX4090-24G", 4)])
def test_what_is_said_of_a_rival_is_what_a_search_for_it_finds(gpus, batch, profiles):
    """For every knob and every other value: configuration, memory and step of the plan that is restricted to it; where
    nothing fits, such a search finds nothing either.
    """
    made = the_plan(gpus, batch, profiles)
    found = knobs(made, profiles)
    assert {"method", "gradient_checkpointing", "optim"} <= {knob.name for knob in found}
    for knob in found:
        for rival in knob.rivals:
            value = (
                READ.get(rival.value, rival.configuration.per_device_train_batch_size)
                if knob.name in ("gradient_checkpointing", "per_device_train_batch_size")
                else rival.value
            )
            asked = {"methods": (made.configuration.method,)} | {
                FIELDS[knob.name]: value if knob.name in SINGLE else (value,)
            }
            if rival.misfit != "none":
                with pytest.raises(NothingFitsError):
                    the_plan(gpus, batch, profiles, **asked)
                continue
            other = the_plan(gpus, batch, profiles, **asked)
            assert rival.configuration == other.configuration, (knob.name, rival.value)
            assert rival.needed_bytes == other.memory.needed_bytes
            assert rival.step_seconds == other.time.step_seconds
            assert rival.excess_fraction == pytest.approx(other.time.step_seconds / made.time.step_seconds - 1)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["memory", "quality"])
def test_what_is_said_of_a_method_is_its_row(objective, profiles):
    """Whatever decides: what a plan says that another method would need is what its row beside the plan says."""
    made = the_plan("2xA100-80G", 8, profiles, objective=objective)
    (said,) = (reason for reason in made.reasons if reason.startswith("method"))
    assert made.alternatives
    for other in made.alternatives:
        assert f"{other.configuration.method} would need {format_bytes(other.needed_bytes)}" in said
    least = min(other.needed_bytes for other in made.alternatives)
    assert objective != "memory" or made.memory.needed_bytes <= 1.01 * least


def test_a_plan_of_another_search_has_nothing_beside_it(profiles):
    """A configuration that its own restrictions would not allow is none of its search, and that is said."""
    made = the_plan("RTX4090-24G", 4, profiles, methods=("qlora",))
    foreign = replace(made, configuration=replace(made.configuration, attention="eager"))
    assert knobs(foreign, profiles) == ()
    for width in (60, 80, 160):
        for plan in (made, foreign):
            console = Console(width=width, file=io.StringIO(), highlight=False)
            console.print(knobs_table(plan, knobs(plan, profiles), width=width))
            text = console.file.getvalue()
            assert all(len(line) <= width for line in text.splitlines())
            assert ("nothing to set beside it" in text) is (plan is foreign)
            assert ("adamw_8bit" in text) is (plan is made)


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "tokens"), [("8xA100-80G", 4096), ("2xA100-80G", 2048)])
def test_a_plan_says_of_a_faster_micro_batch_what_it_would_need(gpus, tokens, profiles):
    """What a search for it finds, segments that grow or not; or that it does not fit, where such a search fails."""
    made = the_plan(gpus, 64, profiles, tokens, methods=("lora",))
    mine = made.configuration.per_device_train_batch_size
    (said,) = (reason for reason in made.reasons if reason.startswith("per_device_train_batch_size"))
    larger = re.search(rf"[:;] {2 * mine} would (.*?)[;.]$", said)[1]
    try:
        other = the_plan(gpus, 64, profiles, tokens, methods=("lora",), micro_batch_sequences=(2 * mine,))
    except NothingFitsError:
        assert larger.startswith("not fit")
    else:
        assert other.time.step_seconds < made.time.step_seconds
        assert larger.startswith(f"need {format_bytes(other.memory.needed_bytes)} and take")


def test_a_plan_says_of_a_method_what_its_own_row_says(profiles):
    """Also of one that fits only with segments that grow."""
    made = the_plan("8xA100-80G", 64, profiles, 4096)
    (said,) = (reason for reason in made.reasons if reason.startswith("method"))
    assert any(row.configuration.expandable_segments for row in made.alternatives)
    for row in made.alternatives:
        assert f"{row.configuration.method} would need {format_bytes(row.needed_bytes)} and" in said
