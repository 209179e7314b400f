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


def answers_to(config: dict[str, Any], *regimes: Any) -> list[Any]:
    """Send one request; return the decoded answers."""
    request = msgspec.json.encode({"model": "tiny", "config": config, "regimes": regimes, "sequence_tokens": 1024})
    child = subprocess.run(
        [sys.executable, "-m", "autofit.profile"],
        input=request,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
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
