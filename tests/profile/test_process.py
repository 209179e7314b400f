"""`python -m autofit.profile`, as the planner starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from autofit.errors import InputError
from autofit.sources.profiles import trace_in_subprocess
from autofit.spec.configuration import Lora
from autofit.spec.job import Model
from autofit.spec.profile import RegimeProfile
from tests.profile.tiny import CONFIGS, a_regime


def answers_to(config: dict[str, Any], *regimes: Any, hash_seed: str = "random") -> list[Any]:
    """Send one request to a process whose strings are hashed with a seed; return the decoded answers."""
    request = msgspec.json.encode({"model": "tiny", "config": config, "regimes": regimes, "sequence_tokens": 1024})
    child = subprocess.run(
        [sys.executable, "-m", "autofit.profile"],
        input=request,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": hash_seed},
        check=True,
    )
    return [json.loads(line) for line in child.stdout.splitlines()]


@pytest.mark.slow
def test_every_regime_is_answered_in_order_also_after_one_that_fails():
    """A regime that cannot be traced is answered with an error, and the next one with its profile."""
    unknown, good = a_regime(method="lora", lora=Lora(target_modules=("no_such_proj",))), a_regime()
    refused, answered = answers_to(CONFIGS["gpt2"], unknown, good)
    assert "no_such_proj" in refused["error"]["message"]
    assert msgspec.convert(answered, RegimeProfile).regime == good


@pytest.mark.slow
def test_a_tape_is_the_same_in_every_process():
    """Gemma 3 goes through a set of its kinds of layers, whose order depends on the seed of strings' hashes."""
    config = {**CONFIGS["llama"], "model_type": "gemma3_text", "head_dim": 32, "sliding_window": 64}
    config |= {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    orders = {seed: _order_of_kinds(config["layer_types"], seed) for seed in ("1", "2", "3", "4")}
    seeds = {order: seed for seed, order in orders.items()}
    assert len(seeds) == 2
    one, other = (answers_to(config, a_regime(), hash_seed=seed)[0] for seed in seeds.values())
    assert "error" not in one
    assert one == other


def _order_of_kinds(kinds: list[str], hash_seed: str) -> str:
    """Tell in which order a process goes through a set of strings."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    return subprocess.check_output([sys.executable, "-c", f"print(*set({kinds}))"], env=environment, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({"hidden_size": 127}, "127"),
        ({"num_attention_heads": 0}, "llama"),
        ({"vocab_size": "many"}, ""),
    ],
)
def test_a_broken_config_is_answered_with_what_to_do(change, said):
    """Whatever a library raises while it builds or runs the model arrives as a message and a remedy."""
    (answer,) = answers_to({**CONFIGS["llama"], **change}, a_regime())
    assert said in answer["error"]["message"]
    assert answer["error"]["to_fix"]
    assert "Traceback" not in answer["error"]["message"]


@pytest.mark.slow
def test_the_planner_raises_what_the_tracer_answers():
    """An error of the process is an InputError of the caller."""
    model = Model(name="tiny", config={"model_type": "no_such_model"}, origin="config file")
    with pytest.raises(InputError, match="no_such_model"):
        trace_in_subprocess(model, [a_regime()], sequence_tokens=1024)
