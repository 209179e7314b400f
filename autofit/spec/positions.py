"""How many tokens a model with a table of learned positions can take: a longer sequence ends in an index error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TABLES = {
    "albert": ("max_position_embeddings", 512),
    "bert": ("max_position_embeddings", 512),
    "biogpt": ("max_position_embeddings", 1024),
    "distilbert": ("max_position_embeddings", 512),
    "electra": ("max_position_embeddings", 512),
    "gpt2": ("n_positions", 1024),
    "gpt_bigcode": ("n_positions", 1024),
    "gpt_neo": ("max_position_embeddings", 2048),
    "openai-gpt": ("n_positions", 512),
    "opt": ("max_position_embeddings", 2048),
    "roberta": ("max_position_embeddings", 512),
    "xlm-roberta": ("max_position_embeddings", 512),
}
"""By model type: the setting, and transformers' default. Source: transformers 5.23 configuration_*.py; a test builds
each and looks up its last position and the one after."""
FROM_PADDING = ("roberta", "xlm-roberta")
"""Positions are counted from the padding's index on. Source: transformers 5.23 modeling_roberta.py,
`create_position_ids_from_input_ids`."""


def num_positions(config: Mapping[str, Any]) -> int | None:
    """Return the most tokens of a sequence, None where no table of positions limits them or it is not known."""
    model_type = config.get("model_type")
    if model_type not in TABLES:
        return None
    name, default = TABLES[str(model_type)]
    stated = config.get(name, config.get("max_position_embeddings", default))
    if not isinstance(stated, int) or isinstance(stated, bool):
        return None
    padding = config.get("pad_token_id", 1)
    return stated - (padding + 1 if isinstance(padding, int) else 2) if model_type in FROM_PADDING else stated
