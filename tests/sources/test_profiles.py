"""Stored profiles: which of them are read, and what happens to those that cannot be."""

from __future__ import annotations

import json
import lzma

import msgspec
import pytest

from autofit.sources.models import resolve_model
from autofit.sources.profiles import cache_folder, pack_name, read_pack, stored_profiles, write_pack
from autofit.spec.libraries import installed_versions
from autofit.spec.profile import RegimeProfile
from tests.plans import shipped_profiles

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """Return the model and the place of its profiles in a cache of its own."""
    monkeypatch.setenv("AUTOFIT_CACHE", str(tmp_path))
    model = resolve_model(MODEL)
    return model, cache_folder() / pack_name(model.config, installed_versions())


def test_what_is_found_is_what_was_stored(cached):
    """Each regime that is asked for comes back equal, in the order of the question, and no other does."""
    model, _ = cached
    shipped = shipped_profiles(MODEL)
    asked = [profile.regime for profile in shipped[5:2:-1]]
    assert stored_profiles(model, asked, 512) == {profile.regime: profile for profile in shipped[3:6]}
    assert list(stored_profiles(model, asked, 512)) == asked


def test_only_what_is_asked_for_is_decoded(cached, monkeypatch):
    """Of all profiles of a model a search needs a part: the others cost it next to nothing."""
    model, path = cached
    shipped = shipped_profiles(MODEL)
    write_pack(path, shipped)
    decoded = []
    decode = msgspec.json.decode
    monkeypatch.setattr(msgspec.json, "decode", lambda text, **how: decoded.append(how["type"]) or decode(text, **how))
    stored_profiles(model, [shipped[0].regime, shipped[1].regime], 512)
    assert decoded.count(RegimeProfile) == 2


def test_a_profile_that_cannot_be_read_is_passed_over(cached):
    """The next that is stored takes its place, and the others of its file are read; a file that is none holds none."""
    model, path = cached
    shipped = shipped_profiles(MODEL)
    write_pack(path, shipped[:2])
    content = json.loads(lzma.decompress(path.read_bytes()))
    content[0]["segments"], content[1]["num_layers"] = "nothing", 7
    path.write_bytes(lzma.compress(json.dumps(content).encode()))
    found = stored_profiles(model, [shipped[0].regime, shipped[1].regime], 512)
    assert found[shipped[0].regime] == shipped[0]
    assert found[shipped[1].regime].num_layers == 7
    path.write_bytes(b"no pack")
    assert read_pack(path) == ()
    assert stored_profiles(model, [shipped[1].regime], 512)[shipped[1].regime] == shipped[1]
