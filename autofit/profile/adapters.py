"""What trains of a model: everything, a peft adapter, or its last layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autofit.errors import InputError
from autofit.spec.configuration import Lora


def adapt(model: nn.Module, lora: Lora, dtype: torch.dtype) -> nn.Module:
    """Put peft's own LoRA modules on the model.

    Raises:
        InputError: the target modules are not in the model.
    """
    from peft import LoraConfig, get_peft_model

    targets: Any = "all-linear" if lora.target_modules == ("all-linear",) else list(lora.target_modules)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        adapted: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(
            f"peft cannot put an adapter on {', '.join(lora.target_modules)}: {error}",
            to_fix="name modules that the model has, or use all-linear",
        ) from error
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:  # on the meta device peft leaves an adapter's dtype as it was made
            parameter.data = parameter.data.to(dtype)
    return adapted
