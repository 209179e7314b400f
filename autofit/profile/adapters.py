"""What trains of a model: everything, a peft adapter, or its last layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from autofit.errors import InputError
from autofit.profile.dtypes import DTYPES
from autofit.profile.layers import layer_stacks
from autofit.profile.packed import peft_layers
from autofit.profile.quantized import quantize, unpacking_as_an_operator
from autofit.profile.tasks import Head, task_of
from autofit.spec.configuration import Freeze, Lora
from autofit.spec.profile import Regime


def apply_method(model: nn.Module, regime: Regime) -> nn.Module:
    """Quantise a plain model, put its adapter on, or freeze what does not train; call it on the meta device.

    Raises:
        InputError: the method names modules that the model does not have, or leaves nothing to train.
    """
    _refuse_foreign_quantization(model, regime)
    if regime.quantization is not None:
        quantize(model, regime.quantization, regime.device)
    if regime.lora is not None and regime.lora.use_dora and regime.device == "cpu" and _is_int8(regime):
        raise InputError(
            "on a CPU peft's DoRA loses the scales of an int8 weight and the backward pass fails",
            to_fix="use bits 4, or plain LoRA",
        )
    if regime.lora is not None:
        with unpacking_as_an_operator():
            return adapt(model, regime.lora, DTYPES[regime.adapter_dtype], task_of(model.config, regime.task))
    if regime.freeze is not None:
        freeze(model, regime.freeze, checkpoints_reentrantly=regime.gradient_checkpointing and regime.use_reentrant)
    return model


def _refuse_foreign_quantization(model: nn.Module, regime: Regime) -> None:
    """A checkpoint that is packed already would be traced as if it were not."""
    declared: Any = getattr(getattr(model, "config", None), "quantization_config", None) or {}
    method = declared.get("quant_method") if isinstance(declared, dict) else getattr(declared, "quant_method", None)
    name = str(getattr(method, "value", method))
    packed = regime.quantization.quant_type if regime.quantization is not None else None
    if name in {"gptq", "awq"} and name != packed:
        raise InputError(
            f"the checkpoint is packed with {name.upper()}: only an adapter on it can be trained",
            to_fix="use --method qlora, or plan the checkpoint that it was made from",
        )
    if name == "bitsandbytes" and regime.quantization is None:
        raise InputError(
            "the checkpoint is quantised by bitsandbytes", to_fix="use --method qlora with the bits it was packed in"
        )


def _is_int8(regime: Regime) -> bool:
    return regime.quantization is not None and regime.quantization.is_int8


_PEFT_TASKS: dict[Head, str | None] = {
    "causal-lm": "CAUSAL_LM",
    "image-text-to-text": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "masked-lm": None,
}
"""peft/utils/peft_types.py, TaskType; it has none for masked language."""


def adapt(model: nn.Module, lora: Lora, dtype: torch.dtype, task: Head = "causal-lm") -> nn.Module:
    """Put peft's own LoRA modules on the model.

    peft trains the head of a classifier whole, as it does for the task type that such scripts name.
    What is trained whole beside them (`modules_to_save`) is a copy in the dtype of the original, which stays.
    Source: peft/utils/other.py, ModulesToSaveWrapper.

    Raises:
        InputError: the target modules are not in the model.
    """
    from peft import LoraConfig, get_peft_model

    _refuse_unknown_modules(model, lora.modules_to_save, "train whole (modules_to_save)")
    targets: Any = "all-linear" if lora.target_modules == ("all-linear",) else list(lora.target_modules)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=list(lora.modules_to_save) or None,
        task_type=_PEFT_TASKS[task],
    )
    config._register_custom_module(peft_layers())
    try:
        adapted: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(
            f"peft cannot put an adapter on {', '.join(lora.target_modules)}: {error}",
            to_fix="name modules that the model has, or use all-linear, which finds no layers that come packed",
        ) from error
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:  # on the meta device peft leaves an adapter's dtype as it was made
            parameter.data = parameter.data.to(dtype)
    return adapted


def freeze(model: nn.Module, what: Freeze, *, checkpoints_reentrantly: bool) -> None:
    """Leave the last layers and the named modules trainable, in the dtype that they were loaded in.

    Source: LLaMA-Factory src/llamafactory/model/adapter.py, _setup_freeze_tuning (which also upcasts to fp32 what
    trains; a script that does so loads fp32 weights as far as memory goes, and is not this method).

    Raises:
        InputError: a named module is not in the model, nothing would train, or gradients would not reach the layers.
    """
    layers = _layers(model)
    _refuse_unknown_modules(model, what.freeze_extra_modules, "train (freeze_extra_modules)")
    if not 0 <= what.freeze_trainable_layers <= len(layers):
        raise InputError(
            f"freeze_trainable_layers is {what.freeze_trainable_layers}; the model has {len(layers)} layers",
            to_fix=f"give a number from 0 to {len(layers)}",
        )
    trained = [*layers[len(layers) - what.freeze_trainable_layers :], *_named(model, what.freeze_extra_modules)]
    if not trained:
        raise InputError("with freeze_trainable_layers 0 nothing trains", to_fix="train a layer or name a module")
    for parameter in model.parameters():
        parameter.requires_grad = False
    for module in trained:
        for parameter in module.parameters():
            parameter.requires_grad = True
    if checkpoints_reentrantly and not _trains_embeddings(model):
        raise InputError(
            "with frozen embeddings, reentrant checkpointing gives the layers no gradients: nothing that goes into "
            "them asks for any",
            to_fix="checkpoint without use_reentrant, or train embed_tokens too",
        )


def _layers(model: nn.Module) -> nn.ModuleList:
    return layer_stacks(model)[0][1]


def _trains_embeddings(model: nn.Module) -> bool:
    embeddings: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return embeddings is not None and any(parameter.requires_grad for parameter in embeddings.parameters())


def _named(model: nn.Module, names: tuple[str, ...]) -> Iterator[nn.Module]:
    """Modules whose dotted name ends with one of the names; inside the layers `norm` means none."""
    layers = set(_layers(model).modules())
    for name, module in model.named_modules():
        if module not in layers and any(name == wanted or name.endswith(f".{wanted}") for wanted in names):
            yield module


def _refuse_unknown_modules(model: nn.Module, names: tuple[str, ...], purpose: str) -> None:
    for wanted in names:
        if not any(_named(model, (wanted,))):
            raise InputError(
                f"the model has no module {wanted!r} outside its layers to {purpose}",
                to_fix="name modules as the model does: " + ", ".join(_outside_layers(model)),
            )


def _outside_layers(model: nn.Module) -> list[str]:
    layers = set(_layers(model).modules())
    found = [
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if module not in layers and any(True for _ in module.parameters(recurse=False))
    ]
    return sorted(set(found))
