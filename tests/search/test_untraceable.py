"""A code path that cannot be traced is left out of a search, and the search goes on."""

from __future__ import annotations

import pytest

from autofit.api import make_plan
from autofit.errors import InputError
from autofit.sources import profiles

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHY = "the quantised layers read a value"


@pytest.fixture
def tracer_that_fails(monkeypatch, tmp_path):
    """Return a function that takes what is stored of some methods away, and lets their traces fail."""
    stored = profiles.stored_profiles
    monkeypatch.setenv("AUTOFIT_CACHE", str(tmp_path))
    monkeypatch.setattr(
        profiles, "answers_of_subprocess", lambda _model, regimes, _tokens: [InputError(WHY) for _ in regimes]
    )

    def fails_for(*methods):
        def without(model, regimes, sequence_tokens):
            found = stored(model, regimes, sequence_tokens)
            return {regime: profile for regime, profile in found.items() if regime.method not in methods}

        monkeypatch.setattr(profiles, "stored_profiles", without)

    return fails_for


def test_a_search_goes_on_without_what_cannot_be_traced(tracer_that_fails):
    """The other methods are planned; how many configurations were left out is said, and why."""
    tracer_that_fails("qlora")
    made = make_plan(model=MODEL, gpus="1xA100-80G", seq_len=512, global_batch=8)
    assert {made.configuration.method, *(rung.configuration.method for rung in made.alternatives)} == {"full", "lora"}
    assert any("24 have no traced profile" in reason for reason in made.reasons)
    assert any(WHY in reason for reason in made.reasons)


def test_a_search_of_which_nothing_can_be_traced_is_refused(tracer_that_fails):
    """With the reason of the first."""
    tracer_that_fails("full", "lora", "qlora")
    with pytest.raises(InputError, match=WHY):
        make_plan(model=MODEL, gpus="1xA100-80G", seq_len=512, global_batch=8)
