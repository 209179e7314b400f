"""Refuses a config.json whose sizes cannot be a model's, before anything is built from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autofit.errors import InputError

COUNTS = ("hidden_size", "n_embd", "d_model", "num_hidden_layers", "num_attention_heads", "n_head", "vocab_size")
"""What no model has less than one of. A few types give a list, or one for each part: left to transformers."""
WIDTH_AND_HEADS = {
    "bert": ("hidden_size", "num_attention_heads"),
    "gpt2": ("n_embd", "n_head"),
    "gpt_neox": ("hidden_size", "num_attention_heads"),
    "llama": ("hidden_size", "num_attention_heads"),
    "opt": ("hidden_size", "num_attention_heads"),
    "roberta": ("hidden_size", "num_attention_heads"),
}
"""Model types whose heads share the hidden size evenly where the config names no `head_dim`."""


def refuse_impossible_sizes(config: Mapping[str, Any], source: str) -> None:
    """Check the sizes that nearly every config has.

    Args:
        config: content of config.json.
        source: where it was read, for the message.

    Raises:
        InputError: a size is no whole number of one or more, or the heads do not share the hidden size evenly.
    """
    text = config.get("text_config")
    for part in (config, text) if isinstance(text, Mapping) else (config,):
        for name in COUNTS:
            value = part.get(name)
            if value is None or isinstance(value, (list, Mapping)):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(
                    f"{source} has {name} {value!r}, which has to be a whole number of 1 or more.",
                    to_fix="correct it, or give the config.json that the model was saved with",
                )
    _refuse_uneven_heads(config, source)


def _refuse_uneven_heads(config: Mapping[str, Any], source: str) -> None:
    names = WIDTH_AND_HEADS.get(str(config.get("model_type")))
    if names is None or config.get("head_dim"):
        return
    width, heads = (config.get(name) for name in names)
    if isinstance(width, int) and isinstance(heads, int) and width % heads:
        raise InputError(
            f"{source} has {names[0]} {width}, which its {names[1]} of {heads} do not divide.",
            to_fix="correct one of them, or give the config.json that the model was saved with",
        )
