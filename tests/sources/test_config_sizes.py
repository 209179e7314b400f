"""Sizes that no model has are refused before anything is traced; those of every real config are not."""

from __future__ import annotations

import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from autofit.errors import InputError
from autofit.sources.config_sizes import WIDTH_AND_HEADS, refuse_impossible_sizes
from autofit.sources.models import model_catalogue, model_from_config

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "big"}, "hidden_size 'big'"),
        ({"hidden_size": -64}, "hidden_size -64"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"vocab_size": 1.5}, "vocab_size 1.5"),
        ({"num_attention_heads": True}, "num_attention_heads True"),
        ({"num_attention_heads": 5}, "num_attention_heads of 5 do not divide"),
        ({"text_config": {"hidden_size": -1}}, "hidden_size -1"),
    ],
    ids=str,
)
def test_sizes_that_no_model_has_are_refused(changes, words):
    """By name and value, when the config is read."""
    with pytest.raises(InputError) as refused:
        model_from_config({**LLAMA, **changes}, name="it", origin="path", source="config.json")
    assert words in refused.value.message


def test_heads_that_have_a_size_of_their_own_need_not_divide():
    """As of Qwen 3 and Gemma."""
    refuse_impossible_sizes({**LLAMA, "num_attention_heads": 5, "head_dim": 32}, "config.json")


def test_every_config_of_the_installed_transformers_passes():
    """As its class makes it, and every config of the catalogue: none is refused that the library has."""
    refused = []
    for model_type in CONFIG_MAPPING_NAMES:
        try:
            config = AutoConfig.for_model(model_type).to_dict()
        except Exception:  # noqa: BLE001, S112 - a class that needs arguments
            continue
        try:
            refuse_impossible_sizes(config, model_type)
        except InputError as error:
            refused.append(error.message)
    assert refused == []
    for entry in model_catalogue().models:
        refuse_impossible_sizes(entry.config, str(entry.config["model_type"]))


@pytest.mark.parametrize("model_type", WIDTH_AND_HEADS)
def test_these_types_divide_their_width_by_their_heads(model_type):
    """The library refuses others itself, when the config or the model is made."""
    import torch
    from transformers import AutoModel

    width, heads = WIDTH_AND_HEADS[model_type]
    with torch.device("meta"), pytest.raises(Exception, match=r"(?i)head"):
        AutoModel.from_config(AutoConfig.for_model(model_type, **{width: 64, heads: 5}))
