"""Optimizers that use up each gradient as soon as it is made, held to real hooks on a CPU."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from autofit.memory.tape import phase_peaks
from autofit.profile.step import forward
from autofit.profile.trace import trace
from autofit.runtime.live_bytes import LiveBytes
from tests.profile.tiny import CONFIGS, a_regime

NUM_SEQUENCES, TOKENS = 2, 128
LOGITS_BYTES = NUM_SEQUENCES * TOKENS * CONFIGS["llama"]["vocab_size"] * 4
REGIMES = {
    "autocast": a_regime(weights_dtype="float32", autocast="bf16"),
    "fp32, checkpointing": a_regime(weights_dtype="float32", gradient_checkpointing=True),
}


def seen_by_hooks(config, regime):
    """Train a real model for two steps; return the bytes alive, without weights, at each hook of the second."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **values, use_cache=False)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation="sdpa").train()
    if regime.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    names = {parameter: name for name, parameter in model.named_parameters()}
    highest = defaultdict(int)
    with LiveBytes() as live:
        live.count_existing()

        def use_up(parameter):
            live.add(parameter.grad)
            highest[phase_of(names[parameter])] = max(highest[phase_of(names[parameter])], live.now_bytes - before)
            parameter.grad = None

        for parameter in names:
            parameter.register_post_accumulate_grad_hook(use_up)
        for _ in range(2):
            highest.clear()
            before = live.now_bytes
            ids = torch.randint(0, 8, (NUM_SEQUENCES, TOKENS))
            outputs = forward(model, {"input_ids": ids, "labels": ids}, regime)
            loss = outputs["loss"]
            del outputs, ids
            loss.backward()
            del loss
    return dict(highest)


def phase_of(name):
    """Name the phase in which a parameter's gradient is made."""
    return "layer_backward" if ".layers." in name else "embedding_backward" if "embed" in name else "head_backward"


@pytest.mark.slow
@pytest.mark.parametrize("name", REGIMES)
def test_what_is_alive_when_a_gradient_is_used_up(name):
    """The most that hooks find in each phase of backward: what made the gradient is gone, its bf16 copy too.

    Where one operator makes two gradients, what it frees may be counted still: the logits' gradient at the head.
    """
    regime = REGIMES[name]
    profile = trace("tiny", CONFIGS["llama"], regime)
    found, seen = defaultdict(float), seen_by_hooks(CONFIGS["llama"], regime)
    for peak in phase_peaks(profile, [NUM_SEQUENCES], TOKENS):
        if peak.updated_gradients.size:
            found[peak.name] = max(found[peak.name], float(np.max(peak.at_updates)))
    if regime.autocast == "no":
        assert found["head_backward"] == pytest.approx(seen["head_backward"] + LOGITS_BYTES, rel=2e-4)
        del found["head_backward"], seen["head_backward"]
    assert found == pytest.approx(seen, rel=2e-4)
