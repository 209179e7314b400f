"""Builds every model that a script loads from its config alone, and remembers how it was asked for."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import Any

from autofit.runtime.discover.observed import Observed
from autofit.runtime.discover.side_effects import nothing
from autofit.runtime.discover.weights import give_weights
from autofit.runtime.model import is_part_of_a_model

LOADING_ARGUMENTS = (
    "state_dict", "device_map", "max_memory", "offload_folder", "offload_buffers", "offload_state_dict",
    "low_cpu_mem_usage", "variant", "use_safetensors", "weights_only", "ignore_mismatched_sizes", "output_loading_info",
    "adapter_kwargs", "adapter_name", "generation_config", "key_mapping", "tp_plan", "tp_size", "device_mesh",
    "distributed_config", "mirror", "from_tf", "from_flax", "use_flash_attention_2", "load_in_4bit", "load_in_8bit",
    "_fast_init", "_from_auto", "_from_pipeline", "_commit_hash", "use_kernels", "kernel_config", "disable_mmap",
)  # fmt: skip
"""What `from_pretrained` takes for reading weights, which are not read here. Source: transformers/modeling_utils.py."""
HUB_ARGUMENTS = (
    "cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies", "trust_remote_code",
)  # fmt: skip


def hook_models(observed: Observed, module: ModuleType) -> None:
    """Let no weights be read or written."""

    def from_pretrained(cls: Any, path: Any = None, *args: Any, **kwargs: Any) -> Any:
        return build_without_weights(observed, cls, path, args, kwargs)

    from_config = module.PreTrainedModel._from_config.__func__

    def _from_config(cls: Any, config: Any, /, **kwargs: Any) -> Any:
        if is_part_of_a_model():
            return from_config(cls, config, **kwargs)
        return build_without_weights(observed, cls, None, (), {"config": config, **kwargs})

    made = module.PreTrainedModel.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - a model that the script makes itself
        if "model" not in observed.where:
            observed.mark("model")
        made(self, *args, **kwargs)

    module.PreTrainedModel.__init__ = functools.wraps(made)(__init__)
    module.PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    module.PreTrainedModel._from_config = classmethod(_from_config)
    module.PreTrainedModel.save_pretrained = module.PreTrainedModel.push_to_hub = nothing


def build_without_weights(
    observed: Observed, cls: Any, path: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Build the model `from_pretrained` would return, from its config alone."""
    observed.mark("model")
    asked = {
        "name": _loaded_name(path, kwargs.get("gguf_file")),
        "dtype": kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None),
        "quantization": _quantization(kwargs),
        "attention": kwargs.pop("attn_implementation", None),
        "device_map": kwargs.get("device_map"),
        "where": observed.where.get("model"),
    }
    asked["fixes_dtype"] = asked["dtype"] not in (None, "auto")
    kwargs.pop("torch_dtype", None)
    for name in LOADING_ARGUMENTS:
        kwargs.pop(name, None)
    config, rest = _config(cls, path, kwargs)
    dtype = _dtype(asked["dtype"], config)
    model = _on_meta(cls, config, dtype, args, rest)
    give_weights(model)
    model.config.name_or_path = "" if path is None else str(path)
    observed.loaded.append((model, {**asked, "dtype": dtype}))
    return model.eval()


def _loaded_name(path: Any, gguf_file: str | None) -> str | None:
    """Return what was loaded, as the script calls it: of a folder with a GGUF file, the file."""
    if path is None:
        return None
    return str(Path(path) / gguf_file) if gguf_file else str(path)


def _quantization(kwargs: dict[str, Any]) -> Any:
    """Return the quantisation asked for, in either of transformers' spellings; a GGUF file's is not one."""
    config = kwargs.pop("quantization_config", None)
    if config is None and kwargs.get("load_in_4bit"):
        return {"load_in_4bit": True}
    if config is None and kwargs.get("load_in_8bit"):
        return {"load_in_8bit": True}
    return config.to_dict() if hasattr(config, "to_dict") else config


def _config(cls: Any, path: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the model's config, and what of the arguments goes to its constructor."""
    config, gguf_file = kwargs.pop("config", None), kwargs.pop("gguf_file", None)
    if hasattr(config, "to_dict"):
        return config, {name: value for name, value in kwargs.items() if name not in HUB_ARGUMENTS}
    kwargs = {name: value for name, value in kwargs.items() if name != "trust_remote_code"}
    if gguf_file is not None:
        kwargs["gguf_file"] = gguf_file
    config, rest = cls.config_class.from_pretrained(config or path, return_unused_kwargs=True, **kwargs)
    return config, {name: value for name, value in rest.items() if name not in (*HUB_ARGUMENTS, "gguf_file")}


def _dtype(asked: Any, config: Any) -> Any:
    """Return the dtype the weights would have, None where only the checkpoint knows.

    Source: transformers/modeling_utils.py `_get_dtype`; leaving it out means `auto` since release 5, fp32 before.
    """
    import torch
    import transformers

    if asked is None and int(transformers.__version__.split(".")[0]) < 5:
        return torch.float32
    if asked is None or asked == "auto":
        asked = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return getattr(torch, asked) if isinstance(asked, str) else asked


def _on_meta(cls: Any, config: Any, dtype: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the model's constructor on the meta device; with sdpa, as other attention may need the GPU to be built."""
    import torch

    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        with torch.device("meta"):
            return cls(config, *args, **kwargs)
    finally:
        torch.set_default_dtype(usual)
