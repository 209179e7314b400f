"""What `--model` may say, and that the catalogue's configs build the models that were published."""

import copy
import json
import re

import pytest

from autofit.errors import InputError
from autofit.sources.models import Entry, model_catalogue, resolve_model

ENTRIES = model_catalogue().models
NO_CACHE = {"HF_HOME": "/nonexistent"}


def built(config: dict) -> "torch.nn.Module":  # noqa: F821
    """Build the model of a config with the installed transformers, without memory for its weights."""
    import torch
    import transformers

    values = copy.deepcopy(config)  # transformers writes into what is nested in it
    hosted = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(hosted)
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def num_built_params() -> dict[str, int]:
    """Parameters of every catalogue model as the installed transformers builds it."""
    return {entry.id: sum(weight.numel() for weight in built(entry.config).parameters()) for entry in ENTRIES}


@pytest.mark.slow
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.num_params], ids=lambda entry: entry.id)
def test_a_config_builds_the_published_number_of_parameters(entry: Entry, num_built_params):
    """The installed transformers makes exactly as many parameters of a config as were published."""
    published = int(entry.published.figure) - entry.published.more_than_params
    assert num_built_params[entry.id] == entry.num_params == published
    assert bool(entry.published.more_than_params) == bool(entry.published.because)


@pytest.mark.slow
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if not entry.num_params], ids=lambda entry: entry.id)
def test_a_config_builds_the_rounded_number_that_was_published(entry: Entry, num_built_params):
    """Where only a figure such as 13B is published, the built count is within one of its last place."""
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?([MB])", entry.published.figure)
    unit = {"M": 1e6, "B": 1e9}[match[3]]
    last_place = unit / 10 ** len(match[2] or "")
    figure = float(entry.published.figure[:-1]) * unit
    assert abs(num_built_params[entry.id] - figure) <= last_place


def test_the_catalogue_is_broad_and_sourced():
    """At least 40 models, decoders and encoders, each with the source of its figure."""
    assert len(ENTRIES) >= 40
    kinds = {entry.config["architectures"][0] for entry in ENTRIES}
    assert {"LlamaForCausalLM", "Qwen2ForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration"} <= kinds
    assert all(entry.published.source for entry in ENTRIES)
    assert all(isinstance(entry.config["model_type"], str) for entry in ENTRIES)


def test_what_is_done_to_a_resolved_model_does_not_reach_the_next():
    """Every resolved model has a config of its own, as transformers writes into the nested values of what it reads.

    Otherwise the shapes would get another key, and the profiles that ship would not be found.
    """
    import transformers

    name = "meta-llama/Llama-3.1-405B"
    before = copy.deepcopy(resolve_model(name).config)
    values = dict(resolve_model(name).config)
    transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    assert values["rope_scaling"] != before["rope_scaling"]
    assert resolve_model(name).config == before


def test_no_id_means_two_models():
    """Every Hub id, in any case, belongs to one entry."""
    ids = [name.casefold() for name in model_catalogue().ids]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("text", "name", "num_params"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("MISTRALAI/mistral-7b-v0.1", "mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("gpt2", "openai-community/gpt2", 124_439_808),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100_048_384),
    ],
)
def test_a_catalogue_model_is_found_by_its_id(text, name, num_params, tmp_path, monkeypatch):
    """Case does not matter, nor does the organisation where it is not needed."""
    monkeypatch.chdir(tmp_path)
    model = resolve_model(text, environment=NO_CACHE)
    assert (model.name, model.num_params, model.origin) == (name, num_params, "catalogue")
    assert model.source.startswith("https://huggingface.co/")


CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64}


@pytest.mark.parametrize("folder", ["plain", "with space", 'it\'s "quoted"', "new\nline"])
def test_a_folder_and_its_config_mean_the_same_model(tmp_path, folder):
    """A saved model's folder, or the config.json in it, however the folder is called."""
    path = tmp_path / folder
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    from_folder, from_file = resolve_model(str(path)), resolve_model(str(path / "config.json"))
    assert from_folder.config == from_file.config == CONFIG
    assert (from_folder.origin, from_file.origin) == ("folder", "config file")


def test_a_folder_goes_before_the_catalogue(tmp_path, monkeypatch):
    """As in transformers, a folder of that name is what is meant."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    assert resolve_model("gpt2").config == CONFIG


def test_a_config_without_architectures_says_what_it_is_taken_for(tmp_path):
    """A config that was saved without a model has none; where the type has one usual class, it is used and named."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "architectures": None}), encoding="utf-8")
    model = resolve_model(str(path))
    assert model.config["architectures"] == ["LlamaForCausalLM"]
    assert "taken as LlamaForCausalLM" in model.source


def test_a_config_that_was_downloaded_before_is_found_without_the_hub(tmp_path):
    """The Hub's cache on this machine is read as huggingface_hub lays it out."""
    folder = tmp_path / "hub" / "models--someone--something"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc123", encoding="utf-8")
    (folder / "snapshots" / "abc123").mkdir(parents=True)
    (folder / "snapshots" / "abc123" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    model = resolve_model("someone/something", environment={"HF_HOME": str(tmp_path)})
    assert (model.origin, model.config) == ("hub", CONFIG)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"{}", "no model_type"),
        (b'{"model_type": 3}', "no model_type"),
        (b'{"model_type": "unheard-of"}', "names no architectures"),
        (b"\xff\xfe\x00\x01", "not text"),
        (b"[" * 100000, "not JSON"),
    ],
)
def test_a_broken_config_is_refused(tmp_path, content, says):
    """Whatever is wrong with the file is said, with the file's path."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as refusal:
        resolve_model(str(tmp_path))
    assert "config.json" in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("meta-lama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("nobody/nothing", "--allow-hub"),
        ("./missing", "there is no './missing'"),
        ("missing/config.json", "there is no"),
        ("/nowhere/a/b/c", "there is no"),
        ("", "no config.json"),
        ("~nobody/x", "there is no"),
        ("a\x00b", "neither a path"),
        ("x" * 5000, "neither a path"),
    ],
)
def test_an_unknown_model_is_refused_with_what_to_do(text, says, tmp_path, monkeypatch):
    """The nearest known names, or what is missing, and no traceback."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refusal:
        resolve_model(text, environment=NO_CACHE)
    assert says in str(refusal.value)
    assert refusal.value.to_fix


def test_a_folder_without_a_config_is_refused(tmp_path):
    """An empty folder has nothing; one with a GGUF file needs a config.json beside it, or the training script."""
    with pytest.raises(InputError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="autofit launch"):
        resolve_model(str(tmp_path))


def test_an_unreachable_hub_is_an_input_error(monkeypatch, tmp_path):
    """With --allow-hub and no network the message names the model and what to do instead."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="could not be fetched"):
        resolve_model("nobody/nothing", allow_hub=True, environment=NO_CACHE)
    with pytest.raises(InputError, match="not a Hub id"):
        resolve_model("no body", allow_hub=True, environment=NO_CACHE)
