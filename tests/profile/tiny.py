"""Tiny models to trace, deeper than the tracer needs, and what a trace of every layer says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from autofit.profile.models import load_config
from autofit.profile.recorder import RawSegment
from autofit.profile.trace import trace_steps
from autofit.runtime.live_bytes import LiveBytes
from autofit.spec.configuration import Lora, Quantization
from autofit.spec.profile import Regime

_SHARED: dict[str, Any] = {"vocab_size": 1000}
_GROUPED = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_GROUPED, **_SHARED},
    "qwen3": {"model_type": "qwen3", **_GROUPED, **_SHARED, "head_dim": 32, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 128, "n_layer": 8, "n_head": 4, "n_positions": 2048, **_SHARED},
}


def a_regime(**changes: Any) -> Regime:
    """Full fine-tuning in pure bf16 on a CPU rank, with what is given changed."""
    values: dict[str, Any] = {
        "method": "full",
        "quantization": None,
        "lora": None,
        "weights_dtype": "bfloat16",
        "adapter_dtype": "float32",
        "autocast": "no",
        "gradient_checkpointing": False,
        "use_reentrant": False,
        "attention": "sdpa",
        "device": "cpu",
    }
    return Regime(**{**values, **changes})


REGIMES = {
    "full": a_regime(),
    "autocast, checkpointing": a_regime(weights_dtype="float32", autocast="bf16", gradient_checkpointing=True),
    "eager lora": a_regime(method="lora", lora=Lora(), attention="eager"),
    "qlora, checkpointing": a_regime(
        method="qlora", lora=Lora(), quantization=Quantization(), autocast="bf16", gradient_checkpointing=True
    ),
}


def every_layer_traced(config: dict[str, Any], regime: Regime, points: list[tuple[int, int]]) -> list[list[RawSegment]]:
    """Trace the whole model, every layer of it, at each of `points`."""
    whole = load_config(config, None, regime)
    return trace_steps(whole, regime, points)[0]


def tool(name: str) -> Any:
    """Load a script of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def highest_alive(segments: list[RawSegment]) -> int:
    """Play a trace's births and deaths, one by one; return the most bytes that were alive."""
    alive = highest = 0
    for segment in segments:
        for event in segment.events:
            alive += event[0] if len(event) == 2 else -event[0]
            highest = max(highest, alive)
    return highest


def real_peak(
    config: dict[str, Any], size: tuple[int, int], *, attention: str = "sdpa", gradient_checkpointing: bool = False
) -> int:
    """Train a real model for two steps on this machine; return the most bytes alive in the second above the first."""
    torch.manual_seed(0)
    values = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **values, use_cache=False)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16, attn_implementation=attention).train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    counter, peak = LiveBytes(), 0
    with counter:
        for tensor in [*model.parameters(), *model.buffers()]:
            counter.add(tensor)
        for _ in range(2):
            before = counter.now_bytes
            counter.reset_peak()
            ids = torch.randint(0, 8, size)
            loss = model(input_ids=ids, labels=ids)["loss"]
            del ids
            loss.backward()
            del loss
            peak = counter.peak_bytes - before
            model.zero_grad()
    return peak
