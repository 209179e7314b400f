"""Real launches with FSDP on two CPU ranks: accelerate's own wrapping, over gloo, and what each rank then holds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from autofit.launch import launch
from autofit.memory.assemble import estimate_memory
from autofit.profile.trace import trace
from autofit.spec.configuration import Configuration, Quantization
from autofit.spec.regimes import regime_of
from tests.plans import CPU_RANK, TINY_LLAMA, a_configuration, a_plan
from tests.scripts import TRAIN_SCRIPT

pytestmark = pytest.mark.slow

PRETENDING_GPUS = Path(__file__).parents[2] / "benchmarks" / "cpu_fsdp"
NUM_TOKENS = 128
HELD_BY_THE_LOOP_BYTES = 2**14
"""Token ids, labels and losses of the last step, which the loop still names when the step is over."""
LLAMA = TINY_LLAMA | {"hidden_size": 128, "intermediate_size": 352, "vocab_size": 2000, "num_hidden_layers": 4}
SCRIPT = TRAIN_SCRIPT.replace("(32,)", f"({NUM_TOKENS},)")
SCRIPT_WITHOUT_SAVING = SCRIPT.replace("trainer.save_model()", "")
"""FSDP1 collects a full state dict on the first rank's host through CUDA: on a CPU the rank dies."""
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "fsdp2": {"sharding": "fsdp2", "gradient_checkpointing": True},
    "fsdp1": {"sharding": "fsdp1", "gradient_accumulation_steps": 1},
    "fsdp2 offloaded": {"sharding": "fsdp2", "offload": "optimizer_and_parameters"},
    "fsdp2 qlora": {
        "sharding": "fsdp2",
        "method": "qlora",
        "quantization": Quantization(storage_dtype="bfloat16"),
    },
}
HELD_BY_GLOO_BYTES = LLAMA["vocab_size"] * LLAMA["hidden_size"] * 2
"""The largest weight in bf16: a collective's tensors die when gloo's thread drops them, a moment after `wait` returned.

Source: torch 2.13, torch/csrc/distributed/c10d/ProcessGroupGloo.cpp, `runLoop`, whose `work` lives until the lock is
taken again. Of twelve launches of "fsdp2 qlora", seven ended with one rank 0.4 or 0.5 MB above the other, never below.
"""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small Llama on disk, whose weights are not drowned by what a step takes besides."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_plan_is_in_effect_and_holds_what_was_predicted(
    name: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run passes its own verification (version, layers, groups, checkpoints), and each rank's peak is the estimate.

    Within 1 %: between the predicted and the counted bytes of live tensor storages, peak and between two steps. A
    rank's peak may be higher by what gloo's thread still holds. What is offloaded lies where the device's memory does,
    and nothing is copied between the two: there no figure is compared.
    """
    monkeypatch.setenv("PYTHONPATH", str(PRETENDING_GPUS))
    configuration = a_configuration(**CONFIGURATIONS[name])
    script = tmp_path / "train.py"
    saves = configuration.sharding == "fsdp2"
    script.write_text(SCRIPT if saves else SCRIPT_WITHOUT_SAVING)
    outcome = launch(
        a_plan(configuration, config=LLAMA, sequence_tokens=NUM_TOKENS),
        tmp_path / "run",
        script,
        [str(model_folder), str(tmp_path / "out")],
        stream=io.BytesIO(),
    )
    ranks = outcome.summary["memory"]["ranks"]
    predicted = estimate(configuration)
    assert len(ranks) == 2
    if configuration.offload != "none":
        return
    peaks_bytes = sorted(rank["peak_bytes"] for rank in ranks)
    assert peaks_bytes[0] >= 0.99 * predicted.peak_allocated_bytes
    assert peaks_bytes[-1] <= 1.01 * predicted.peak_allocated_bytes + HELD_BY_GLOO_BYTES
    after = max(rank["after_step_bytes"] for rank in ranks)
    assert predicted.after_step_allocated_bytes == pytest.approx(after, rel=0.01, abs=HELD_BY_THE_LOOP_BYTES)
    assert not saves or saved_parameters(tmp_path / "out") > 0


def estimate(configuration: Configuration) -> Any:
    """Estimate a configuration of the small model, traced as it is."""
    plan = a_plan(configuration, config=LLAMA, sequence_tokens=NUM_TOKENS)
    profile = trace("small", LLAMA, regime_of(configuration, CPU_RANK))
    return estimate_memory(profile, configuration, plan.inputs.cluster, plan.inputs.job.workload)


def saved_parameters(folder: Path) -> int:
    """Count the tensors of what the script saved: a full state dict, or `save_model` would have written none."""
    from safetensors import safe_open

    file = next(folder.glob("*.safetensors"))
    with safe_open(file, "pt") as saved:
        return len(list(saved.keys()))
