"""How sources of published speeds spell what a configuration says, and what each spelling means here."""

from __future__ import annotations

import re
from typing import Any, get_args

from published_rows import RefusedError, Row, flag, letters, text

from autofit.errors import InputError
from autofit.sources.gpus import catalogue, find
from autofit.spec.configuration import Optim

FULL = {
    *("full", "fullft", "fft", "fullsft", "fullfinetune", "fullfinetuning", "fullparameter", "fullparameters"),
    *("fullparam", "fullweight", "fullparameterfinetuning", "pretrain", "pretraining", "pretrainfull"),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lorasft": {},
    "loraft": {},
    "lorafinetune": {},
    "lorafinetuning": {},
    "loraemblmhead": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
}
LARGEST_WITH_BITS = 8


def method_of(row: Row) -> dict[str, Any]:
    """Return the method, and what its name says of the adapter and the bits under it.

    Raises:
        RefusedError: it is not modelled, or is not that of weights of so many bits.
    """
    stated = whole_name = text(row, "method")
    if not stated:
        raise RefusedError("the method is not stated")
    rank = re.search(r"\br(?:ank)?\W{0,3}(\d+)\b", stated, re.IGNORECASE)
    named = re.search(r"\b(?:int|nf|fp)?[-_ ]?([48])[-_ ]?bits?\b|\b(?:int|nf)([48])\b", stated, re.IGNORECASE)
    bits = row["quant_bits"] or (int(named[1] or named[2]) if named else None)
    for found in filter(None, (rank, named)):
        stated = stated.replace(found[0], " ")
    key = re.sub(r"^(bnb|peft)|bnb$", "", letters(stated))
    quantised = key.startswith("q") and key[1:] in ADAPTERS
    key = key[1:] if quantised else key
    if key in FULL:
        if bits is not None and bits <= LARGEST_WITH_BITS:
            raise RefusedError(f"the method {whole_name!r} trains weights, and they are in {bits} bits")
        return {"method": "full"}
    if key == "freeze":
        return {"method": "freeze"}
    if key not in ADAPTERS:
        raise RefusedError(f"the method {whole_name!r} is not modelled")
    is_packed = bits is not None and bits <= LARGEST_WITH_BITS
    of_rank = {} if rank is None else {"lora_rank": int(rank[1])}
    return {"method": "qlora" if quantised or is_packed else "lora", **ADAPTERS[key], **of_rank, "bits": bits}


OPTIMIZERS = {
    **{letters(name): name for name in get_args(Optim)},
    "adamw": "adamw_torch",
    "adam": "adamw_torch",
    "adamwhf": "adamw_torch",
    "torchadamw": "adamw_torch",
    "torchoptimadamw": "adamw_torch",
    "decoupledadamw": "adamw_torch",
    "adamwfused": "adamw_torch_fused",
    "fusedadamw": "adamw_torch_fused",
    "torchfusedadamw": "adamw_torch_fused",
    "torchoptimadamwfused": "adamw_torch_fused",
    "torchoptimadamwfusedtrue": "adamw_torch_fused",
    "adamwfusedtrue": "adamw_torch_fused",
    "fusedadam": "adamw_torch_fused",
    "deepspeedcpuadam": "adamw_torch",
    "cpuadam": "adamw_torch",
    "adamwbnb8bit": "adamw_8bit",
    "adamw8bit": "adamw_8bit",
    "8bitadamw": "adamw_8bit",
    "adam8bit": "adamw_8bit",
    "bnbadamw8bit": "adamw_8bit",
    "bnb8bitadamw": "adamw_8bit",
    "bitsandbytesadamw8bit": "adamw_8bit",
    "bitsandbytesoptimadamw8bit": "adamw_8bit",
    "bnboptimadamw8bit": "adamw_8bit",
    "pagedadamw": "paged_adamw_32bit",
    "bitsandbytesoptimpagedadamw": "paged_adamw_32bit",
    "bitsandbytesoptimpagedadamw8bit": "paged_adamw_8bit",
    "torchaooptimadamw8bit": "adamw_torch_8bit",
    "torchaooptimadamw4bit": "adamw_torch_4bit",
    "lion": "lion_32bit",
    "pagedlion": "paged_lion_32bit",
    "ademamix32bit": "ademamix",
    "torchoptimsgd": "sgd",
}
GENERAL_OPTIMIZERS = {"adamw", "adam"}
"""Names that leave the implementation open."""


def optimizer_of(row: Row) -> str | None:
    """Return the optimizer under transformers' name, None where none is named.

    Raises:
        RefusedError: it is not modelled.
    """
    stated = text(row, "optimizer")
    if not stated:
        return None
    found = OPTIMIZERS.get(letters(stated)) or OPTIMIZERS.get(letters(re.sub(r"\(.*?\)", "", stated)))
    if found is None:
        raise RefusedError(f"the optimizer {stated!r} is not modelled")
    return found


ATTENTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"ring|ulysses|paged", {}),
    (r"no[- ]?flash|without flash", {}),
    (r"flex", {"attention": "flex_attention"}),
    (r"xformers", {"attention": "sdpa", "sdpa_kernel": "efficient", "nearest": "xformers, timed as torch's kernel"}),
    (r"mem\w*[-_ ]?efficient", {"attention": "sdpa", "sdpa_kernel": "efficient"}),
    (r"sdpa|scaled.dot|torch|native", {"attention": "sdpa"}),
    (
        r"flash[-_ ]?(?:attn|attention)?[-_ ]?v?3|\bfa[-_ ]?3",
        {"attention": "flash_attention_2", "nearest": "FlashAttention 3, timed as 2"},
    ),
    (r"flash|\bfa[-_ ]?2", {"attention": "flash_attention_2"}),
    (r"eager|naive|vanilla|manual|math", {"attention": "eager"}),
)


def attention_of(row: Row) -> dict[str, Any]:
    """Return the implementation of attention, and what of it is not modelled; nothing where none is named.

    Raises:
        RefusedError: it is not modelled.
    """
    stated = text(row, "attention")
    if not stated:
        return {}
    for pattern, found in ATTENTIONS:
        if re.search(pattern, stated, re.IGNORECASE):
            if not found:
                break
            return dict(found)
    raise RefusedError(f"the attention {stated!r} is not modelled")


def sharding_of(row: Row, num_nodes: int) -> dict[str, Any] | None:
    """Return how a model is sharded, None where that is not stated or not clear.

    Raises:
        RefusedError: it is not modelled.
    """
    stated = text(row, "sharding")
    said = stated.casefold()
    stages = set(re.findall(r"(?:zero|stage|z)[-_ ]?([0-3])(?!\d)", said)) | set(re.findall(r"/([0-3])(?!\d)", said))
    if re.search(r"zero\+\+|zeropp|nvme|infinity", said):
        raise RefusedError(f"the sharding {stated!r} is not one that is modelled")
    if re.search(r"hybrid|hsdp", said):
        return _hybrid(stated, said, num_nodes)
    if "fsdp" in said or re.search(r"full[-_ ]?shard|fully[-_ ]?shard|shard[-_ ]?grad|no[-_ ]?shard", said):
        return _fsdp(said)
    if stages or (re.search(r"deepspeed|zero", said) and not said.startswith("none")):
        return _zero(stages)
    if re.search(r"\bddp\b|data[-_ ]?parallel|^dp$|multi_gpu", said):
        return {"sharding": "ddp"}
    if not said or re.match(r"none|no\b|false|single|-$", said):
        several = {"sharding": "ddp"} if said else None
        return {"sharding": "none"} if row["gpus_count"] == 1 else several
    raise RefusedError(f"the sharding {stated!r} is not one that is modelled")


def _zero(stages: set[str]) -> dict[str, Any] | None:
    if len(stages) != 1:
        return None
    stage = stages.pop()
    return {"sharding": "ddp" if stage == "0" else f"zero{stage}"}


def _fsdp(said: str) -> dict[str, Any]:
    if re.search(r"no[-_ ]?shard|\bddp\b", said):
        return {"sharding": "ddp"}
    version = "fsdp2" if re.search(r"fsdp[-_ ]?(?:v|version )?2|fully[-_ ]?shard", said) else "fsdp1"
    if re.search(r"shard[-_ ]?grad|reshard_after_forward\W*false", said):
        return {"sharding": version, "reshard_after_forward": False}
    return {"sharding": version}


def _hybrid(stated: str, said: str, num_nodes: int) -> dict[str, Any]:
    if "zero2" in said:
        raise RefusedError(f"the sharding {stated!r} is not one that is modelled")
    return {**_fsdp(said), "num_replicas": num_nodes}


NOTHING_OFFLOADED = {"", "none", "no", "false", "0", "off"}
OF_OFFLOADING = (
    r"fsdp|cpu|offload(?:ed|ing)?|zero|deepspeed|optim(?:izer)?|states?|param(?:eter)?s?|activations?|true|yes|and|host"
)


def offload_of(row: Row) -> dict[str, Any]:
    """Return what is kept on the host. FSDP takes parameters, gradients and optimizer there together.

    Raises:
        RefusedError: it is not modelled, or not clear.
    """
    stated, beside = text(row, "offload"), text(row, "sharding")
    said, key = stated.casefold(), letters(stated)
    is_fsdp = re.search("fsdp|full.?shard", f"{beside} {stated}", re.IGNORECASE) is not None
    if re.search("offload", beside, re.IGNORECASE):
        if key in NOTHING_OFFLOADED - {""}:
            raise RefusedError(f"the sharding {beside!r} offloads, and the offload is {stated!r}")
        if not key and not is_fsdp and re.search(r"(?:zero|stage|z)[-_ ]?3", beside, re.IGNORECASE):
            raise RefusedError(f"the sharding {beside!r} does not say whether parameters are offloaded too")
        said, key = (said, key) if key else ("cpu" if is_fsdp else "optimizer",) * 2
    if key in NOTHING_OFFLOADED:
        return {}
    if letters(re.sub(OF_OFFLOADING, "", said)) not in {"", "1"}:
        raise RefusedError(f"the offload {stated!r} is not modelled")
    parts = re.split(r"[+,;&]|\band\b", said)
    others = " ".join(part for part in parts if "activation" not in part)
    found: dict[str, Any] = {"checkpoint_offload": True} if "activation" in said else {}
    if not others.strip():
        return found
    of_optimizer, of_parameters = "optim" in others or key == "zerooffload", "param" in others
    if is_fsdp or (of_optimizer and of_parameters):
        return found | {"offload": "optimizer_and_parameters"}
    if not of_optimizer:
        raise RefusedError(f"the offload {stated!r} does not say what is offloaded")
    return found | {"offload": "optimizer"}


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "usereentranttrue": {"use_reentrant": True},
    "nonreentrant": {"use_reentrant": False},
    "usereentrantfalse": {"use_reentrant": False},
    "offload": {"checkpoint_offload": True},
    "offloaded": {"checkpoint_offload": True},
    "cpuoffload": {"checkpoint_offload": True},
}


def checkpointing_of(row: Row) -> dict[str, Any]:
    """Return whether layers are checkpointed, and how.

    Raises:
        RefusedError: it is not stated, or not modelled.
    """
    named = CHECKPOINTS.get(letters(text(row, "gradient_checkpointing")))
    if named is not None:
        return {"gradient_checkpointing": True, **named}
    checkpoints = flag(row, "gradient_checkpointing")
    if checkpoints is None:
        raise RefusedError("whether activations are checkpointed is not stated")
    return {"gradient_checkpointing": checkpoints}


def precision_of(row: Row, *, trains_weights: bool) -> dict[str, Any]:
    """Read the precision where no fact says it: bf16 or fp16 by itself is autocast over weights in fp32.

    Raises:
        RefusedError: it is not stated, or not modelled.
    """
    kind = kind_of_precision(row)
    stated = text(row, "precision").casefold()
    if kind == "tf32":
        return {"weights_dtype": "float32", "autocast": "no", "tf32": True}
    if kind == "fp32":
        return {"weights_dtype": "float32", "autocast": "no"}
    half = {"bf16": "bfloat16", "fp16": "float16"}[kind]
    if re.search(r"pure|-true|no.?autocast|full.?bf16|bf16.?full|bf16.?weights", stated):
        return {"weights_dtype": half, "autocast": "no"}
    return {"weights_dtype": "float32" if trains_weights else half, "autocast": kind}


def leaves_weights_open(row: Row) -> bool:
    """Whether the precision does not say in which dtype weights are kept."""
    return not re.search(r"amp|autocast|mix|pure|true|weights|32", text(row, "precision").casefold())


def kind_of_precision(row: Row) -> str:
    """Return what products are computed in: bf16, fp16, tf32 or fp32.

    Raises:
        RefusedError: it is not stated, or not modelled.
    """
    stated = text(row, "precision")
    said = stated.casefold()
    if not said:
        raise RefusedError("the precision is not stated")
    if re.search(r"fp8|float8|nvfp4|mxfp|\bint8\b(?! (?:base|weights))", said):
        raise RefusedError(f"products in {stated} are not modelled")
    if re.search("bf16|bfloat16", said):
        return "bf16"
    if re.search(r"fp16|float16|half|\b16-", said):
        return "fp16"
    if "tf32" in said:
        return "tf32"
    if re.search(r"fp32|float32|single", said):
        return "fp32"
    raise RefusedError(f"the precision {stated!r} is not known")


USUAL = {"A100": "A100-SXM", "H100": "H100-SXM"}
"""Form factors where a row states none. llm-foundry's MFU column is relative to 989 TFLOPS on an H100 and 312 on an
A100, which are SXM's."""
LARGER = {"A100": "80GB"}
"""Memory where a row states none, of a device that came with two sizes."""
GIB_OF_SMALLER = 40


def device_of(row: Row) -> tuple[str, list[str]]:
    """Name a GPU as the catalogue does, and say what was taken for granted.

    Raises:
        RefusedError: it is not in the catalogue, or not clear which.
    """
    stated = text(row, "gpu")
    inside = " ".join(re.findall(r"\((.*?)\)", stated))
    told = re.findall(r"\d+ ?GB?\b|\bSXM\d?\b|\bPCIe\b|\bNVL\b", inside, re.IGNORECASE)
    bare = re.sub(r"^\s*\d+\s*[xX*]\s*|\s[xX*]\s*\d+\s*$|\(.*?\)", "", stated).strip(" -")
    spelt = " ".join([bare, *(each for each in told if each.casefold() not in bare.casefold())])
    model = re.sub(r"(?i)nvidia|[^a-z0-9]", "", spelt).upper()
    assumed = []
    if model in USUAL or re.fullmatch("[AH]100[0-9]+GB?", model):
        assumed.append(f"the {model[:4]} is SXM's")
    if "A6000ADA" in model:  # no product is called so
        assumed.append("the A6000 Ada is an RTX 6000 Ada")
    if model in LARGER:
        spelt = f"{spelt} {LARGER[model]}"
        if (row["peak_gib"] or 0) <= GIB_OF_SMALLER:
            assumed.append(f"the {model} has {LARGER[model]}")
    try:
        return find(spelt, catalogue()).name, assumed
    except InputError as error:
        raise RefusedError(f"{error.message.rstrip('.')} ({error.to_fix.partition(';')[0]})") from error
