"""deepspeed.json: every value decided; only the clipping norm is left to the arguments of the script's Trainer."""

from __future__ import annotations

from typing import Any

from msgspec.structs import asdict

from autofit.plan import Plan, to_json
from autofit.spec.configuration import Configuration
from autofit.spec.deepspeed import bucket_settings, hidden_size
from autofit.spec.hardware import DeviceKind


def render_deepspeed_config(plan: Plan) -> str:
    """Write the DeepSpeed configuration as JSON."""
    return to_json(deepspeed_config(plan)) + "\n"


def deepspeed_config(plan: Plan) -> dict[str, Any]:
    """Say to DeepSpeed what the plan says; a script whose own arguments differ is refused by transformers, not obeyed.

    `zero_allow_untested_optimizer` because transformers makes the optimizer and DeepSpeed knows few by name.
    """
    configuration, device = plan.configuration, plan.inputs.cluster.device
    hidden = hidden_size(plan.inputs.job.model.config)
    return {
        "train_micro_batch_size_per_gpu": configuration.per_device_train_batch_size,
        "gradient_accumulation_steps": configuration.gradient_accumulation_steps,
        "train_batch_size": configuration.global_batch_sequences,
        "gradient_clipping": clipping_norm(plan),
        "bf16": {"enabled": configuration.mixed_precision == "bf16"},
        "fp16": _fp16_block(enabled=configuration.mixed_precision == "fp16"),
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero_block(configuration, hidden, device.kind),
        "wall_clock_breakdown": False,
    }


def clipping_norm(plan: Plan) -> float | str:
    """Return what DeepSpeed clips the gradients to: what a loop clips to by itself, 0 being nothing.

    A Trainer's `max_grad_norm` is filled in for `auto` by transformers; of a loop accelerate would take 1, whatever it
    does. Source: accelerate 1.15 accelerator.py, `_prepare_deepspeed`.
    """
    loop = plan.inputs.job.script_loop
    return "auto" if loop is None else loop.max_grad_norm or 0.0


def _fp16_block(*, enabled: bool) -> dict[str, Any]:
    """Dynamic loss scaling, from 2^16. Source: the example files in transformers' DeepSpeed guide."""
    if not enabled:
        return {"enabled": False}
    return {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
    }


def zero_block(configuration: Configuration, hidden: int, kind: DeviceKind) -> dict[str, Any]:
    """Write the `zero_optimization` block.

    Args:
        configuration: what is trained.
        hidden: width of the model, which sizes the buckets.
        kind: what it runs on; only a GPU's host memory can be pinned.
    """
    settings = asdict(bucket_settings(configuration, hidden))
    if configuration.zero_stage == 3:
        settings["stage3_gather_16bit_weights_on_model_save"] = True  # or save_model writes no weights
    else:
        settings = {name: value for name, value in settings.items() if not name.startswith("stage3_")}
    place = {"device": "cpu", "pin_memory": kind == "cuda"}
    if configuration.offload != "none":
        settings["offload_optimizer"] = place
    if configuration.offload == "optimizer_and_parameters":
        settings["offload_param"] = place
    return settings
