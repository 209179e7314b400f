"""What each method holds and takes, against the real libraries training on this machine's CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from autofit.errors import InputError
from autofit.memory.assemble import estimate_memory
from autofit.profile.models import load_config
from autofit.profile.trace import trace, trace_steps
from autofit.runtime.live_bytes import LiveBytes
from autofit.spec.configuration import Configuration, Freeze, Lora, Optim, Quantization
from autofit.spec.hardware import Cluster, Device
from autofit.spec.job import Workload
from autofit.spec.profile import Regime, RegimeProfile, StaticTensor
from autofit.units import BYTES_PER_ELEMENT, GIB
from tests.profile.tiny import CONFIGS, a_regime, every_layer_traced, highest_alive

SIZE = (2, 192)
"""Sequences and tokens."""
FEW_TOKENS = (2, 16)
"""So few that weights and gradients matter more than activations."""
TIED = {**CONFIGS["qwen3"], "num_hidden_layers": 3}
APART = {**CONFIGS["llama"], "num_hidden_layers": 3}
SMALL_TABLES = {**APART, "num_hidden_layers": 4, "vocab_size": 64}
TOLERANCE = 0.003
"""Scalars and masks that libraries make beside the step."""


def real_model(config: dict[str, Any], regime: Regime, folder: Path) -> torch.nn.Module:
    """Load the model as a script would: saved weights, bitsandbytes' config, peft's preparation and adapter."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    dtype = getattr(torch, regime.weights_dtype)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values), dtype=dtype)
    if regime.quantization is not None:
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=real_quantization(regime.quantization)
        )
    model.config.use_cache = False
    if regime.quantization is not None and regime.quantization.prepares_kbit:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if regime.freeze is not None:
        freeze(model, regime.freeze)
    return adapted(model, regime.lora) if regime.lora else model


def freeze(model: Any, what: Freeze) -> None:
    """Freeze by name, as a script would."""
    trained = [f"layers.{n}." for n in range(len(model.model.layers))][-what.freeze_trainable_layers :]
    trained += [f"{name}.weight" for name in what.freeze_extra_modules]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(part in name and ("layers." in part or "layers." not in name) for part in trained)


def real_quantization(asked: Quantization) -> BitsAndBytesConfig:
    """Spell a quantisation as transformers does."""
    skipped = list(asked.skip_modules) or None
    if asked.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=asked.quant_type,
        bnb_4bit_use_double_quant=asked.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, asked.compute_dtype),
        bnb_4bit_quant_storage=getattr(torch, asked.storage_dtype),
        llm_int8_skip_modules=skipped,
    )


def adapted(model: torch.nn.Module, lora: Lora) -> torch.nn.Module:
    """Put an adapter on as a script would."""
    from peft import LoraConfig, get_peft_model

    targets = "all-linear" if lora.target_modules == ("all-linear",) else list(lora.target_modules)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=list(lora.modules_to_save) or None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def held(model: torch.nn.Module, *, trains: bool | None = None) -> int:
    """Count the bytes of a real model's parameters and buffers and of bitsandbytes' state, shared ones once."""
    found = [p for p in model.parameters() if trains is None or p.requires_grad == trains]
    if trains is None:
        found += list(model.buffers())
        for module in model.modules():
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            nested = getattr(state, "state2", None)
            scales = getattr(getattr(module, "weight", None), "SCB", None)
            found += [getattr(holder, name, None) for holder in (state, nested) for name in ("absmax", "code")]
            found += [getattr(state, "offset", None), scales]
            found += [getattr(getattr(module, "state", None), "SCB", None)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in found if isinstance(t, torch.Tensor)}
    return sum(storages.values())


def real_peak(model: torch.nn.Module, regime: Regime) -> int:
    """Count the most bytes that a second micro-step holds above its start."""
    model.train()
    if regime.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": regime.use_reentrant})
        if regime.lora is not None:
            model.enable_input_require_grads()
    with LiveBytes() as live:
        for _ in range(2):
            live.count_existing()
            live.reset_peak()
            before = live.now_bytes
            a_step(model)
            peak = live.peak_bytes - before
            for parameter in model.parameters():
                parameter.grad = None
    return peak


def a_step(model: torch.nn.Module) -> None:
    """Run forward and backward with the lifetimes of Trainer."""
    ids = torch.randint(0, 8, SIZE)
    outputs = model(input_ids=ids, labels=ids)
    loss = outputs["loss"]
    del outputs, ids
    loss.backward()


def num_bytes(tensors: list[StaticTensor]) -> int:
    """Add up listed tensors."""
    return sum(tensor.num_elements * BYTES_PER_ELEMENT[tensor.dtype] for tensor in tensors)


def assert_as_real(config: dict[str, Any], regime: Regime, folder: Path) -> None:
    """Compare weights, what trains, and the peak of a micro-step with a real one."""
    steps, named = trace_steps(load_config(config, None, regime), regime, [SIZE])
    model = real_model(config, regime, folder)
    real = real_peak(model, regime)
    listed = [tensor for _, tensor in named]
    assert num_bytes([tensor for tensor in listed if tensor.trains]) == held(model, trains=True)
    assert num_bytes(listed) == held(model)
    assert highest_alive(steps[0]) == pytest.approx(real, rel=TOLERANCE)


def lora_on(**quantization: Any) -> dict[str, Any]:
    """Return what a regime needs for an adapter on a quantised base."""
    return {"method": "qlora", "lora": Lora(), "quantization": Quantization(**quantization)}


CASES: dict[str, tuple[dict[str, Any], Regime]] = {
    "last layer and norm": (
        APART,
        a_regime(method="freeze", freeze=Freeze(freeze_trainable_layers=1, freeze_extra_modules=("norm",))),
    ),
    "dora": (APART, a_regime(method="lora", lora=Lora(use_dora=True))),
    "modules saved, tied": (TIED, a_regime(method="lora", lora=Lora(modules_to_save=("embed_tokens", "lm_head")))),
    "int8": (TIED, a_regime(**lora_on(bits=8))),
    "fp4": (APART, a_regime(**lora_on(quant_type="fp4", double_quant=False, storage_dtype="bfloat16"))),
}
SLOW_CASES: dict[str, tuple[dict[str, Any], Regime]] = {
    "embedding and two layers, checkpointed": (
        TIED,
        a_regime(
            method="freeze",
            freeze=Freeze(freeze_trainable_layers=2, freeze_extra_modules=("embed_tokens",)),
            gradient_checkpointing=True,
        ),
    ),
    "some targets, rslora": (
        TIED,
        a_regime(method="lora", lora=Lora(target_modules=("q_proj", "v_proj"), use_rslora=True)),
    ),
    "dropout": (APART, a_regime(method="lora", lora=Lora(lora_dropout=0.1))),
    "modules saved": (APART, a_regime(method="lora", lora=Lora(modules_to_save=("embed_tokens", "lm_head")))),
    "int8 checkpointed": (APART, a_regime(**lora_on(bits=8), gradient_checkpointing=True)),
    "int8 checkpointed reentrantly": (
        APART,
        a_regime(**lora_on(bits=8), gradient_checkpointing=True, use_reentrant=True),
    ),
    "nf4 prepared": (APART, a_regime(**lora_on(prepares_kbit=True))),
    "int8 prepared": (TIED, a_regime(**lora_on(bits=8, prepares_kbit=True))),
    "nf4 dora": (TIED, a_regime(**{**lora_on(), "lora": Lora(use_dora=True)})),
    "head quantised, mlp not": (APART, a_regime(**lora_on(skip_modules=("mlp",)))),
}


@pytest.mark.parametrize("case", CASES)
def test_a_method_holds_and_takes_what_the_real_libraries_do(case, tmp_path):
    """Weights, and what of them trains, to the byte; the peak of a micro-step to 0.3 %."""
    assert_as_real(*CASES[case], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES)
def test_every_other_method_holds_and_takes_what_the_real_libraries_do(case, tmp_path):
    """The same for the rest."""
    assert_as_real(*SLOW_CASES[case], tmp_path)


def test_int8_keeps_every_linear_input_through_checkpoints_that_are_not_reentrant():
    """bitsandbytes keeps a product's input on the context, which saved-tensor hooks do not see: layers add up."""
    kept = [
        highest_alive(every_layer_traced(APART, regime, [SIZE])[0])
        for regime in (SLOW_CASES["int8 checkpointed"][1], SLOW_CASES["int8 checkpointed reentrantly"][1])
    ]
    tokens, hidden, intermediate, layers = SIZE[0] * SIZE[1], 128, 256, 3
    assert kept[0] - kept[1] >= (layers - 1) * tokens * (3 * hidden + intermediate) * 2


def test_a_gpu_multiplies_int8_into_int32():
    """The product of LLM.int8() is born in 32 bits, and again in fp16 before it is cast."""
    regime = a_regime(**lora_on(bits=8), device="cuda")
    (segments,) = every_layer_traced(APART, regime, [SIZE])
    tokens, intermediate = SIZE[0] * SIZE[1], 256
    layer = next(segment for segment in segments if segment.layer == 0)
    born = [event[0] for event in layer.events if len(event) == 2]
    assert born.count(4 * tokens * intermediate) >= 2  # gate and up
    assert layer.matmul_flops > 2 * tokens * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)


def test_the_scale_of_an_adapter_changes_no_tape():
    """rsLoRA and another alpha keep and allocate what a plain adapter does, so that one trace is of all of them."""
    plain, scaled = (
        trace("a small model", APART, a_regime(method="lora", lora=lora))
        for lora in (Lora(), Lora(lora_alpha=7, use_rslora=True))
    )
    assert replace(scaled, regime=plain.regime) == plain
    other = trace("a small model", APART, a_regime(method="lora", lora=Lora(use_dora=True)))
    assert replace(other, regime=plain.regime) != plain


def test_trl_leaves_only_norms_in_fp32():
    """After prepare_model_for_kbit_training TRL cast embedding and head to bf16 again."""
    regime = a_regime(**lora_on(prepares_kbit=True, recasts_tables=True))
    _, named = trace_steps(load_config(APART, None, regime), regime, [SIZE])
    kept = {name: tensor.dtype for name, tensor in named if tensor.kind == "parameter"}
    assert {dtype for name, dtype in kept.items() if "norm" in name} == {"float32"}
    assert {dtype for name, dtype in kept.items() if "norm" not in name} == {"bfloat16"}


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        ({}, {"method": "freeze", "freeze": Freeze(freeze_trainable_layers=9)}, "has 3 layers"),
        ({}, {"method": "freeze", "freeze": Freeze(freeze_trainable_layers=0)}, "nothing trains"),
        ({}, {"method": "freeze", "freeze": Freeze(freeze_extra_modules=("nrom",))}, "norm"),
        (
            {},
            {"method": "freeze", "freeze": Freeze(), "gradient_checkpointing": True, "use_reentrant": True},
            "reentrant",
        ),
        ({}, {"method": "lora", "lora": Lora(modules_to_save=("head",))}, "lm_head"),
        ({}, lora_on(skip_modules=("no_such",)), "no_such"),
        ({"tie_word_embeddings": True}, lora_on(skip_modules=("down_proj",)), "lm_head"),
        ({}, {**lora_on(bits=8), "lora": Lora(use_dora=True)}, "DoRA"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, {}, "GPTQ"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, {}, "AWQ"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, {}, "qlora"),
    ],
)
def test_what_cannot_be_traced_is_refused_in_words(config, changes, said):
    """What was given, and what would do instead."""
    with pytest.raises(InputError, match=said) as refused:
        trace("a small model", {**APART, **config}, a_regime(**changes))
    assert refused.value.to_fix


def test_lomo_never_holds_all_gradients():
    """Two gradients instead of a model's, and their fp32 copies: at least the real peak, and at most 15 % above it.

    What the largest update takes is counted wherever there are gradients.
    """
    lomo = pytest.importorskip("lomo_optim")
    regime = a_regime()
    profile = trace("a small model", SMALL_TABLES, regime)
    model = real_model(SMALL_TABLES, regime, Path())
    model.train()
    optimizer = lomo.Lomo(model)
    with LiveBytes() as live:
        for _ in range(2):
            live.count_existing()
            live.reset_peak()
            outputs = model(input_ids=(ids := torch.randint(0, 8, FEW_TOKENS)), labels=ids)
            loss = outputs["loss"]
            del outputs
            optimizer.fused_backward(loss, 1e-3)
            del loss
    real = held(model) + live.peak_bytes - live.now_bytes
    assert real <= estimate(profile, "lomo") <= 1.15 * real
    assert 1.1 * real < estimate(profile, "sgd")


def estimate(profile: RegimeProfile, optim: Optim) -> int:
    """Estimate the peak of full fine-tuning on one CPU rank."""
    configuration = Configuration(
        method="full",
        quantization=None,
        lora=None,
        optim=optim,
        per_device_train_batch_size=FEW_TOKENS[0],
        gradient_accumulation_steps=1,
        num_processes=1,
        gradient_checkpointing=False,
        sharding="none",
        weights_dtype="bfloat16",
        mixed_precision="no",
        attention="sdpa",
    )
    cluster = Cluster(device=Device(name="CPU-8G", kind="cpu", memory_bytes=8 * GIB), num_devices_per_node=1)
    workload = Workload(sequence_tokens=FEW_TOKENS[1], global_batch_sequences=FEW_TOKENS[0])
    return estimate_memory(profile, configuration, cluster, workload).peak_allocated_bytes
