"""Rows of measured or planned runs, one JSON object each: from a row to the one configuration that it describes.

Fields and their meaning are those of published measurements: `id`, `model`, `gpus`, `seq_len`, `micro_batch_size`,
`method`, `quantization`, `kbit_prepare`, `lora_rank`, `lora_target_modules`, `weights_dtype`, `autocast`, `optimizer`,
`gradient_checkpointing`, `attention`, `loss`, `outputs_kept`, `sharding`, `offload`. Every other keyword of
`autofit.estimate` may stand beside them. What was measured is not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import asdict

from autofit.errors import InputError, nearest
from autofit.search.space import ADAPTER_METHODS, candidates
from autofit.sources.deepspeed_file import read_deepspeed_file
from autofit.sources.hardware import parse_cluster
from autofit.sources.models import resolve_model
from autofit.sources.packed import with_packed_weights
from autofit.spec.configuration import Configuration
from autofit.spec.hardware import Cluster
from autofit.spec.job import Job, Model, Restrictions, Workload
from autofit.spec.libraries import installed_versions
from autofit.spec.profile import Regime
from autofit.spec.regimes import regime_of

Row = Mapping[str, Any]

NOT_READ = frozenset({"id", "source", "stack", "notes", "tokens_per_second", "tokens_per_second_total"})
"""What says where a row is from, and what was measured (so is everything that ends in `_gib` or `_bytes`)."""
PINNED_IN_NOTES = "memory-efficient kernel pinned"
"""How fitcheck-llm's rows say, in their notes only, that sdpa could take no other kernel."""
RECAST_IN_NOTES = "baseline-peft-bnb"
"""The scenario of fms-acceleration's benchmarks that leaves preparing the model to TRL's SFTTrainer (`no_peft_model`),
which casts embeddings and head to bf16 again where bf16 is asked for.

Source: foundation-model-stack/fms-acceleration plugins/accelerated-peft framework_plugin_bnb.py; trl 0.11-0.13
trainer/sft_trainer.py and trainer/utils.py, peft_module_casting_to_bf16."""
SCENARIO_IN_NOTES = re.compile("(baseline|accelerated)-peft-(bnb|autogptq)")
SCENARIO_DROPOUT = 0.1
"""`lora_dropout` of those. Source: foundation-model-stack/fms-acceleration scripts/benchmarks/scenarios.yaml."""
REQUIRED = ("model", "gpus", "seq_len")
SHARDINGS = {"fsdp_full_shard": "fsdp1", "fsdp2_full_shard": "fsdp2", "fsdp": "fsdp1", "fsdp_shard_grad_op": "fsdp1"}
"""accelerate's words for FSDP, which mean the first of its versions unless they say otherwise."""
OFFLOADS = {
    "params cpu (FSDP CPUOffload)": "optimizer_and_parameters",
    "params cpu": "optimizer_and_parameters",
    "optimizer cpu": "optimizer",
}
PURE = {"float32": "fp32", "bfloat16": "pure-bf16", "float16": "pure-fp16"}
MAX_NUMBER = 2**31 - 1
"""Of tokens, sequences or steps; nothing trains as many."""
AUTO_GPTQ_IN_NOTES = "accelerated-peft-autogptq"
"""The scenario of fms-acceleration's benchmarks whose layers are auto_gptq's.

Source: foundation-model-stack/fms-acceleration plugins/accelerated-peft framework_plugin_autogptq.py."""
PACKED = ("gptq", "awq")
"""What a checkpoint comes packed with, at any number of bits."""
OF_BITSANDBYTES = (4, 8, None)
"""Bits that a model can be loaded in; None is 4."""
FIRST_WITHOUT_REENTRY = 5
"""Of transformers."""
ALWAYS_UNQUANTISED = ("lm_head",)
"""What transformers leaves unquantised unasked."""


class Case(Struct, frozen=True, kw_only=True):
    """One row, read."""

    id: Any
    model: Model
    cluster: Cluster
    workload: Workload
    configuration: Configuration

    @property
    def regime(self) -> Regime:
        """The code path that it has to be traced under."""
        return regime_of(self.configuration, self.cluster.device, self.model.fp32_modules)


def read_case(row: Row, *, allow_hub: bool = False) -> Case:
    """Read a row.

    Raises:
        InputError: it lacks something, or has a value that is not known.
    """
    _refuse_unknown_fields(row)
    for name in REQUIRED:
        if row.get(name) is None:
            raise InputError(f"the row has no {name}.", to_fix=f"give {', '.join(REQUIRED)}")
    cluster, model = _cluster(_text(row, "gpus")), _model(_text(row, "model"), allow_hub)
    restrictions = with_packed_weights(read_restrictions(row, cluster), model.config)
    accumulation = _number(row, "gradient_accumulation_steps", 1)
    num_groups = max(1, cluster.num_devices // restrictions.sequence_parallel_size)
    sequences = restrictions.micro_batch_sequences[0] * accumulation * num_groups
    workload = Workload(sequence_tokens=_number(row, "seq_len", 1), global_batch_sequences=sequences)
    found = candidates(Job(model=model, workload=workload, restrictions=restrictions), cluster)
    if len(found) != 1:
        raise InputError(
            f"the row leaves several shardings: {', '.join(each.sharding for each in found)}.", to_fix="give sharding"
        )
    return Case(id=row.get("id"), model=model, cluster=cluster, workload=workload, configuration=found[0])


def read_restrictions(row: Row, cluster: Cluster) -> Restrictions:
    """Read what a row fixes: everything. A null is the default, or follows from the rest.

    Raises:
        InputError: a value is not known.
    """
    given: dict[str, Any] = {
        "methods": (_method(row),),
        "precision": _precision(row),
        "weights_dtype": row.get("weights_dtype"),
        "optims": (_text(row, "optimizer") or "adamw_torch_fused",),
        "shardings": _shardings(row, cluster),
        "offload": _offload(row),
        **_deepspeed(row),
        "reshard_after_forward": _text(row, "sharding") != "fsdp_shard_grad_op",
        "micro_batch_sequences": (_number(row, "micro_batch_size", 1),),
        "gradient_checkpointing": _flag(row, "gradient_checkpointing"),
        "use_reentrant": _reenters_unasked(row),
        "attention": _text(row, "attention") or "auto",
        "lora": _stated(
            {"r": row.get("lora_rank"), "target_modules": _targets(row), "lora_dropout": _scenario_dropout(row)}
        ),
        "quantization": _quantization(row),
        "loss": _text(row, "loss") or "stock",
        "keeps_outputs": _flag(row, "outputs_kept"),
    }
    if PINNED_IN_NOTES in _notes(row):
        given["sdpa_kernel"] = "efficient"
    given |= {name: read(row[name]) for name, read in FURTHER.items() if row.get(name) is not None}
    if row.get("batching") is not None:
        given["batchings"] = (row["batching"],)
    for whole, names in PARTS.items():
        parts = {part: row[name] for name, part in names.items() if row.get(name) is not None}
        if parts:
            given[whole] = {**given.get(whole, {}), **parts}
    try:
        return msgspec.convert(_stated(given), Restrictions)
    except msgspec.ValidationError as error:
        raise InputError(f"the row has a value that is not known: {_words(error)}", to_fix="correct it") from error


def _same(value: Any) -> Any:
    return value


FURTHER: dict[str, Callable[[Any], Any]] = dict.fromkeys(
    (
        "use_reentrant",
        "checkpoint_every_n_layers",
        "checkpoint_offload",
        "gradient_as_bucket_view",
        "num_replicas",
        "reshard_after_forward",
        "sequence_parallel_size",
        "task",
        "image_tokens",
        "expandable_segments",
        "max_split_size_mb",
        "sdpa_kernel",
    ),
    _same,
)
"""Fields of `Restrictions` that a row may name as they are."""
PARTS = {
    "lora": {name: name for name in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora", "modules_to_save")},
    "freeze": {name: name for name in ("freeze_trainable_layers", "freeze_extra_modules")},
    "evaluation": {
        "per_device_eval_batch_size": "per_device_eval_batch_size",
        "compute_metrics": "keeps_predictions",
        "eval_sequences": "num_sequences",
        "eval_accumulation_steps": "eval_accumulation_steps",
        "predict_with_generate": "predict_with_generate",
    },
}
READ = frozenset(
    {
        *REQUIRED,
        *FURTHER,
        *(name for names in PARTS.values() for name in names),
        "gradient_accumulation_steps",
        "micro_batch_size",
        "method",
        "quantization",
        "kbit_prepare",
        "recasts_tables",
        "lora_rank",
        "lora_target_modules",
        "weights_dtype",
        "autocast",
        "tf32",
        "optimizer",
        "gradient_checkpointing",
        "attention",
        "batching",
        "loss",
        "outputs_kept",
        "sharding",
        "offload",
        "deepspeed",
    }
)


def _refuse_unknown_fields(row: Row) -> None:
    for name, value in row.items():
        measured = name in NOT_READ or name.endswith(("_gib", "_bytes"))
        if name not in READ and not measured and value is not None:
            raise InputError(
                f"the row has the unknown field {name!r}.", to_fix=f"the nearest are {nearest(name, READ)}"
            )


@lru_cache(maxsize=256)
def _cluster(text: Any) -> Cluster:
    return parse_cluster(str(text))


@lru_cache(maxsize=1024)
def _model(text: Any, allow_hub: bool) -> Model:  # noqa: FBT001 - a key of the cache
    return resolve_model(str(text), allow_hub=allow_hub)


def _number(row: Row, name: str, default: int) -> int:
    value = row.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_NUMBER:
        raise InputError(f"the row's {name} is {value!r}.", to_fix=f"give a whole number from 1 to {MAX_NUMBER}")
    return value


def _text(row: Row, name: str) -> str:
    """Return a text, empty where the row has none."""
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or not value:
        raise InputError(f"the row's {name} is {value!r}.", to_fix="give a text")
    return value


def _reenters_unasked(row: Row) -> bool | None:
    """Transformers before 5 checkpointed with reentry unless told otherwise; later ones do not, which follows anyway.

    Source: transformers 4.35 to 4.57 and 5.0 modeling_utils.py, `gradient_checkpointing_enable`.
    """
    release = installed_versions(("transformers",)).get("transformers", "")
    is_old = release.split(".")[0].isdigit() and int(release.split(".")[0]) < FIRST_WITHOUT_REENTRY
    return True if is_old and _flag(row, "gradient_checkpointing") else None


def _flag(row: Row, name: str) -> bool:
    value = row.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"the row's {name} is {value!r}.", to_fix="give true or false")
    return bool(value)


def _notes(row: Row) -> str:
    """What a person wrote; anything else says nothing."""
    notes = row.get("notes")
    return notes if isinstance(notes, str) else ""


def _method(row: Row) -> str:
    method = _text(row, "method") or "full"
    quantised = row.get("quantization") is not None
    if quantised and method not in {"qlora", "lora"}:
        raise InputError(f"the row's method is {method!r}, and it is quantised.", to_fix="give the method qlora")
    return method


def _precision(row: Row) -> str:
    """Name what autocast and the weights' dtype come to; autocast `no` leaves it to the weights."""
    autocast, weights, rounds = _text(row, "autocast"), _text(row, "weights_dtype"), _flag(row, "tf32")
    if autocast not in {"", "no", "bf16", "fp16"}:
        raise InputError(f"the row's autocast is {autocast!r}.", to_fix="give no, bf16 or fp16")
    if autocast != "no":
        return autocast or "auto"
    if rounds and weights in {"", "float32"}:
        return "tf32"
    if weights and weights not in PURE:
        raise InputError(f"the row's weights_dtype is {weights!r}.", to_fix=f"give one of {', '.join(PURE)}")
    return PURE[weights or "float32"]


def _shardings(row: Row, cluster: Cluster) -> tuple[str, ...]:
    stated = _text(row, "sharding")
    if not stated or (stated == "none" and cluster.num_devices > 1):
        return ("none", "ddp")
    return (SHARDINGS.get(stated, stated),)


def _deepspeed(row: Row) -> dict[str, Any]:
    """Read the buckets that a DeepSpeed configuration fixes, whose stage and offload have to be the row's.

    Raises:
        InputError: they are not, or see `read_deepspeed_file`.
    """
    if row.get("deepspeed") is None:
        return {}
    file = read_deepspeed_file(Path(_text(row, "deepspeed")))
    said = (f"zero{file.stage}", file.offload)
    stated = (_text(row, "sharding") or said[0], _offload(row) if row.get("offload") else said[1])
    if stated != said:
        raise InputError(
            f"the row's sharding or offload is not that of {row['deepspeed']!r}.", to_fix="leave them out of the row"
        )
    return {"shardings": (said[0],), "offload": said[1], "zero_settings": _stated(asdict(file.settings))}


def _offload(row: Row) -> str:
    stated = _text(row, "offload") or "none"
    return OFFLOADS.get(stated, stated)


def _targets(row: Row) -> list[str] | None:
    stated = row.get("lora_target_modules")
    return [stated] if isinstance(stated, str) else stated


def _scenario_dropout(row: Row) -> float | None:
    has_adapter = _method(row) in ADAPTER_METHODS
    return SCENARIO_DROPOUT if has_adapter and SCENARIO_IN_NOTES.search(_notes(row)) else None


def _quantization(row: Row) -> dict[str, Any]:
    stated = row.get("quantization") or {}
    known = {"bits", "type", "double_quant", "storage", "skip", "compute_dtype", "group_size", "kernel"}
    if not isinstance(stated, dict) or set(stated) - known:
        raise InputError(f"the row's quantization is {stated!r}.", to_fix=f"give null or {', '.join(sorted(known))}")
    if stated.get("bits") not in OF_BITSANDBYTES and stated.get("type") not in PACKED:
        raise InputError(
            f"the row's quantization has {stated['bits']!r} bits.",
            to_fix="give 4 or 8, or the type of a packed checkpoint",
        )
    skipped = stated.get("skip") or ()
    if not isinstance(skipped, list | tuple):
        raise InputError(f"the row's quantization skips {skipped!r}.", to_fix="give a list of module names")
    return _stated(
        {
            "bits": stated.get("bits"),
            "quant_type": stated.get("type") if stated.get("bits") != 8 or stated.get("type") in PACKED else None,
            "double_quant": stated.get("double_quant"),
            "storage_dtype": stated.get("storage"),
            "compute_dtype": stated.get("compute_dtype"),
            "prepares_kbit": False if _is_left_sharded_to_trl(row) else row.get("kbit_prepare"),
            "skip_modules": () if tuple(skipped) == ALWAYS_UNQUANTISED else tuple(skipped),
            "recasts_tables": _recasts_tables(row),
            "group_size": stated.get("group_size"),
            "kernel": stated.get("kernel") or ("auto_gptq" if AUTO_GPTQ_IN_NOTES in _notes(row) else None),
        }
    )


def _recasts_tables(row: Row) -> Any:
    is_named = RECAST_IN_NOTES in _notes(row) and not _is_left_sharded_to_trl(row)
    is_recast = is_named and row.get("kbit_prepare") and row.get("autocast") == "bf16"
    return row.get("recasts_tables", True if is_recast else None)


def _is_left_sharded_to_trl(row: Row) -> bool:
    """TRL prepares no quantised model whose weights are on their way to be sharded (`is_sharded_qlora`).

    Source: trl 0.13 trainer/sft_trainer.py.
    """
    return RECAST_IN_NOTES in _notes(row) and _text(row, "sharding").startswith("fsdp")


def _stated(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _words(error: msgspec.ValidationError) -> str:
    """Shorten msgspec's words to what and where."""
    return str(error).replace(" - at `$.", ", in `")
