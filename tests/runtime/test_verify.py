"""What is compared before the first step, on models that transformers and peft make."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec import structs
from msgspec.structs import asdict
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

from autofit.plan import Plan
from autofit.runtime.verify import Training, check_adapter, check_all, check_steps
from autofit.spec.configuration import Configuration, Quantization
from autofit.spec.deepspeed import bucket_settings
from tests.plans import TINY_LLAMA, a_configuration, a_plan

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
    lora = structs.replace(configuration.lora, target_modules=target_modules)
    return structs.replace(configuration, lora=lora)


def adapted(kind: str, targets: str | list[str], **changes: Any) -> Any:
    """Return a model with peft's own adapter on it."""
    task = "SEQ_CLS" if "head" in kind else "CAUSAL_LM"
    settings = {"r": 8, "lora_alpha": 16, "target_modules": targets, "task_type": task}
    return get_peft_model(MODELS[kind](), LoraConfig(**settings | changes))


@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_as_planned_is_in_effect(kind: str) -> None:
    """On every linear layer that peft takes for `all-linear`, heads that it trains whole left out."""
    assert all(check.holds for check in check_adapter(adapting("all-linear"), adapted(kind, "all-linear")))


def test_another_kind_of_adapter_is_not_the_planned_one() -> None:
    """DoRA and rsLoRA are compared by name, and DoRA's magnitudes are counted among what trains."""
    plain = adapting("all-linear")
    assert plain.lora is not None
    dora = structs.replace(plain, lora=structs.replace(plain.lora, use_dora=True))
    in_effect = adapted("llama", "all-linear", use_dora=True)
    assert all(check.holds for check in check_adapter(dora, in_effect))
    failing = [check.setting for check in check_adapter(plain, in_effect) if not check.holds]
    assert failing == ["use_dora", "parameters of the adapter"]
    (rslora,) = [
        each for each in check_adapter(plain, adapted("llama", "all-linear", use_rslora=True)) if not each.holds
    ]
    assert rslora.setting == "use_rslora"


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


def training(**changes: Any) -> Training:
    """Return what would train `a_plan()` on two ranks of an unsharded tiny Llama, with what is given changed."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY_LLAMA), attn_implementation="sdpa")
    in_effect = {
        "model": model,
        "engine": type("DistributedDataParallel", (), {})(),
        "optimizer": torch.optim.AdamW(model.parameters(), fused=True),
        "accelerator": SimpleNamespace(num_processes=2, mixed_precision="bf16"),
        "rows_per_rank": 2,
        "gradient_accumulation_steps": 2,
        "uses_liger_kernel": False,
    }
    return Training(**in_effect | changes)


def zero_engine(stage: int) -> Any:
    """Return what DeepSpeed's engine says of itself; no process group is needed to say it."""
    nowhere = SimpleNamespace(device="none")
    buckets = SimpleNamespace(
        **asdict(bucket_settings(a_configuration(sharding=f"zero{stage}"), 64)) | {"stage": stage}
    )
    return SimpleNamespace(
        zero_optimization_stage=lambda: stage,
        zero_offload_optimizer=lambda: nowhere,
        zero_offload_param=lambda: nowhere,
        gradient_accumulation_steps=lambda: 2,
        bfloat16_enabled=lambda: True,
        fp16_enabled=lambda: False,
        _config=SimpleNamespace(zero_config=buckets),
    )


def failing(plan: Plan, in_effect: Training) -> dict[str, tuple[str, str]]:
    """Return the settings that differ: their planned values, and those in effect."""
    return {c.setting: (c.planned, c.in_effect) for c in check_all(plan, in_effect) if not c.holds}


def frozen_but_one() -> Training:
    """Train a single parameter."""
    made = training()
    for number, parameter in enumerate(made.model.parameters()):
        parameter.requires_grad = number == 0
    return made


def checkpointing(*, in_all: bool) -> Training:
    """Switch checkpointing on, in all layers or in all but the last."""
    made = training()
    made.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made.model.model.layers[-1].gradient_checkpointing = in_all
    return made


DIFFERENCES: dict[str, tuple[Configuration, Callable[[], Training], dict[str, tuple[str, str]]]] = {
    "micro-batch": (
        a_configuration(),
        lambda: training(rows_per_rank=3),
        {"per_device_train_batch_size": ("2", "3"), "global batch (sequences)": ("8", "12")},
    ),
    "accumulation": (
        a_configuration(),
        lambda: training(gradient_accumulation_steps=1),
        {"gradient_accumulation_steps": ("2", "1"), "global batch (sequences)": ("8", "4")},
    ),
    "world size": (
        a_configuration(),
        lambda: training(accelerator=SimpleNamespace(num_processes=4, mixed_precision="bf16")),
        {"num_processes": ("2", "4"), "global batch (sequences)": ("8", "16")},
    ),
    "ZeRO instead of DDP": (a_configuration(), lambda: training(engine=zero_engine(2)), {"sharding": ("ddp", "zero2")}),
    "precision": (
        a_configuration(),
        lambda: training(accelerator=SimpleNamespace(num_processes=2, mixed_precision="no")),
        {"mixed_precision": ("bf16", "no")},
    ),
    "dtype": (
        a_configuration(weights_dtype="bfloat16"),
        training,
        {"dtype of the weights": ("bfloat16", "float32")},
    ),
    "trained parameters": (
        a_configuration(),
        frozen_but_one,
        {"trained parameters": ("all", "1 of 21, for instance model.embed_tokens.weight")},
    ),
    "quantised modules": (
        a_configuration(method="qlora"),
        training,
        {
            "quantised linear layers": ("14 of 14", "0 of 14"),
            "trained parameters": ("only the adapter's", "all"),
            "adapter": ("lora", "none"),
            "dtype of the weights": ("bfloat16", "float32"),
        },
    ),
    "int8 modules": (
        a_configuration(method="qlora", quantization=Quantization(bits=8)),
        training,
        {
            "quantised linear layers": ("14 of 14", "0 of 14"),
            "trained parameters": ("only the adapter's", "all"),
            "adapter": ("lora", "none"),
            "dtype of the weights": ("bfloat16", "float32"),
        },
    ),
    "checkpointing": (
        a_configuration(gradient_checkpointing=True),
        training,
        {"gradient_checkpointing": ("True", "False"), "layers that checkpoint": ("2", "0")},
    ),
    "checkpointing of some layers": (
        a_configuration(gradient_checkpointing=True),
        lambda: checkpointing(in_all=False),
        {"layers that checkpoint": ("2", "1")},
    ),
    "checkpointing unplanned": (
        a_configuration(),
        lambda: checkpointing(in_all=True),
        {"gradient_checkpointing": ("False", "True")},
    ),
    "attention": (a_configuration(attention="eager"), training, {"attention": ("eager", "sdpa")}),
    "loss": (a_configuration(), lambda: training(uses_liger_kernel=True), {"use_liger_kernel": ("False", "True")}),
    "optimizer": (
        a_configuration(optim="adamw_8bit"),
        training,
        {"optim": ("adamw_8bit", "adamw_torch_fused")},
    ),
}


def test_what_is_planned_is_found_in_effect() -> None:
    """Nothing is reported of a training that is as planned, with and without ZeRO and checkpointing."""
    assert not failing(a_plan(), training())
    assert not failing(a_plan(a_configuration(gradient_checkpointing=True)), checkpointing(in_all=True))
    sharded = a_configuration(sharding="zero2", weights_dtype="float32", mixed_precision="bf16")
    found = failing(a_plan(sharded), training(engine=zero_engine(2)))
    assert found == {"dtype of the weights": ("bfloat16", "float32")}  # which DeepSpeed itself would have converted


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_each_difference_is_named_and_nothing_else(difference: str) -> None:
    """Whatever of a training is not as planned is reported, with both values, and all else holds."""
    planned, in_effect, expected = DIFFERENCES[difference]
    assert failing(a_plan(planned), in_effect()) == expected
