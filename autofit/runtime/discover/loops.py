"""Stops a script with a loop of its own where its first optimizer step would be, and reads everything off it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from autofit.runtime.discover.batches import lengths_of, sample_lengths
from autofit.runtime.discover.observed import NotUnderstood, Observed
from autofit.runtime.discover.side_effects import nothing
from autofit.runtime.discover.trainers import describe, name_of
from autofit.runtime.verify import optimizer_name

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
        self.num_backward = 0

    def prepare(self, prepared: Any) -> None:
        """Remember what was prepared; the model that learns is the one whose forward never runs."""
        from torch import nn
        from torch.optim import Optimizer

        for each in prepared:
            if isinstance(each, nn.Module) and any(parameter.requires_grad for parameter in each.parameters()):
                self._take_model(each)
            if isinstance(each, Optimizer):
                self.optimizer = each

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
        loop.prepare(prepared if isinstance(prepared, (tuple, list)) else [prepared])
        return prepared

    def backward(_self: Any, *_args: Any, **_kwargs: Any) -> None:
        loop.backward()

    module.Accelerator.__init__, module.Accelerator.prepare, module.Accelerator.backward = __init__, prepare, backward
    for name in ("init_trackers", "log", "end_training", "save", "save_model", "save_state", "clip_grad_norm_"):
        setattr(module.Accelerator, name, nothing)
    _hook_optimizer(module, loop)


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
        is_loop=True,
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
