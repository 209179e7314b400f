"""The tensors that a profile lists are the model's, each once."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from autofit.errors import InputError
from autofit.memory.optimizer_steps import is_projected
from autofit.memory.tensors import tensors
from autofit.profile.trace import trace
from autofit.spec.configuration import Lora, Quantization
from autofit.spec.profile import RegimeProfile
from tests.profile.tiny import CONFIGS, a_regime


def real_model(config: dict) -> torch.nn.Module:
    """Build a model on the meta device by transformers alone."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values))


def elements_of(profile: RegimeProfile, *kinds: str) -> int:
    """Count a profile's elements of some kinds over all layers."""
    return sum(
        tensor.num_elements * (profile.num_layers if tensor.repeats else 1)
        for tensor in profile.tensors
        if tensor.kind in kinds
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parameters_are_counted_as_the_model_counts_them(name):
    """Every parameter of the real model is in the profile once, also where the head is the embedding."""
    profile = trace(name, CONFIGS[name], a_regime())
    assert profile.num_elements(trains=True) == sum(p.numel() for p in real_model(CONFIGS[name]).parameters())
    assert profile.num_elements(trains=False) == 0


def test_tied_weights_are_counted_once():
    """Tying the head to the embedding takes exactly one table away."""
    apart = trace("llama", {**CONFIGS["llama"], "tie_word_embeddings": False}, a_regime())
    tied = trace("llama", {**CONFIGS["llama"], "tie_word_embeddings": True}, a_regime())
    assert apart.num_elements() - tied.num_elements() == 1000 * 128


def test_an_adapter_trains_and_the_model_does_not():
    """A LoRA of rank r on every linear layer trains r (inputs + outputs) of each, in its own dtype."""
    profile = trace("llama", CONFIGS["llama"], a_regime(method="lora", lora=Lora(r=4)))
    hidden, kv, mlp, layers = 128, 64, 256, 8
    each_layer = 2 * (hidden + hidden) + 2 * (hidden + kv) + 2 * (hidden + mlp) + (mlp + hidden)
    assert profile.num_elements(trains=True) == 4 * each_layer * layers
    assert {tensor.dtype for tensor in profile.tensors if tensor.trains} == {"float32"}
    assert {tensor.dtype for tensor in profile.tensors if tensor.kind == "parameter"} == {"bfloat16"}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_low_rank_optimizers_project_what_transformers_would_hand_them(name):
    """The projected matrices are the weights of nn.Linear that the model names: none of GPT-2's, whose head is tied."""
    from torch import nn

    model = real_model(CONFIGS[name])
    linear = {module_name for module_name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = [p.numel() for n, p in model.named_parameters() if n.removesuffix(".weight") in linear]
    profile = trace(name, CONFIGS[name], a_regime())
    assert sorted(t.num_elements for t in tensors(profile) if is_projected(t)) == sorted(targets)
    assert bool(targets) == (name == "llama")


@pytest.mark.parametrize("double_quant", [True, False])
def test_packed_weights_are_those_that_bitsandbytes_makes(double_quant):
    """Packed bytes and scales of a linear layer equal those of bitsandbytes' own Linear4bit, tensor by tensor."""
    import bitsandbytes

    profile = trace(
        "llama",
        CONFIGS["llama"],
        a_regime(method="qlora", lora=Lora(), quantization=Quantization(double_quant=double_quant)),
    )
    real = bitsandbytes.nn.Linear4bit(
        128, 256, bias=False, quant_type="nf4", compress_statistics=double_quant, compute_dtype=torch.bfloat16
    )
    real.to("cpu")
    real(torch.zeros(1, 128, dtype=torch.bfloat16))  # a CPU packs at the first use
    state = real.weight.quant_state
    tensors = [state.absmax, state.code]
    if double_quant:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    sizes = {"float32": 4, "uint8": 1}
    ours = [t for t in profile.tensors if "up_proj" in t.name and t.kind == "quant_state"]
    assert sorted(t.num_elements * sizes[t.dtype] for t in ours) == sorted(t.nbytes for t in tensors)
    (packed,) = [t for t in profile.tensors if "up_proj" in t.name and t.kind == "quantized"]
    assert packed.num_elements == real.weight.nbytes
    assert packed.dtype == "uint8"


def test_the_head_is_not_quantised():
    """As transformers does, embedding and head stay in the dtype they were loaded in."""
    regime = a_regime(method="qlora", lora=Lora(), quantization=Quantization())
    profile = trace("llama", {**CONFIGS["llama"], "tie_word_embeddings": False}, regime)
    tables = [tensor for tensor in profile.tensors if tensor.num_elements == 1000 * 128]
    assert [(tensor.dtype, tensor.kind) for tensor in tables] == [("bfloat16", "parameter")] * 2


def test_an_unknown_architecture_is_refused_by_name():
    """A config of a type that the installed transformers does not know names both in the refusal."""
    with pytest.raises(InputError, match="no_such_model"):
        trace("x", {"model_type": "no_such_model"}, a_regime())


def test_an_adapter_on_modules_that_are_not_there_is_refused():
    """Peft's refusal reaches the user with what to do."""
    with pytest.raises(InputError, match="no_such_proj") as refused:
        trace("llama", CONFIGS["llama"], a_regime(method="lora", lora=Lora(target_modules=("no_such_proj",))))
    assert "all-linear" in str(refused.value)
