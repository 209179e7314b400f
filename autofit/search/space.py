"""Every configuration that makes sense for a job on a cluster, in one order; each keeps the global batch exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import product
from typing import TypeVar, get_args

from msgspec import Struct
from msgspec.structs import replace

from autofit.errors import InputError
from autofit.memory.inference import kv_cache_elements
from autofit.spec.configuration import (
    ZERO_STAGES,
    Attention,
    Batching,
    Configuration,
    Dtype,
    Evaluation,
    Lora,
    Loss,
    Method,
    MixedPrecision,
    Offload,
    Optim,
    PackedKernel,
    Quantization,
    Sharding,
    ZeroSettings,
)
from autofit.spec.hardware import Cluster, Device
from autofit.spec.job import Job, Precision, QuantizationWish, Restrictions, Workload
from autofit.spec.positions import num_positions

METHODS: tuple[Method, ...] = ("full", "lora", "qlora")
"""Tried unasked. How many layers to leave trainable is nothing that a planner can choose."""
OPTIMS: tuple[Optim, ...] = ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit")
"""Tried unasked, the plain one first. `adamw_torch` computes what its fused form does, with a temporary as large as the
gradients; paged 32-bit state is larger than paged 8-bit state."""
ADAPTER_METHODS: tuple[Method, ...] = ("lora", "qlora")

USUAL_EVAL_BATCH = 8
"""`per_device_eval_batch_size` where nobody gives one. Source: transformers/training_args.py 5.23."""

Value = TypeVar("Value", bound=str | int)
Split = tuple[int, int]
"""A device's share of the global batch as micro-batch and accumulation steps."""


class Path(Struct, frozen=True, kw_only=True):
    """The code that a step runs, but for what the engine does around it."""

    method: Method
    lora: Lora | None
    quantization: QuantizationWish | None
    precision: Precision
    gradient_checkpointing: bool
    attention: Attention
    loss: Loss
    batching: Batching


class Dtypes(Struct, frozen=True, kw_only=True):
    """What a precision means for one method under one sharding."""

    weights_dtype: Dtype
    mixed_precision: MixedPrecision
    compute_dtype: Dtype
    """Of matrix products, and so what quantised weights are unpacked to."""


class Engine(Struct, frozen=True, kw_only=True):
    """How processes share the work, and what of it waits on the host."""

    sharding: Sharding
    offload: Offload
    num_processes: int
    num_replicas: int


class Block(Struct, frozen=True, kw_only=True):
    """Configurations that differ in the optimizer and in the split of the batch alone."""

    path: Path
    engine: Engine
    optims: tuple[Optim, ...]
    splits: tuple[Split, ...]
    first: Configuration
    """With the first optimizer and the first split."""

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of optimizers and of splits."""
        return len(self.optims), len(self.splits)

    def configuration(self, optim: int, split: int) -> Configuration:
        """Return one of its configurations by the places of its optimizer and its split."""
        micro_batch, num_micro_steps = self.splits[split]
        return replace(
            self.first,
            optim=self.optims[optim],
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=num_micro_steps,
        )


def candidates(job: Job, cluster: Cluster) -> tuple[Configuration, ...]:
    """Enumerate the configurations that the job's restrictions leave free.

    Raises:
        InputError: see `blocks`.
    """
    return tuple(
        block.configuration(optim, split)
        for block in blocks(job, cluster)
        for optim, split in product(*map(range, block.shape))
    )


def blocks(job: Job, cluster: Cluster) -> tuple[Block, ...]:
    """Divide the space: a block for every path with every engine.

    Raises:
        InputError: the global batch does not divide over the devices, or a restriction leaves nothing; see also
            `refuse_positions` and `evaluation_of`.
    """
    refuse_positions(job)
    restrictions, evaluation = job.restrictions, evaluation_of(job)
    splits = {
        num: batch_splits(job.workload, cluster.using(num), restrictions)
        for num in process_counts(restrictions, cluster)
    }
    every = product(
        paths(job, cluster), [engine for num in splits for engine in engines(restrictions, cluster.using(num))]
    )
    return tuple(
        Block(
            path=path,
            engine=engine,
            optims=optims(restrictions, engine),
            splits=splits[engine.num_processes],
            first=configuration(
                path=path,
                engine=engine,
                optim=optims(restrictions, engine)[0],
                split=splits[engine.num_processes][0],
                restrictions=restrictions,
                evaluation=evaluation,
                stored_dtype=job.model.stored_dtype,
            ),
        )
        for path, engine in every
    )


def refuse_positions(job: Job) -> None:
    """Refuse sequences that are longer than the model's table of positions.

    Raises:
        InputError: they are.
    """
    tokens, longest = job.workload.sequence_tokens, num_positions(job.model.config)
    if longest is not None and tokens > longest:
        raise InputError(
            f"{job.model.name} has a table of {longest:,} positions, and sequences have {tokens:,} tokens.",
            to_fix=f"use --seq-len {longest} or less",
        )


def paths(job: Job, cluster: Cluster) -> tuple[Path, ...]:
    """Return every path that the job's restrictions leave free.

    Raises:
        InputError: see `batchings`.
    """
    restrictions = job.restrictions
    asked = restrictions.gradient_checkpointing
    return tuple(
        Path(
            method=method,
            lora=lora,
            quantization=quantization,
            precision=resolved_precision(precision, cluster.device),
            gradient_checkpointing=checkpoints,
            attention=attention,
            loss=loss,
            batching=batching,
        )
        for (method, lora, quantization), precision, checkpoints, attention, loss, batching in product(
            methods(restrictions),
            values(restrictions.precision),
            (False, True) if asked is None else (asked,),
            attentions(job),
            values(restrictions.loss),
            batchings(job),
        )
    )


def methods(restrictions: Restrictions) -> Iterator[tuple[Method, Lora | None, QuantizationWish | None]]:
    """Yield each method that is allowed, with each adapter and each quantisation that it can have."""
    for method in dict.fromkeys(restrictions.methods or METHODS):
        loras = restrictions.loras if method in ADAPTER_METHODS else (None,)
        quantizations = restrictions.quantizations if method == "qlora" else (None,)
        yield from product((method,), loras, quantizations)


def attentions(job: Job) -> tuple[Attention, ...]:
    """Return the attentions that the user allows, or the model's usual one."""
    asked = job.restrictions.attention
    if isinstance(asked, tuple):
        return tuple(dict.fromkeys(asked))
    return (job.model.usual_attention if asked == "auto" else asked,)


def values(asked: Value | tuple[Value, ...]) -> tuple[Value, ...]:
    """Return what may be a single value or several as several, each once."""
    return tuple(dict.fromkeys(asked)) if isinstance(asked, tuple) else (asked,)


def evaluation_of(job: Job) -> Evaluation:
    """Complete what is known of the evaluation: its batch where nobody gives it, and the cache of a generated sequence.

    What an architecture caches may not follow from its config; then it is not known.

    Raises:
        InputError: logits are kept, of nobody knows how many sequences, and the evaluation is to be held.
    """
    asked = job.restrictions.evaluation
    counted = asked.num_sequences is not None or asked.eval_accumulation_steps is not None
    if asked.keeps_predictions and not counted and "evaluation" in job.restrictions.held_stages:
        raise InputError(
            "an evaluation with compute_metrics keeps the logits of every sequence, of nobody knows how many.",
            to_fix="give --eval-sequences or --eval-accumulation-steps, or say with --hold what else has to fit",
        )
    elements = asked.cache_elements_per_sequence
    if asked.predict_with_generate and elements is None:
        with contextlib.suppress(InputError):
            tokens = job.workload.sequence_tokens
            elements = kv_cache_elements(job.model.config, batch=1, tokens=tokens)
    return replace(
        asked,
        per_device_eval_batch_size=asked.per_device_eval_batch_size or USUAL_EVAL_BATCH,
        cache_elements_per_sequence=elements,
    )


def configuration(
    *,
    path: Path,
    engine: Engine,
    optim: Optim,
    split: Split,
    restrictions: Restrictions,
    evaluation: Evaluation,
    stored_dtype: Dtype | None = None,
) -> Configuration:
    """Complete the free knobs with what follows from them.

    Reentrant checkpointing for an adapter under stage 3, where the other implementation fails on older releases, and
    for int8 weights, whose inputs the other keeps.
    Source: huggingface/transformers#47254, deepspeedai/DeepSpeed#8130; the rule int8-checkpoints-with-reentry.
    """
    method, sharding, gradient_checkpointing = path.method, engine.sharding, path.gradient_checkpointing
    dtypes = dtypes_of(path.precision, method, sharding)
    quantization = None if path.quantization is None else _quantization(path.quantization, dtypes, sharding)
    is_int8 = quantization is not None and quantization.is_int8
    reentrant_by_need = (method in ADAPTER_METHODS and sharding == "zero3") or is_int8
    return Configuration(
        method=method,
        quantization=quantization,
        lora=path.lora,
        freeze=restrictions.freeze if method == "freeze" else None,
        optim=optim,
        per_device_train_batch_size=split[0],
        gradient_accumulation_steps=split[1],
        num_processes=engine.num_processes,
        gradient_checkpointing=gradient_checkpointing,
        sharding=sharding,
        offload=engine.offload,
        num_replicas=engine.num_replicas,
        reshard_after_forward=restrictions.reshard_after_forward,
        gradient_as_bucket_view=restrictions.gradient_as_bucket_view and sharding == "ddp",
        zero_settings=restrictions.zero_settings if sharding in ZERO_STAGES else ZeroSettings(),
        sequence_parallel_size=restrictions.sequence_parallel_size,
        weights_dtype=_loaded_dtype(restrictions.weights_dtype or dtypes.weights_dtype, quantization),
        stored_dtype=stored_dtype,
        mixed_precision=dtypes.mixed_precision,
        attention=path.attention,
        sdpa_kernel=restrictions.sdpa_kernel,
        use_reentrant=gradient_checkpointing
        and (reentrant_by_need if restrictions.use_reentrant is None else restrictions.use_reentrant),
        checkpoint_every_n_layers=restrictions.checkpoint_every_n_layers if gradient_checkpointing else 1,
        checkpoint_offload=gradient_checkpointing and restrictions.checkpoint_offload,
        loss=path.loss,
        batching=path.batching,
        task=restrictions.task,
        image_tokens=restrictions.image_tokens,
        keeps_outputs=restrictions.keeps_outputs,
        evaluation=evaluation,
        tf32=path.precision == "tf32",
        expandable_segments=restrictions.expandable_segments,
        max_split_size_mb=restrictions.max_split_size_mb,
    )


def batchings(job: Job) -> tuple[Batching, ...]:
    """Return the ways to batch: what the user allows, or what a trainer does unasked.

    Raises:
        InputError: packed rows are to be compared with sequences, of which a step would hold another number.
    """
    allowed = job.restrictions.batchings or (("padded",) if job.workload.lengths else ("equal",))
    if "packed" in allowed and len(set(allowed)) > 1:
        raise InputError(
            "batching packed is allowed beside others, and a step of as many packed rows trains several times as many "
            "sequences.",
            to_fix="plan packed alone, with --global-batch in rows; padding_free wastes as little and keeps the step",
        )
    return tuple(dict.fromkeys(allowed))


def resolved_precision(asked: str, device: Device) -> Precision:
    """Choose the precision where the user left it open: half where the hardware multiplies it, fp32 on a CPU."""
    if asked != "auto":
        return asked  # type: ignore[return-value]
    if device.kind == "cpu":
        return "fp32"
    return "bf16" if device.computes_bf16 else "fp16"


def dtypes_of(precision: Precision, method: Method, sharding: Sharding) -> Dtypes:
    """Say what is loaded and what is multiplied.

    Full fine-tuning under autocast needs fp32 weights, or small updates round away; DeepSpeed keeps fp32 copies of its
    own, so there the weights are loaded in half, with half the host's memory. What is frozen needs no more than half.
    """
    if precision in {"fp32", "tf32"}:
        return Dtypes(weights_dtype="float32", mixed_precision="no", compute_dtype="float32")
    half: Dtype = "float16" if precision.endswith("fp16") else "bfloat16"
    if precision.startswith("pure-"):
        return Dtypes(weights_dtype=half, mixed_precision="no", compute_dtype=half)
    keeps_fp32 = method not in ADAPTER_METHODS and not sharding.startswith("zero")
    mixed: MixedPrecision = "fp16" if half == "float16" else "bf16"
    return Dtypes(weights_dtype="float32" if keeps_fp32 else half, mixed_precision=mixed, compute_dtype=half)


def _quantization(wish: QuantizationWish, dtypes: Dtypes, sharding: Sharding) -> Quantization:
    """Complete the dtypes of a quantised model.

    Packed for stage 3 in the dtype that DeepSpeed casts to, so that its cast is none; for FSDP in the dtype of the
    other weights, which it flattens them with, and it shards floating ones only.
    Source: huggingface/transformers#29587; deepspeed/runtime/engine.py 0.19 (`_cast_module_mixed_precision`);
    transformers' bitsandbytes guide, "FSDP-QLoRA".
    """
    if wish.comes_packed:
        return _packed(wish, dtypes, sharding)
    casts = sharding == "zero3" and dtypes.mixed_precision != "no"
    packed_as_computed = casts or sharding.startswith("fsdp")
    return Quantization(
        bits=wish.bits,
        quant_type=wish.quant_type,
        double_quant=wish.double_quant,
        compute_dtype=wish.compute_dtype or dtypes.compute_dtype,
        storage_dtype=wish.storage_dtype or (dtypes.compute_dtype if packed_as_computed else "uint8"),
        prepares_kbit=wish.prepares_kbit,
        recasts_tables=wish.recasts_tables,
        skip_modules=wish.skip_modules,
    )


def _loaded_dtype(asked: Dtype, quantization: Quantization | None) -> Dtype:
    """On a GPU transformers loads an AWQ model in fp16 where bf16 is asked for.

    Source: transformers/quantizers/quantizer_awq.py 5.23, update_dtype.
    """
    is_awq = quantization is not None and quantization.quant_type == "awq"
    return "float16" if is_awq and asked == "bfloat16" else asked


def _packed(wish: QuantizationWish, dtypes: Dtypes, sharding: Sharding) -> Quantization:
    """Complete what is known of a checkpoint that comes packed.

    `auto_gptq` unpacks to fp16, and under FSDP fms-acceleration views its packed words as the weights' dtype.
    gptqmodel unpacks to the dtype of the scales, which transformers leaves in fp16 whatever the model is loaded in.
    peft's `prepare_model_for_kbit_training` leaves a GPTQ model's other weights as they are.
    Source: auto_gptq 0.7 nn_modules/triton_utils/dequant.py, dequant248; fms-acceleration-peft
    framework_plugin_autogptq.py; gptqmodel 7.7 nn_modules/qlinear/__init__.py, _dequantize_from_codes;
    transformers/core_model_loading.py 5.23 (`empty_param.dtype`); peft/utils/other.py 0.21 (`is_gptq_quantized`).
    """
    kernel: PackedKernel = "gptqmodel" if wish.quant_type == "awq" else wish.kernel
    views = kernel == "auto_gptq" and sharding.startswith("fsdp")
    return Quantization(
        bits=wish.bits,
        quant_type=wish.quant_type,
        double_quant=False,
        compute_dtype="float16",
        storage_dtype=dtypes.compute_dtype if views else "int32",
        prepares_kbit=wish.prepares_kbit and wish.quant_type != "gptq",
        group_size=wish.group_size,
        kernel=kernel,
    )


def optims(restrictions: Restrictions, engine: Engine) -> tuple[Optim, ...]:
    """Return the optimizers to try; unasked, none that offload would put its own in the place of."""
    if restrictions.optims:
        return tuple(dict.fromkeys(restrictions.optims))
    return OPTIMS if engine.offload == "none" else OPTIMS[:1]


def process_counts(restrictions: Restrictions, cluster: Cluster) -> tuple[int, ...]:
    """Return how many devices to use of those given: all, or what the user allows.

    Raises:
        InputError: a number was asked for that is no part of the cluster.
    """
    asked = tuple(dict.fromkeys(restrictions.num_processes)) or (cluster.num_devices,)
    unusable = [num for num in asked if num not in cluster.parts]
    if unusable:
        raise InputError(
            f"{unusable[0]} processes are no part of {cluster.num_nodes} x {cluster.num_devices_per_node} devices.",
            to_fix=f"choose from {', '.join(map(str, cluster.parts))}",
        )
    return asked


def engines(restrictions: Restrictions, cluster: Cluster) -> tuple[Engine, ...]:
    """Return the shardings to try, each with the offloads: what the user allows of what can do what else is asked for.

    FSDP is tried where it is asked for, or nothing else can do it. Offload is tried unasked where DeepSpeed is tried
    anyway: it takes the same code path. A CPU rank's device is the host.

    Raises:
        InputError: none of those asked for can be used.
    """
    several = cluster.num_devices > 1
    is_free = restrictions.offload is None and several and cluster.device.kind == "cuda"
    offloads = get_args(Offload) if is_free else (restrictions.offload or "none",)
    replicas = values(restrictions.num_replicas)
    unasked = [offload for offload in offloads if offload == "none" or restrictions.offload is not None]
    possible = tuple(
        sharding
        for sharding in get_args(Sharding)
        if any(_can(sharding, *each, restrictions, cluster) for each in product(unasked, replicas))
    )
    usual = tuple(sharding for sharding in possible if not sharding.startswith("fsdp"))
    allowed = tuple(s for s in possible if s in restrictions.shardings) if restrictions.shardings else usual or possible
    if allowed:
        return tuple(
            Engine(sharding=sharding, offload=offload, num_processes=cluster.num_devices, num_replicas=num_replicas)
            for sharding, offload, num_replicas in product(allowed, offloads, replicas)
            if _can(sharding, offload, num_replicas, restrictions, cluster)
            and (restrictions.offload is not None or offload == "none" or sharding.startswith("zero"))
        )
    num = cluster.num_devices
    raise InputError(
        f"sharding {', '.join(restrictions.shardings) or 'of any kind'} cannot be used on {num} "
        f"{'devices' if several else 'device'}{_asked_of_sharding(restrictions)}.",
        to_fix=f"choose from {', '.join(possible)}, or another number of devices"
        if possible
        else "leave one of these out",
    )


def _can(sharding: Sharding, offload: Offload, num_replicas: int, restrictions: Restrictions, cluster: Cluster) -> bool:
    """Tell whether a sharding is of use on so many devices and has what is asked of it.

    On one device an engine is of use only to move state to the host.
    Source: accelerate 1.15 utils/dataclasses.py (`DeepSpeedPlugin`, `FullyShardedDataParallelPlugin`,
    `ParallelismConfig.sp_backend`).
    """
    engine = sharding.startswith(("zero", "fsdp"))
    shards_parameters = sharding == "zero3" or sharding.startswith("fsdp")
    hybrid = num_replicas > 1 or not restrictions.reshard_after_forward
    several = cluster.num_devices > 1
    return (
        (sharding == "none") != (several or offload != "none")
        and (several or engine or sharding == "none")
        and ((engine and sharding != "zero1") or offload == "none")
        and (shards_parameters or offload != "optimizer_and_parameters")
        and (sharding.startswith("fsdp") or not hybrid)
        and (sharding.startswith("zero") or restrictions.sequence_parallel_size == 1)
    )


def _asked_of_sharding(restrictions: Restrictions) -> str:
    """Name what narrows the choice of a sharding."""
    offload, replicas = restrictions.offload or "none", values(restrictions.num_replicas)
    asked = {
        f"offload of {offload.replace('_', ' ')}": offload != "none",
        f"{min(replicas)} replicas": min(replicas) > 1,
        "no resharding after forward": not restrictions.reshard_after_forward,
        "sequence parallelism": restrictions.sequence_parallel_size > 1,
    }
    names = [name for name, is_asked in asked.items() if is_asked]
    return f" with {' and '.join(names)}" if names else ""


def batch_splits(workload: Workload, cluster: Cluster, restrictions: Restrictions) -> tuple[Split, ...]:
    """Split the global batch over all devices in every way that is exact, the smallest micro-batch first.

    Raises:
        InputError: it does not divide over the devices, or not by a micro-batch that was asked for.
    """
    per_device = _per_device_sequences(workload, cluster, restrictions.sequence_parallel_size)
    asked = restrictions.micro_batch_sequences
    unusable = [size for size in asked if size < 1 or per_device % size]
    if unusable:
        raise InputError(
            f"a micro-batch of {unusable[0]} does not divide the {per_device} sequences of each device's step.",
            to_fix=f"choose from {', '.join(map(str, divisors(per_device)))}, or another global batch",
        )
    return tuple((size, per_device // size) for size in (sorted(set(asked)) or divisors(per_device)))


def _per_device_sequences(workload: Workload, cluster: Cluster, sequence_parallel_size: int) -> int:
    """Return the sequences of a device's step; devices that share sequences count as one.

    Raises:
        InputError: they do not divide.
    """
    num_groups, rest = divmod(cluster.num_devices, sequence_parallel_size)
    if rest:
        raise InputError(
            f"{cluster.num_devices} devices do not divide into groups of {sequence_parallel_size}.",
            to_fix=f"choose a sequence_parallel_size from {', '.join(map(str, divisors(cluster.num_devices)))}",
        )
    sequences = workload.global_batch_sequences
    if sequences >= 1 and sequences % num_groups == 0:
        return sequences // num_groups
    below = sequences // num_groups * num_groups
    nearest = [str(batch) for batch in (below, below + num_groups) if batch > 0]
    raise InputError(
        f"a global batch of {sequences} does not divide over {num_groups} devices.",
        to_fix=f"choose a global batch of {' or '.join(nearest)}, or another number of devices",
    )


def divisors(number: int) -> tuple[int, ...]:
    """Return all divisors, ascending."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return tuple(sorted({*small, *(number // n for n in small)}))
