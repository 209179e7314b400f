"""Which part of a model is which: the language model, where there are others beside it."""

from __future__ import annotations

from typing import Any

from torch import nn


def base_model(model: Any) -> Any:
    """Return the model without its adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(config: Any) -> Any:
    """Return the part of a config that describes the language model: itself, unless that is nested."""
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):  # releases before 4.46, and configs with several texts
        return getattr(config, "text_config", config)


def language_model(model: nn.Module) -> nn.Module:
    """Return what of a model reads tokens: of a vision-language model its decoder, else all of it."""
    base = base_model(model)
    config = getattr(base, "config", None)
    if config is None or text_config(config) is config or getattr(config, "is_encoder_decoder", False):
        return model
    decoder: Any = base.get_decoder() if hasattr(base, "get_decoder") else None
    return model if decoder is None or decoder is base else decoder
