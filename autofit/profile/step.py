"""One training step as transformers' Trainer does it, cut into segments."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autofit.profile.fit import Point
from autofit.profile.inputs import a_batch
from autofit.profile.recorder import Recorder
from autofit.spec.profile import Regime

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def checkpoint(model: nn.Module, *, use_reentrant: bool) -> None:
    """Switch checkpointing on, as Trainer does."""
    kwargs = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(kwargs)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    if hasattr(model, "peft_config"):
        model.enable_input_require_grads()


def run_step(model: nn.Module, recorder: Recorder, regime: Regime, point: Point) -> None:
    """One forward and backward with the lifetimes of transformers' Trainer (compute_loss, training_step)."""
    recorder.mark("embedding", "forward")
    batch = a_batch(point)
    outputs = forward(model, batch, regime)
    loss = outputs["loss"]
    kept = outputs if regime.keeps_outputs else None
    del outputs, batch
    recorder.mark("loss_backward", "backward")
    loss.backward()
    recorder.call_gradients(p.grad for p in model.parameters() if p.grad is not None)
    recorder.mark("end", "backward")
    del loss, kept
    for parameter in model.parameters():
        parameter.grad = None


def forward(model: nn.Module, batch: dict[str, torch.Tensor], regime: Regime) -> Any:
    """The forward pass as accelerate wraps it: autocast around it, outputs converted to fp32 after it."""
    if regime.autocast == "no":
        return model(**batch)
    with torch.autocast("cpu", AUTOCAST_DTYPES[regime.autocast]):
        outputs = model(**batch)
    from accelerate.utils.operations import convert_to_fp32

    return convert_to_fp32(outputs)
