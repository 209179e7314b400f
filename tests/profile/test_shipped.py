"""The profiles that ship are what the tracer makes of the pinned libraries."""

from __future__ import annotations

import pytest

from autofit.profile.trace import trace
from autofit.sources.models import model_catalogue, resolve_model
from autofit.sources.profiles import SHIPPED_FOLDER, architecture_key, pack_name, read_pack
from autofit.spec.libraries import installed_versions

SAMPLE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def shipped(model: str):
    """Return the shipped profiles of a model under the installed libraries."""
    return read_pack(SHIPPED_FOLDER / pack_name(resolve_model(model).config, installed_versions()))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "device"), [("full", "cpu"), ("qlora", "cuda")])
def test_a_shipped_profile_is_what_a_trace_gives(method, device):
    """A fresh trace of a shipped model equals the stored one, byte for byte; if not, run tools/make_profiles.py."""
    stored = next(p for p in shipped(SAMPLE) if (p.regime.method, p.regime.device) == (method, device))
    fresh = trace(stored.model, resolve_model(SAMPLE).config, stored.regime)
    assert fresh == stored


def test_every_shipped_file_is_of_a_catalogued_model_and_the_tested_libraries():
    """No file is left over from another release, and each can be found by its model's name."""
    names = {pack_name(dict(entry.config), installed_versions()) for entry in model_catalogue().models}
    files = {path.name for path in SHIPPED_FOLDER.glob("*.json.gz")}
    assert files
    assert files <= names


def test_a_shipped_file_holds_one_architecture():
    """Every profile in the sample's file is of the architecture that the file is named after."""
    profiles = shipped(SAMPLE)
    assert len({(p.num_layers, p.hidden_size, p.vocab_size) for p in profiles}) == 1
    assert architecture_key(resolve_model(SAMPLE).config)
