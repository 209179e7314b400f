"""Reads the adapter that a model carries and the quantisation that it was asked for."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from autofit.runtime.discover.observed import Observed, dtype_name
from autofit.spec.discovered import FoundAdapter, FoundQuantization


def hook_adapters(observed: Observed, module: ModuleType) -> None:
    """Note where a script puts an adapter on its model, itself or through a trainer."""
    made = module.PeftModel.__init__

    @functools.wraps(made)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        observed.mark("method")
        made(self, *args, **kwargs)

    module.PeftModel.__init__ = __init__


def hook_kbit(observed: Observed, module: ModuleType) -> None:
    """Note peft's preparation of a quantised model, which would give its weights memory."""

    def prepare_model_for_kbit_training(model: Any, *_args: Any, **_kwargs: Any) -> Any:
        observed.mark("prepare_model_for_kbit_training")
        observed.prepares_kbit = True
        return model.requires_grad_(False)

    vars(module)["prepare_model_for_kbit_training"] = prepare_model_for_kbit_training


def adapter_of(model: Any) -> FoundAdapter | None:
    """Return the adapter a model carries, with what of it cannot be planned for."""
    if not hasattr(model, "peft_config"):
        return None
    config = model.peft_config[model.active_adapter]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return FoundAdapter(peft_type=kind, unplanned=(f"peft_type {kind}",))
    carrying = {name for name, module in model.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)}
    targets = sorted({name.rsplit(".", 1)[-1] for name in carrying})
    return FoundAdapter(
        peft_type=kind,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=tuple(targets),
        use_rslora=bool(getattr(config, "use_rslora", False)),
        use_dora=bool(getattr(config, "use_dora", False)),
        unplanned=tuple(_unplanned(config, model, carrying, targets)),
    )


def _unplanned(config: Any, model: Any, carrying: set[str], targets: Sequence[str]) -> Iterator[str]:
    for name in ("modules_to_save", "rank_pattern", "trainable_token_indices", "layer_replication"):
        if getattr(config, name, None):
            yield f"{name}={getattr(config, name)}"
    if getattr(config, "bias", "none") != "none":
        yield f"bias={config.bias}"
    inside = tuple(f"{name}." for name in carrying)
    bare = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in targets and name not in carrying]
    if missed := [name for name in bare if not name.startswith(inside)]:
        yield f"an adapter on some modules only, for instance not on {missed[0]}"


def quantization_of(asked: Mapping[str, Any] | None, *, prepares_kbit: bool) -> FoundQuantization | None:
    """Return the quantisation in the planner's words. Source: transformers' `BitsAndBytesConfig` and its defaults."""
    if not asked or asked.get("dequantize"):  # GgufConfig, Mxfp4Config: a quantised file, loaded as ordinary weights
        return None
    if not asked.get("load_in_4bit"):
        if asked.get("load_in_8bit"):
            return FoundQuantization(bits=8, quant_type="int8", prepares_kbit=prepares_kbit)
        return FoundQuantization(bits=0, quant_type=str(asked.get("quant_method") or "of an unknown kind"))
    return FoundQuantization(
        bits=4,
        quant_type=asked.get("bnb_4bit_quant_type", "fp4"),
        double_quant=bool(asked.get("bnb_4bit_use_double_quant")),
        compute_dtype=dtype_name(asked.get("bnb_4bit_compute_dtype")) or "float32",
        storage_dtype=dtype_name(asked.get("bnb_4bit_quant_storage")) or "uint8",
        prepares_kbit=prepares_kbit,
    )
