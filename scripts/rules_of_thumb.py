"""Prints the figures of docs/rules_of_thumb.md: what people know, and ours beside it. Arguments: sections, or none."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from autofit import api
from autofit.batch import estimate_rows
from autofit.memory.engines import layout
from autofit.memory.static import static_bytes
from autofit.memory.tensors import Tensor
from autofit.spec.configuration import Configuration, Sharding

GB = 1e9
"""The rules count in 10^9 bytes, and so does this page."""
SIZES = {
    "7B": "huggyllama/llama-7b",
    "13B": "huggyllama/llama-13b",
    "30B": "huggyllama/llama-30b",
    "65B": "huggyllama/llama-65b",
    "8x7B": "mistralai/Mixtral-8x7B-v0.1",
}
LLAMA_FACTORY = {
    "Full": (160, 320, 600, 1200, 1000),
    "Freeze": (20, 40, 120, 240, 200),
    "LoRA": (16, 32, 80, 160, 120),
    "QLoRA-8": (10, 16, 40, 80, 80),
    "QLoRA-4": (6, 12, 24, 48, 32),
}
"""GB by method, for each of `SIZES`. Source: hiyouga/LLaMA-Factory README, "Hardware Requirement" (estimated there)."""
ROW = {
    "gpus": "1xA100-80G",
    "seq_len": 1024,
    "micro_batch_size": 1,
    "gradient_checkpointing": True,
    "autocast": "bf16",
    "weights_dtype": "bfloat16",
    "lora_rank": None,
}
LORA = {"lora_rank": 8, "lora_target_modules": ["all-linear"]}
METHODS: dict[str, dict[str, Any]] = {
    "Full": {"method": "full", "weights_dtype": "float32"},
    "Freeze": {"method": "freeze", "freeze_trainable_layers": 2, "autocast": "no"},
    "LoRA": {"method": "lora", **LORA},
    "QLoRA-8": {"method": "qlora", **LORA, "quantization": {"bits": 8}, "use_reentrant": False},
    "QLoRA-4": {"method": "qlora", **LORA, "quantization": {"bits": 4, "double_quant": True}},
}
FURTHER: dict[str, dict[str, Any]] = {
    "7B pure": {"model": SIZES["7B"], "method": "full", "autocast": "no"},
    "7B int8": {"model": SIZES["7B"], **METHODS["QLoRA-8"], "seq_len": 2048},
    "7B int8 x 50": {"model": SIZES["7B"], **METHODS["QLoRA-8"], "seq_len": 2048, "micro_batch_size": 50},
    "7B int8 kept": {
        "model": SIZES["7B"],
        **METHODS["QLoRA-8"],
        "seq_len": 2048,
        "gradient_checkpointing": False,
    },
    "7B int8 kept x 2": {
        "model": SIZES["7B"],
        **METHODS["QLoRA-8"],
        "seq_len": 2048,
        "gradient_checkpointing": False,
        "micro_batch_size": 2,
    },
    "65B once": {"model": SIZES["65B"], **METHODS["QLoRA-4"], "quantization": {"bits": 4, "double_quant": False}},
    "65B paged": {"model": SIZES["65B"], **METHODS["QLoRA-4"], "optimizer": "paged_adamw_32bit"},
}
ZERO_PARAMS, ZERO_PROCESSES = 7_500_000_000, 64
ZERO_PAPER = {"ddp": 120.0, "zero1": 31.4, "zero2": 16.6, "zero3": 1.9}
"""GB of model states. Source: Rajbhandari et al. 2020, ZeRO (arXiv:1910.02054), figure 1."""


def rows() -> Iterator[dict[str, Any]]:
    """Yield every configuration of the page."""
    for size, model in SIZES.items():
        for name, method in METHODS.items():
            yield {**ROW, "model": model, **method, "id": f"{size} {name}"}
    for name, further in FURTHER.items():
        yield {**ROW, **further, "id": name}


@cache
def answers(size: str) -> dict[str, dict[str, Any]]:
    """Estimate the configurations of one model of the page; each code path is traced once."""
    asked = [row for row in rows() if row["id"].split()[0] == size]
    found = [json.loads(line) for line in estimate_rows(asked, replays=False)]
    return {answer["id"]: answer for answer in found}


def answer(name: str) -> dict[str, Any]:
    """Return the estimate of a configuration."""
    return answers(name.split(maxsplit=1)[0])[name]


def allocated_gb(name: str) -> float | None:
    """Return what a configuration allocates at its peak, None where it is refused."""
    memory = answer(name).get("memory")
    return memory["peak_allocated_bytes"] / GB if memory else None


def term_gb(name: str, term: str, phase: str = "optimizer_step") -> float:
    """Return a term of a configuration in one phase."""
    phases = {each["name"]: each["terms"] for each in answer(name)["memory"]["phases"]}
    return float(phases[phase].get(term, 0) / GB)


def llama_factory() -> Iterator[str]:
    """LLaMA-Factory's table with ours in brackets."""
    yield "| GB: theirs (ours) | " + " | ".join(SIZES) + " |"
    yield "| --- |" + " ---: |" * len(SIZES)
    for name, theirs in LLAMA_FACTORY.items():
        ours = (allocated_gb(f"{size} {name}") for size in SIZES)
        cells = (f"{t} ({'refused' if o is None else f'{o:.1f}'})" for t, o in zip(theirs, ours, strict=True))
        yield f"| {name} | " + " | ".join(cells) + " |"


def sixteen_bytes() -> Iterator[str]:
    """What 7B in mixed precision holds when the optimizer steps, beside the rule's six parts."""
    yield "| 7B, GB | the rule | Trainer, bf16 autocast | pure bf16 |"
    yield "| --- | ---: | ---: | ---: |"
    rule = {"weights": "14 + 14", "gradients": "14 + 14", "optimizer_state": "28 + 28"}
    for term, words in rule.items():
        cells = f"{term_gb('7B Full', term):.1f} | {term_gb('7B pure', term):.1f}"
        yield f"| {term.replace('_', ' ')} | {words} | {cells} |"
    yield f"| peak allocated |  | {allocated_gb('7B Full'):.1f} | {allocated_gb('7B pure'):.1f} |"


def int8() -> Iterator[str]:
    """The int8 rule for 7B, part by part."""
    names = ("7B int8", "7B int8 x 50", "7B int8 kept", "7B int8 kept x 2")
    one, fifty, kept, two = (allocated_gb(name) or 0.0 for name in names)
    yield "| 7B in int8, GB | the rule | ours |"
    yield "| --- | ---: | ---: |"
    weights = term_gb("7B int8", "quantized_weights") + term_gb("7B int8", "weights")
    yield f"| weights, adapter included | 7 | {weights:.2f} |"
    yield f"| gradients | 7 | {term_gb('7B int8', 'gradients'):.2f} |"
    yield f"| AdamW | 14 | {term_gb('7B int8', 'optimizer_state'):.2f} |"
    yield f"| a further sample of 2,048 tokens, checkpointing | 0.99 | {(fifty - one) / 49:.2f} |"
    yield f"| a further sample of 2,048 tokens, all kept | 0.99 | {two - kept:.2f} |"
    yield f"| batch 50, checkpointing | 80 | {fifty:.1f} |"


def inference() -> Iterator[str]:
    """Weights and cache beside 1.2 times the weights."""
    yield "| 7B in bf16, GB | the rule | weights | keys and values | ours |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for batch, tokens in ((1, 512), (1, 2048), (8, 2048)):
        found = api.estimate_inference(model=SIZES["7B"], gpus="A100-80G", seq_len=tokens, micro_batch=batch)
        weights, total = found.weights_bytes / GB, found.total_bytes / GB
        cells = f"{1.2 * weights:.1f} | {weights:.2f} | {found.kv_cache_bytes / GB:.2f} | {total:.1f}"
        yield f"| {batch} x {tokens:,} tokens | {cells} |"


def saved_bits() -> float:
    """Return the bits a quantised parameter that quantising the scales saves on 65B."""
    once, twice = (term_gb(name, "quantized_weights") for name in ("65B once", "65B QLoRA-4"))
    hidden, inner, num_layers = 8192, 22016, 80
    quantised = num_layers * (4 * hidden * hidden + 3 * hidden * inner)
    return (once - twice) * GB * 8 / quantised


def qlora() -> Iterator[str]:
    """QLoRA's claims on 65B."""
    once, twice = (term_gb(name, "quantized_weights") for name in ("65B once", "65B QLoRA-4"))
    yield "| QLoRA on 65B | the paper | ours |"
    yield "| --- | ---: | ---: |"
    yield f"| double quantisation saves, bits a parameter | 0.37 | {saved_bits():.3f} |"
    yield f"| that is, GB | 3 | {once - twice:.2f} |"
    plan = plan_65b()
    needs, has = plan.memory.needed_bytes / 2**30, plan.memory.budget_bytes / 2**30
    yield f"| needs on a card of 48 GB, GiB | fits | {needs:.1f} of {has:.1f} |"
    resident, paged = (term_gb(name, "optimizer_state") for name in ("65B QLoRA-4", "65B paged"))
    host = answer("65B paged")["memory"]["host_bytes"] / GB
    yield f"| AdamW's state, GB on the device: plain, paged | | {resident:.2f}, {paged:.2f} |"
    yield f"| of paged state the host's, GB | | {host:.2f} |"


@cache
def plan_65b() -> Any:
    """Plan the paper's run: 65B on one card of 48 GB, 16 sequences of 512 tokens, an adapter of rank 64."""
    return api.make_plan(
        model=SIZES["65B"],
        gpus="A6000-48G",
        seq_len=512,
        global_batch=16,
        method="qlora",
        lora_r=64,
        optim="paged_adamw_32bit",
        gradient_checkpointing=True,
    )


def zero_model_states_gb(sharding: Sharding) -> float:
    """Return weights, gradients and optimizer state of the ZeRO paper's example: 7.5B parameters on 64 GPUs.

    Under the engine weights are 16-bit; without it a Trainer's are fp32, and its gradients too.
    """
    engine = sharding != "ddp"
    element = 2 if engine else 4
    num_tensors = 100
    model = tuple(
        Tensor(ZERO_PARAMS // num_tensors, element, trains=True, embeds=False, kind="parameter")
        for _ in range(num_tensors)
    )
    configuration = Configuration(
        method="full",
        quantization=None,
        lora=None,
        optim="adamw_torch_fused",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        num_processes=ZERO_PROCESSES,
        gradient_checkpointing=True,
        sharding=sharding,
        weights_dtype="bfloat16" if engine else "float32",
        mixed_precision="bf16",
        attention="sdpa",
    )
    plan = layout(configuration, model, static_bytes(model, "cuda"), 1, "cuda")
    states = sum(plan.resident.get(term, 0) for term in ("weights", "master_weights", "optimizer_state"))
    kept = ZERO_PARAMS * element if plan.gradients == "kept" else 0
    return (states + kept + max(terms.get("gradients", 0) for terms in (plan.resident, plan.backward))) / GB


def zero() -> Iterator[str]:
    """The ZeRO paper's figure 1."""
    yield "| 7.5B on 64 GPUs: model states, GB | the paper | ours |"
    yield "| --- | ---: | ---: |"
    for sharding, theirs in ZERO_PAPER.items():
        yield f"| {sharding} | {theirs} | {zero_model_states_gb(sharding):.1f} |"  # type: ignore[arg-type]


SECTIONS: dict[str, Callable[[], Iterator[str]]] = {
    "llama-factory": llama_factory,
    "sixteen-bytes": sixteen_bytes,
    "int8": int8,
    "inference": inference,
    "qlora": qlora,
    "zero": zero,
}


def main() -> None:
    """Print the sections named on the command line, or all."""
    for name in sys.argv[1:] or SECTIONS:
        sys.stdout.write("\n".join(SECTIONS[name]()) + "\n\n")


if __name__ == "__main__":
    main()
