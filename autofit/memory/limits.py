"""What of a configuration is not modelled: refused by name, so that no knob is ever left out of a figure in silence.

Whoever models one of these removes its line.
"""

from __future__ import annotations

from autofit.errors import InputError
from autofit.memory.optimizers import OPTIMIZERS, UNMODELLED
from autofit.spec.configuration import Configuration, Optim

MODELLED_SHARDINGS = ("none", "ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2")
OFFLOADED_SHARDINGS = ("zero2", "zero3", "fsdp1", "fsdp2")
FSDP_HOST_OPTIMS = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""torch's own, which step on tensors of the host as they are. Others have kernels for GPUs, or none for DTensors."""


def refuse_unmodelled(configuration: Configuration) -> None:
    """Refuse a configuration whose memory would come out as if one of its knobs were not set.

    Raises:
        InputError: something about it is not modelled.
    """
    knob = unmodelled(configuration)
    if knob is not None:
        raise InputError(f"{knob} is not modelled.", to_fix="leave it out, or choose another")


def unmodelled(configuration: Configuration) -> str | None:
    """Name the first knob that is not modelled, None if all are."""
    return unmodelled_optim(configuration) or unmodelled_but_optim(configuration)


def unmodelled_optim(configuration: Configuration) -> str | None:
    """Name the optimizer if it is not modelled with the configuration's engine and its accumulation."""
    c = configuration
    checks = (
        (c.optim not in OPTIMIZERS, f"optim {c.optim} ({UNMODELLED.get(c.optim)})"),
        (_updates_in_backward(c.optim) and c.sharding != "none", f"optim {c.optim} in several processes"),
        (_projects(c.optim) and (c.uses_deepspeed or c.uses_fsdp), f"optim {c.optim} under {c.sharding}"),
        (c.optim.endswith("layerwise") and c.gradient_accumulation_steps > 1, f"accumulation under optim {c.optim}"),
        (
            c.uses_fsdp and c.offload != "none" and c.optim not in FSDP_HOST_OPTIMS,
            f"optim {c.optim} on the host under {c.sharding}",
        ),
    )
    return next((name for applies, name in checks if applies), None)


def unmodelled_but_optim(configuration: Configuration) -> str | None:
    """Name the first other knob that is not modelled, whatever the optimizer and the split of the batch."""
    c = configuration
    checks = (
        (c.sharding not in MODELLED_SHARDINGS, f"sharding {c.sharding}"),
        (c.offload != "none" and c.sharding not in OFFLOADED_SHARDINGS, f"offload {c.offload} under {c.sharding}"),
        (c.uses_fsdp and c.offload == "optimizer", f"offload of the optimizer alone under {c.sharding}"),
        (c.num_replicas != 1 and not c.uses_fsdp, f"a hybrid shard (num_replicas) under {c.sharding}"),
        (c.sequence_parallel_size != 1 and _unshared(c) is not None, f"sequence parallelism {_unshared(c)}"),
        (not c.reshard_after_forward and not c.uses_fsdp, f"reshard_after_forward off under {c.sharding}"),
        (c.uses_fsdp and c.checkpoint_every_n_layers != 1, "checkpointing of every n-th layer under FSDP"),
        (c.sharding == "fsdp2" and c.use_reentrant, "reentrant checkpointing under FSDP2"),
        (c.uses_fsdp and c.lora is not None and bool(c.lora.modules_to_save), "modules_to_save under FSDP"),
        (c.uses_fsdp and c.loss != "stock", f"loss {c.loss} under FSDP"),
        (c.uses_fsdp and c.num_processes == c.num_replicas, "FSDP whose copies are each held by one process"),
        (c.loss != "stock" and c.zero_stage == 3, f"loss {c.loss} under zero3, which gathers the head for it,"),
        (_is_packed_apart(c), f"{c.sharding} of a checkpoint that comes packed"),
    )
    return next((name for applies, name in checks if applies), None)


def _is_packed_apart(configuration: Configuration) -> bool:
    """Whether an engine that shards parameters meets packed weights that are none, or that it was not seen with."""
    c = configuration
    if c.quantization is None or not c.quantization.comes_packed:
        return False
    was_seen = c.sharding == "fsdp1" and c.quantization.kernel == "auto_gptq" and c.offload == "none"
    return c.zero_stage == 3 or (c.uses_fsdp and not was_seen)


def _unshared(configuration: Configuration) -> str | None:
    """Say why processes cannot share sequences: what DeepSpeed refuses, and what was not held to it.

    Source: accelerate/utils/dataclasses.py 1.15, DeepSpeedSequenceParallelConfig (`_unsupported_sp_attn`).
    """
    c = configuration
    checks = (
        (not c.uses_deepspeed, f"under {c.sharding}"),
        (c.num_processes % c.sequence_parallel_size != 0, f"by {c.sequence_parallel_size} of {c.num_processes}"),
        (c.attention not in {"sdpa", "flash_attention_2"}, f"with attention {c.attention}"),
        (c.offload != "none", f"with offload {c.offload}"),
        (c.batching != "equal", f"of {c.batching} batches"),
        (c.loss != "stock", f"with loss {c.loss}"),
        (c.keeps_outputs, "in a loop of one's own"),
    )
    return next((words for applies, words in checks if applies), None)


def _projects(optim: Optim) -> bool:
    """DeepSpeed's flat partitions have no two sides to project ("IndexError: tuple index out of range")."""
    return optim.startswith(("apollo", "galore"))


def _updates_in_backward(optim: Optim) -> bool:
    """LOMO reduces no gradients over processes, and transformers refuses layerwise optimizers under DDP.

    Source: lomo-optim 0.1.1 lomo.py, fuse_update; transformers/trainer_optimizer.py 5.23, _setup_low_rank_optimizer.
    """
    return optim in OPTIMIZERS and OPTIMIZERS[optim].in_backward


def refuse_absurd_numbers(*numbers: int) -> None:
    """Refuse numbers of tokens or sequences that 64 bits do not hold.

    Raises:
        InputError: one does not fit.
    """
    if (most := max(numbers, default=0)) >= 2**63:
        raise InputError(f"{most} tokens or sequences are too many to count.", to_fix="check for a slip of the pen")
