"""The cache's arithmetic against the cache itself: models of the installed transformers read and answer on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import AutoConfig, AutoModelForCausalLM

from autofit.errors import InputError
from autofit.memory.inference import inference_memory, kv_cache_bytes, prompt_bytes
from autofit.profile.trace import trace
from autofit.runtime.live_bytes import LiveBytes
from tests.profile.tiny import a_regime

BATCH, PROMPT, ANSWER = 2, 20, 3
WINDOW = 8
_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama, grouped queries": {"model_type": "llama", **_GROUPED},
    "llama, a key for each query": {"model_type": "llama", **_SMALL},
    "gpt2": {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "qwen3, wide heads": {"model_type": "qwen3", **_GROUPED, "head_dim": 16},
    "mistral, a window everywhere": {"model_type": "mistral", **_GROUPED, "head_dim": 8, "sliding_window": WINDOW},
    "mistral, no window": {"model_type": "mistral", **_GROUPED, "head_dim": 8, "sliding_window": None},
    "gemma3, windows in some layers": {
        "model_type": "gemma3_text",
        **_GROUPED,
        "head_dim": 16,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "falcon, one key for all": {"model_type": "falcon", **_SMALL, "multi_query": True, "alibi": False},
    "gpt_bigcode": {
        "model_type": "gpt_bigcode",
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
    },
    "deepseek, a latent": {
        "model_type": "deepseek_v3",
        **_SMALL,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 3,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    },
}


def cached_bytes(config: dict[str, Any]) -> int:
    """Let a real model read a prompt and a few tokens more; return the bytes of its cache's storages."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **values, use_cache=True), dtype=torch.bfloat16
    ).eval()
    cache = None
    with torch.no_grad():
        for length in (PROMPT, *[1] * ANSWER):
            out = model(torch.zeros(BATCH, length, dtype=torch.long), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage() for layer in cache.layers for t in (layer.keys, layer.values)
    }
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cache_holds_as_many_bytes_as_the_config_says(name):
    """Keys and values of every architecture, byte for byte, as a DynamicCache holds them after a few tokens."""
    assert kv_cache_bytes(CONFIGS[name], batch=BATCH, tokens=PROMPT + ANSWER) == cached_bytes(CONFIGS[name])


def test_a_published_cache():
    """Llama 2 7B keeps half a MiB for each token in 16 bits: 2 GiB for a context of 4096."""
    llama = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    assert kv_cache_bytes(llama, batch=1, tokens=4096) == 2 * 2**30


def test_what_generating_holds_is_weights_and_cache():
    """Twice the sequences take twice the cache and what makes it grow, and the weights once."""
    config = CONFIGS["llama, grouped queries"]
    one, two = (inference_memory(1000, config, batch=batch, tokens=9, dtype="float16") for batch in (1, 2))
    assert two.total_bytes - one.total_bytes == one.kv_cache_bytes + one.growth_bytes == one.total_bytes - 1000


@pytest.mark.parametrize("name", ["llama, grouped queries", "deepseek, a latent"])
def test_a_real_generation_takes_what_is_said(name):
    """The most bytes alive while the library's own `generate` answers a short prompt at length, to 3 %.

    With eager attention, as a CPU's fused kernel makes fp32 copies of keys that are not as wide as values.
    """
    config = {**CONFIGS[name], "hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 1024}
    if "kv_lora_rank" in config:
        config |= {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
    values = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **values, use_cache=True),
        dtype=torch.bfloat16,
        attn_implementation="eager" if "kv_lora_rank" in config else "sdpa",
    ).eval()
    batch, answer = 32, 200
    with LiveBytes() as live:
        live.count_existing()
        weights = live.now_bytes
        prompt = torch.zeros(batch, 1, dtype=torch.long)
        sizes = {"max_new_tokens": answer, "min_new_tokens": answer}
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **sizes)
    said = inference_memory(weights, config, batch=batch, tokens=answer)
    assert said.total_bytes == pytest.approx(live.peak_bytes, rel=0.03)


LONGER = {"hidden_size": 128, "num_hidden_layers": 8, "vocab_size": 1000, "max_position_embeddings": 1024}
PROMPTS: dict[str, dict[str, Any]] = {
    "llama, grouped queries": {**CONFIGS["llama, grouped queries"], **LONGER},
    "gpt2": {**CONFIGS["gpt2"], "n_embd": 128, "n_layer": 8, "n_positions": 1024, "vocab_size": 1000},
    "gemma3, windows in some layers": {
        **CONFIGS["gemma3, windows in some layers"],
        **LONGER,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"] * 2,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPTS)
def test_reading_a_long_prompt_takes_what_is_said(name):
    """The most bytes alive while `generate` reads prompts that outweigh the model, above its weights, to 0.3 %."""
    config, batch, prompt_tokens = PROMPTS[name], 8, 480
    values = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **values, use_cache=True), dtype=torch.bfloat16
    ).eval()
    with LiveBytes() as live:
        live.count_existing()
        weights = live.now_bytes
        prompt = torch.randint(5, 64, (batch, prompt_tokens))
        sizes = {"max_new_tokens": 4, "min_new_tokens": 4}
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **sizes)
        measured = live.peak_bytes - weights
    regime = replace(a_regime(), generates=True)
    profile = trace(name, {**config, "architectures": [type(model).__name__]}, regime, sequence_tokens=prompt_tokens)
    reading = prompt_bytes(profile, batch=batch, prompt_tokens=prompt_tokens)
    said = inference_memory(weights, config, batch=batch, tokens=prompt_tokens + 4, prompt_bytes=reading)
    assert measured > weights
    assert said.total_bytes - weights == pytest.approx(measured, rel=0.003)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder"),
        ({"model_type": "strange", **_SMALL}, "num_key_value_heads"),
        ({"model_type": "gemma2", **_GROUPED, "sliding_window": 8}, "sliding_window"),
        ({"model_type": "jamba", **_GROUPED, "layer_types": ["linear_attention"] * 3}, "linear_attention"),
        ({"model_type": "llama"}, "num_attention_heads"),
    ],
)
def test_a_cache_that_does_not_follow_from_the_config_is_refused(config, reason):
    """Other states, and counts that a config leaves to the library's defaults, are not guessed."""
    with pytest.raises(InputError, match=reason):
        kv_cache_bytes(config, batch=1, tokens=1)
