"""Processes that share sequences: what one of them computes and holds, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from autofit.errors import InputError
from autofit.memory.assemble import MemoryModel
from autofit.memory.engines import layout
from autofit.memory.limits import refuse_unmodelled
from autofit.memory.static import static_bytes
from autofit.memory.tensors import Tensor
from autofit.plan import Plan
from autofit.profile.trace import trace
from autofit.spec.profile import MONOMIALS, RegimeProfile
from autofit.writers import render_files
from tests.plans import a_configuration, a_plan
from tests.profile.tiny import CONFIGS, a_regime

TOKENS = 2048
PROFILES: dict[int, RegimeProfile] = {}


def shared_by(num_processes: int) -> RegimeProfile:
    """Trace one of so many processes, once."""
    if num_processes not in PROFILES:
        regime = a_regime(sequence_parallel_size=num_processes)
        PROFILES[num_processes] = trace("tiny", CONFIGS["llama"], regime, sequence_tokens=TOKENS)
    return PROFILES[num_processes]


def matmul_flops(profile: RegimeProfile, num_sequences: int) -> float:
    """Floating point operations of all products of a micro-step on one process."""
    b, s = profile.regime.rows(num_sequences, TOKENS)
    powers = [b**i * s**j for i, j in MONOMIALS]
    return sum(
        profile.repeats(segment) * sum(c * power for c, power in zip(segment.matmul_flops, powers, strict=True))
        for segment in profile.segments
    )


@pytest.mark.parametrize("num_processes", [2, 4])
def test_together_they_compute_what_one_would(num_processes: int) -> None:
    """A process has all tokens of its heads, and its tokens of everything else: nothing is computed twice or left out.

    Four processes share two heads of keys and values, which are then there twice and computed once.
    """
    alone, each = matmul_flops(shared_by(1), 2), matmul_flops(shared_by(num_processes), 2)
    assert num_processes * each == pytest.approx(alone, rel=1e-9)


def test_sequences_that_do_not_divide_are_refused() -> None:
    """DeepSpeed raises at the first batch ("isn't divisible by sp-size"); here nothing starts."""
    with pytest.raises(InputError, match="do not divide over 2 processes"):
        MemoryModel(shared_by(2), TOKENS + 1, (1,))


@pytest.mark.parametrize(
    ("config", "changes", "tokens", "problem"),
    [
        ({}, {"sequence_parallel_size": 8}, TOKENS, "not divisible by SP size 8"),
        ({"model_type": "mistral", "sliding_window": 1024}, {}, TOKENS, "beyond its window of 1,024"),
        ({"model_type": "bert"}, {"task": "masked-lm"}, 512, "shifted beforehand"),
        ({}, {"task": "sequence-classification"}, TOKENS, "shifted beforehand"),
    ],
)
def test_models_that_cannot_be_shared_are_refused(
    config: dict[str, Any], changes: dict[str, Any], tokens: int, problem: str
) -> None:
    """Heads that do not divide, a window that sdpa would not keep, and losses that need whole sequences."""
    regime = a_regime(**{"sequence_parallel_size": 2, **changes})
    with pytest.raises(InputError, match=problem):
        trace("tiny", CONFIGS["llama"] | config, regime, sequence_tokens=tokens)


def test_gradients_are_reduced_in_fp32() -> None:
    """Of shared sequences, a gradient too large for the bucket is copied in twice its bytes to be summed."""
    model = (Tensor(10_000, 2, trains=True, embeds=False, kind="parameter"),)
    plain, shared = (
        layout(
            a_configuration(sharding="zero2", sequence_parallel_size=size), model, static_bytes(model, "cpu"), 64, "cpu"
        )
        for size in (1, 2)
    )
    assert plain.reduction_fraction == 0
    assert shared.reduction_fraction == 2
    assert shared.reduction[0]["communication_buckets"] - plain.reduction[0]["communication_buckets"] == 4 * 10_000


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sharding": "ddp"}, "under ddp"),
        ({"attention": "eager"}, "with attention eager"),
        ({"offload": "optimizer", "optim": "adamw_torch"}, "with offload optimizer"),
        ({"batching": "padded"}, "of padded batches"),
    ],
)
def test_what_was_not_held_to_deepspeed_is_refused(changes: dict[str, Any], problem: str) -> None:
    """By name, before anything is traced."""
    with pytest.raises(InputError, match=f"sequence parallelism {problem}"):
        refuse_unmodelled(a_configuration(**{"sharding": "zero2", "sequence_parallel_size": 2, **changes}))


def test_such_a_plan_is_not_written(tmp_path: Any) -> None:
    """The files would start a run without it, silently."""
    plan: Plan = a_plan(a_configuration(sharding="zero2", sequence_parallel_size=2))
    with pytest.raises(InputError, match="not launched yet"):
        render_files(plan, tmp_path)
