"""Reads a published speed as a configuration that can be timed, or says why it cannot.

What a row leaves open is taken from the code or text that its source published with it (`FACTS`), never from its speed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from autofit.errors import AutofitError, InputError
from autofit.sources.gpus import catalogue, find
from autofit.sources.models import model_catalogue
from autofit.sources.rows import Case, read_case
from autofit.spec.profile import Regime

Row = Mapping[str, Any]
MODELS = Path(__file__).parent / "data" / "speed_models.json"
MAX_DEVICES_PER_NODE = 8


class RefusedError(Exception):
    """A row cannot be stated as a configuration; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """A row as a configuration."""

    case: Case
    regime: Regime
    """The code path: the case's, but for what the libraries of that time did otherwise."""
    software: str
    """What ran it, as far as a configuration does not say."""
    nearest: str | None
    """What of the row is not modelled and was stated as the nearest that is; None: nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """What a source's own code or text says of its rows."""

    fields: Mapping[str, Any]
    """Fields of `autofit.sources.rows`, or `refused` or `nearest` with the reason."""
    because: str
    applies: Callable[[Row], bool] = lambda _row: True


def _is(name: str, *values: Any) -> Callable[[Row], bool]:
    return lambda row: row.get(name) in values


def _notes(words: str) -> Callable[[Row], bool]:
    return lambda row: re.search(words, row.get("notes") or "") is not None


def _is_sharded(row: Row) -> bool:
    return row["gpus_count"] > 1


FACTS: dict[str, tuple[Fact, ...]] = {
    "mosaicml/llm-foundry": (
        Fact(
            fields={"weights_dtype": "float32", "autocast": "bf16", "optimizer": "adamw_torch"},
            because="scripts/train/yamls/pretrain/mpt-*.yaml: decoupled_adamw; FSDP's mixed precision over fp32 shards",
        ),
        Fact(
            fields={
                "attention": "sdpa",
                "sdpa_kernel": "efficient",
                "nearest": "FlashAttention 1 in Triton, timed as the memory-efficient kernel",
            },
            because="submit_benchmarks.py at the commits that added the tables (b2a43a14, 5e85bd62): attn_impl triton",
        ),
        Fact(
            fields={"inter_node_gb_s": 200.0},
            because="the table's title: 1600 Gbps between nodes",
            applies=lambda row: "1600 Gbps" in row["source"],
        ),
        Fact(
            fields={"inter_node_gb_s": 400.0},
            because="MosaicML's H100 nodes have 8 x 400 Gbps, as every HGX H100 of the reference design: "
            "stas00/ml-engineering network, DGX H100",
            applies=lambda row: "H100" in row["source"],
        ),
        Fact(
            fields={"refused": "fp8 products are not modelled"},
            because="its own column",
            applies=_is("precision", "amp_fp8"),
        ),
    ),
    "foundation-model-stack/fms-acceleration": (
        Fact(
            fields={
                "weights_dtype": "bfloat16",
                "optimizer": "adamw_torch",
                "use_reentrant": True,
                "lora_rank": 16,
                "lora_alpha": 16,
                "lora_dropout": 0.1,
                "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            },
            because="scripts/benchmarks/scenarios*.yaml and defaults.yaml; transformers 4.4x, "
            "gradient_checkpointing_enable without arguments",
        ),
        Fact(
            fields={"autocast": "bf16"},
            because="scenarios*.yaml, bf16: True",
            applies=_is("precision", "bfloat16 amp-bf16"),
        ),
        Fact(fields={"autocast": "no"}, because="scenarios.yaml: no bf16", applies=_is("precision", "bfloat16")),
        Fact(
            fields={"kbit_prepare": True, "recasts_tables": True},
            because="trl 0.13 sft_trainer.py prepares a quantised model that is not sharded, then casts tables back",
            applies=lambda row: _notes("framework=baseline-peft-bnb")(row) and not _is_sharded(row),
        ),
        Fact(
            fields={"weights_dtype": "float16", "autocast": "fp16", "packed_by": "auto_gptq"},
            because="scenarios*.yaml: fp16; plugins/accelerated-peft framework_plugin_autogptq.py: the Triton layer",
            applies=_notes("autogptq"),
        ),
        Fact(
            fields={"loss": "liger", "nearest": "fused kernels of fms-acceleration, timed as Liger's"},
            because="plugins/fused-ops-and-kernels: cross entropy, RMSNorm and rotation in Triton; "
            "framework names that end in -liger add Liger's fused head",
            applies=_notes("foak"),
        ),
    ),
    "QwenLM/Qwen": (
        Fact(
            fields={"adapter_dtype": "bfloat16"},
            because="README.md: peft<0.8.0; adapters were made in the weights' dtype up to peft 0.10 "
            "(tuners/lora/layer.py, update_layer)",
        ),
        Fact(
            fields={
                "weights_dtype": "bfloat16",
                "autocast": "bf16",
                "optimizer": "adamw_torch",
                "lora_rank": 64,
                "lora_alpha": 16,
                "lora_dropout": 0.05,
                "lora_target_modules": "all-linear",
                "sharding": "none",
            },
            because="finetune.py (LoraArguments: c_attn, c_proj, w1, w2 are every linear layer; optim), "
            "finetune/finetune_lora_single_gpu.sh, and Qwen's modelling code loads in bf16",
        ),
        Fact(
            fields={"modules_to_save": ["embed_tokens", "lm_head"]},
            because="README.md: LoRA (emb) trains embedding and output layer; finetune.py, modules_to_save",
            applies=_is("method", "lora+emb/lm_head"),
        ),
        Fact(
            fields={"sharding": "zero3"},
            because="finetune/finetune_ds.sh: ds_config_zero3.json",
            applies=lambda row: row["method"] == "full" and _is_sharded(row),
        ),
        Fact(
            fields={"refused": "the network between its two servers is not stated"},
            because="README.md, multinode finetuning",
            applies=_is("method", "lora (multinode)"),
        ),
        Fact(
            fields={"refused": "layers of GPTQ run CUDA kernels of auto_gptq of 2023, which are not modelled"},
            because="README.md: Q-LoRA on the Int4 model; finetune.py, GPTQConfig(disable_exllama=True)",
            applies=_is("method", "qlora"),
        ),
    ),
    "AnswerDotAI/fsdp_qlora": (
        Fact(
            fields={"adapter_dtype": "bfloat16"},
            because="February and March 2024: adapters were made in the weights' dtype up to peft 0.10 "
            "(tuners/lora/layer.py, update_layer)",
        ),
        Fact(
            fields={
                "weights_dtype": "bfloat16",
                "autocast": "no",
                "optimizer": "adamw_torch",
                "use_reentrant": True,
                "lora_rank": 64,
                "lora_alpha": 16,
                "lora_dropout": 0.1,
                "lora_target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj"],
            },
            because="train.py: precision bf16, optimizer adamw, lora_rank, lora_target_modules all; "
            "benchmarks_03_2024.md: --reentrant_checkpointing True",
        ),
        Fact(
            fields={"storage": "bfloat16"},
            because="train.py: quant_storage is FSDP's param_dtype",
            applies=_is("method", "qlora"),
        ),
        Fact(
            fields={"refused": "the rate of the link between its cards is not stated (an older board, slow lanes)"},
            because="benchmarks_03_2024.md, the case of two 3090",
            applies=lambda row: "2x3090" in row["source"] and not row["sharding"].startswith("DDP"),
        ),
    ),
    "atlarge-research/coastline-recommender": (
        Fact(
            fields={
                "weights_dtype": "bfloat16",
                "autocast": "no",
                "optimizer": "adamw_torch",
                "gradient_accumulation_steps": 4,
                "use_reentrant": False,
                "lora_rank": 4,
                "lora_alpha": 16,
                "lora_dropout": 0.05,
                "lora_target_modules": ["q_proj", "v_proj"],
            },
            because="IBM/ado website/docs/actuators/sft-trainer.md: torch_dtype, bf16, optim, "
            "gradient_accumulation_steps, gradient_checkpointing_use_reentrant; accelerate mixed_precision no; its "
            "experiments/lora.py: r, lora_alpha, and q_proj and v_proj for every Granite 3",
        ),
        Fact(
            fields={"inter_node_gb_s": 50.0},
            because="foundation-model-stack/fms-fsdp README.md: IBM's A100 nodes have 400 Gbps",
            applies=lambda row: "A100" in row["gpu"],
        ),
    ),
    "pytorch/torchtune": (
        Fact(
            fields={"weights_dtype": "bfloat16", "autocast": "no", "optimizer": "adamw_torch_fused", "lora_rank": 8},
            because="recipes/configs: dtype bf16, fused AdamW, lora_rank 8",
        ),
        Fact(
            fields={"nearest": "torchtune's own modules, timed as transformers'"}, because="it is no transformers stack"
        ),
        Fact(
            fields={"refused": "torch.compile fuses operators that the trace has apart"},
            because="README.md: torch.compile is on",
            applies=lambda row: not _notes(r'row "(Baseline|\+ Packed Dataset)"')(row),
        ),
        Fact(
            fields={"refused": "the sequences are padded, and how long they really are is not stated"},
            because="README.md, the baseline is not packed",
            applies=_notes('row "Baseline"'),
        ),
    ),
}
"""By what a source's name begins with; of two facts about one field the later one holds."""

METHODS = {"pretrain(full)": "full", "full": "full", "lora": "lora", "qlora": "qlora", "lora+emb/lm_head": "lora"}
SHARDINGS = (
    (r"^(none|None)", "none"),
    (r"SHARD_GRAD_OP", "fsdp_shard_grad_op"),
    (r"^DDP|NO_SHARD", "ddp"),
    (r"HYBRID", None),
    (r"^FSDP2", "fsdp2"),
    (r"^FSDP|full.?shard", "fsdp1"),
    (r"ZeRO-1(?!/)", "zero1"),
    (r"ZeRO-2(?!/)", "zero2"),
    (r"ZeRO-3(?!/)", "zero3"),
)
OFFLOADS = {
    "none": "none",
    "fsdp_params_cpu": "optimizer_and_parameters",
    "param+optim cpu": "optimizer_and_parameters",
}
OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw8bit": "adamw_8bit",
    "pagedadamw8bit": "paged_adamw_8bit",
    "pagedadamw32bit": "paged_adamw_32bit",
    "sgd": "sgd",
    "adafactor": "adafactor",
    "lion": "lion_32bit",
}
NOT_A_CHOICE_HERE = re.compile(
    r"nemo|megatron|tensor.?parallel|pipeline|mlperf|habana|gaudi|tpu|colossal|nanotron|\bTP\d|\bPP\d|\bCP\d|jax",
    re.IGNORECASE,
)


OF_QUANTIZATION = ("storage", "packed_by")
"""Facts about a quantised model alone."""


def state(row: Row, folder: Path) -> Stated:
    """Read a row.

    Args:
        row: one line of a file of published speeds.
        folder: where config.json files may be written.

    Raises:
        RefusedError: it cannot be stated.
    """
    facts = {name: value for fact in _facts(row) for name, value in fact.fields.items()}
    if "refused" in facts:
        raise RefusedError(facts["refused"])
    _refuse_what_is_not_modelled(row)
    nearest, inter_node = facts.pop("nearest", None), facts.pop("inter_node_gb_s", None)
    adapter_dtype = facts.pop("adapter_dtype", None)
    stated = {
        "id": row["id"],
        "model": _model(row, folder),
        "gpus": _gpus(row, inter_node),
        "seq_len": row["seq_len"],
        "micro_batch_size": row["micro_batch_size"],
        "gradient_accumulation_steps": row["grad_accum"] or facts.pop("gradient_accumulation_steps", None),
        "method": METHODS[row["method"]],
        "gradient_checkpointing": bool(row["gradient_checkpointing"]),
        "checkpoint_offload": row["offload"] == "activation_cpu" or None,
        "attention": _attention(row),
        "optimizer": _optimizer(row),
        "sharding": facts.pop("sharding", None) or _sharding(row),
        "offload": OFFLOADS.get(row["offload"] or "none", "none"),
        **_precision(row),
        **{name: value for name, value in facts.items() if name not in OF_QUANTIZATION},
    }
    if stated["method"] == "qlora":
        stated["quantization"] = _quantization(row, facts, stated)
    if stated["method"] == "full":
        stated = {name: value for name, value in stated.items() if not name.startswith("lora_")}
    try:
        case = read_case(stated)
    except AutofitError as error:
        raise RefusedError(error.message) from error
    regime = case.regime if adapter_dtype is None else replace(case.regime, adapter_dtype=adapter_dtype)
    return Stated(case=case, regime=regime, software=_software(row), nearest=nearest)


def _facts(row: Row) -> list[Fact]:
    found = [facts for prefix, facts in FACTS.items() if row["source"].startswith(prefix)]
    return [fact for facts in found for fact in facts if fact.applies(row)]


def _refuse_what_is_not_modelled(row: Row) -> None:
    for name in ("seq_len", "micro_batch_size", "gpus_count", "tokens_per_second_total"):
        if not row.get(name):
            raise RefusedError(f"{name} is not stated")
    if row["method"] not in METHODS:
        raise RefusedError(f"the method {row['method']!r} is not modelled")
    if row.get("parallelism"):
        raise RefusedError(f"tensor, pipeline or context parallelism: {row['parallelism']}")
    if re.search("fp8|int8|nvfp4", str(row.get("precision")), re.IGNORECASE):
        raise RefusedError(f"products in {row['precision']} are not modelled")
    said = NOT_A_CHOICE_HERE.search(f"{row['source']} {row.get('sharding')} {row.get('gpu')}")
    if said:
        raise RefusedError(f"not a stack of PyTorch with data parallelism alone: {said[0]}")
    if row["gradient_checkpointing"] is None:
        raise RefusedError("whether activations are checkpointed is not stated")
    if row["offload"] not in {*OFFLOADS, "activation_cpu", None}:
        raise RefusedError(f"the offload {row['offload']!r} is not modelled")


WHOLE_RUN_SAMPLES = {"atlarge-research/coastline-recommender": 4096}
"""Samples of a whole run, by what a source's name begins with: IBM/ado's data set news-tokens-16384plus-entries-4096,
each cut at the row's length."""
WHOLE_RUN_TOLERANCE = 0.1
"""Two figures of one run differ by less: this source's publisher changes both at random, by up to 3 % each."""


def second_speed(row: Row) -> float | None:
    """Return the speed that a row's published duration means, where its source says how much data a whole run is.

    It is a second figure of the same run. None where there is none, or where the run was stopped before its end.
    """
    samples = next((num for prefix, num in WHOLE_RUN_SAMPLES.items() if row["source"].startswith(prefix)), None)
    seconds = re.search(r"train_runtime ([\d.]+) s", row.get("notes") or "")
    if samples is None or seconds is None:
        return None
    speed = samples * row["seq_len"] / float(seconds[1])
    is_whole = abs(speed / row["tokens_per_second_total"] - 1) < WHOLE_RUN_TOLERANCE
    return speed if is_whole else None


def was_stopped(row: Row) -> bool:
    """Tell a run that ended before its data did.

    None does by the actuator's defaults, which all else that a row leaves open is taken from.
    Source: IBM/ado plugins/actuators/sfttrainer experiments/common.py, `stop_after_seconds` -1.0, and actuators.py on
    the token counts of runs that it stops; no column of coastline's run_database.csv says which were.
    """
    states_end = any(row["source"].startswith(prefix) for prefix in WHOLE_RUN_SAMPLES)
    return states_end and "train_runtime" in (row.get("notes") or "") and second_speed(row) is None


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedModel:
    """An architecture that only published speeds name."""

    names: tuple[str, ...]
    num_params: int | None
    """As published with the speeds; None where only a rounded figure is."""
    source: str
    config: dict[str, Any]


@cache
def speed_models() -> tuple[SpeedModel, ...]:
    """Read the architectures beside the catalogue."""
    rows = json.loads(MODELS.read_text(encoding="utf-8"))
    return tuple(SpeedModel(**{**row, "names": tuple(row["names"])}) for row in rows)


def _model(row: Row, folder: Path) -> str:
    key = _key(row["model"])
    for model in speed_models():
        if key in map(_key, model.names):
            config = dict(model.config)
            if "max_position_embeddings" in config:  # a table of learned positions is as long as the sequences
                config["max_position_embeddings"] = max(row["seq_len"], 2048)
            path = folder / f"{key}-{config.get('max_position_embeddings', 0)}.json"
            path.write_text(json.dumps(config), encoding="utf-8")
            return str(path)
    ids = model_catalogue().ids
    exact = [known for known in ids if known.casefold() == row["model"].casefold()]
    found = exact or [known for known in ids if _key(known.rpartition("/")[2]) == key]
    if not found:
        raise RefusedError(f"the architecture of {row['model']!r} is not known here")
    return found[0]


def _key(name: str) -> str:
    """Reduce a model's name to what tells architectures apart.

    Versions of one model that differ in their weights alone have one key: v0.1 and v0.2, base, chat and instruct.
    """
    bare = name.rpartition("/")[2].casefold()
    bare = re.sub(r"[-_ ](hf|base|chat|instruct|it|v0\.\d|meta|gptq|4k|8k|128k)\b", "", bare)
    bare = re.sub(r"^meta[-_ ]", "", bare)
    bare = re.sub(r"granite-3(?:\.\d)?-(\d)", r"granite-3-\1", bare)
    return re.sub(r"[^a-z0-9.]", "", bare)


def _gpus(row: Row, inter_node_gb_s: float | None) -> str:
    count, device = row["gpus_count"], _device(row["gpu"])
    if count <= MAX_DEVICES_PER_NODE:
        return f"{count}x{device}"
    if inter_node_gb_s is None:
        raise RefusedError("the network between its nodes is not stated")
    nodes, rest = divmod(count, MAX_DEVICES_PER_NODE)
    if rest:
        raise RefusedError(f"{count} devices are no whole nodes of {MAX_DEVICES_PER_NODE}")
    return f"{nodes}x{MAX_DEVICES_PER_NODE}x{device}:inter_node_gb_s={inter_node_gb_s:g}"


def _device(name: str) -> str:
    """Name a GPU as the catalogue does; where a form factor is not stated it is SXM's, where a size is not, the larger.

    llm-foundry's MFU column is relative to 989 TFLOPS on an H100 and 312 on an A100.
    """
    bare = re.sub(r"\(.*\)", "", name).replace("NVIDIA", "").replace("GeForce", "").strip(" -")
    usual = {
        "A100": "A100-SXM-80G",
        "H100": "H100-SXM-80G",
        "A100-80GB": "A100-SXM-80G",
        "A100-40GB": "A100-SXM-40G",
        "A100-80GB-PCIe": "A100-PCIe-80G",
    }
    bare = usual.get(bare, bare)
    spelt = (bare, f"{bare}-80G", bare.replace("H100-80GB", "H100-SXM-80G"), re.sub(r"[ -]?\d+ ?GB?$", "", bare))
    for each in spelt:
        try:
            return find(each, catalogue()).name
        except InputError:
            continue
    raise RefusedError(f"the device {name!r} is not in the catalogue")


def _attention(row: Row) -> str:
    stated = (row.get("attention") or "").casefold()
    if "flash" in stated:
        return "flash_attention_2"
    return "eager" if "eager" in stated else "sdpa"


def _optimizer(row: Row) -> str | None:
    key = re.sub(r"[^a-z0-9]", "", (row.get("optimizer") or "").casefold())
    if not key:
        return None
    if key in {"adamwtorchfused", "adamwtorch"}:
        return str(row["optimizer"])
    if key not in OPTIMIZERS:
        raise RefusedError(f"the optimizer {row['optimizer']!r} is not modelled")
    return OPTIMIZERS[key]


def _sharding(row: Row) -> str:
    stated = str(row.get("sharding"))
    if row["gpus_count"] == 1 and row["offload"] in {"none", None, "activation_cpu"}:
        return "none"
    for pattern, sharding in SHARDINGS:
        if re.search(pattern, stated) and sharding is not None:
            return "ddp" if sharding == "none" else sharding
    raise RefusedError(f"the sharding {stated!r} is not one that is modelled")


def _precision(row: Row) -> dict[str, str]:
    """Read the precision where no fact says it: bf16 or fp16 by itself is autocast over weights in fp32."""
    stated = str(row.get("precision")).casefold()
    half = "fp16" if "float16" in stated.replace("bfloat16", "") or "fp16" in stated else "bf16"
    if not re.search("bf16|bfloat16|fp16|float16|fp32|float32|tf32", stated):
        raise RefusedError(f"the precision {row.get('precision')!r} is not known")
    if re.search("fp32|float32|tf32", stated) and not re.search("bf16|fp16", stated):
        return {"weights_dtype": "float32", "autocast": "no"}
    full = METHODS[row["method"]] == "full"
    return {"weights_dtype": "float32" if full else {"bf16": "bfloat16", "fp16": "float16"}[half], "autocast": half}


def _quantization(row: Row, facts: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    bits = row.get("quant_bits") or 4
    if "packed_by" in facts:
        return {"bits": bits, "type": "gptq", "kernel": facts["packed_by"]}
    shards_weights = stated["sharding"] in {"fsdp1", "fsdp2", "zero3"}
    storage = facts.get("storage") or ("bfloat16" if shards_weights else None)
    given = {"bits": bits, "type": "nf4" if bits == 4 else None, "storage": storage}
    return {name: value for name, value in given.items() if value is not None}


def _software(row: Row) -> str:
    """Name what ran a row, where a source compares software: a plan does not choose it."""
    framework = re.search(r"framework=([^;]+)", row.get("notes") or "")
    ablation = re.search(r'ablation row "([^"]+)"', row.get("notes") or "")
    return framework[1].strip() if framework else ablation[1] if ablation else ""
