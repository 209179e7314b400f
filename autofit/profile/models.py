"""The user's own model, built from the installed libraries on the meta device."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig

from autofit.errors import InputError
from autofit.profile.adapters import apply_method
from autofit.profile.dtypes import DTYPES
from autofit.profile.kernel_packages import refuse_kernel_packages
from autofit.profile.layers import Depth, Signature, layer_stacks, shallow_depth, signatures
from autofit.profile.parts import text_config
from autofit.profile.tasks import auto_class, task_of
from autofit.spec.profile import Regime

TRAINER_SETS_USE_CACHE = int(transformers.__version__.split(".")[0]) >= 5
"""Whether Trainer switches the cache of keys and values off. Before, models that do not do so themselves under
checkpointing (gpt_bigcode) keep every layer's in what they return; a loop of one's own is taken to switch it off.

Source: transformers/trainer.py 5.23, Trainer.__init__ (`config.use_cache = args.use_cache`)."""
DEPTH_NAMES = ("num_hidden_layers", "decoder_layers", "encoder_layers", "num_decoder_layers")
"""What configs call the number of layers where `num_hidden_layers` is not an alias of it."""
EXPERT_NAMES = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")


def load_config(config: dict[str, Any], num_layers: int | None, regime: Regime) -> Any:
    """Make the transformers config object, with `num_layers` layers (None: as many as it has).

    Raises:
        InputError: the installed transformers does not know the architecture.
    """
    values = {key: value for key, value in copy.deepcopy(config).items() if key != "auto_map"}
    model_type = values.pop("model_type", None)
    try:
        made = AutoConfig.for_model(model_type, **values)
    except Exception as error:  # each config class checks its values in its own way
        raise InputError(
            f"transformers {transformers.__version__} cannot read the config of model_type {model_type!r}: {error}",
            to_fix="install a release of transformers that knows this architecture",
        ) from error
    text = text_config(made)
    if regime.keeps_outputs or TRAINER_SETS_USE_CACHE:
        for part in (made, text):
            part.use_cache = False
    made._attn_implementation = "sdpa" if regime.attention == "flash_attention_2" else regime.attention
    if task_of(made, regime.task) == "sequence-classification" and getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0  # without one transformers classifies single sequences only
    if num_layers is not None:
        set_depth(text, num_layers)
    return made


def set_depth(config: Any, num_layers: int) -> None:
    """Give a text config fewer layers: its first, in every list that holds a value for each."""
    before = getattr(config, "num_hidden_layers", None)
    for name in DEPTH_NAMES:
        if hasattr(config, name):
            try:
                setattr(config, name, num_layers)
            except NotImplementedError:  # an encoder-decoder's alias that names two depths
                continue
    for name, values in list(vars(config).items()):
        if isinstance(values, (list, tuple)) and len(values) == before:
            setattr(config, name, values[:num_layers])


def width(config: Any) -> int:
    """Return the hidden size, whatever the config calls it (DeepSpeed's buckets depend on it)."""
    text = text_config(config)
    return int(next(getattr(text, name) for name in ("hidden_size", "d_model", "n_embd") if hasattr(text, name)))


def num_experts(config: Any) -> int | None:
    """Return how many routed experts a layer has, whatever the config calls them; None where it has none.

    It may be said in a part of the config (dbrx's `ffn_config`).
    """
    text = text_config(config)
    parts = [text, *(value for value in vars(text).values() if isinstance(value, transformers.PretrainedConfig))]
    found = [getattr(part, name, None) for part in parts for name in EXPERT_NAMES]
    return next((number for number in found if isinstance(number, int) and number > 1), None)


def choose_depth(config: dict[str, Any], whole: Any, regime: Regime) -> tuple[Any, str, Depth] | None:
    """Return a config with few layers, the name of the stack that it cuts, and how these stand for all of them.

    None where the whole model has to be traced: its layers follow no pattern, or the config does not give its first
    layers alone.

    Raises:
        InputError: the whole model cannot be built.
    """
    stack, kinds = _kinds(build_plain(whole, regime), whole, regime)
    depth = shallow_depth(kinds)
    if depth is None:
        return None
    try:
        shallow = load_config(config, depth.num_traced, regime)
        shallow_stack, shallow_kinds = _kinds(build_plain(shallow, regime), shallow, regime)
    except Exception:  # noqa: BLE001 - a config that cannot be cut is checked by its own class, in its own way
        return None
    order = depth.real_order()
    expected = [kinds[order.index(layer)] for layer in range(depth.num_traced)]
    return (shallow, stack, depth) if (shallow_stack, shallow_kinds) == (stack, expected) else None


def _kinds(model: nn.Module, config: Any, regime: Regime) -> tuple[str, list[Signature]]:
    name, layers = layer_stacks(model)[0]
    return name, signatures(layers, text_config(config), regime.checkpoint_every_n_layers)


def build_plain(config: Any, regime: Regime) -> nn.Module:
    """Build the model for the regime's task on the meta device, in the dtypes in which `from_pretrained` loads it.

    Raises:
        InputError: transformers has no model for the config and the task, or not with this attention.
    """
    parameters = inspect.signature(transformers.PreTrainedModel._from_config).parameters
    is_named_dtype = "dtype" in parameters or int(transformers.__version__.split(".")[0]) >= 5
    dtype = {"dtype" if is_named_dtype else "torch_dtype": DTYPES[regime.weights_dtype]}
    task = task_of(config, regime.task)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model: nn.Module = auto_class(task).from_config(config, **dtype)
        except (ValueError, ImportError) as error:
            raise _cannot_build(config, task, regime, error) from error
    if regime.keeps_fp32:
        _make_fp32(model, DTYPES[regime.weights_dtype])
    return model


def _make_fp32(model: nn.Module, dtype: torch.dtype) -> None:
    """Put into fp32 what transformers loads so beside 16-bit weights; a model made from a config has it in 16 bits.

    Source: transformers/modeling_utils.py 5.23, `_get_dtype_plan`, and core_model_loading.py,
    convert_and_load_state_dict_in_model: names are searched for as patterns, and hold for buffers too.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    in_checkpoint = model.state_dict()
    for name in tensors.keys() & in_checkpoint.keys():
        if tensors[name].is_floating_point() and is_loaded_in_fp32(model, name, dtype):
            tensors[name].data = tensors[name].data.to(torch.float32)


def is_loaded_in_fp32(model: nn.Module, name: str, dtype: torch.dtype) -> bool:
    """Tell whether a class keeps a tensor in fp32 where a 16-bit dtype is asked for.

    Before transformers 5 a part of the dotted name had to be the same as what the class names.
    Source: transformers 4.57 modeling_utils.py, from_pretrained (`keep_in_fp32_regex`).
    """
    named = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        named |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if hasattr(model, "_get_dtype_plan"):
        return any(re.search(pattern.replace("*", ".*"), name) for pattern in named)
    return any(re.search(rf"(^|\.){pattern}($|\.)", name) for pattern in named)


def _cannot_build(config: Any, task: str, regime: Regime, error: Exception) -> InputError:
    """Say what to do: an attention that a class does not have is refused by transformers where it is asked for."""
    if "attention implementation" in str(error) or "scaled_dot_product" in str(error):
        first = str(error).split(". ")[0]
        return InputError(
            f"transformers {transformers.__version__} has no {regime.attention} attention for {config.model_type!r}, "
            f"and a run that asks for it ends with the same error: {first}",
            to_fix="use --attention sdpa or eager"
            if regime.attention == "flex_attention"
            else "leave --attention out, or use --attention eager: transformers takes it where none is asked for",
        )
    return InputError(
        f"transformers {transformers.__version__} cannot build a {task} model of type {config.model_type!r} "
        f"with {regime.attention} attention: {error}",
        to_fix="choose another task (--task) or attention (--attention), or correct the config",
    )


def build(config: Any, regime: Regime) -> nn.Module:
    """Build the model, quantised and with its adapter, on the meta device.

    Raises:
        InputError: transformers has no such model for the config, peft no target for the adapter, or the layers run
            CUDA kernels of a package that cannot be traced.
    """
    model = build_plain(config, regime)
    refuse_kernel_packages(model, regime.device)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = apply_method(model, regime)
    return model
