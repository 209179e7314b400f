"""One training step as transformers' Trainer does it, cut into segments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
import transformers
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from autofit.errors import InputError
from autofit.profile.batching import arrange, branches_of
from autofit.profile.fit import Point
from autofit.profile.inputs import Feed, a_batch
from autofit.profile.losses import loss_of
from autofit.profile.recorder import Recorder
from autofit.profile.sequence_parallel import shared_batch, ulysses_of
from autofit.spec.profile import ON_HOST, Regime

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def checkpoint(model: nn.Module, regime: Regime, recorder: Recorder) -> None:
    """Switch checkpointing on, as Trainer does.

    Source: transformers/trainer.py 5.23, _inner_training_loop; before release 5 the method is
    `gradient_checkpointing_enable`, which knows neither `every_n_layers` nor `offload`.

    Raises:
        InputError: the installed transformers has no checkpointing of that kind, or the model none at all.
    """
    kwargs: dict[str, Any] = {"use_reentrant": regime.use_reentrant}
    chosen: dict[str, Any] = {}
    if regime.checkpoint_every_n_layers > 1:
        chosen["every_n_layers"] = regime.checkpoint_every_n_layers
    if regime.checkpoint_offload:
        chosen["offload"] = True
    enable = getattr(model, "activation_checkpointing_enable", None)
    if chosen and (enable is None or not set(chosen) <= set(inspect.signature(enable).parameters)):
        raise InputError(
            f"transformers {transformers.__version__} cannot checkpoint with {', '.join(chosen)}",
            to_fix="install transformers 5.23 or later, or checkpoint every layer without offload",
        )
    try:
        if enable is None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        else:
            enable(kwargs, **chosen)
    except ValueError as error:
        raise InputError(
            f"transformers {transformers.__version__} cannot checkpoint {type(model).__name__}: {error}",
            to_fix="plan without gradient checkpointing",
        ) from error
    if regime.checkpoint_offload:
        _offload(model, recorder)
    if hasattr(model, "peft_config"):
        model.enable_input_require_grads()


def _offload(model: nn.Module, recorder: Recorder) -> None:
    """Let what checkpoints save count as pinned host memory, and what they read back as the device's again.

    A CPU has no memory to pin, so torch's own `save_on_cpu` cannot run here. The copies are the same: a contiguous one
    on the host when a tensor is saved, one on the device when backward asks for it.
    Source: torch v2.13 torch/autograd/graph.py, save_on_cpu; transformers/modeling_utils.py 5.23,
    _activation_checkpointing_enable.
    """

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        with recorder.bearing(ON_HOST):
            return torch.empty(tensor.size(), dtype=tensor.dtype)

    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None:
            plain = partial(torch.utils.checkpoint.checkpoint, **function.keywords)
            module._gradient_checkpointing_func = _hooked(plain, pack)


def _hooked(function: Callable[..., Any], pack: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(pack, torch.clone):
            return function(*args, **kwargs)

    return run


def run_step(model: nn.Module, recorder: Recorder, regime: Regime, point: Point, feed: Feed | None = None) -> None:
    """One forward and backward with the lifetimes of transformers' Trainer (compute_loss, training_step).

    Inputs that the trace alone would not hold on to are held to the end, as those of all micro-steps are.
    Source: transformers/trainer.py 5.23, get_batch_samples.
    """
    if regime.generates:
        _read_prompt(model, recorder, regime, point)
        return
    if regime.evaluates:
        _evaluate(model, recorder, regime, point, feed)
        return
    recorder.mark("embedding", "forward")
    with (
        branches_of(regime, point),
        ulysses_of(model, regime, point),
        loss_of(model, regime, recorder.launched) as arguments,
    ):
        batch = shared_batch(arrange(a_batch(point, model, regime, feed), regime), regime)
        outputs = forward(model, {**batch, **arguments}, regime)
        loss = outputs["loss"]
        kept = outputs if regime.keeps_outputs else None
        held = batch if regime.batching != "equal" or feed is not None else None
        del outputs, batch
        recorder.mark("loss_backward", "backward")
        loss.backward()
    recorder.call_gradients(p.grad for p in model.parameters() if p.grad is not None)
    recorder.mark("end", "backward")
    del loss, kept, held
    for parameter in model.parameters():
        parameter.grad = None


def _evaluate(model: nn.Module, recorder: Recorder, regime: Regime, point: Point, feed: Feed | None) -> None:
    """One batch of an evaluation; what is alive when its last segment begins are the predictions, which may be kept.

    Source: transformers/trainer.py 5.23, prediction_step.
    """
    model.eval()
    recorder.mark("embedding", "forward")
    with torch.no_grad(), branches_of(regime, point), loss_of(model, regime, recorder.launched) as arguments:
        batch = arrange(a_batch(point, model, regime, feed), regime)
        outputs = forward(model, {**batch, **arguments}, regime)
        loss = outputs["loss"].detach().mean()
        predictions = tuple(value for name, value in outputs.items() if name not in {"loss", "past_key_values"})
        del outputs, loss, batch
        recorder.mark("end", "forward")
        del predictions


def _read_prompt(model: nn.Module, recorder: Recorder, regime: Regime, point: Point) -> None:
    """One prompt for each sequence, with a new cache, up to the fp32 logits of its last token.

    Only that token's logits are made where the model can leave out the others. Every sequence has positions of its own,
    and so rotary tables or position embeddings.
    Source: transformers/generation/utils.py 5.23, generate (`_supports_logits_to_keep`), `_prefill`, `_sample` and
    prepare_inputs_for_generation.
    """
    model.eval()
    recorder.mark("embedding", "forward")
    with torch.no_grad(), branches_of(regime, point):
        batch = arrange(a_batch(point, model, regime), regime)
        del batch["labels"]
        taken = inspect.signature(model.forward).parameters
        positions = torch.ones_like(batch["input_ids"]).cumsum(-1) - 1
        given = {name: value for name, value in (("logits_to_keep", 1), ("position_ids", positions)) if name in taken}
        outputs = forward(model, {**batch, **given, "use_cache": True}, regime)
        logits = outputs["logits"][:, -1, :].to(copy=True, dtype=torch.float32)
        recorder.mark("end", "forward")
        del outputs, logits, batch, given, positions


def forward(model: nn.Module, batch: dict[str, Any], regime: Regime) -> Any:
    """The forward pass as accelerate wraps it: autocast around it, outputs converted to fp32 after it."""
    if regime.autocast == "no":
        return model(**batch)
    with torch.autocast("cpu", AUTOCAST_DTYPES[regime.autocast]):
        outputs = model(**batch)
    from accelerate.utils.operations import convert_to_fp32

    return convert_to_fp32(outputs)
