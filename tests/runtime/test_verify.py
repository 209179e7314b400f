"""What is compared before the first step, on models that transformers and peft make."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    TrainingArguments,
)

from autofit.runtime.verify import check_adapter, check_steps
from autofit.spec.configuration import Configuration
from tests.plans import a_configuration, a_plan

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
MODELS: dict[str, Any] = {
    "llama": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**TINY)),
    "mixtral": lambda: AutoModelForCausalLM.from_config(MixtralConfig(**TINY, num_local_experts=4)),
    "gpt2": lambda: AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)),
    "bert head": lambda: AutoModelForSequenceClassification.from_config(BertConfig(**TINY)),
}


def adapting(*target_modules: str) -> Configuration:
    """Return LoRA on the given modules."""
    configuration = a_configuration(method="lora")
    assert configuration.lora is not None
    lora = dataclasses.replace(configuration.lora, target_modules=target_modules)
    return dataclasses.replace(configuration, lora=lora)


def adapted(kind: str, targets: str | list[str], **changes: Any) -> Any:
    """Return a model with peft's own adapter on it."""
    task = "SEQ_CLS" if "head" in kind else "CAUSAL_LM"
    settings = {"r": 8, "lora_alpha": 16, "target_modules": targets, "task_type": task}
    return get_peft_model(MODELS[kind](), LoraConfig(**settings | changes))


@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_as_planned_is_in_effect(kind: str) -> None:
    """On every linear layer that peft takes for `all-linear`, heads that it trains whole left out."""
    assert all(check.holds for check in check_adapter(adapting("all-linear"), adapted(kind, "all-linear")))


def test_an_adapter_on_fewer_layers_is_not_the_planned_one() -> None:
    """A script that puts its adapter on two of seven modules, or on one layer of two, differs in layers and in size."""
    planned = adapting("all-linear")
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for other in (adapted("llama", ["q_proj", "v_proj"]), adapted("llama", every, layers_to_transform=[0])):
        failing = {check.setting: check for check in check_adapter(planned, other) if not check.holds}
        assert failing.keys() == {"linear layers with an adapter", "parameters of the adapter"}
        assert failing["linear layers with an adapter"].planned == "14"
    by_hand = 2 * 8 * 2 * (32 + 32)  # two layers, rank 8, two modules of 32 x 32
    found = {
        check.setting: check
        for check in check_adapter(adapting("q_proj", "v_proj"), adapted("llama", ["q_proj", "v_proj"]))
    }
    assert found["parameters of the adapter"].planned == found["parameters of the adapter"].in_effect == str(by_hand)


@pytest.mark.parametrize(
    ("settings", "samples", "steps", "holds"),
    [
        ({"max_steps": 7}, 64, 7, True),
        ({"max_steps": 7}, 64, 8, False),
        ({"num_train_epochs": 3}, 64, 24, True),
        ({"num_train_epochs": 3}, 65, 27, True),  # 8 x 8 and one more, each time
        ({"num_train_epochs": 0.5}, 64, 4, True),
        ({"num_train_epochs": 3}, 64, 48, False),
        ({"num_train_epochs": 3}, 5, 3, True),
    ],
)
def test_the_optimizer_steps_are_those_of_the_scripts_settings(
    settings: dict[str, Any], samples: int, steps: int, holds: bool, tmp_path: Any
) -> None:
    """At a global batch of 8: max_steps as it is said, otherwise epochs over the data."""
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **settings)
    trainer = SimpleNamespace(args=arguments, train_dataset=range(samples))
    assert [check.holds for check in check_steps(a_plan(), trainer, steps)] == [holds]


def test_the_steps_of_data_without_a_length_are_not_compared(tmp_path: Any) -> None:
    """A stream has no number of steps to compare, unless max_steps says it."""
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    assert check_steps(a_plan(), SimpleNamespace(args=arguments, train_dataset=iter(())), 9) == []
