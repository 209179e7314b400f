"""Tables of learned positions: what is said of a model type is where its real embedding ends."""

from __future__ import annotations

import pytest

from autofit.errors import InputError
from autofit.sources.rows import read_case
from autofit.spec.positions import TABLES, num_positions

SMALL = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 1}
WIDTHS = {"hidden_size": 16, "intermediate_size": 16}
OTHER_WIDTHS = {
    "distilbert": {"dim": 16, "hidden_dim": 16},
    "electra": {**WIDTHS, "embedding_size": 16},
    "albert": {**WIDTHS, "embedding_size": 16},
    "gpt_neo": {"hidden_size": 16, "num_heads": 2, "num_layers": 1, "attention_types": [[["global"], 1]]},
    "opt": {"hidden_size": 16, "ffn_dim": 16, "word_embed_proj_dim": 16},
}


@pytest.mark.parametrize("model_type", TABLES)
def test_a_table_ends_where_the_real_one_does(model_type):
    """Of each type a model of a layer takes as many tokens as is said, and raises an index error for one more."""
    import torch
    from transformers import AutoConfig, AutoModel

    settings = {**SMALL, **OTHER_WIDTHS.get(model_type, WIDTHS), TABLES[model_type][0]: 40}
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModel.from_config(config, attn_implementation="eager").eval()
    longest = num_positions({"model_type": model_type, **settings})
    assert longest is not None
    with torch.no_grad():
        model(input_ids=torch.full((1, longest), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, longest + 1), 7))


@pytest.mark.parametrize("model_type", TABLES)
def test_what_a_config_leaves_out_is_the_librarys_default(model_type):
    """A config.json without the setting has transformers' own number of positions."""
    from transformers import AutoConfig

    name, default = TABLES[model_type]
    assert getattr(AutoConfig.for_model(model_type), name) == default


def test_sequences_longer_than_the_table_are_refused():
    """GPT-2 has 1,024 positions; a model without a table takes any length."""
    row = {"model": "openai-community/gpt2", "gpus": "1xA100-80G", "seq_len": 1024}
    assert read_case(row).workload.sequence_tokens == 1024
    with pytest.raises(InputError, match=r"table of 1,024 positions, and sequences have 1,025 tokens"):
        read_case({**row, "seq_len": 1025})
    assert num_positions({"model_type": "llama", "max_position_embeddings": 8}) is None
