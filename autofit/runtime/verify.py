"""Reads back, from the objects that will train, every setting that was planned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from math import ceil
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from autofit.plan import Plan, planned_rows
from autofit.runtime.fsdp import (
    checkpoints_units,
    fsdp_name,
    num_shards,
    num_wrapped_layers,
    offload_name,
    reshards_after_forward,
)
from autofit.runtime.model import dtype_name
from autofit.spec.configuration import Configuration, Lora, Quantization
from autofit.spec.deepspeed import bucket_settings, hidden_size

DENSE_LINEAR = "torch.nn.modules.linear.Linear"
QUANTIZED_LINEARS = {4: "bitsandbytes.nn.modules.Linear4bit", 8: "bitsandbytes.nn.modules.Linear8bitLt"}
"""By the bits of their weights."""
AUTOCAST_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


class Check(Struct, frozen=True, kw_only=True):
    """One planned setting beside what is in effect, both as a user would write them."""

    setting: str
    planned: str
    in_effect: str

    @property
    def holds(self) -> bool:
        """Whether the two are the same."""
        return self.planned == self.in_effect


class Training(Struct, frozen=True, kw_only=True):
    """The objects that are about to take the first step, whoever made them."""

    model: Any
    engine: Any
    """What is called: the model, or what wraps it."""
    optimizer: Any
    accelerator: Any
    rows_per_rank: int
    """Samples of a micro-batch."""
    gradient_accumulation_steps: int | None
    """None: a loop of the script's own counts them, and nothing here can ask it."""
    uses_liger_kernel: bool | None = None
    """None: no Trainer switches it."""


def training_of(trainer: Any, dataloader: Any) -> Training:
    """Return what a Trainer is about to train with."""
    return Training(
        model=trainer.model,
        engine=trainer.model_wrapped,
        optimizer=trainer.optimizer,
        accelerator=trainer.accelerator,
        rows_per_rank=rows_per_rank(dataloader, trainer.accelerator, trainer.args.per_device_train_batch_size),
        gradient_accumulation_steps=trainer.args.gradient_accumulation_steps,
        uses_liger_kernel=getattr(trainer.args, "use_liger_kernel", None),
    )


def check_all(plan: Plan, training: Training) -> list[Check]:
    """Compare the plan with what is about to take its first step."""
    configuration = plan.configuration
    return [
        *_check_batch(configuration, training),
        *_check_engine(plan, training.engine),
        *_check_precision(configuration, training),
        *_check_weights(configuration, training.model),
        *_check_quantization(configuration.quantization, training.model),
        *check_adapter(configuration, training.model),
        *_check_checkpointing(configuration, training.model),
        _check("attention", configuration.attention, training.model.config._attn_implementation),
        *_check_loss(configuration, training),
        _check("optim", expected_optimizer(configuration), optimizer_name(training.optimizer)),
    ]


def _check_loss(configuration: Configuration, training: Training) -> Iterator[Check]:
    """Compare whether Liger's kernels are on; a fused head of trl's is the trainer's own."""
    if training.uses_liger_kernel is not None:
        yield _check("use_liger_kernel", configuration.loss == "liger", training.uses_liger_kernel)


def check_first_batch(plan: Plan, rows: int, tokens: int) -> list[Check]:
    """Compare the first micro-batch with the one that was planned for; shorter sequences need no more than planned."""
    num_planned, planned_tokens = planned_rows(plan)
    return [
        _check("rows of the first micro-batch", num_planned, rows),
        _check("tokens of its sequences", planned_tokens, max(planned_tokens, tokens)),
    ]


def check_steps(plan: Plan, trainer: Any, num_steps: int) -> list[Check]:
    """Compare the optimizer steps of a training with those of the script's own settings at the planned global batch.

    Of data without a length, or with incomplete batches left out, they are not known. Older releases leave out the
    last, incomplete step of an epoch. Source: transformers/trainer.py 5.23 and 4.45, `num_update_steps_per_epoch`.
    """
    arguments = trainer.args
    if arguments.max_steps > 0:
        return [_check("optimizer steps", arguments.max_steps, num_steps)]
    if not hasattr(trainer.train_dataset, "__len__") or arguments.dataloader_drop_last:
        return []
    samples, batch = len(trainer.train_dataset), plan.configuration.global_batch_sequences
    allowed = [ceil(arguments.num_train_epochs * max(1, each)) for each in (ceil(samples / batch), samples // batch)]
    return [_check("optimizer steps", num_steps if num_steps in allowed else allowed[0], num_steps)]


def table(checks: Iterable[Check]) -> str:
    """Lay out checks as text, one a line, what does not hold marked."""
    rows = [("setting", "planned", "in effect")]
    rows += [(check.setting, check.planned, check.in_effect) for check in checks]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    marks = ["", *("" if check.holds else "  <- not in effect" for check in checks)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"{line.rstrip()}{mark}" for line, mark in zip(lines, marks, strict=True))


def _check(setting: str, planned: object, in_effect: object) -> Check:
    return Check(setting=setting, planned=str(planned), in_effect=str(in_effect))


def _check_batch(configuration: Configuration, training: Training) -> Iterator[Check]:
    rows, steps = training.rows_per_rank, training.gradient_accumulation_steps
    ranks = training.accelerator.num_processes
    yield _check("num_processes", configuration.num_processes, ranks)
    yield _check("per_device_train_batch_size", configuration.per_device_train_batch_size, rows)
    if steps is None:
        return
    yield _check("gradient_accumulation_steps", configuration.gradient_accumulation_steps, steps)
    yield _check("global batch (sequences)", configuration.global_batch_sequences, rows * steps * ranks)


def rows_per_rank(dataloader: Any, accelerator: Any, argument: int) -> int:
    """Ask the loader itself; one over an iterable dataset does not know, and then its argument counts."""
    total = getattr(dataloader, "total_batch_size", None)
    if total is None or getattr(dataloader, "batch_sampler", None) is None:
        return int(argument)
    return int(total) // int(accelerator.num_processes)


def _check_engine(plan: Plan, engine: Any) -> Iterator[Check]:
    configuration = plan.configuration
    yield _check("sharding", configuration.sharding, sharding_name(engine))
    if configuration.uses_fsdp and fsdp_name(engine) is not None:
        yield from _check_units(configuration, engine)
    if sharding_name(engine) not in {"zero1", "zero2", "zero3"} or not configuration.uses_deepspeed:
        return
    yield _check("offload", configuration.offload, _offload_name(engine))
    yield _check(
        "gradient_accumulation_steps in DeepSpeed",
        configuration.gradient_accumulation_steps,
        engine.gradient_accumulation_steps(),
    )
    yield from _check_buckets(plan, engine._config.zero_config)


def _check_buckets(plan: Plan, zero_config: Any) -> Iterator[Check]:
    """Compare the numbers of the zero_optimization block. DeepSpeed drops the prefix `stage3_` in its own fields."""
    settings = asdict(bucket_settings(plan.configuration, hidden_size(plan.inputs.job.model.config)))
    for name, planned in settings.items():
        if plan.configuration.zero_stage == 3 or not name.startswith("stage3_"):
            in_effect = getattr(zero_config, name.removeprefix("stage3_"))
            yield _check(f"deepspeed {name}", planned, int(in_effect) if name == "stage" else in_effect)


def _check_units(configuration: Configuration, engine: Any) -> Iterator[Check]:
    """Compare FSDP's layers and groups; a wrap policy that matches no layer gathers the whole model at once."""
    layers = frozenset(engine._no_split_modules or ())
    yield _check("layers sharded by themselves", _num_layers(engine.config), num_wrapped_layers(engine, layers))
    yield _check("processes in a shard", configuration.num_processes // configuration.num_replicas, num_shards(engine))
    yield _check("reshard_after_forward", configuration.reshard_after_forward, reshards_after_forward(engine))
    yield _check("offload", configuration.offload, offload_name(engine))


def _num_layers(config: Any) -> int:
    return int(getattr(config, "text_config", config).num_hidden_layers)


def sharding_name(engine: Any) -> str:
    """Name what wraps the model, in the plan's words."""
    if hasattr(engine, "zero_optimization_stage"):
        return f"zero{engine.zero_optimization_stage()}"
    return fsdp_name(engine) or {"DistributedDataParallel": "ddp"}.get(type(engine).__name__, "none")


def _offload_name(engine: Any) -> str:
    places = [engine.zero_offload_optimizer(), engine.zero_offload_param()]
    optimizer, parameters = (place is not None and place.device != "none" for place in places)
    return "optimizer_and_parameters" if parameters else "optimizer" if optimizer else "none"


def _check_precision(configuration: Configuration, training: Training) -> Iterator[Check]:
    engine = training.engine
    in_effect = training.accelerator.mixed_precision
    if hasattr(engine, "bfloat16_enabled"):
        in_effect = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "no"
    yield _check("mixed_precision", configuration.mixed_precision, in_effect)


def _check_weights(configuration: Configuration, model: Any) -> Iterator[Check]:
    yield _check("dtype of the weights", expected_weights_dtype(configuration), _prevailing_dtype(model))
    adapts = configuration.method != "full"
    yield _check("trained parameters", "only the adapter's" if adapts else "all", _trained_parameters(model))


def expected_weights_dtype(configuration: Configuration) -> str:
    """Say in which dtype the weights train: DeepSpeed converts them to its own, and so may peft's preparation.

    FSDP keeps what trains in fp32 under mixed precision.
    """
    if configuration.uses_deepspeed:
        return AUTOCAST_DTYPES.get(configuration.mixed_precision, configuration.weights_dtype)
    if configuration.uses_fsdp and configuration.lora is None and configuration.mixed_precision != "no":
        return "float32"
    if configuration.quantization is not None and configuration.quantization.prepares_kbit:
        return "float32"
    return configuration.weights_dtype


def _prevailing_dtype(model: Any) -> str:
    """Return the dtype of most elements that are neither quantised nor the adapter's."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if not _is_adapters(name) and not _is_quantized(parameter):
            counts[dtype_name(parameter.dtype)] += getattr(parameter, "ds_numel", parameter.numel())
    return counts.most_common(1)[0][0]


def _is_quantized(parameter: Any) -> bool:
    """Tell a weight of four bits by the state that it carries, and one of eight by its dtype."""
    return hasattr(parameter, "quant_state") or dtype_name(parameter.dtype) == "int8"


def _trained_parameters(model: Any) -> str:
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    num_parameters = sum(1 for _ in model.parameters())
    if len(trained) == num_parameters:
        return "all"
    if trained and all(_is_adapters(name) for name in trained):
        return "only the adapter's"
    return f"{len(trained)} of {num_parameters}, for instance {trained[0] if trained else 'none'}"


def _is_adapters(name: str) -> bool:
    """Tell a LoRA weight by the prefix that peft gives it. Source: peft/tuners/lora/model.py, `prefix`."""
    return "lora_" in name


def _check_quantization(quantization: Quantization | None, model: Any) -> Iterator[Check]:
    linears = [module for _, module in _base_linears(model)]
    classes = [*QUANTIZED_LINEARS.values()] if quantization is None else [QUANTIZED_LINEARS[quantization.bits]]
    quantized = [module for module in linears if _class_path(module) in classes]
    planned = 0 if quantization is None else len(linears)
    yield _check("quantised linear layers", f"{planned} of {len(linears)}", f"{len(quantized)} of {len(linears)}")
    if quantization is not None and quantization.bits == 8 and quantized:
        yield _check("quantisation", "int8", dtype_name(quantized[0].weight.dtype))
    elif quantization is not None and quantized:
        # Of a weight that FSDP sharded only the layer's own state knows how it was quantised.
        state = quantized[0].weight.quant_state if quantized[0].quant_state is None else quantized[0].quant_state
        in_effect = _words(
            state.quant_type,
            state.nested,
            dtype_name(quantized[0].compute_dtype),
            dtype_name(quantized[0].weight.dtype),
        )
        words = (quantization.quant_type, quantization.double_quant)
        planned_words = _words(*words, quantization.compute_dtype, quantization.storage_dtype)
        yield _check("quantisation", planned_words, in_effect)


def _words(quant_type: str, double_quant: bool, compute: str, storage: str) -> str:  # noqa: FBT001 - a word of four
    return f"{quant_type}{', double' if double_quant else ''}, computes in {compute}, stored as {storage}"


def _is_base_linear(name: str, module: Any, model: Any) -> bool:
    """Tell a linear layer that a quantiser would take: not the adapter's, not the output embedding."""
    is_linear = _class_path(module) in {DENSE_LINEAR, *QUANTIZED_LINEARS.values()}
    return is_linear and not _is_adapters(name) and module is not model.get_output_embeddings()


def _class_path(module: Any) -> str:
    """Name a class with its module: peft's wrappers have the class names of what they wrap."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def check_adapter(configuration: Configuration, model: Any) -> Iterator[Check]:
    """Compare the adapter: its settings, the layers that carry it, and how large it is."""
    if configuration.lora is None:
        return
    adapters = getattr(model, "peft_config", {})
    if not adapters:
        yield _check("adapter", "lora", "none")
        return
    adapter = next(iter(adapters.values()))
    for name in ("r", "lora_alpha", "lora_dropout"):
        yield _check(name, getattr(configuration.lora, name), getattr(adapter, name, "none"))
    for name in ("use_rslora", "use_dora"):
        yield _check(name, getattr(configuration.lora, name), getattr(adapter, name, False))  # older peft has neither
    linears = {name.replace(".base_layer", ""): each for name, each in _base_linears(model) if not _is_kept(name)}
    planned = [each for name, each in linears.items() if _is_target(name, configuration.lora.target_modules)]
    carriers = {name.partition(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    yield _check("linear layers with an adapter", len(planned), len(carriers & linears.keys()))
    if not configuration.uses_fsdp:  # a shard does not say how large the whole is
        elements = sum(_num_adapter_elements(configuration.lora, each) for each in planned)
        yield _check("parameters of the adapter", elements, _num_adapter_parameters(model, linears.keys()))


def _num_adapter_elements(lora: Lora, linear: Any) -> int:
    """Count two matrices, and DoRA's magnitude of each output.

    Source: peft/tuners/lora/dora.py 0.21, DoraLinearLayer.
    """
    magnitudes = linear.out_features if lora.use_dora else 0
    return int(lora.r * (linear.in_features + linear.out_features) + magnitudes)


def _base_linears(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if _is_base_linear(name, module, model))


def _is_kept(name: str) -> bool:
    """Tell a head that peft trains whole beside the adapter. Source: peft/utils/other.py, ModulesToSaveWrapper."""
    return not {"modules_to_save", "original_module"}.isdisjoint(name.split("."))


def _is_target(name: str, target_modules: Iterable[str]) -> bool:
    """Tell whether peft puts an adapter on a linear layer. Source: peft/tuners/tuners_utils.py, `all-linear`."""
    return "all-linear" in target_modules or name.rpartition(".")[2] in target_modules


def _num_adapter_parameters(model: Any, linears: Container[str]) -> int:
    return sum(
        getattr(parameter, "ds_numel", parameter.numel())
        for name, parameter in model.named_parameters()
        if _is_adapters(name) and name.partition(".lora_")[0] in linears
    )


def _check_checkpointing(configuration: Configuration, model: Any) -> Iterator[Check]:
    if configuration.uses_fsdp:
        yield _check("gradient_checkpointing", configuration.gradient_checkpointing, checkpoints_units(model))
        return
    modules = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    yield _check("gradient_checkpointing", configuration.gradient_checkpointing, bool(modules))
    if configuration.gradient_checkpointing and modules:
        function = modules[0]._gradient_checkpointing_func
        in_effect = getattr(function, "keywords", {}).get("use_reentrant")
        yield _check("use_reentrant", configuration.use_reentrant, in_effect)
    if configuration.gradient_checkpointing and configuration.checkpoint_every_n_layers == 1:
        yield from _check_layers(model)


def _check_layers(model: Any) -> Iterator[Check]:
    """Compare how many layers checkpoint, where each has a switch of its own; older releases have one for all.

    Source: transformers/modeling_layers.py 5.23, GradientCheckpointingLayer.
    """
    names = frozenset(getattr(model, "_no_split_modules", None) or ())
    layers = [each for each in model.modules() if type(each).__name__ in names and hasattr(each, _SWITCH)]
    if layers:
        switched = sum(1 for layer in layers if getattr(layer, _SWITCH))
        yield _check("layers that checkpoint", len(layers), switched)


_SWITCH = "gradient_checkpointing"


_SAME_OPTIMIZERS = {"rmsprop_bnb": "rmsprop_bnb_32bit", "ademamix": "ademamix_32bit"}
"""Names of transformers for what another name, or its pattern, makes too."""
_OPTIMIZER_CLASSES = {
    "torch.SGD": "sgd",
    "torch.Adagrad": "adagrad",
    "torch.RMSprop": "rmsprop",
    "transformers.Adafactor": "adafactor",
    "torchao.AdamW8bit": "adamw_torch_8bit",
    "torchao.AdamW4bit": "adamw_torch_4bit",
    "schedulefree.AdamWScheduleFree": "schedule_free_adamw",
    "schedulefree.RAdamScheduleFree": "schedule_free_radam",
    "schedulefree.SGDScheduleFree": "schedule_free_sgd",
    "optimi.StableAdamW": "stable_adamw",
    "grokadamw.GrokAdamW": "grokadamw",
    "apollo_torch.AdamW": "apollo_adamw",
    "galore_torch.AdamW": "galore_adamw",
    "galore_torch.AdamW8bit": "galore_adamw_8bit",
    "galore_torch.Adafactor": "galore_adafactor",
    "lomo_optim.Lomo": "lomo",
    "lomo_optim.AdaLomo": "adalomo",
}
"""Package and class, by the name that makes it. Source: transformers/trainer_optimizer.py 5.23."""
_BITSANDBYTES_CLASSES = {"AdamW": "adamw", "Lion": "lion", "AdEMAMix": "ademamix", "RMSprop": "rmsprop_bnb"}


def expected_optimizer(configuration: Configuration) -> str:
    """Name the optimizer that will step: with offload DeepSpeed puts its own in place of any other.

    Source: accelerate/accelerator.py, `map_pytorch_optim_to_deepspeed`.
    """
    if configuration.offload != "none" and configuration.uses_deepspeed:
        return "DeepSpeedCPUAdam"
    return _SAME_OPTIMIZERS.get(configuration.optim, configuration.optim)


def optimizer_name(optimizer: Any) -> str:
    """Name the innermost optimizer as `TrainingArguments.optim` would."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if hasattr(optimizer, "optimizer_dict"):  # a stand-in for one optimizer of each parameter
        return f"{optimizer_name(next(iter(optimizer.optimizer_dict.values())))}_layerwise"
    package, kind = type(optimizer).__module__.partition(".")[0], type(optimizer).__name__
    if (package, kind) == ("torch", "AdamW"):
        return "adamw_torch_fused" if optimizer.defaults.get("fused") else "adamw_torch"
    if package == "bitsandbytes" and kind in _BITSANDBYTES_CLASSES:
        paged = "paged_" if optimizer.is_paged else ""
        return f"{paged}{_BITSANDBYTES_CLASSES[kind]}_{optimizer.args.optim_bits}bit"
    return _OPTIMIZER_CLASSES.get(f"{package}.{kind}", kind)
