"""Decides what of a loop of the script's own with accelerate can be planned: its batch, and how it is sharded."""

from __future__ import annotations

from collections.abc import Iterator

from autofit.errors import InputError
from autofit.spec.configuration import Sharding
from autofit.spec.discovered import Discovered, FoundLoop
from autofit.spec.job import ScriptLoop

DEEPSPEED: tuple[Sharding, ...] = ("zero1", "zero2", "zero3")
FSDP: tuple[Sharding, ...] = ("fsdp1", "fsdp2")


def script_loop(discovered: Discovered) -> ScriptLoop | None:
    """Return what the plan has to know of the script's own loop, if it has one."""
    loop, said = discovered.loop, discovered.arguments
    if loop is None:
        return None
    return ScriptLoop(
        per_device_train_batch_size=int(said["per_device_train_batch_size"]),
        gradient_accumulation_steps=int(said["gradient_accumulation_steps"]),
        accumulates_by_hand=loop.accumulates_by_hand,
        max_grad_norm=loop.max_grad_norm,
        train_loader=loop.train_loader,
    )


def refuse_split(discovered: Discovered, asked: str) -> None:
    """Let another micro-batch and accumulation be planned only where the loop goes on as it is.

    Args:
        discovered: a script with a loop of its own.
        asked: the option that asks for it.

    Raises:
        InputError: it would not.
    """
    reason = _why_batch_is_kept(discovered)
    if reason:
        raise InputError(
            f"the script trains in a loop of its own, which {reason}: {asked} cannot be put into effect.",
            to_fix=f"leave {asked} out, or change the script: a DataLoader that goes through Accelerator.prepare, and "
            "micro-steps inside Accelerator.accumulate, can be split otherwise",
        )


def _why_batch_is_kept(discovered: Discovered) -> str:
    loop = discovered.loop
    if discovered.is_guess:
        return "was read and not run"
    if loop is not None and loop.accumulates_by_hand and discovered.arguments["gradient_accumulation_steps"] > 1:
        return "decides in its own code when the optimizer steps"
    return loop.keeps_batch if loop is not None else ""


def unsharded_only(discovered: Discovered) -> dict[Sharding, str]:
    """Return the shardings under which a loop would not train as it does by itself, each with the reason.

    DeepSpeed takes the optimizer's step inside `Accelerator.backward` whenever accelerate is to synchronise, keeps
    gradients in buffers of its own, and clips by itself; `Accelerator.clip_grad_norm_` then returns a number or None.
    A model and an optimizer that are prepared apart end in two engines, or in an error; a schedule that is prepared
    apart from them is handed back as it was, and stepped in every micro-step. Under ZeRO-3 and FSDP a rank's
    `state_dict` holds its share alone, and so do its gradients.
    Source: accelerate 1.15 accelerator.py (`clip_grad_norm_`, `clip_grad_value_`, `get_state_dict`, `prepare`),
    utils/deepspeed.py (`DeepSpeedEngineWrapper`).
    """
    loop = discovered.loop
    if loop is None:
        return {}
    if discovered.is_guess:
        return dict.fromkeys((*DEEPSPEED, *FSDP), "it was read and not run")
    reasons: dict[Sharding, str] = {}
    for shardings, reason in _reasons(loop, int(discovered.arguments["gradient_accumulation_steps"])):
        reasons |= {sharding: reason for sharding in shardings if sharding not in reasons}
    return reasons


def _reasons(loop: FoundLoop, num_micro_steps: int) -> Iterator[tuple[tuple[Sharding, ...], str]]:
    if loop.prepares_apart:
        yield (*DEEPSPEED, *FSDP), "it prepares its model and its optimizer by different calls"
    if loop.accumulates_by_hand and num_micro_steps > 1:
        yield DEEPSPEED, "it accumulates by its own code, and DeepSpeed would step in every micro-step"
    if loop.schedules_apart:
        yield DEEPSPEED, "it prepares its learning-rate schedule apart from its model, which accelerate leaves as it is"
    if loop.clips_itself:
        yield (*DEEPSPEED, *FSDP), f"it clips gradients itself ({loop.clips_itself}), which are not its own there"
    if loop.reads_gradients:
        yield (*DEEPSPEED, *FSDP), f"it looks at gradients ({loop.reads_gradients}), which are not whole there"
    if loop.reads_norm:
        yield DEEPSPEED, f"it takes the norm of its gradients for a tensor ({loop.reads_norm}): DeepSpeed's is none"
    if loop.saves_its_share:
        yield (
            ("zero3", *FSDP),
            f"it saves weights without Accelerator.get_state_dict ({loop.saves_its_share}): a rank has its share alone",
        )
