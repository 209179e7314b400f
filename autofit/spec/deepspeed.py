"""The numbers of a DeepSpeed configuration that decide memory; the writer and the memory model both read them here."""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from msgspec.structs import asdict, replace

from autofit.errors import InputError
from autofit.spec.configuration import Configuration


class DeepSpeedSettings(Struct, frozen=True, kw_only=True):
    """The `zero_optimization` block, with DeepSpeed's own names. Sizes are numbers of elements, as DeepSpeed counts."""

    stage: int
    overlap_comm: bool
    """Whether a bucket is reduced while the next one fills; for stages 1 and 2 this needs a second bucket."""
    contiguous_gradients: bool
    reduce_scatter: bool
    reduce_bucket_size: int
    allgather_bucket_size: int
    sub_group_size: int
    stage3_prefetch_bucket_size: int
    stage3_param_persistence_threshold: int
    stage3_max_live_parameters: int
    stage3_max_reuse_distance: int


def reduce_bucket_elements(hidden_size: int) -> int:
    """Return the size of the bucket that gradients are reduced in; a larger gradient is reduced by itself."""
    return hidden_size * hidden_size


def bucket_settings(configuration: Configuration, hidden_size: int) -> DeepSpeedSettings:
    """Decide the bucket sizes of a ZeRO stage, the same for every device so that a plan holds on any of them.

    What the configuration gives goes first. Of the rest, the three that depend on the model follow the rule that
    transformers applies to "auto"; the others are DeepSpeed's defaults, written out because a default that moves with a
    release would move the memory with it.

    Source: transformers/integrations/deepspeed.py (`trainer_config_finalize`); deepspeed/runtime/zero/config.py 0.19.8.
    """
    decided = DeepSpeedSettings(
        stage=configuration.zero_stage,
        overlap_comm=configuration.zero_stage == 3,
        contiguous_gradients=True,
        reduce_scatter=True,
        reduce_bucket_size=reduce_bucket_elements(hidden_size),
        allgather_bucket_size=500_000_000,
        sub_group_size=1_000_000_000,
        stage3_prefetch_bucket_size=hidden_size * hidden_size * 9 // 10,
        stage3_param_persistence_threshold=10 * hidden_size,
        stage3_max_live_parameters=1_000_000_000,
        stage3_max_reuse_distance=1_000_000_000,
    )
    given = {name: value for name, value in asdict(configuration.zero_settings).items() if value is not None}
    return replace(decided, **given)


def hidden_size(config: dict[str, Any]) -> int:
    """Find the width that transformers sizes DeepSpeed's buckets by, in the content of a config.json.

    Source: transformers/integrations/deepspeed.py (`trainer_config_finalize`); the other names are the
    `attribute_map` of the older architectures (GPT-2: `n_embd`, OPT and T5: `d_model`).

    Raises:
        InputError: the config names no width.
    """
    for candidate in (config, config.get("text_config") or {}):
        for name in ("hidden_size", "n_embd", "d_model"):
            if isinstance(candidate.get(name), int):
                return int(candidate[name])
    raise InputError(
        f"the config of {config.get('model_type', 'this model')!r} has no hidden_size, so DeepSpeed cannot be sized.",
        to_fix="choose a sharding without DeepSpeed, or a config.json with hidden_size",
    )
