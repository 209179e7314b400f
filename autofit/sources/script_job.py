"""Makes a job of what a script turned out to train, with what the user says in place of it where the user says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from msgspec import Struct, field
from msgspec.structs import replace

from autofit.errors import InputError
from autofit.memory.optimizers import OPTIMIZERS
from autofit.search.space import engines, values
from autofit.sources.attention import usual_attention
from autofit.sources.checkpoints import stored_dtype
from autofit.sources.lengths import distribution
from autofit.sources.script_loops import refuse_split, script_loop, unsharded_only
from autofit.sources.script_words import found_words, said_at
from autofit.spec.configuration import Attention, Dtype, Evaluation, Lora, Loss, Method, Optim, Sharding
from autofit.spec.discovered import Discovered, FoundAdapter, FoundQuantization
from autofit.spec.estimate import StageName
from autofit.spec.hardware import Cluster
from autofit.spec.job import Job, Model, QuantizationWish, Restrictions, Workload
from autofit.spec.lengths import LengthDistribution


class Overrides(Struct, frozen=True, kw_only=True):
    """What the user says beside the script; what is None or empty is the script's to say."""

    model: Model | None = None
    sequence_tokens: int | None = None
    global_batch_sequences: int | None = None
    restrictions: Restrictions = field(default_factory=Restrictions)
    frees_settings: bool = False
    """Whether the planner is free in what the script says of precision, dtype, optimizer, attention and checkpointing,
    and in how a loop of its own splits its global batch; its method, adapter and global batch stay."""


def job_from_discovery(
    discovered: Discovered,
    cluster: Cluster,
    overrides: Overrides | None = None,
    *,
    script: Path | None = None,
    arguments: Sequence[str] = (),
) -> Job:
    """Return the job a script is, run by `accelerate launch` on every device of a cluster.

    What changes the result of training (method, adapter, precision, optimizer, global batch) is the script's, unless
    the user says otherwise; what changes only memory and speed is the planner's.

    Raises:
        InputError: the script does something that cannot be planned for.
    """
    wishes = overrides or Overrides()
    if wishes.frees_settings:
        discovered = _freed(discovered)
    restrictions = _restrictions(discovered, wishes.restrictions, cluster, is_free=wishes.frees_settings)
    names = Restrictions.__struct_fields__
    return Job(
        model=wishes.model or _model(discovered),
        workload=Workload(
            sequence_tokens=wishes.sequence_tokens or _sequence_tokens(discovered),
            global_batch_sequences=_wished_batch(discovered, wishes) or _global_batch(discovered, cluster),
            lengths=_lengths(discovered, script),
            num_rows_per_sequence=discovered.lengths.num_rows_per_sequence if discovered.lengths else 1,
        ),
        restrictions=restrictions,
        script_decides=tuple(n for n in names if getattr(restrictions, n) != getattr(wishes.restrictions, n)),
        script=None if script is None else str(script),
        script_arguments=tuple(arguments),
        script_loop=script_loop(discovered),
        found=found_words(discovered, cluster) | _loop_words(discovered, cluster),
    )


def _freed(discovered: Discovered) -> Discovered:
    """Forget what the script says of settings that change no more than numerics, memory and speed.

    A loop of the script's own makes its optimizer itself, and keeps it.
    """
    freed: dict[str, Any] = {"bf16": False, "fp16": False, "fixes_precision": False}
    unsaid = {"fixed_checkpointing": None, "gradient_checkpointing": None}
    optim = {} if discovered.is_loop else {"optim": None}
    return replace(
        discovered,
        arguments=discovered.arguments | freed | unsaid | optim,
        attention="auto",
        fixes_weights_dtype=False,
        checkpoints=False if discovered.is_loop else None,
    )


def _model(discovered: Discovered) -> Model:
    return Model(
        name=discovered.model_name,
        config=discovered.config,
        origin="script",
        source=said_at(discovered, "model"),
        usual_attention=usual_attention(discovered.config),
        stored_dtype=stored_dtype(discovered.config, _folder(discovered.model_name)),
    )


def _folder(name: str) -> Path | None:
    """The folder that a script's model is in, where its name is one."""
    try:
        return Path(name) if Path(name).is_dir() else None
    except (OSError, ValueError):  # not a path at all
        return None


def _sequence_tokens(discovered: Discovered) -> int:
    if discovered.lengths is None:
        raise InputError(
            "the script's batches have no input_ids, so their length is not known.", to_fix="give --seq-len"
        )
    return discovered.lengths.sequence_tokens


def _global_batch(discovered: Discovered, cluster: Cluster) -> int:
    """Return what the script trains on in one step: each device its own batches."""
    said = discovered.arguments
    return int(said["per_device_train_batch_size"] * said["gradient_accumulation_steps"] * cluster.num_devices)


def _wished_batch(discovered: Discovered, wishes: Overrides) -> int | None:
    """Return the global batch that the user asks for; a loop of the script's own has its own."""
    if wishes.global_batch_sequences is not None and discovered.is_loop:
        raise InputError(
            "the script trains in a loop of its own, whose batch and accumulation are its own: --global-batch cannot "
            "be put into effect.",
            to_fix="leave --global-batch out, or change the script's batch",
        )
    return wishes.global_batch_sequences


def _lengths(discovered: Discovered, script: Path | None) -> LengthDistribution | None:
    """Return the lengths of the script's own data, where batches depend on them and all rows are sequences."""
    found, sampled = discovered.lengths, discovered.sampled_tokens
    if found is None or found.batching not in {"padded", "padding_free"} or found.num_rows_per_sequence > 1:
        return None
    if not any(sampled):
        return None
    return distribution(
        np.array(sampled),
        path=str(script) if script else discovered.model_name,
        read_as="what the script's own data set holds",
        tokenizer=discovered.tokenizer,
        num_sequences=found.num_samples or len(sampled),
        max_tokens=max(sampled),
    )


def _restrictions(
    discovered: Discovered, wishes: Restrictions, cluster: Cluster, *, is_free: bool = False
) -> Restrictions:
    """Return the user's wishes, with the script's own choices where the user has none.

    Args:
        discovered: the script.
        wishes: what the user says.
        cluster: where it is to train.
        is_free: whether a loop of the script's own may be split otherwise than it splits itself.
    """
    said = discovered.arguments
    _refuse_unplanned(discovered)
    default = Restrictions()
    lengths, quantized = discovered.lengths, discovered.quantization
    takes_code = wishes.quantization == default.quantization and _keeps_code(discovered, wishes)
    return replace(
        wishes,
        methods=wishes.methods or (_method(discovered),),
        precision=_precision(discovered) if wishes.precision == default.precision else wishes.precision,
        weights_dtype=wishes.weights_dtype or _weights_dtype(discovered, wishes),
        shardings=_shardings(discovered, wishes, cluster),
        optims=wishes.optims or _optims(said.get("optim"), is_loop=discovered.is_loop),
        attention=_attention(discovered) if wishes.attention == default.attention else wishes.attention,
        lora=_lora(discovered.adapter) if discovered.adapter and wishes.lora == default.lora else wishes.lora,
        quantization=_quantization(quantized) if quantized and takes_code else wishes.quantization,
        image_tokens=wishes.image_tokens or (lengths.image_tokens if lengths else 0),
        loss=discovered.loss if wishes.loss == default.loss else _settable_loss(discovered, wishes),
        batchings=wishes.batchings or ((lengths.batching,) if lengths else ()),
        micro_batch_sequences=_micro_batches(discovered, wishes, is_free=is_free),
        gradient_checkpointing=_checkpointing(discovered, wishes),
        keeps_outputs=wishes.keeps_outputs or discovered.is_loop,
        evaluation=_evaluation(discovered, wishes),
        held_stages=_held_stages(discovered, wishes),
    )


def _evaluation(discovered: Discovered, wishes: Restrictions) -> Evaluation:
    """Return how the script evaluates, or how the user says it does."""
    found = discovered.evaluation
    if found is None or wishes.evaluation != Evaluation():
        return wishes.evaluation
    return Evaluation(
        per_device_eval_batch_size=found.batch_sequences,
        num_sequences=found.num_sequences,
        keeps_predictions=found.keeps_predictions,
        eval_accumulation_steps=found.accumulation_steps,
        predict_with_generate=found.generates,
    )


def _held_stages(discovered: Discovered, wishes: Restrictions) -> tuple[StageName, ...]:
    """Leave out an evaluation that a trainer does not make, and that of a loop, which is its own."""
    evaluates = discovered.evaluation is not None or wishes.evaluation != Evaluation() or discovered.is_guess
    return tuple(name for name in wishes.held_stages if evaluates or name != "evaluation")


def _refuse_unplanned(discovered: Discovered) -> None:
    """Refuse what decides memory and is not modelled.

    Raises:
        InputError: the script compiles its model, or holds a second one.
    """
    if discovered.arguments.get("torch_compile"):
        raise InputError(
            "the script sets torch_compile=True: what its fused kernels keep and allocate is not modelled.",
            to_fix="plan and train without torch_compile",
        )
    if discovered.reference_model:
        raise InputError(
            f"the script's {discovered.trainer} holds a reference model beside the one it trains, which is not "
            "planned for.",
            to_fix="train an adapter (peft_config=...), whose reference is the model without it, or give "
            "precompute_ref_log_probs=True",
        )


def _settable_loss(discovered: Discovered, wishes: Restrictions) -> Loss | tuple[Loss, ...]:
    """Return the losses to choose among: transformers' own and Liger's, which are one of the Trainer's arguments.

    Raises:
        InputError: the loss is that of a loop or of trl's head, which nothing outside the script can change.
    """
    asked = values(wishes.loss)
    if asked == (discovered.loss,):
        return wishes.loss
    if discovered.is_loop or "chunked" in {discovered.loss, *asked}:
        owner = "a loop of its own" if discovered.is_loop else discovered.trainer
        raise InputError(
            f"the loss of the script is {discovered.loss}, computed by {owner}: --loss {' --loss '.join(asked)} cannot "
            "be put into effect.",
            to_fix="leave --loss out, or change the script",
        )
    return wishes.loss


def _micro_batches(discovered: Discovered, wishes: Restrictions, *, is_free: bool) -> tuple[int, ...]:
    """Return the micro-batches that are allowed: a loop of the script's own has one, unless it is to be split anew."""
    if not discovered.is_loop:
        return wishes.micro_batch_sequences
    own = int(discovered.arguments["per_device_train_batch_size"])
    if is_free:
        refuse_split(discovered, "--override")
        return wishes.micro_batch_sequences
    if wishes.micro_batch_sequences not in {(), (own,)}:
        refuse_split(discovered, "--micro-batch")
        raise InputError(
            f"the script trains in a loop of its own on batches of {own}, which --micro-batch would change.",
            to_fix="give --override beside it, or leave it out",
        )
    return (own,)


def _shardings(discovered: Discovered, wishes: Restrictions, cluster: Cluster) -> tuple[Sharding, ...]:
    """Return the shardings that are allowed: of those that are tried all under which a loop trains as by itself."""
    if not discovered.is_loop:
        return wishes.shardings or _modelled_shardings(discovered, wishes, cluster)
    if set(wishes.num_processes) - {cluster.num_devices}:
        raise InputError(
            "the script trains in a loop of its own, whose global batch follows from the number of devices.",
            to_fix=f"leave --num-processes out, or give {cluster.num_devices}",
        )
    refused = unsharded_only(discovered)
    tried = tuple(dict.fromkeys(engine.sharding for engine in engines(wishes, cluster)))
    allowed = tuple(sharding for sharding in tried if sharding not in refused)
    if allowed:
        return allowed if len(allowed) < len(tried) else wishes.shardings
    raise InputError(
        f"the script trains in a loop of its own, which cannot be sharded as {tried[0]}: {refused[tried[0]]}.",
        to_fix="leave the sharding out, or change the script",
    )


def _loop_words(discovered: Discovered, cluster: Cluster) -> dict[str, str]:
    """Say of a loop under what it cannot be sharded on this cluster, and why."""
    refused = unsharded_only(discovered)
    if not refused or cluster.num_devices == 1:
        return {}
    reasons = {reason: [name for name, why in refused.items() if why == reason] for reason in refused.values()}
    words = [f"not {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return {"sharding": ("DDP only; " if "zero1" in refused and "fsdp2" in refused else "") + "; ".join(words)}


def _modelled_shardings(discovered: Discovered, wishes: Restrictions, cluster: Cluster) -> tuple[Sharding, ...]:
    """Leave out what is not modelled beside a fused head, rather than to refuse the script for it."""
    if discovered.loss == "stock":
        return ()
    possible = (engine.sharding for engine in engines(wishes, cluster))
    return tuple(dict.fromkeys(each for each in possible if each not in {"zero3", "fsdp1", "fsdp2"}))


def _checkpointing(discovered: Discovered, wishes: Restrictions) -> bool | None:
    """A loop that switches checkpointing on itself keeps it, and so does a script whose arguments say it."""
    said = "gradient_checkpointing" if discovered.is_guess else "fixed_checkpointing"  # what is read was written
    fixed = True if discovered.checkpoints else discovered.arguments.get(said)
    return fixed if wishes.gradient_checkpointing is None else wishes.gradient_checkpointing


def _weights_dtype(discovered: Discovered, wishes: Restrictions) -> Dtype | None:
    """Return the dtype that the script names for its weights; one that it leaves to the checkpoint is no choice.

    A precision that the user asks for, or a method, decides the dtype instead.
    """
    if not discovered.fixes_weights_dtype or wishes.methods or wishes.precision != "auto":
        return None
    return discovered.weights_dtype if discovered.weights_dtype in get_args(Dtype) else None  # type: ignore[return-value]


def _precision(discovered: Discovered) -> Literal["auto", "bf16", "fp16", "fp32"]:
    """Return the mixed precision the script switches on; where it says nothing, the planner is free.

    An Accelerator that is told "no" keeps it: what it is told goes before the launcher's.
    """
    said = discovered.arguments
    if said.get("bf16"):
        return "bf16"
    if said.get("fp16"):
        return "fp16"
    return "fp32" if said.get("fixes_precision") else "auto"


def method_of(discovered: Discovered) -> Method:
    """Return what a script trains, as it is."""
    if discovered.quantization is not None:
        return "qlora"
    return "full" if discovered.adapter is None else "lora"


def _method(discovered: Discovered) -> Method:
    quantization = discovered.quantization
    if quantization is None:
        return method_of(discovered)
    if discovered.adapter is None:
        raise InputError(
            "the script loads a quantised model and puts no adapter on it, which transformers' Trainer refuses.",
            to_fix="put a LoRA adapter on it, load it unquantised, or give --method",
        )
    if (quantization.bits, quantization.quant_type) not in _PLANNED_CODES:
        raise InputError(
            f"the script quantises with {quantization.quant_type}, which is not planned for.",
            to_fix="load it with bitsandbytes, in four bits or in eight; a checkpoint that GPTQ or AWQ packed can be "
            "planned with autofit plan --model, and started without autofit",
        )
    return "qlora"


_PLANNED_CODES = {(4, "nf4"), (4, "fp4"), (8, "int8")}


def _keeps_code(discovered: Discovered, wishes: Restrictions) -> bool:
    """Tell whether weights stay in the script's code: not where --method qlora asks a script of eight bits for four."""
    found = discovered.quantization
    return found is not None and (found.bits, found.quant_type) in (
        {(4, "nf4"), (4, "fp4")} if wishes.methods else _PLANNED_CODES
    )


def _quantization(found: FoundQuantization) -> QuantizationWish:
    """Return how the script quantises; what weights are computed and packed in is the planner's."""
    if found.bits == 8:
        return QuantizationWish(bits=8, prepares_kbit=found.prepares_kbit)
    quant_type: Literal["nf4", "fp4"] = "fp4" if found.quant_type == "fp4" else "nf4"
    return QuantizationWish(quant_type=quant_type, double_quant=found.double_quant, prepares_kbit=found.prepares_kbit)


def _optims(said: str | None, *, is_loop: bool) -> tuple[Optim, ...]:
    """Return the script's optimizer; transformers' default is no choice, and leaves the planner free.

    A loop of the script's own makes its optimizer itself.
    """
    if not said or (said.startswith("adamw_torch") and not is_loop):
        return ()
    known = {"adamw_bnb_8bit": "adamw_8bit", "paged_adamw": "paged_adamw_32bit"}
    optim = known.get(said, said)
    if optim not in OPTIMIZERS:
        raise InputError(
            f"the script trains with optim={said!r}, which is not planned for.",
            to_fix=f"use one of {', '.join(OPTIMIZERS)}, or give --optim",
        )
    return (optim,)


def _attention(discovered: Discovered) -> Literal["auto"] | Attention:
    if discovered.attention not in {"auto", *get_args(Attention)}:
        raise InputError(
            f"the script's attention is {discovered.attention!r}, which is not planned for.",
            to_fix=f"use one of {', '.join(get_args(Attention))}, or give --attention",
        )
    return discovered.attention  # type: ignore[return-value]


def _lora(adapter: FoundAdapter) -> Lora:
    if adapter.unplanned or adapter.r is None or adapter.lora_alpha is None:
        raise InputError(
            f"the script's adapter has {', '.join(adapter.unplanned)}, which is not planned for.",
            to_fix="use plain LoRA on whole groups of modules",
        )
    return Lora(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout or 0.0,
        target_modules=adapter.target_modules,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
    )
