"""`estimate --inference`: the weights of the real model, and its keys and values."""

from __future__ import annotations

import json

import pytest

import autofit as package
from tests.cli.test_batch import CONFIG


@pytest.mark.parametrize(
    ("given", "words"),
    [({"optim": "sgd"}, "--optim"), ({"method": "lora"}, "--method"), ({"weights_dtype": "int8"}, "int8")],
    ids=str,
)
def test_what_generating_does_not_depend_on_is_refused(given, words):
    """An option of training beside --inference is refused, not ignored."""
    with pytest.raises(package.AutofitError) as refused:
        package.estimate_inference(model="gpt2", gpus="A100-80G", seq_len=8, **given)
    assert words in refused.value.message


def test_several_devices_are_refused():
    """How several devices would share a model is not modelled, and said so."""
    with pytest.raises(package.AutofitError, match="several devices"):
        package.estimate_inference(model="gpt2", gpus="2xA100-80G", seq_len=8)


@pytest.mark.parametrize("prompt_tokens", [0, 8, -1])
def test_a_prompt_that_leaves_no_answer_is_refused(prompt_tokens):
    """A sequence is prompt and answer together."""
    with pytest.raises(package.AutofitError, match="does not leave an answer"):
        package.estimate_inference(model="gpt2", gpus="A100-80G", seq_len=8, prompt_tokens=prompt_tokens)


def test_training_has_no_prompt(autofit):
    """--prompt-tokens without --inference is refused, not ignored."""
    refused = autofit("estimate", "--model", "gpt2", "--gpus", "A100-80G", "--seq-len", 8, "--prompt-tokens", 4)
    assert refused.exit_code == 2
    assert "--inference" in refused.stderr


@pytest.mark.slow
def test_weights_and_cache_are_those_of_the_real_model(tmp_path, autofit, monkeypatch):
    """The weights are the real model's bytes in bf16, and the cache what transformers' own holds after generating."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setenv("AUTOFIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    options = ("--model", path, "--gpus", "CPU-8G", "--seq-len", 12, "--micro-batch", 3)
    printed = autofit("estimate", "--inference", *options, "--json")
    assert printed.exit_code == 0, printed.stderr
    found = json.loads(printed.stdout)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "model_type"})).to(torch.bfloat16)
    cache = model(torch.ones(3, 12, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found["kv_cache_bytes"] == held
    weights = sum(parameter.nbytes for parameter in model.parameters())
    buffers = sum(buffer.numel() * 4 for buffer in model.buffers())
    assert found["weights_bytes"] == weights + buffers
    assert found["process_bytes"] is None
    assert found["prompt_bytes"] is None
    printed = autofit("estimate", "--inference", *options, "--prompt-tokens", 8, "--json")
    assert printed.exit_code == 0, printed.stderr
    reading = json.loads(printed.stdout)
    assert reading["prompt_bytes"] > held * 8 / 12
    assert reading["total_bytes"] == reading["weights_bytes"] + max(
        reading["prompt_bytes"], held + reading["growth_bytes"]
    )
