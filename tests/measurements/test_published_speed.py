"""How published speeds are read: no row is lost, and none is read as another model."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from autofit.errors import AutofitError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import published_speed  # noqa: E402 - benchmarks are scripts beside each other
import throughput  # noqa: E402

ROWS = [json.loads(line) for line in throughput.PUBLISHED.read_text(encoding="utf-8").splitlines()]
EXACT = [model for model in published_speed.speed_models() if model.num_params is not None]


def test_every_row_is_stated_or_refused_with_a_reason(tmp_path):
    """Of 233 rows 201 are stated, on as many devices as they ran on; every other one says why it is not."""
    stated, refused = [], []
    for row in ROWS:
        try:
            case = published_speed.state(row, tmp_path).case
        except (published_speed.RefusedError, AutofitError) as refusal:
            refused.append(str(refusal))
        else:
            assert case.configuration.num_processes == case.cluster.num_devices == row["gpus_count"]
            assert case.workload.sequence_tokens == row["seq_len"]
            stated.append(row["id"])
    assert all(refused)
    assert (len(stated), len(refused)) == (201, 32)


@pytest.mark.slow
@pytest.mark.parametrize("model", EXACT, ids=lambda model: model.names[0])
def test_models_have_the_published_number_of_parameters(model):
    """Built without memory, each has as many as its source says; OPT has two more rows of positions than MPT."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(model.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    more = 2 * config.hidden_size if config.model_type == "opt" else 0
    assert sum(p.numel() for p in built.parameters()) == model.num_params + more


@pytest.mark.parametrize(
    ("model", "loss"), [("mistralai/Mistral-7B-v0.1", "liger"), ("mistralai/Mixtral-8x7B-Instruct-v0.1", "stock")]
)
def test_fused_kernels_leave_experts_as_they_are(tmp_path, model, loss):
    """fms-acceleration's rules for Mixtral name norms, rotation, the loss and attention; Liger's fuse experts too."""
    row = next(row for row in ROWS if row["model"] == "mistralai/Mistral-7B-v0.1" and "=foak-fast" in row["notes"])
    stated = published_speed.state(row | {"model": model, "num_params": None}, tmp_path)
    assert stated.regime.loss == loss
    assert ("experts" in (stated.nearest or "")) == (loss == "stock")


def test_ranks_are_those_of_the_definition():
    """Equal values share the mean of their ranks; a reversed order is -1, and what does not vary has no order."""
    assert throughput.ranks([3.0, 1.0, 3.0]) == [2.5, 1.0, 2.5]
    assert throughput.spearman([1, 2, 3], [9, 5, 1]) == pytest.approx(-1)
    assert throughput.spearman([1, 1], [1, 2]) is None


def test_a_run_that_was_stopped_has_no_second_figure():
    """Of IBM's 29 rows 23 ran all of the 4,096 samples, and their two figures differ by less than 6 %."""
    twice = [(row, published_speed.second_speed(row)) for row in ROWS]
    ratios = [again / row["tokens_per_second_total"] for row, again in twice if again is not None]
    sources = {row["source"].split()[0] for row, again in twice if again is not None}
    assert (len(ratios), sources) == (23, {"atlarge-research/coastline-recommender"})
    assert max(abs(ratio - 1) for ratio in ratios) < 0.06


def test_a_run_that_was_stopped_contradicts_what_does_not_fit():
    """The other six of IBM's were stopped; of them only those contradict their row that need more than there is."""
    stopped = [row for row in ROWS if published_speed.was_stopped(row)]
    assert {row["id"] for row in stopped} == {"thr1962", "thr1963", "thr1968", "thr1973", "thr1978", "thr1993"}
    whole = next(row for row in ROWS if published_speed.second_speed(row) is not None)
    fits, over = (types.SimpleNamespace(needed_bytes=needed, budget_bytes=80) for needed in (80, 81))
    assert "needs more memory" in throughput.contradiction(stopped[0], over)
    assert throughput.contradiction(stopped[0], fits) is None
    assert throughput.contradiction(stopped[0], None) is None
    assert throughput.contradiction(whole, over) is None
