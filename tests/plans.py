"""Plans made by hand, for tests of what is a function of a plan."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from msgspec.structs import replace

from autofit.plan import Inputs, Plan, Rung
from autofit.sources.lengths import length_bins
from autofit.sources.models import resolve_model
from autofit.sources.profiles import SHIPPED_FOLDER, pack_name, read_pack
from autofit.spec.configuration import Configuration, Lora, Quantization
from autofit.spec.estimate import CostEstimate, MemoryEstimate, TimeEstimate
from autofit.spec.hardware import Cluster, Device
from autofit.spec.job import Job, Model, Restrictions, Workload
from autofit.spec.lengths import LengthDistribution, LengthPercentile
from autofit.spec.libraries import installed_versions
from autofit.spec.profile import RegimeProfile
from autofit.units import GIB

TINY_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
CPU_RANK = Device(name="CPU-8G", kind="cpu", memory_bytes=8 * GIB)
A100 = Device(
    name="A100-SXM-80G", kind="cuda", memory_bytes=85_094_825_984, compute_capability=(8, 0), computes_bf16=True
)


def a_configuration(**changes: Any) -> Configuration:
    """Full fine-tuning in bf16 on two DDP ranks, with what is given changed; an adapter where the method has one."""
    method = changes.get("method", "full")
    values: dict[str, Any] = {
        "method": method,
        "quantization": Quantization() if method == "qlora" else None,
        "lora": None if method == "full" else Lora(r=8, lora_alpha=16),
        "optim": "adamw_torch_fused",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_processes": 2,
        "gradient_checkpointing": False,
        "sharding": "ddp",
        "weights_dtype": "float32" if method == "full" else "bfloat16",
        "mixed_precision": "bf16",
        "attention": "sdpa",
    }
    return Configuration(**values | changes)


def a_plan(
    configuration: Configuration | None = None,
    *,
    device: Device = CPU_RANK,
    config: dict[str, Any] | None = None,
    model_name: str = "tiny-llama",
    sequence_tokens: int = 32,
    script: str | None = None,
    budget_bytes: int | None = None,
    peak_allocated_bytes: int = 10_000_000,
    fallbacks: tuple[Configuration, ...] = (),
) -> Plan:
    """Wrap one configuration in the smallest plan that is valid."""
    configuration = configuration or a_configuration()
    workload = Workload(sequence_tokens=sequence_tokens, global_batch_sequences=configuration.global_batch_sequences)
    return Plan(
        inputs=Inputs(
            job=Job(
                model=Model(name=model_name, config=config or TINY_LLAMA, origin="folder"),
                workload=workload,
                restrictions=Restrictions(),
                script=script,
            ),
            cluster=Cluster(device=device, num_devices_per_node=configuration.num_processes),
            profile_key="by hand",
        ),
        configuration=configuration,
        memory=MemoryEstimate(
            peak_allocated_bytes=peak_allocated_bytes,
            peak_reserved_bytes=None,
            process_bytes=None,
            after_step_allocated_bytes=peak_allocated_bytes // 2,
            host_bytes=None,
            budget_bytes=budget_bytes or device.memory_bytes,
            phases=(),
        ),
        time=TimeEstimate(
            step_seconds=None,
            step_seconds_lower=None,
            step_seconds_upper=None,
            tokens_per_second=None,
            tokens_per_second_lower=None,
            tokens_per_second_upper=None,
            terms={},
        ),
        cost=CostEstimate(
            dollars_per_million_tokens=None, device_hours_per_million_tokens=None, dollars_per_device_hour=None
        ),
        fallbacks=tuple(
            Rung(
                configuration=fallback,
                peak_allocated_bytes=peak_allocated_bytes // (2 + rank),
                needed_bytes=peak_allocated_bytes // (2 + rank),
                step_seconds=None,
            )
            for rank, fallback in enumerate(fallbacks)
        ),
        alternatives=(),
        reasons=("made by hand",),
        versions={"transformers": "5.23.0"},
    )


def with_script(plan: Plan, script: str) -> Plan:
    """Return the plan of the same job started from a script."""
    job = replace(plan.inputs.job, script=script)
    return replace(plan, inputs=replace(plan.inputs, job=job))


def with_script_settings(plan: Plan, settings: dict[str, str]) -> Plan:
    """Return the plan of the same job, of a script that does by itself what is given."""
    job = replace(plan.inputs.job, script_settings=settings)
    return replace(plan, inputs=replace(plan.inputs, job=job))


def a_distribution(lengths: Iterable[int], **changes: Any) -> LengthDistribution:
    """Return the distribution of lengths, all of them measured."""
    measured = np.array(sorted(lengths))
    values: dict[str, Any] = {
        "path": "data.jsonl",
        "read_as": "column length",
        "tokenizer": None,
        "num_sequences": len(measured),
        "num_measured_sequences": len(measured),
        "mean_tokens": float(measured.mean()),
        "mean_interval_tokens": None,
        "max_tokens": int(measured.max()),
        "percentiles": tuple(
            LengthPercentile(fraction=share, tokens=int(np.quantile(measured, share, method="inverted_cdf")))
            for share in (0.5, 0.95, 0.99)
        ),
        "bins": length_bins(measured),
    }
    return LengthDistribution(**values | changes)


def shipped_profiles(model: str) -> tuple[RegimeProfile, ...]:
    """Return the shipped profiles of a model under the installed libraries."""
    return read_pack(SHIPPED_FOLDER / pack_name(resolve_model(model).config, installed_versions()))
