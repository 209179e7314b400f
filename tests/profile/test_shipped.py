"""The profiles that ship are what the tracer makes of the pinned libraries."""

from __future__ import annotations

import pytest

from autofit.profile.trace import trace
from autofit.sources.models import model_catalogue, resolve_model
from autofit.sources.profiles import SHIPPED_FOLDER, architecture_key, pack_name
from autofit.spec.libraries import installed_versions
from tests.plans import shipped_profiles

SAMPLE = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "method", "device"),
    [(SAMPLE, "full", "cpu"), (SAMPLE, "qlora", "cuda"), ("Qwen/Qwen2.5-0.5B", "lora", "cuda")],
)
def test_a_shipped_profile_is_what_a_trace_gives(model, method, device):
    """A fresh trace of a shipped model equals the stored one, byte for byte; if not, run tools/make_profiles.py."""
    stored = next(p for p in shipped_profiles(model) if (p.regime.method, p.regime.device) == (method, device))
    fresh = trace(stored.model, resolve_model(model).config, stored.regime)
    assert fresh == stored


def test_every_shipped_file_is_of_a_catalogued_model_and_the_tested_libraries():
    """No file is left over from another release, and each can be found by its model's name."""
    names = {pack_name(dict(entry.config), installed_versions()) for entry in model_catalogue().models}
    files = {path.name for path in SHIPPED_FOLDER.glob("*.json.xz")}
    assert files
    assert files <= names


def test_a_shipped_file_holds_one_architecture():
    """Every profile in the sample's file is of the architecture that the file is named after."""
    profiles = shipped_profiles(SAMPLE)
    assert len({(p.num_layers, p.hidden_size, p.vocab_size) for p in profiles}) == 1
    assert architecture_key(resolve_model(SAMPLE).config)
