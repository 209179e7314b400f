"""The user's own model, built from the installed libraries on the meta device."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from autofit.errors import InputError
from autofit.profile.adapters import adapt
from autofit.profile.dtypes import DTYPES
from autofit.profile.quantized import quantize
from autofit.spec.profile import Regime


def load_config(config: dict[str, Any], num_layers: int | None, regime: Regime) -> Any:
    """Make the transformers config object, with `num_layers` layers (None: as many as it has).

    Raises:
        InputError: the installed transformers does not know the architecture.
    """
    values = {key: value for key, value in copy.deepcopy(config).items() if key != "auto_map"}
    model_type = values.pop("model_type", None)
    try:
        made = AutoConfig.for_model(model_type, **values)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"transformers {transformers.__version__} cannot read the config of model_type {model_type!r}: {error}",
            to_fix="install a release of transformers that knows this architecture",
        ) from error
    made.use_cache = False
    made._attn_implementation = "sdpa" if regime.attention == "flash_attention_2" else regime.attention
    if num_layers is not None:
        made.num_hidden_layers = num_layers
        if getattr(made, "layer_types", None):
            made.layer_types = made.layer_types[:num_layers]
    return made


def layers_differ(config: Any) -> bool:
    """Whether the config gives its layers different kinds, so that one cannot stand for all."""
    kinds = getattr(config, "layer_types", None) or []
    return len(set(kinds)) > 1 or bool(getattr(config, "first_k_dense_replace", 0))


def build(config: Any, regime: Regime) -> nn.Module:
    """Build the model, quantised and with its adapter, on the meta device.

    Raises:
        InputError: transformers has no causal language model for the config, or peft no target for the adapter.
    """
    argument = (
        "dtype" if "dtype" in inspect.signature(transformers.PreTrainedModel._from_config).parameters else "torch_dtype"
    )
    argument = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else argument
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = AutoModelForCausalLM.from_config(config, **{argument: DTYPES[regime.weights_dtype]})
        except ValueError as error:
            raise InputError(
                f"transformers {transformers.__version__} cannot build a causal language model of type "
                f"{config.model_type!r} with {regime.attention} attention: {error}",
                to_fix="give a decoder-only model, or an attention that it supports (--attention eager)",
            ) from error
        if regime.quantization is not None:
            quantize(model, regime.quantization)
        if regime.lora is not None:
            model = adapt(model, regime.lora, DTYPES[regime.adapter_dtype])
    return model
