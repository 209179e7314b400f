"""Stops a script with a loop of its own where its first optimizer step would be, and reads everything off it."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from autofit.runtime.discover.batches import lengths_of, sample_lengths
from autofit.runtime.discover.loop_source import LoopSource, read_loop
from autofit.runtime.discover.observed import NotUnderstood, Observed
from autofit.runtime.discover.side_effects import nothing
from autofit.runtime.discover.trainers import describe, name_of
from autofit.runtime.verify import optimizer_name
from autofit.spec.discovered import FoundLoop

MOST_MICRO_STEPS = 4096
"""Backward passes without an optimizer step after which a loop is given up."""
_INSTEAD = "train with a transformers Trainer, or with accelerate's Accelerator.prepare and Accelerator.backward"


class Loop:
    """What a script has prepared for its own loop, and how far it has come."""

    def __init__(self, observed: Observed) -> None:
        self.observed = observed
        self.accelerator: Any = None
        self.given: dict[str, Any] = {}
        self.model: Any = None
        self.optimizer: Any = None
        self.loader: Any = None
        self.loaders: list[Any] = []
        """All that were prepared, in their order."""
        self.schedulers: list[Any] = []
        self.num_backward = 0
        self.num_prepared = 0
        self.prepared_in: dict[str, int] = {}
        """Of the model and of the optimizer: in which call."""
        self.num_accumulated = 0
        """Micro-steps that began inside `Accelerator.accumulate`."""
        self.reads_accumulation = False
        self.max_grad_norm: float | None = None

    def prepare(self, given: Any, prepared: Any) -> None:
        """Remember what was prepared; the model that learns is the one whose forward never runs."""
        from torch import nn
        from torch.optim import Optimizer
        from torch.utils.data import DataLoader

        self.num_prepared += 1
        for each in given:
            if hasattr(each, "get_last_lr"):
                self.schedulers.append(each)
                self.prepared_in["scheduler"] = self.num_prepared
        for each in prepared:
            if isinstance(each, DataLoader):
                self.loaders.append(each)
            if isinstance(each, nn.Module) and any(parameter.requires_grad for parameter in each.parameters()):
                self._take_model(each)
                self.prepared_in["model"] = self.num_prepared
            if isinstance(each, Optimizer):
                self.optimizer = each
                self.prepared_in["optimizer"] = self.num_prepared

    def _take_model(self, model: Any) -> None:
        if self.model is not None and self.model is not model:
            raise NotUnderstood("trains two models at once", "give each a script of its own")
        self.model = model
        model.forward = functools.partial(_pretend, model.forward, self)

    def backward(self) -> None:
        """Count a micro-step."""
        self.num_backward += 1
        if self.num_backward > MOST_MICRO_STEPS:
            raise NotUnderstood(f"took no optimizer step in {MOST_MICRO_STEPS} micro-steps", _INSTEAD)

    def clip(self, max_norm: Any, norm_type: Any = 2) -> Any:
        """Note to what the gradients are clipped; there are none."""
        import torch

        if float(norm_type) == 2:
            self.max_grad_norm = float(max_norm)
        else:
            self.observed.mark("clips_itself")
        return torch.zeros(())

    def step(self) -> None:
        """Finish at the first optimizer step that is not one of accumulation's pauses."""
        if self.accelerator.gradient_state.sync_gradients and self.num_backward:
            self.observed.mark("train")
            with self.observed.library():
                found = _describe(self)
            self.observed.finish(found)


def _pretend(original: Callable[..., Any], loop: Loop, *args: Any, **kwargs: Any) -> Any:
    """Answer for a model that is about to train, without computing: a loss of zero, and zeros of the logits' shape."""
    if not loop.model.training:
        return original(*args, **kwargs)
    loop.loader = loop.accelerator.gradient_state.active_dataloader or loop.observed.iterated
    import torch
    from transformers.modeling_outputs import CausalLMOutput

    ids = kwargs.get("input_ids", args[0] if args else None)
    rows = tuple(ids.shape) if ids is not None else (1, 1)
    config: Any = loop.model.config
    classes = "Classification" in type(loop.model).__name__
    shape = (rows[0], config.num_labels) if classes else (*rows, config.get_text_config().vocab_size)
    zero = torch.zeros((), requires_grad=True)
    return CausalLMOutput(loss=zero * 1.0, logits=(zero * 1.0).expand(shape))


def hook_accelerator(observed: Observed, module: ModuleType) -> None:
    """Let an Accelerator be made without what it asks of a GPU, and note what it prepares."""
    make, original = module.Accelerator.__init__, module.Accelerator.prepare
    loop = Loop(observed)

    @functools.wraps(make)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if observed.inside_library:
            make(self, *args, **kwargs)
            return
        observed.mark("arguments")
        loop.accelerator, loop.given = self, dict(kwargs)
        for name in ("deepspeed_plugin", "fsdp_plugin", "megatron_lm_plugin", "dynamo_backend", "log_with"):
            kwargs.pop(name, None)
        with observed.library():
            make(self, *args, **{**kwargs, "cpu": True, "mixed_precision": "no"})

    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        if observed.inside_library:
            return original(self, *args, **kwargs)
        observed.mark("trainer")
        with observed.library():
            prepared = original(self, *args, **kwargs)
        loop.prepare(args, prepared if isinstance(prepared, (tuple, list)) else [prepared])
        return prepared

    def backward(_self: Any, *_args: Any, **_kwargs: Any) -> None:
        loop.backward()

    def clip_grad_norm_(_self: Any, _parameters: Any, max_norm: Any, norm_type: Any = 2) -> Any:
        return loop.clip(max_norm, norm_type)

    def clip_grad_value_(*_args: Any, **_kwargs: Any) -> None:
        observed.mark("clips_itself")

    module.Accelerator.__init__, module.Accelerator.prepare, module.Accelerator.backward = __init__, prepare, backward
    module.Accelerator.clip_grad_norm_ = clip_grad_norm_
    module.Accelerator.clip_grad_value_ = clip_grad_value_
    for name in ("init_trackers", "log", "end_training", "save", "save_model", "save_state"):
        setattr(module.Accelerator, name, nothing)
    _hook_accumulation(module, loop)
    _hook_optimizer(module, loop)


def _hook_accumulation(module: ModuleType, loop: Loop) -> None:
    """Count what begins inside `accumulate`, and note whether the script asks its Accelerator for the steps."""
    synchronise, steps = module.Accelerator._do_sync, module.Accelerator.gradient_accumulation_steps

    def _do_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        loop.num_accumulated += 1
        return synchronise(self, *args, **kwargs)

    def gradient_accumulation_steps(self: Any) -> Any:
        if sys._getframe(1).f_code.co_filename == str(loop.observed.script):
            loop.reads_accumulation = True
        return steps.fget(self)

    module.Accelerator._do_sync = functools.wraps(synchronise)(_do_sync)
    module.Accelerator.gradient_accumulation_steps = property(gradient_accumulation_steps, steps.fset)


def _hook_optimizer(module: ModuleType, loop: Loop) -> None:
    """Have every prepared optimizer's step asked about, none taken."""
    module.AcceleratedOptimizer.step = lambda _self, *_args, **_kwargs: loop.step()


def hook_dataloader(observed: Observed, module: ModuleType) -> None:
    """Note which DataLoader is iterated."""
    original = module.DataLoader.__iter__

    @functools.wraps(original)
    def __iter__(self: Any) -> Any:  # noqa: N807
        if not observed.inside_library:
            observed.iterated = self
        return original(self)

    module.DataLoader.__iter__ = __iter__


def hook_clipping(observed: Observed, module: ModuleType) -> None:
    """Note where a script clips gradients by itself; there are none."""
    import torch

    def clip(*_args: Any, **_kwargs: Any) -> Any:
        if not observed.inside_library:
            observed.mark("clips_itself")
        return torch.zeros(())

    for name in ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_"):
        if hasattr(module, name):
            setattr(module, name, clip)


def hook_own_ddp(observed: Observed, module: ModuleType) -> None:
    """End a script that wraps its model itself, which Accelerator.prepare would wrap again."""

    def __init__(*_args: Any, **_kwargs: Any) -> None:  # noqa: N807
        observed.mark("ddp")
        raise NotUnderstood(
            f"wraps its model in DistributedDataParallel itself ({observed.where.get('ddp', 'torch')})",
            "leave that to Accelerator.prepare or to a Trainer",
        )

    module.DistributedDataParallel.__init__ = __init__


def hook_backward(observed: Observed, module: ModuleType) -> None:
    """End a script that trains without any of the libraries that a plan can be applied through."""

    def backward(*_args: Any, **_kwargs: Any) -> None:
        observed.mark("backward")
        raise NotUnderstood(f"runs its own training loop ({observed.where.get('backward', 'backward')})", _INSTEAD)

    module.Tensor.backward = backward


def _describe(loop: Loop) -> Any:
    """Return everything that a plan needs to know of a loop."""
    loader = loop.loader
    if loader is None or loop.model is None:
        raise NotUnderstood("steps an optimizer without a prepared model and a DataLoader", _INSTEAD)
    if getattr(loop.accelerator, "split_batches", False):
        raise NotUnderstood("splits each batch over the processes (split_batches)", "let each process have its own")
    sampler = getattr(loader, "batch_sampler", None)
    rows = int(getattr(sampler, "batch_size", None) or getattr(loader, "batch_size", None) or 1)
    lengths = sample_lengths(loader.dataset, loop.observed.tell_progress)
    return describe(
        loop.observed,
        loop.model,
        trainer="a loop of its own with accelerate.Accelerator",
        loop=_facts(loop, loader, read_loop(loop.observed.script)),
        checkpoints=any(getattr(module, "gradient_checkpointing", False) for module in loop.model.modules()),
        lengths=lengths_of(loader, lengths, rows, loop.model.config),
        collator=name_of(loader.collate_fn),
        sampled_tokens=tuple(lengths.values()),
        arguments={
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": loop.num_backward,
            "bf16": loop.given.get("mixed_precision") == "bf16",
            "fp16": loop.given.get("mixed_precision") == "fp16",
            "optim": "" if loop.optimizer is None else optimizer_name(loop.optimizer),
            "fixes_precision": loop.given.get("mixed_precision") is not None,
        },
    )


def _facts(loop: Loop, loader: Any, source: LoopSource) -> FoundLoop:
    """Return what of a loop decides how it can be split and sharded."""
    by_hand = loop.num_accumulated < loop.num_backward
    model_in = loop.prepared_in.get("model")
    place = next((place for place, each in enumerate(loop.loaders) if each is loader), None)
    return FoundLoop(
        accumulates_by_hand=by_hand,
        max_grad_norm=loop.max_grad_norm,
        train_loader=place,
        keeps_batch=next(_what_keeps_batch(loop, loader, source, is_prepared=place is not None), ""),
        prepares_apart=loop.prepared_in.get("optimizer") != model_in,
        schedules_apart=loop.prepared_in.get("scheduler", model_in) != model_in or _has_schedule_apart(loop),
        clips_itself=loop.observed.where.get("clips_itself", ""),
        reads_gradients=source.reads_gradients,
        reads_norm=source.reads_norm,
        saves_its_share=source.saves_its_share,
    )


def _what_keeps_batch(loop: Loop, loader: Any, source: LoopSource, *, is_prepared: bool) -> Iterator[str]:
    """Yield why another micro-batch, with as many more or fewer micro-steps, would change what the loop does."""
    from torch.utils.data import BatchSampler, DataLoader, IterableDataset

    base = getattr(loader, "base_dataloader", loader)
    if not is_prepared:
        yield "iterates a DataLoader that is not prepared"
    if loop.num_accumulated < loop.num_backward:
        yield "takes its micro-steps outside Accelerator.accumulate"
    if isinstance(loader.dataset, IterableDataset) or type(loader.batch_sampler) is not BatchSampler:
        yield "makes its batches itself, by an iterable data set or a batch sampler of its own"
    if type(base) is not DataLoader:
        yield f"has a DataLoader of another kind ({type(base).__name__})"
    if loop.reads_accumulation:
        yield "asks its Accelerator for gradient_accumulation_steps, which would no longer be its own"
    if source.skips_batches:
        yield f"skips batches to resume ({source.skips_batches}), which it counts itself"
    if any(hasattr(each, "total_steps") for each in loop.schedulers):
        yield "has a learning-rate schedule with an end (OneCycleLR), up to which accelerate counts micro-steps"
    if _has_schedule_apart(loop):
        yield "has a learning-rate schedule that is not prepared, and steps it itself"


def _has_schedule_apart(loop: Loop) -> bool:
    """Tell whether a schedule of the optimizer was not given to `prepare`."""
    from torch.optim.lr_scheduler import LRScheduler

    inner = loop.optimizer.optimizer if loop.optimizer is not None else None
    made = [each for each in gc.get_objects() if issubclass(type(each), LRScheduler) and each.optimizer is inner]
    return any(all(each is not given for given in loop.schedulers) for each in made)
