"""Fixtures that every folder of tests uses: a few models and clusters, a whole plan, and paths that break quoting."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autofit.plan import Inputs, Plan, Rung
from autofit.spec.configuration import Configuration, Lora
from autofit.spec.estimate import CostEstimate, MemoryEstimate, Phase, TimeEstimate
from autofit.spec.hardware import Cluster, Device
from autofit.spec.job import Job, Model, Restrictions, Workload
from autofit.units import GIB

STARTING_RANKS = (
    "tests/launch/",
    "tests/measurements/test_real_stack.py",
    "tests/search/test_rules_hold.py",
    "tests/cli/test_scripts.py",
    "tests/cli/test_pipeline.py",
)
"""Tests that start several processes of training: one worker runs them all, one after the other."""


def pytest_configure(config: pytest.Config) -> None:
    """Keep traced profiles of this run apart: one that an older tracer left in the user's cache would be believed."""
    if not hasattr(config, "workerinput"):
        os.environ["AUTOFIT_CACHE"] = tempfile.mkdtemp(prefix="autofit-test-cache-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what this run traced."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["AUTOFIT_CACHE"], ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file to one worker of `pytest -n`, for its fixtures, and all that starts ranks to one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "starting ranks" if file.startswith(STARTING_RANKS) else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, asking torch only if such a test was collected."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Undo what libraries write into the environment: accelerate's plugin turns DeepSpeed on for all later."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def weird_tmp_path(tmp_path: Path) -> Path:
    """Return a folder whose name has a blank, both quotes, a dollar sign and a newline."""
    folder = tmp_path / "a b'c\"d$e\nf"
    folder.mkdir()
    return folder


@pytest.fixture
def llama() -> Model:
    """Return a two-layer Llama that any machine can build."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 256,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    return Model(name="tiny-llama", config=config, origin="config file", num_params=None)


@pytest.fixture
def a100_pair() -> Cluster:
    """Return two A100s in one node, with their datasheet rates."""
    device = Device(
        name="A100-SXM-80G",
        kind="cuda",
        memory_bytes=85_097_971_712,
        compute_capability=(8, 0),
        computes_bf16=True,
        bf16_flops_per_second=312e12,
        fp16_flops_per_second=312e12,
        fp32_flops_per_second=19.5e12,
        memory_bytes_per_second=2039e9,
        peer_bytes_per_second=300e9,
        host_bytes_per_second=32e9,
        dollars_per_hour=1.20,
    )
    return Cluster(device=device, num_devices_per_node=2)


@pytest.fixture
def lora_configuration() -> Configuration:
    """Return LoRA with ZeRO-2 on two processes, global batch 64."""
    return Configuration(
        method="lora",
        quantization=None,
        lora=Lora(),
        optim="adamw_torch_fused",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=8,
        num_processes=2,
        gradient_checkpointing=True,
        sharding="zero2",
        weights_dtype="bfloat16",
        mixed_precision="bf16",
        attention="sdpa",
    )


@pytest.fixture
def plan(llama: Model, a100_pair: Cluster, lora_configuration: Configuration) -> Plan:
    """Return a plan with every kind of content: alternatives, fallbacks, reasons, and figures that are not known."""
    terms = {"weights": 16 * GIB, "gradients": GIB // 2, "optimizer_state": GIB, "activations": 20 * GIB}
    phases = (
        Phase(name="forward", bytes=30 * GIB, terms={**terms, "activations": 30 * GIB - 35 * GIB // 2}),
        Phase(name="backward", bytes=75 * GIB // 2, terms=terms),
        Phase(name="optimizer step", bytes=35 * GIB // 2, terms={**terms, "activations": 0}),
    )
    smaller = _with(lora_configuration, per_device_train_batch_size=2, gradient_accumulation_steps=16)
    full = _with(
        lora_configuration,
        method="full",
        lora=None,
        sharding="zero3",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=32,
    )
    return Plan(
        inputs=Inputs(
            job=Job(
                model=llama,
                workload=Workload(sequence_tokens=4096, global_batch_sequences=64),
                restrictions=Restrictions(),
            ),
            cluster=a100_pair,
            profile_key="llama-0000",
        ),
        configuration=lora_configuration,
        memory=MemoryEstimate(
            peak_allocated_bytes=75 * GIB // 2,
            peak_reserved_bytes=40 * GIB,
            process_bytes=41 * GIB,
            after_step_allocated_bytes=35 * GIB // 2,
            host_bytes=None,
            budget_bytes=85_097_971_712,
            phases=phases,
        ),
        time=TimeEstimate(
            step_seconds=20.0,
            step_seconds_lower=15.0,
            step_seconds_upper=25.0,
            tokens_per_second=64 * 4096 / 20.0,
            tokens_per_second_lower=64 * 4096 / 25.0,
            tokens_per_second_upper=64 * 4096 / 15.0,
            terms={"matmul": 18.0, "communication": 2.0},
            model_flops_utilization_fraction=0.42,
        ),
        cost=CostEstimate(
            dollars_per_million_tokens=2 * 1.20 * 20.0 / 3600 / (64 * 4096) * 1e6,
            device_hours_per_million_tokens=2 * 20.0 / 3600 / (64 * 4096) * 1e6,
            dollars_per_device_hour=1.20,
        ),
        fallbacks=(
            Rung(configuration=smaller, peak_allocated_bytes=30 * GIB, needed_bytes=33 * GIB, step_seconds=22.0),
        ),
        alternatives=(
            Rung(configuration=full, peak_allocated_bytes=70 * GIB, needed_bytes=75 * GIB, step_seconds=30.0),
        ),
        reasons=("LoRA is the cheapest per token of the methods allowed", "412 candidates: 10 fell to a rule"),
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
    )


def _with(configuration: Configuration, **changes: object) -> Configuration:
    from msgspec.structs import replace

    return replace(configuration, **changes)
