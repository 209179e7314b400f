"""What generating text needs: the weights and the cache of keys and values, and a prompt's activations.

The cache follows from a config.json alone, the activations from a traced forward pass over the prompt.

Source: transformers/cache_utils.py 5.23, DynamicCache and get_layer_types_and_kwargs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from autofit.errors import InputError
from autofit.memory.inputs import TOKEN_ID_BYTES
from autofit.memory.tape import phase_peaks
from autofit.spec.configuration import Dtype
from autofit.spec.profile import RegimeProfile
from autofit.units import BYTES_PER_ELEMENT

FULL = "full_attention"
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Layer types that keep a window, and the config's name for its length."""
LOGIT_BYTES = 4
WINDOW_IN_EVERY_LAYER = ("ministral", "mistral", "mixtral", "phi3", "starcoder2")
"""Model types whose `sliding_window` holds for every layer without `layer_types`."""
SQUARE_HEADS = ("bloom", "codegen", "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "mpt", "opt", "stablelm")
"""Model types in which, where a config names no `num_key_value_heads`, every query head has keys of its own."""


class InferenceMemory(Struct, frozen=True, kw_only=True):
    """What one device holds while it generates."""

    weights_bytes: int
    kv_cache_bytes: int
    growth_bytes: int
    """For a moment, while a token is added."""
    prompt_bytes: int | None = None
    """While the prompt is read, its keys and values included; None: how long it is was not said."""

    @property
    def total_bytes(self) -> int:
        """The most at one time; of a prompt that nobody named, activations come on top."""
        answering = self.kv_cache_bytes + self.growth_bytes
        return self.weights_bytes + max(answering, self.prompt_bytes or 0)


def inference_memory(
    weights_bytes: int,
    config: Mapping[str, Any],
    *,
    batch: int,
    tokens: int,
    dtype: Dtype = "bfloat16",
    prompt_bytes: int | None = None,
) -> InferenceMemory:
    """Add up what generating holds.

    Args:
        weights_bytes: of the parameters and buffers as they are stored.
        config: content of config.json.
        batch: sequences at one time (times beams).
        tokens: prompt and answer together.
        dtype: that keys and values are computed in.
        prompt_bytes: see `prompt_bytes`.

    Raises:
        InputError: what the architecture caches does not follow from its config.
    """
    return InferenceMemory(
        weights_bytes=weights_bytes,
        kv_cache_bytes=kv_cache_bytes(config, batch=batch, tokens=tokens, dtype=dtype),
        growth_bytes=growth_bytes(config, batch=batch, tokens=tokens, dtype=dtype),
        prompt_bytes=prompt_bytes,
    )


def prompt_bytes(profile: RegimeProfile, *, batch: int, prompt_tokens: int) -> int:
    """Return the most bytes above the weights while every sequence's prompt is read, its keys and values included.

    `generate` holds a mask of all tokens beside what is traced.

    Args:
        profile: of a regime that generates.
        batch: sequences at one time (times beams).
        prompt_tokens: of each, padding included.
    """
    beside = batch * prompt_tokens * TOKEN_ID_BYTES
    return int(max(peak.kept[0] for peak in phase_peaks(profile, [batch], prompt_tokens))) + beside


def kv_cache_bytes(config: Mapping[str, Any], *, batch: int, tokens: int, dtype: Dtype = "bfloat16") -> int:
    """Return the bytes of a DynamicCache that holds so many tokens of each sequence, after the last was added.

    A layer with a window keeps its last tokens: the window, as the storage has one token more than the view shows.
    While a prompt is read, such a layer holds all of it for the moment.

    Args:
        config: content of config.json.
        batch: sequences at one time (times beams).
        tokens: prompt and answer together.
        dtype: that keys and values are computed in.

    Raises:
        InputError: what the architecture caches does not follow from its config.
    """
    return kv_cache_elements(config, batch=batch, tokens=tokens) * BYTES_PER_ELEMENT[dtype]


def growth_bytes(config: Mapping[str, Any], *, batch: int, tokens: int, dtype: Dtype = "bfloat16") -> int:
    """Return what adding a token takes for a moment: a layer's keys are made anew, beside those of before.

    Of a compressed cache it makes the keys and values of every head, and then whole keys, for all tokens.
    The fp32 logits of the token before are there meanwhile, and those of the new one when it ends; and, always, the
    ids of all tokens and the mask of which are padding.
    Source: transformers/cache_utils.py 5.23, DynamicLayer.update; generation/utils.py, `_sample`;
    models/deepseek_v3/modeling_deepseek_v3.py, DeepseekV3Attention.forward.

    Args:
        config: content of config.json.
        batch: sequences at one time (times beams).
        tokens: prompt and answer together.
        dtype: that keys and values are computed in.

    Raises:
        InputError: what the architecture caches does not follow from its config.
    """
    text = _text_config(config)
    widest = max(min(tokens, window or tokens) for window in _windows(text))
    is_latent = bool(text.get("kv_lora_rank"))
    of_keys = _expanded(text) if is_latent else _elements_per_token(text) // 2
    logits = 2 * _number(text, "vocab_size") * LOGIT_BYTES
    return batch * (widest * of_keys * BYTES_PER_ELEMENT[dtype] + logits + 2 * tokens * TOKEN_ID_BYTES)


def kv_cache_elements(config: Mapping[str, Any], *, batch: int, tokens: int) -> int:
    """Return the keys and values that it holds, in elements; see `kv_cache_bytes`."""
    text = _text_config(config)
    return batch * _elements_per_token(text) * sum(min(tokens, window or tokens) for window in _windows(text))


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    if config.get("is_encoder_decoder"):
        raise _unknown(config, "an encoder-decoder also caches what the encoder made")
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _windows(config: Mapping[str, Any]) -> list[int | None]:
    """The most tokens that each layer keeps, None where it keeps all."""
    num_layers = _number(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = [_kind_of_every_layer(config)] * num_layers
    if config.get("num_kv_shared_layers"):
        raise _unknown(config, "some of its layers read the keys of others (num_kv_shared_layers)")
    unknown = sorted({kind for kind in kinds if kind != FULL and kind not in WINDOWS})
    if unknown:
        raise _unknown(config, f"layers of type {', '.join(unknown)} keep a state of another shape")
    return [None if kind == FULL else _number(config, WINDOWS[kind]) for kind in kinds]


def _kind_of_every_layer(config: Mapping[str, Any]) -> str:
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return FULL
    if config.get("model_type") in WINDOW_IN_EVERY_LAYER:
        return "sliding_attention"
    raise _unknown(config, "it has a sliding_window, and no layer_types say in which layers")


def _elements_per_token(config: Mapping[str, Any]) -> int:
    """Keys and values of one token in one layer.

    With latent attention (MLA) the compressed latent and the shared rotated key are cached.
    Source: transformers/models/deepseek_v3/modeling_deepseek_v3.py 5.23, DeepseekV3Attention.forward.
    """
    if config.get("kv_lora_rank"):
        return _number(config, "kv_lora_rank") + _number(config, "qk_rope_head_dim")
    if config.get("global_head_dim") or config.get("num_global_key_value_heads"):
        raise _unknown(config, "its layers of full attention have heads of another size")
    heads = _number(config, "num_attention_heads", "n_head", "n_heads", "num_heads")
    head_dim = config.get("head_dim") or _number(config, "hidden_size", "n_embd", "d_model") // heads
    return 2 * _key_value_heads(config, heads) * head_dim


def _expanded(config: Mapping[str, Any]) -> int:
    """Return the elements of one token, of every head, that latent attention makes of what it caches.

    Keys and values at once, then keys with their rotated part, and values in a tensor of their own, as eager attention
    and some kernels ask for it.
    """
    of_keys, of_values = _number(config, "qk_nope_head_dim"), _number(config, "v_head_dim")
    together = of_keys + of_values
    rotated = of_keys + _number(config, "qk_rope_head_dim")
    return _number(config, "num_attention_heads") * (together + rotated + of_values)


def _key_value_heads(config: Mapping[str, Any], heads: int) -> int:
    if config.get("num_key_value_heads"):
        return int(config["num_key_value_heads"])
    if config.get("model_type") == "falcon":
        grouped = int(config.get("num_kv_heads") or heads)
        return grouped if config.get("new_decoder_architecture") or not config.get("multi_query", True) else 1
    if config.get("model_type") == "gpt_bigcode":
        return 1 if config.get("multi_query", True) else heads
    if config.get("model_type") in SQUARE_HEADS:
        return heads
    raise _unknown(config, "it names no num_key_value_heads")


def _number(config: Mapping[str, Any], *names: str) -> int:
    found = next((config[name] for name in names if config.get(name) is not None), None)
    if found is None:
        raise _unknown(config, f"it has no {names[0]}")
    return int(found)


def _unknown(config: Mapping[str, Any], reason: str) -> InputError:
    return InputError(
        f"the cache of model_type {config.get('model_type')!r} cannot be worked out from its config: {reason}.",
        to_fix="give the config.json of a decoder with full or sliding attention, as transformers saves it",
    )
