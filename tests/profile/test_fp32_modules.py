"""Modules that transformers loads in fp32 beside 16-bit weights, against checkpoints that it really loads."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from msgspec.structs import replace
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, BitsAndBytesConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

from autofit.memory.tape import BIRTH_FIELDS
from autofit.profile.models import build, load_config
from autofit.profile.parameters import static_tensors
from autofit.profile.trace import trace_steps
from autofit.runtime.live_bytes import LiveBytes
from autofit.spec.configuration import Configuration, Lora, Quantization
from autofit.spec.fp32_modules import IN_16_BITS, IN_FP16, dtypes_with_fp32_modules
from autofit.spec.hardware import Device
from autofit.spec.profile import Regime
from autofit.spec.regimes import regime_of
from autofit.units import GIB
from tests.profile.tiny import a_regime

SIZE = (2, 192)
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}
T5 = {
    "model_type": "t5",
    "d_model": 64,
    "d_ff": 128,
    "num_layers": 3,
    "num_heads": 4,
    "d_kv": 16,
    "vocab_size": 500,
    "is_encoder_decoder": True,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "architectures": ["T5ForConditionalGeneration"],
}
DEEPSEEK = {
    "model_type": "deepseek_v4",
    **_SIZES,
    "n_routed_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
GPT_OSS = {"model_type": "gpt_oss", **_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
QLORA: dict[str, Any] = {"method": "qlora", "lora": Lora(), "quantization": Quantization(compute_dtype="float16")}
CASES: dict[str, tuple[dict[str, Any], Regime]] = {
    "t5 in fp16": (T5, a_regime(weights_dtype="float16")),
    "t5 in four bits": (T5, a_regime(weights_dtype="float16", **QLORA)),
    "norms and sinks in bf16": (DEEPSEEK, a_regime(attention="eager")),
    "norms in fp16": (GPT_OSS, a_regime(weights_dtype="float16", attention="eager")),
}


def loaded(config: dict[str, Any], regime: Regime, folder: Path) -> torch.nn.Module:
    """Save a model with random weights in fp32, and load it as a script does."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    auto = AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM
    auto.from_config(AutoConfig.for_model(config["model_type"], **values)).save_pretrained(folder)
    dtype = getattr(torch, regime.weights_dtype)
    packs = regime.quantization is not None
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype) if packs else None
    return auto.from_pretrained(
        folder, dtype=dtype, quantization_config=quantization, attn_implementation=regime.attention
    )


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_the_dtype_in_which_it_is_loaded(case, tmp_path):
    """Those that are not packed, by name, and some of them fp32: as `from_pretrained` leaves them."""
    config, regime = CASES[case]
    keeping = replace(regime, keeps_fp32=True)
    real = {name: each.dtype for name, each in loaded(config, regime, tmp_path).named_parameters()}
    unpacked = {name: dtype for name, dtype in real.items() if dtype.is_floating_point}
    made = build(load_config(config, None, keeping), keeping)
    traced = {name.removeprefix("base_model.model."): each.dtype for name, each in made.named_parameters()}
    traced = {name.replace(".base_layer", ""): dtype for name, dtype in traced.items()}
    assert unpacked == {name: traced[name] for name in unpacked}
    assert torch.float32 in unpacked.values()
    assert getattr(torch, regime.weights_dtype) in unpacked.values()


@pytest.mark.parametrize("case", ["t5 in fp16", "norms and sinks in bf16", "norms in fp16"])
def test_what_an_engine_gathers_in_16_bits_is_marked_as_loaded_in_fp32(case, tmp_path):
    """Exactly those parameters that `from_pretrained` leaves in fp32; all are traced in the dtype that computes."""
    config, regime = CASES[case]
    gathers = replace(regime, weights_dtype="bfloat16", stores_fp32_beside=regime.weights_dtype)
    real = {name: each.dtype for name, each in loaded(config, regime, tmp_path).named_parameters()}
    built = build(load_config(config, None, gathers), gathers)
    marked = dict(static_tensors(built, gathers.stores_fp32_beside))
    assert {name: marked[name].loaded_in_fp32 for name in real} == {
        name: dtype == torch.float32 for name, dtype in real.items()
    }
    assert {marked[name].dtype for name in real} == {"bfloat16"}


def test_a_forward_pass_with_modules_in_fp32_keeps_what_a_real_one_does(tmp_path):
    """For the backward pass of T5 in fp16, whose layers cast what goes into `wo` to fp32: to 0.01 %."""
    regime = a_regime(weights_dtype="float16", keeps_fp32=True)
    (segments,), _ = trace_steps(load_config(T5, None, regime), regime, [SIZE])
    forward = [event for segment in segments if segment.kind == "forward" for event in segment.events]
    model = loaded(T5, regime, tmp_path).train()
    model.config.use_cache = False
    with LiveBytes() as live:
        live.count_existing()
        before = live.now_bytes
        ids = torch.randint(0, 8, SIZE)
        loss = model(input_ids=ids, labels=ids)["loss"]
        kept = live.now_bytes - before
    assert loss.requires_grad
    assert sum(event[0] if len(event) == BIRTH_FIELDS else -event[0] for event in forward) == pytest.approx(
        kept, rel=1e-4
    )


def test_the_table_has_every_class_that_keeps_modules_in_fp32():
    """Each model type of the installed transformers whose classes name more than the bias of a router's scores."""
    declared: dict[str, set[str]] = {"_keep_in_fp32_modules": set(), "_keep_in_fp32_modules_strict": set()}
    for path in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        text = path.read_text(encoding="utf-8")
        for each in ast.walk(ast.parse(text)) if "_keep_in_fp32_modules" in text else ():
            if isinstance(each, ast.Assign) and isinstance(each.value, ast.List):
                named = {element.value for element in each.value.elts if isinstance(element, ast.Constant)}
                target = getattr(each.targets[0], "id", None)
                if target in declared and named - {"e_score_correction_bias"}:
                    declared[target].add(path.parent.name)
    for table, folders in (
        (IN_FP16, declared["_keep_in_fp32_modules"]),
        (IN_16_BITS, declared["_keep_in_fp32_modules_strict"]),
    ):
        assert table == {name for name in CONFIG_MAPPING_NAMES if model_type_to_module_name(name) in folders}


def a_configuration(**changes: Any) -> Configuration:
    """An adapter on bf16 weights under DDP, with what is given changed."""
    values: dict[str, Any] = {
        "method": "lora",
        "quantization": None,
        "lora": Lora(),
        "optim": "adamw_torch",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_processes": 2,
        "gradient_checkpointing": False,
        "sharding": "ddp",
        "weights_dtype": "bfloat16",
        "mixed_precision": "bf16",
        "attention": "sdpa",
    }
    return Configuration(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "keeps"),
    [
        ({}, True),
        ({"mixed_precision": "no"}, True),
        ({"weights_dtype": "float32"}, False),
        ({"sharding": "zero2"}, False),
        ({"sharding": "fsdp2"}, False),
        ({"method": "qlora", "quantization": Quantization()}, True),
        ({"method": "qlora", "quantization": Quantization(prepares_kbit=True)}, False),
    ],
)
def test_engines_that_cast_weights_leave_none_in_fp32(changes, keeps):
    """Norms and sinks stay in fp32 where weights are used as they were loaded, and are stored so where FSDP casts."""
    device = Device(name="A100-80G", kind="cuda", memory_bytes=80 * GIB)
    configuration = a_configuration(**changes)
    assert regime_of(configuration, device, dtypes_with_fp32_modules(DEEPSEEK)).keeps_fp32 is keeps
    assert regime_of(configuration, device, dtypes_with_fp32_modules(T5)).keeps_fp32 is False  # in fp16 alone
    stored = regime_of(configuration, device, dtypes_with_fp32_modules(DEEPSEEK)).stores_fp32_beside
    assert stored == ("bfloat16" if changes.get("sharding") == "fsdp2" else None)
    assert dtypes_with_fp32_modules({"model_type": "llava", "text_config": GPT_OSS}) == {"float16"}
