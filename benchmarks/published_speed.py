"""Reads a published speed as a configuration that can be timed, or says why it cannot.

What a row leaves open is taken from the code or text that its source published with it (`FACTS`), never from its speed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace
from published_rows import RefusedError, Row, flag, letters, number, number_beside, text, whole
from published_spellings import (
    GENERAL_OPTIMIZERS,
    attention_of,
    checkpointing_of,
    device_of,
    kind_of_precision,
    leaves_weights_open,
    method_of,
    offload_of,
    optimizer_of,
    precision_of,
    sharding_of,
)

from autofit.errors import AutofitError, InputError
from autofit.sources.models import model_catalogue, resolve_model
from autofit.sources.rows import Case, read_case
from autofit.spec.profile import Regime, RegimeProfile

MODELS = Path(__file__).parent / "data" / "speed_models.json"
MAX_DEVICES_PER_NODE = 8


class Stated(Struct, frozen=True, kw_only=True):
    """A row as a configuration."""

    case: Case
    regime: Regime
    """The code path: the case's, but for what the libraries of that time did otherwise."""
    software: str
    """What ran it, as far as a configuration does not say."""
    nearest: str | None
    """What of the row is not modelled and was stated as the nearest that is; None: nothing."""
    assumed: tuple[str, ...] = ()
    """What neither the row nor its source says, and what it was taken to be."""
    model: str
    """As the row names it."""
    num_params: float | None
    """Of the model, as the row says."""


class Fact(Struct, frozen=True, kw_only=True):
    """What a source's own code or text says of its rows."""

    fields: Mapping[str, Any]
    """Fields of `autofit.sources.rows`, or `refused` or `nearest` with the reason."""
    because: str
    applies: Callable[[Row], bool] = lambda _row: True


def _is(name: str, *values: Any) -> Callable[[Row], bool]:
    return lambda row: row.get(name) in values


def _notes(words: str) -> Callable[[Row], bool]:
    return lambda row: re.search(words, text(row, "notes")) is not None


def _is_routed(row: Row) -> bool:
    return re.search("mixtral|moe", row["model"], re.IGNORECASE) is not None


def _is_sharded(row: Row) -> bool:
    return row["gpus_count"] > 1


QWEN_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""Qwen's c_attn, c_proj, w1 and w2 under the names of Qwen2's layers, as which it is stated."""

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
        Fact(
            fields={
                "nearest": "experts one after the other, in four bits too, timed as one grouped product in 16 bits"
            },
            because="scripts/benchmarks/refs/requirements.txt: transformers 4.4x, where each expert is a module with "
            "linear layers (models/mixtral/modeling_mixtral.py)",
            applies=lambda row: _is_routed(row) and not _notes("scattermoe")(row),
        ),
        Fact(
            fields={
                "loss": "stock",
                "nearest": "fused kernels beside experts, timed as none; experts as one grouped product in 16 bits",
            },
            because="plugins/fused-ops-and-kernels models/mixtral.py: norms, rotation, loss and attention's adapters; "
            "Liger's own would fuse the experts, and work out their gradients",
            applies=lambda row: _is_routed(row) and _notes("foak")(row),
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
            fields={"sharding": "zero2"},
            because="finetune/finetune_lora_ds.sh: ds_config_zero2.json",
            applies=lambda row: row["method"] != "full" and _is_sharded(row),
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
            fields={
                "packed_by": "gptqmodel",
                "weights_dtype": "float16",
                "autocast": "fp16",
                "adapter_dtype": "float16",
                "kbit_prepare": True,
                "lora_target_modules": QWEN_LINEAR,
                "nearest": "auto_gptq's layers of 2023, timed as gptqmodel's: both unpack by torch's operators",
            },
            because="README.md: Q-LoRA on the Int4 model; finetune.py, GPTQConfig(disable_exllama=True); auto_gptq "
            "nn_modules/qlinear/qlinear_cuda_old.py, forward: from 128 rows on no kernel of its own; "
            "finetune/finetune_qlora_single_gpu.sh: fp16, which DeepSpeed casts adapters to",
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

NOT_A_CHOICE_HERE = re.compile(
    r"\bnemo\b|megatron|tensor[-_ ]?parallel|pipeline[-_ ]?parallel|mlperf|habana|gaudi|\btpus?\b|colossal|nanotron"
    r"|\bTP\d|\bPP\d|\bCP\d|\bjax\b|maxtext|gpt-neox repo",
    re.IGNORECASE,
)
SOFTWARE = (
    (r"unsloth", "refused", "Unsloth's own kernels and backward pass are not modelled"),
    (r"torchtitan", "nearest", "torchtitan's own modules, timed as transformers'"),
    (r"torchtune", "nearest", "torchtune's own modules, timed as transformers'"),
    (r"lit-?gpt|lit-?llama", "nearest", "LitGPT's own modules, timed as transformers'"),
)
"""What runs a model in place of transformers, where no fact says more."""
NOT_FILLED = (
    r"\bcap(ped)?\b|cutoff|upper (bound|limit)|\bat most\b|truncat|unpacked|not packed|packing[ :=]*(off|false|no)\b"
    r"|padding tokens|dynamic(ally)? pad|variable.length|real lengths?|shorter"
)
"""Notes by which sequences need not be as long as the row says."""
FILLED = (
    r"pad(ded|ding)?\W*(and truncated |/truncated |= ?)?(to )?(the )?[\"']?max|all filled"
    r"|dummy|random tokens|fills? seq"
)
COMPILED = r"(?<!no )(?<!without )(?<!not )torch[._ ]?compile(?! *(=|:|is)? *(off|false|no\b|disabled|not))"
OF_QUANTIZATION = ("storage", "packed_by")
"""Facts about a quantised model alone."""
OF_ADAPTERS = (
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "use_dora", "use_rslora", "modules_to_save"),
)
OF_ROWS = (
    *OF_ADAPTERS,
    *("freeze_trainable_layers", "freeze_extra_modules", "loss", "use_reentrant", "checkpoint_every_n_layers"),
    *("kbit_prepare", "sdpa_kernel", "sequence_parallel_size"),
)
"""Fields of `autofit.sources.rows` that rows of published speeds may have under the same name."""
TEXTS = (
    *("id", "source", "family", "model", "method", "gpu", "precision", "sharding", "offload", "attention"),
    *("optimizer", "parallelism", "notes", "gradient_checkpointing", "framework", "software", "stack", "packing"),
)
WHOLES = (*("seq_len", "micro_batch_size", "grad_accum", "gpus_count", "global_batch_size", "num_nodes", "quant_bits"),)
NUMBERS = ("tokens_per_second_total", "tokens_per_second_per_gpu")
BESIDE = ("num_params", "peak_gib", "inter_node_gb_s")
"""Numbers that a row can do without: what is none says nothing."""
READ = (*TEXTS, *WHOLES, *NUMBERS, *BESIDE, *OF_ROWS, "gpus", "mfu")
"""Every field that is read; mfu follows from others."""
BITS_OF_HALVES = 16
SAME_FIGURE = 0.05
"""Relative difference of two figures that are said to be the same."""


def read(row: Row) -> dict[str, Any]:
    """Return every field that is read, in its kind: texts empty and numbers None where a row says nothing.

    Raises:
        RefusedError: a number is none, the row says two things of one, or lacks what every row needs.
    """
    found: dict[str, Any] = {name: text(row, name) for name in TEXTS}
    found |= {name: _bits(row) if name == "quant_bits" else whole(row, name) for name in WHOLES}
    found |= {name: number(row, name) for name in NUMBERS} | {name: number_beside(row, name) for name in BESIDE}
    found |= {name: row[name] for name in OF_ROWS if row.get(name) is not None}
    together = re.fullmatch(r"\s*(\d+)\s*[xX]\s*(.+)", text(row, "gpus"))
    if together and not found["gpu"]:
        found |= {"gpu": together[2], "gpus_count": found["gpus_count"] or int(together[1])}
    for name in ("model", "gpu"):
        if not found[name]:
            raise RefusedError(f"{name} is not stated")
    for name in ("seq_len", "gpus_count"):
        if found[name] is None:
            raise RefusedError(f"{name} is not stated")
    counted = re.match(r"\s*(\d+)\s*[xX*]\s*\D", found["gpu"])
    if counted and int(counted[1]) not in {1, found["gpus_count"]}:
        raise RefusedError(f"gpu says {counted[1]} devices, and gpus_count {found['gpus_count']}")
    return found | {"micro_batch_size": _micro_batch(found), "tokens_per_second_total": _speed(found)}


def _bits(row: Row) -> int | None:
    """Read `quant_bits`: a number, or a name such as int4 or nf4; 16 and more are not quantised."""
    said = text(row, "quant_bits")
    named = re.fullmatch(r"(?:bnb[-_ ]?)?(?:int|nf|fp)?[-_ ]?(\d+)(?:\.0)?[-_ ]?(?:bits?)?", said.casefold())
    if not said or said.casefold() in {"none", "0", "0.0"}:
        return None
    if named is None:
        raise RefusedError(f"quant_bits is {row['quant_bits']!r}, which is no number of bits")
    return int(named[1]) if int(named[1]) < BITS_OF_HALVES else None


def _micro_batch(row: Row) -> int:
    """Return sequences a device and micro-step, which a batch over all devices and micro-steps may stand for."""
    micro, over_all = row["micro_batch_size"], row["global_batch_size"]
    if over_all is None:
        if micro is None:
            raise RefusedError("micro_batch_size is not stated")
        return int(micro)
    others = row["gpus_count"] * (row["grad_accum"] or 1)
    if micro is None:
        if row["grad_accum"] is None or over_all % others:
            raise RefusedError("micro_batch_size is not stated, and does not follow from global_batch_size")
        return int(over_all // others)
    if row["grad_accum"] is not None and micro * others != over_all:
        raise RefusedError(
            f"global_batch_size is {over_all}, and micro-batches, steps and devices make {micro * others}"
        )
    return int(micro)


def _speed(row: Row) -> float:
    total, each = row["tokens_per_second_total"], row["tokens_per_second_per_gpu"]
    product = None if each is None else each * row["gpus_count"]
    if total is not None and product is not None and abs(total / (product or 1) - 1) > SAME_FIGURE:
        raise RefusedError("tokens_per_second_total is not tokens_per_second_per_gpu times the devices")
    found = total if total is not None else product
    if found is None:
        raise RefusedError("tokens_per_second_total is not stated")
    if found <= 0:
        raise RefusedError(f"tokens_per_second_total is {found:g}")
    return float(found)


def state(row: Row, folder: Path) -> Stated:
    """State a row as a configuration.

    Args:
        row: one line of a file of published speeds.
        folder: where config.json files may be written.

    Raises:
        RefusedError: it cannot be stated.
    """
    row = read(row)
    known = _facts(row)
    facts = {name: value for fact in known for name, value in fact.fields.items()}
    if "refused" in facts:
        raise RefusedError(facts["refused"])
    notes = [facts.pop("nearest", None)]
    facts |= {} if known else _said_of_software(row)
    notes += [facts.pop("nearest", None), *_power_limits(row)]
    _refuse_what_is_not_modelled(row)
    inter_node, adapter_dtype = facts.pop("inter_node_gb_s", None), facts.pop("adapter_dtype", None)
    assumed: list[str] = []
    method = method_of(row)
    bits = method.pop("bits", None)
    if method["method"] == "lora" and re.search(PACKED_IN_NAMES, row["model"], re.IGNORECASE):
        method["method"] = "qlora"
    gpus, num_nodes = _gpus(row, inter_node, assumed)
    attention = attention_of(row)
    notes.append(attention.pop("nearest", None))
    stated: dict[str, Any] = {
        "id": row["id"],
        "model": _model(row, folder, assumed),
        "gpus": gpus,
        "seq_len": row["seq_len"],
        "micro_batch_size": row["micro_batch_size"],
        **method,
        **checkpointing_of(row),
        **offload_of(row),
        **_precision(row, facts, method["method"], assumed),
        **_sharding(row, facts, num_nodes, assumed),
        **{name: value for name, value in facts.items() if name not in {*OF_QUANTIZATION, *OF_PRECISION, "sharding"}},
        **{name: row[name] for name in OF_ROWS if name in row},
    }
    if stated.get("checkpoint_offload") and not stated["gradient_checkpointing"]:
        raise RefusedError("activations are offloaded that are not checkpointed, which is not modelled")
    stated |= {} if "attention" in facts else attention
    stated["optimizer"] = _optimizer(row, facts)
    stated["gradient_accumulation_steps"] = row["grad_accum"] or facts.get("gradient_accumulation_steps")
    _note_what_is_open(stated, assumed)
    if stated["method"] == "qlora":
        stated["quantization"] = _quantization(row, facts, stated, bits, assumed)
    if stated["method"] not in {"lora", "qlora"}:
        stated = {name: value for name, value in stated.items() if name not in OF_ADAPTERS}
    try:
        case = read_case(stated)
    except AutofitError as error:
        raise RefusedError(error.message) from error
    if stated.get("attention") is None:
        assumed.append(f"attention is {case.configuration.attention}")
    regime = case.regime if adapter_dtype is None else replace(case.regime, adapter_dtype=adapter_dtype)
    return Stated(
        case=case,
        regime=regime,
        software=_software(row),
        nearest="; ".join(filter(None, notes)) or None,
        assumed=tuple(assumed),
        model=row["model"],
        num_params=row["num_params"],
    )


def _facts(row: Row) -> list[Fact]:
    found = [facts for prefix, facts in FACTS.items() if row["source"].startswith(prefix)]
    return [fact for facts in found for fact in facts if fact.applies(row)]


def _said_of_software(row: Row) -> dict[str, Any]:
    """Return what a row whose source is not known says of the software that ran it.

    Raises:
        RefusedError: it cannot be modelled.
    """
    where = " ".join(row[name] for name in ("source", "family", "framework", "software", "stack"))
    for pattern, kind, words in SOFTWARE:
        if re.search(pattern, where, re.IGNORECASE):
            if kind == "refused":
                raise RefusedError(words)
            return {"nearest": words}
    if _notes(rf"(?i){COMPILED}")(row):
        raise RefusedError("torch.compile fuses operators that the trace has apart")
    if _notes("(?i)liger")(row) and "loss" not in row:
        return {"loss": "liger"}
    return {}


def _power_limits(row: Row) -> Iterator[str]:
    limit = re.search(r"(\d+) ?W\b", row["gpu"])
    if limit:
        yield f"a card held to {limit[1]} W, timed as one that is not"


def _refuse_what_is_not_modelled(row: Row) -> None:
    _refuse_parallelism(row)
    kind_of_precision(row)
    where = " ".join(row[name] for name in ("source", "family", "framework", "sharding"))
    said = NOT_A_CHOICE_HERE.search(where)
    if said:
        raise RefusedError(f"not a stack of PyTorch with data parallelism alone: {said[0]}")
    if _facts(row):
        return
    is_open = _notes(f"(?i){NOT_FILLED}")(row) or flag(row, "packing") is False
    if is_open and not _notes(f"(?i){FILLED}")(row):
        raise RefusedError("the sequences need not be as long as the row says, and how long they are is not stated")


OTHER_PARALLELISM = r"(tp|pp|cp|ep|sp|tensor|pipeline|context|expert|sequence)\w*[^\d,;]{0,6}(\d+)"


def _refuse_parallelism(row: Row) -> None:
    stated = row["parallelism"]
    said = stated.casefold()
    others = [int(size) for _, size in re.findall(OTHER_PARALLELISM, said)]
    rest = re.sub(rf"{OTHER_PARALLELISM}|d\w*p\w*[^\d,;]{{0,6}}\d*|data[-_ ]?parallel\w*|none|fsdp\d?", "", said)
    if any(size > 1 for size in others) or re.search("[a-z]", rest):
        raise RefusedError(f"tensor, pipeline or context parallelism: {stated}")


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
    seconds = re.search(r"train_runtime ([\d.]+) s", text(row, "notes"))
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
    return states_end and "train_runtime" in (text(row, "notes")) and second_speed(row) is None


class SpeedModel(Struct, frozen=True, kw_only=True):
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


def _model(row: Row, folder: Path, assumed: list[str]) -> str:
    """Return the path or Hub id of the architecture that a row names.

    Raises:
        RefusedError: it is not known, or the name means several.
    """
    named = row["model"]
    for model in speed_models():
        if _key(named) in map(_key, model.names):
            return _written(model, row, folder)
    ids = model_catalogue().ids
    exact = [known for known in ids if known.casefold() == named.casefold()]
    if exact:
        return exact[0]
    for key in (_key, _key_of_any_version):
        found = [known for known in ids if key(known) == key(named)]
        if found:
            return _one_of(found, row, assumed)
    try:
        resolve_model(named)
    except InputError as error:
        is_file = Path(named).exists()
        raise RefusedError(error.message if is_file else f"the architecture of {named!r} is not known here") from error
    return str(named)


def _written(model: SpeedModel, row: Row, folder: Path) -> str:
    config = dict(model.config)
    if config["model_type"] == "opt":  # its table of learned positions is as long as the sequences
        config["max_position_embeddings"] = max(row["seq_len"], 2048)
    path = folder / f"{letters(model.names[0])}-{config.get('max_position_embeddings', 0)}.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return str(path)


def _one_of(found: Sequence[str], row: Row, assumed: list[str]) -> str:
    """Choose among ids that a name may mean: of the number of parameters that the row says, else the first version."""
    sizes = {known: resolve_model(known).num_params for known in found}
    said = row["num_params"]
    unpacked = [known for known in found if "gptq" not in known.casefold()] or list(found)
    if said is not None:
        unpacked.sort(key=lambda known: (abs((sizes[known] or said) - said), _version(known)))
    else:
        unpacked.sort(key=_version)
        if len({sizes[known] for known in unpacked}) > 1:
            assumed.append(f"{row['model']} is {unpacked[0]}")
    return unpacked[0]


def _version(known: str) -> tuple[str, str]:
    version = re.search(r"v0\.\d", known)
    return (version[0] if version else "", known)


PACKED_IN_NAMES = r"[-_ ](gptq|awq|int4|int8|gguf|fp8|bnb[-_]4bit|bnb[-_]8bit|4bit|8bit)\b"
"""What names of checkpoints say of how their weights are stored."""


def _key(name: str) -> str:
    """Reduce a model's name to what tells architectures apart.

    Versions of one model that differ in their weights alone have one key: base, chat and instruct, and how its weights
    are stored.
    """
    bare = name.rpartition("/")[2].casefold()
    bare = re.sub(PACKED_IN_NAMES, "", bare)
    bare = re.sub(r"[-_ ](hf|base|chat|instruct|it|pt|meta|4k|8k|128k|v1\.0|unsloth|deduped)\b", "", bare)
    bare = re.sub(r"^(meta[-_ ]|gpt_bigcode-)", "", bare)
    bare = re.sub(r"granite-3(?:\.\d)?-(\d)", r"granite-3-\1", bare)
    bare = re.sub(r"(?<=\d)_(?=\d)", ".", bare)
    return re.sub(r"[^a-z0-9.]", "", bare)


def _key_of_any_version(name: str) -> str:
    """Do the same where a name gives no version, or one whose shapes are an earlier one's."""
    return re.sub(r"v0\.[12]$|v1$", "", _key(name))


def _gpus(row: Row, stated_gb_s: float | None, assumed: list[str]) -> tuple[str, int]:
    """Return the devices as `--gpus` takes them, and how many nodes they are in."""
    count = row["gpus_count"]
    device, taken = device_of(row)
    assumed += taken
    num_nodes = row["num_nodes"] or _nodes_in_notes(row) or (1 if count <= MAX_DEVICES_PER_NODE else None)
    if num_nodes == 1:
        return f"{count}x{device}", 1
    each = MAX_DEVICES_PER_NODE if num_nodes is None else count // num_nodes
    nodes, rest = divmod(count, each or 1)
    if rest or not each:
        raise RefusedError(f"{count} devices are no whole nodes" + ("" if num_nodes else f" of {each}"))
    inter_node = row["inter_node_gb_s"] or stated_gb_s or _gb_s_in(row)
    if inter_node is None:
        raise RefusedError("the network between its nodes is not stated")
    return f"{nodes}x{each}x{device}:inter_node_gb_s={inter_node:g}", nodes


def _nodes_in_notes(row: Row) -> int | None:
    said = re.search(r"\b(\d+)[- ]nodes?\b", row["notes"])
    return int(said[1]) if said and int(said[1]) > 0 else None


def _gb_s_in(row: Row) -> float | None:
    said = re.search(r"(\d+(?:\.\d+)?) ?(?:Gbps|Gb/s|Gbit/s)", f"{row['source']} {row['notes']}")
    return float(said[1]) / 8 if said else None


def _optimizer(row: Row, facts: Mapping[str, Any]) -> str | None:
    """Return the row's own; where it is named in general alone, the one that its source's code has."""
    own: str | None = optimizer_of(row)
    is_open = own is None or letters(row["optimizer"]) in GENERAL_OPTIMIZERS
    return facts.get("optimizer", own) if is_open else own


def _sharding(row: Row, facts: Mapping[str, Any], num_nodes: int, assumed: list[str]) -> dict[str, Any]:
    """Return the row's own sharding; where it is not clear, the one of its source's code.

    Raises:
        RefusedError: it is neither stated nor known.
    """
    own = sharding_of(row, num_nodes)
    if row["gpus_count"] == 1 and offload_of(row).get("offload") is None:
        if own not in (None, {"sharding": "none"}, {"sharding": "ddp"}):
            assumed.append(f"{row['sharding']} on one device is none")
        return {"sharding": "none"}
    if own is not None:
        return own
    if "sharding" in facts:
        return {"sharding": facts["sharding"]}
    if not row["sharding"]:
        raise RefusedError("how the model is sharded over its devices is not stated")
    raise RefusedError(f"the sharding {row['sharding']!r} does not say which")


OF_PRECISION = ("weights_dtype", "autocast")


def _precision(row: Row, facts: Mapping[str, Any], method: str, assumed: list[str]) -> dict[str, Any]:
    """Return what the source's code says of the row's precision, or how it reads by itself."""
    said = {name: facts[name] for name in OF_PRECISION if name in facts}
    of_dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    if said:
        kind = said["autocast"] if said.get("autocast", "no") != "no" else of_dtype[said["weights_dtype"]]
        if kind == kind_of_precision(row):
            return said
    elif method == "full" and leaves_weights_open(row):
        assumed.append(f"{row['precision']} is autocast over weights in fp32")
    return precision_of(row, trains_weights=method in {"full", "freeze"})


def _note_what_is_open(stated: dict[str, Any], assumed: list[str]) -> None:
    """Name what neither a row nor a fact says, and what is taken for it."""
    if stated["optimizer"] is None:
        stated["optimizer"] = "adamw_torch_fused"
        assumed.append("the optimizer is adamw_torch_fused")
    if stated["gradient_accumulation_steps"] is None:
        stated["gradient_accumulation_steps"] = 1
        assumed.append("one micro-step a step")
    if stated["method"] in {"lora", "qlora"}:
        if stated.get("lora_rank") is None:
            assumed.append("the adapter is of rank 16")
        if not stated.get("lora_target_modules"):
            assumed.append("the adapter is on all linear layers")


def _quantization(
    row: Row, facts: Mapping[str, Any], stated: Mapping[str, Any], bits: int | None, assumed: list[str]
) -> dict[str, Any]:
    """Return how the weights under the adapter are stored.

    Raises:
        RefusedError: in a way that is not modelled.
    """
    named = re.search(PACKED_IN_NAMES, row["model"], re.IGNORECASE)
    packed = {"gptq": "gptq", "int4": "gptq", "int8": "gptq", "awq": "awq"}.get(named[1].casefold() if named else "")
    if named and named[1].casefold() in {"gguf", "fp8"}:
        raise RefusedError(f"a checkpoint in {named[1]} is not modelled")
    if bits is None:
        bits = 8 if named and "8" in named[1] else 4
        assumed.append(f"weights are in {bits} bits")
    if "packed_by" in facts or packed:
        if not stated.get("lora_target_modules"):
            raise RefusedError("which packed layers the adapter is on is not stated")
        given = {"bits": bits, "type": packed or "gptq", "kernel": facts.get("packed_by")}
        return {name: value for name, value in given.items() if value is not None}
    shards_weights = stated["sharding"] in {"fsdp1", "fsdp2", "zero3"}
    storage = facts.get("storage") or ("bfloat16" if shards_weights else None)
    given = {"bits": bits, "type": "nf4" if bits == 4 else None, "storage": storage}
    return {name: value for name, value in given.items() if value is not None}


def _software(row: Row) -> str:
    """Name what ran a row, where a source compares software: a plan does not choose it."""
    framework = re.search(r"framework=([^;]+)", row["notes"])
    ablation = re.search(r'ablation row "([^"]+)"', row["notes"])
    return framework[1].strip() if framework else ablation[1] if ablation else row["framework"] or row["software"]


EXACT_PARAMS, ROUNDED_PARAMS = 0.05, 0.3
"""Relative difference of two numbers of parameters of one model: as counted, and rounded as in its name (Gemma 7B has
8.5 billion)."""


def contradicts_size(stated: Stated, profile: RegimeProfile) -> str | None:
    """Say that a row is of another size than the model of its name here; None if it is not."""
    said, model = stated.num_params, stated.case.model
    configuration = stated.case.configuration
    packs = configuration.quantization is not None
    if not said or (packs and not model.num_params):
        return None
    counted = model.num_params or profile.num_elements(trains=None if configuration.lora is None else False)
    tolerance = ROUNDED_PARAMS if float(f"{said:.1e}") == said else EXACT_PARAMS
    off = said / counted - 1
    if abs(off) <= tolerance or (packs and off < 0):  # a packed weight counts as fewer elements
        return None
    return f"the row says {said / 1e9:.3g} billion parameters, and {stated.model} has {counted / 1e9:.3g} here"
