"""Stops a script where its Trainer would begin, and reads everything off it."""

from __future__ import annotations

import functools
import math
import tempfile
from collections import defaultdict
from dataclasses import fields
from types import ModuleType
from typing import Any

from autofit.runtime.discover.adapters import adapter_of, quantization_of
from autofit.runtime.discover.arguments import LEFT_OUT, RECORDED_ARGUMENTS, SWITCHED_OFF, left_out
from autofit.runtime.discover.batches import lengths_of, sample_lengths
from autofit.runtime.discover.observed import Observed, dtype_name, plain
from autofit.runtime.discover.side_effects import nothing
from autofit.spec.configuration import Loss
from autofit.spec.discovered import Discovered, FoundEvaluation


def hook_trainer(observed: Observed, module: ModuleType) -> None:
    """Let Trainers be made without a folder, and never train, evaluate or save."""
    original = module.Trainer.__init__

    @functools.wraps(original)
    def __init__(self: Any, model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:  # noqa: N807
        observed.mark("trainer")
        args = args or module.TrainingArguments("tmp_trainer")
        with tempfile.TemporaryDirectory() as nowhere, left_out(args), observed.library():
            output_dir, args.output_dir = args.output_dir, nowhere
            original(self, model, args, *rest, **kwargs)
            args.output_dir = output_dir

    def train(self: Any, *_args: Any, **_kwargs: Any) -> None:
        observed.mark("train")
        with observed.library():
            found = describe_trainer(observed, self)
        observed.finish(found)

    def evaluate(*_args: Any, **_kwargs: Any) -> dict[str, float]:
        return defaultdict(lambda: math.nan)

    module.Trainer.__init__, module.Trainer.train, module.Trainer.evaluate = __init__, train, evaluate
    module.Trainer.save_model = module.Trainer.save_state = module.Trainer.push_to_hub = nothing


def hook_dpo(observed: Observed, module: ModuleType) -> None:
    """Let a reference be compared with later: its answers would need the weights."""
    module.DPOTrainer._precompute_ref_logps = lambda _self, dataset, *_args, **_kwargs: dataset


def describe_trainer(observed: Observed, trainer: Any) -> Discovered:
    """Return everything that a plan needs to know of a trainer that is about to train."""
    given = next((given for arguments, given in observed.given if arguments is trainer.args), {})
    trainer.args.dataloader_num_workers, trainer.args.dataloader_prefetch_factor = 0, None
    trainer.args.dataloader_persistent_workers = False
    loader = trainer.get_train_dataloader()
    lengths = sample_lengths(loader.dataset, observed.tell_progress)
    return describe(
        observed,
        trainer.model,
        trainer=type(trainer).__name__,
        loss=loss_of(trainer),
        reference_model=getattr(trainer, "ref_model", None) is not None,
        lengths=lengths_of(loader, lengths, trainer.args.per_device_train_batch_size, trainer.model.config),
        evaluation=evaluation_of(trainer),
        tokenizer=_tokenizer_name(trainer),
        collator=name_of(trainer.data_collator),
        sampled_tokens=tuple(lengths.values()),
        arguments=plain({**_now(trainer.args), **given}),
    )


def describe(observed: Observed, model: Any, **facts: Any) -> Discovered:
    """Return what is known of a model that is about to be trained, with what is known of the loop around it."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    asked = next((asked for built, asked in observed.loaded if built is base), {})
    if asked.get("where"):
        observed.where["model"] = asked["where"]
    return Discovered(
        model_name=asked.get("name") or type(base).__name__,
        config={**plain(base.config.to_dict()), "architectures": [type(base).__name__]},
        weights_dtype=dtype_name(asked["dtype"] if asked else base.dtype),
        fixes_weights_dtype=bool(asked.get("fixes_dtype")),
        attention=asked.get("attention") or getattr(base.config, "_attn_implementation", None) or "eager",
        adapter=adapter_of(model),
        quantization=quantization_of(asked.get("quantization"), prepares_kbit=observed.prepares_kbit),
        device_map=None if asked.get("device_map") is None else str(asked["device_map"]),
        where=observed.where,
        **facts,
    )


def evaluation_of(trainer: Any) -> FoundEvaluation | None:
    """Say how a trainer evaluates; None where it has nothing to evaluate.

    What `preprocess_logits_for_metrics` makes of logits is taken to be small: that is what it is for.
    Source: transformers/trainer.py 5.23, evaluate and evaluation_loop.
    """
    sets, arguments = getattr(trainer, "eval_dataset", None), trainer.args
    if sets is None:
        return None
    each = list(sets.values()) if isinstance(sets, dict) else [sets]
    sizes = [len(one) for one in each if hasattr(one, "__len__")]
    batch = arguments.per_device_eval_batch_size
    default = next(field.default for field in fields(arguments) if field.name == "per_device_eval_batch_size")
    return FoundEvaluation(
        batch_sequences=None if batch == default else batch,
        num_sequences=max(sizes) if len(sizes) == len(each) else None,
        keeps_predictions=getattr(trainer, "compute_metrics", None) is not None
        and not arguments.prediction_loss_only
        and getattr(trainer, "preprocess_logits_for_metrics", None) is None,
        accumulation_steps=arguments.eval_accumulation_steps,
        generates=bool(getattr(arguments, "predict_with_generate", False)),
    )


def loss_of(trainer: Any) -> Loss:
    """Tell which code computes the loss: Liger's kernels, trl's fused head, or the model's own."""
    if getattr(trainer.args, "use_liger_kernel", False):
        return "liger"
    base = trainer.model.get_base_model() if hasattr(trainer.model, "peft_config") else trainer.model
    return "chunked" if _has_fused_head(base) else "stock"


def _has_fused_head(model: Any) -> bool:
    """Tell a model whose forward trl has replaced. Source: trl/trainer/utils.py 1.16, `add_fused_lm_head`."""
    forward = vars(model).get("forward")
    code = getattr(getattr(forward, "__func__", forward), "__code__", None)
    return code is not None and code.co_name == "_fused_forward"


def name_of(collate: Any) -> str:
    """Name a collator, which may be a function or an object."""
    return getattr(collate, "__name__", type(collate).__name__)


def _tokenizer_name(trainer: Any) -> str | None:
    tokenizer = getattr(trainer, "processing_class", None)
    return None if tokenizer is None else str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def _now(arguments: Any) -> dict[str, Any]:
    """Return the recorded arguments as they stand, for those a script set after they were made."""
    values = {name: getattr(arguments, name, None) for name in RECORDED_ARGUMENTS}
    return {name: value for name, value in values.items() if name not in (*LEFT_OUT, *SWITCHED_OFF, "output_dir")}
