"""Loads the job's model in the planned dtype, attention and quantisation, and puts the planned adapter on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from autofit.plan import Plan
from autofit.runtime.session import Session
from autofit.spec.configuration import Configuration

SHAPE_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "intermediate_size",
)
CONFIG_ARGUMENTS = ("gguf_file", "revision", "cache_dir", "token", "subfolder", "local_files_only", "trust_remote_code")


DECIDED_ARGUMENTS = ("dtype", "torch_dtype", "attn_implementation", "device_map")
"""What the plan decides in the script's place. A `device_map` would put every rank's model on one device, or part it
over all, which accelerate refuses. Source: accelerate/accelerator.py 1.15, `prepare`, "device_map='auto'"."""


def load_as_planned(
    session: Session, cls: Any, load: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Load a model: the job's as planned, any other (a reference, a reward model) as the script says."""
    if not is_jobs_model(session, cls, args, kwargs):
        return load(*args, **kwargs)
    if session.plan.configuration.zero_stage == 3:
        announce_zero3(session.plan, session.run_folder, session.keep_alive)
    given = {name: kwargs.pop(name, None) for name in DECIDED_ARGUMENTS}
    take_own_device()
    model = load_configured(session.plan.configuration, load, args, kwargs)
    session.log.record(
        "applied",
        to=f"{cls.__name__}.from_pretrained",
        dtype=dtype_name(model.dtype),
        changes={name: [str(value), "the plan's"] for name, value in given.items() if value is not None},
    )
    return model


def build_as_planned(session: Session, cls: Any, build: Callable[..., Any], config: Any, kwargs: dict[str, Any]) -> Any:
    """Build the job's model from its config in the planned dtype and attention; parts of a model follow the whole.

    A quantised model cannot be built so: verification says what is not in effect.
    """
    if is_part_of_a_model() or not _has_planned_shape(session, config):
        return build(config, **kwargs)
    import torch

    configuration = session.plan.configuration
    if configuration.zero_stage == 3:
        announce_zero3(session.plan, session.run_folder, session.keep_alive)
    given = {name: kwargs.pop(name, None) for name in ("dtype", "torch_dtype", "attn_implementation")}
    take_own_device()
    settings = {_dtype_argument(): getattr(torch, configuration.weights_dtype)}
    model = build(config, **kwargs, **settings, attn_implementation=configuration.attention)
    session.log.record(
        "applied",
        to=f"{cls.__name__}.from_config",
        dtype=dtype_name(model.dtype),
        changes={name: [str(value), "the plan's"] for name, value in given.items() if value is not None},
    )
    return model


def is_part_of_a_model() -> bool:
    """Tell whether a model is being made by the constructor of another, or by its loading."""
    modeling = sys.modules["transformers.modeling_utils"]
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if frame.f_code.co_name == "__init__" and isinstance(owner, modeling.PreTrainedModel):
            return True
        frame = frame.f_back
    return False


def take_own_device() -> None:
    """Make each rank's GPU its current one before anything is loaded, as accelerate does later.

    Source: accelerate/state.py 1.15, `PartialState.set_device`.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def is_jobs_model(session: Session, cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether what is being loaded has the shape of the model that was planned for."""
    return _has_planned_shape(session, _config_of(cls, args, kwargs))


def _has_planned_shape(session: Session, config: Any) -> bool:
    planned, found = session.plan.inputs.job.model.config, config.to_dict()
    return all(found[key] == planned[key] for key in SHAPE_KEYS if key in planned and key in found)


def _config_of(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the config that `from_pretrained` will use: the one it was given, or the one beside the weights."""
    config = kwargs.get("config")
    if hasattr(config, "to_dict"):
        return config
    path = config or kwargs.get("pretrained_model_name_or_path") or args[0]
    return cls.config_class.from_pretrained(path, **{key: kwargs[key] for key in CONFIG_ARGUMENTS if key in kwargs})


def load_configured(
    configuration: Configuration, load: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Load a model in the planned dtype, attention and quantisation, whatever else was asked for."""
    import torch

    settings = {
        _dtype_argument(): getattr(torch, configuration.weights_dtype),
        "attn_implementation": configuration.attention,
    }
    quantization = bits_and_bytes_config(configuration)
    if quantization is None:
        return load(*args, **kwargs | settings)
    if kwargs.get("gguf_file") is None:
        return load(*args, **kwargs | settings | {"quantization_config": quantization})
    return quantize_in_place(load(*args, **kwargs | settings), quantization)


def _dtype_argument() -> str:
    """Name the argument: `dtype` since transformers 4.56, `torch_dtype` before."""
    import transformers

    return "dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype"


def bits_and_bytes_config(configuration: Configuration) -> Any:
    """Make the `BitsAndBytesConfig` of the plan, or None."""
    if configuration.quantization is None:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    quantization = configuration.quantization
    skipped = {"llm_int8_skip_modules": list(quantization.skip_modules) or None}
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, **skipped)
    return BitsAndBytesConfig(
        **skipped,
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, quantization.compute_dtype),
        bnb_4bit_quant_storage=getattr(torch, quantization.storage_dtype),
    )


def quantize_in_place(model: Any, quantization_config: Any) -> Any:
    """Quantise a model that is already loaded, leaving it as `from_pretrained(quantization_config=...)` would.

    For GGUF files, which transformers loads but refuses to quantise while loading: the same steps, on the weights
    that are there. Source: transformers/modeling_utils.py `from_pretrained`, integrations/bitsandbytes.py.
    """
    import bitsandbytes
    from torch import nn
    from transformers.quantizers import AutoHfQuantizer

    packed = {bitsandbytes.nn.Linear4bit: bitsandbytes.nn.Params4bit, bitsandbytes.nn.Linear8bitLt: _int8_params}
    quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
    device = _training_device()
    dense = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    quantizer.preprocess_model(model=model, device_map={"": device})
    for name, module in model.named_modules():
        if (pack := packed.get(type(module))) is not None:
            source = dense.pop(name)
            module.weight = pack(source.weight.data, requires_grad=False, **module.weight.__dict__).to(device)
            module.bias = source.bias
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model.to(device)


def _int8_params(weight: Any, **settings: Any) -> Any:
    """Make an int8 weight, which finds its own scales. Source: transformers/integrations/bitsandbytes.py 5.23."""
    import bitsandbytes

    return bitsandbytes.nn.Int8Params(weight, **{name: settings[name] for name in settings if name != "SCB"})


def _training_device() -> Any:
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def announce_zero3(plan: Plan, run_folder: Path, keep_alive: list[Any]) -> None:
    """Let transformers know of ZeRO stage 3 before the model is built, so that every rank builds only its share.

    Source: transformers/integrations/deepspeed.py, `HfDeepSpeedConfig`; TrainingArguments would be too late for a
    script that loads its model first.
    """
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        return
    join_ranks(plan)
    keep_alive.append(HfDeepSpeedConfig(str(run_folder / "deepspeed.json")))


def join_ranks(plan: Plan) -> None:
    """Let the ranks of a DeepSpeed run know each other, as accelerate does by itself where there are GPUs.

    DeepSpeed asks its own communicator for the world size, and accelerate makes that one only for GPUs.
    Source: accelerate 1.15 state.py, `PartialState.__init__`, `_prepare_backend`.
    """
    import accelerate
    import deepspeed

    if plan.inputs.cluster.device.kind == "cpu":
        accelerate.PartialState(cpu=True, backend="gloo")
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    else:
        accelerate.PartialState()


def with_adapter(session: Session, model: Any) -> Any:
    """Put the planned LoRA adapter on a model, unless the script has put one on itself."""
    configuration = session.plan.configuration
    if configuration.lora is None:
        return model
    from peft import PeftModel

    made_by = "script" if isinstance(model, PeftModel) else "plan"
    session.log.record("applied", to="PeftModel", changes={}, made_by=made_by)
    return model if made_by == "script" else adapted(configuration, model)


def adapted(configuration: Configuration, model: Any) -> Any:
    """Put the planned LoRA adapter on a model."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    if configuration.quantization is not None and configuration.quantization.prepares_kbit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=configuration.gradient_checkpointing)
    return get_peft_model(model, lora_config(configuration))


def switch_checkpointing(configuration: Configuration, model: Any) -> None:
    """Switch activation checkpointing as planned; FSDP's is accelerate's to switch, inside what it shards."""
    if not configuration.gradient_checkpointing or configuration.uses_fsdp:
        model.gradient_checkpointing_disable()
        return
    model.gradient_checkpointing_enable({"use_reentrant": configuration.use_reentrant})
    if configuration.use_reentrant and configuration.lora is not None:
        model.enable_input_require_grads()  # or a checkpoint of frozen inputs has no gradient to pass on


def lora_config(configuration: Configuration) -> Any:
    """Make peft's `LoraConfig` of the plan."""
    from peft import LoraConfig

    lora = configuration.lora
    assert lora is not None, "a configuration without an adapter has no LoraConfig"
    targets = "all-linear" if lora.target_modules == ("all-linear",) else list(lora.target_modules)
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=list(lora.modules_to_save) or None,
        task_type="CAUSAL_LM",
    )


def dtype_name(dtype: Any) -> str:
    """Write a torch dtype as a configuration does."""
    return str(dtype).removeprefix("torch.")
