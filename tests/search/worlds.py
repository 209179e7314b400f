"""Jobs, clusters and made-up models to search in: small, adversarial, and without a tracer."""

from __future__ import annotations

import random
from typing import Any

from msgspec.structs import replace

from autofit.search import required_regimes
from autofit.spec.estimate import MemoryEstimate, Phase
from autofit.spec.hardware import Cluster, Device
from autofit.spec.job import Job, Model, Restrictions, Workload
from autofit.spec.profile import ProfileSet, Regime, RegimeProfile, StaticTensor
from autofit.units import GIB
from tests.plans import TINY_LLAMA
from tests.timing.hand_profiles import a_profile, a_segment, constant, per_token

GPU = Device(
    name="by-hand-80G",
    kind="cuda",
    memory_bytes=80 * GIB,
    compute_capability=(8, 0),
    computes_bf16=True,
    bf16_flops_per_second=312e12,
    fp16_flops_per_second=312e12,
    fp32_flops_per_second=19.5e12,
    memory_bytes_per_second=2e12,
    peer_bytes_per_second=300e9,
    host_bytes_per_second=32e9,
    dollars_per_hour=2.0,
)
OLD_GPU = replace(GPU, name="by-hand-old", compute_capability=(7, 5), computes_bf16=False, bf16_flops_per_second=None)
CPU = Device(name="CPU-8G", kind="cpu", memory_bytes=8 * GIB)


def a_job(global_batch: int = 8, sequence_tokens: int = 512, **restrictions: Any) -> Job:
    """Return a job on the tiny Llama."""
    return Job(
        model=Model(name="tiny-llama", config=TINY_LLAMA, origin="folder"),
        workload=Workload(sequence_tokens=sequence_tokens, global_batch_sequences=global_batch),
        restrictions=Restrictions(**restrictions),
    )


def a_cluster(num_devices: int = 2, device: Device = GPU, **changes: Any) -> Cluster:
    """Return one node of equal devices."""
    return Cluster(device=device, num_devices_per_node=num_devices, **changes)


def made_up_profile(regime: Regime) -> RegimeProfile:
    """Return a profile whose work depends on the regime as a real model's does: checkpointing recomputes, and so on."""
    recomputed = 4 / 3 if regime.gradient_checkpointing else 1.0
    flops = recomputed * {"full": 6e9, "lora": 4.2e9, "qlora": 4.3e9}[regime.method]
    other = recomputed * (4e5 if regime.autocast == "no" else 6e5)
    segment = a_segment(
        matmul_flops=per_token(flops), matmul_bytes=constant(2e9), other_bytes=per_token(other), num_kernels=500
    )
    return a_profile(segments=(segment,), regime=regime, tensors=_tensors(regime))


def _tensors(regime: Regime) -> tuple[StaticTensor, ...]:
    base = StaticTensor(
        name="base",
        num_elements=1_000_000_000,
        dtype=regime.weights_dtype,
        trains=regime.method == "full",
        repeats=False,
        kind="parameter",
    )
    adapter = replace(
        base, name="lora", num_elements=10_000_000, dtype=regime.adapter_dtype, trains=True, kind="adapter"
    )
    return (base,) if regime.method == "full" else (base, adapter)


def profiles_for(job: Job, cluster: Cluster) -> ProfileSet:
    """Return a made-up profile of every code path that a search needs."""
    return {regime: made_up_profile(regime) for regime in required_regimes(job, cluster)}


def an_estimate(needed_bytes: int, budget_bytes: int) -> MemoryEstimate:
    """Return an estimate of one phase with two terms."""
    phase = Phase(
        name="backward", bytes=needed_bytes, terms={"weights": needed_bytes // 3, "activations": needed_bytes}
    )
    return MemoryEstimate(
        peak_allocated_bytes=needed_bytes,
        peak_reserved_bytes=None,
        process_bytes=None,
        after_step_allocated_bytes=needed_bytes // 2,
        host_bytes=None,
        budget_bytes=budget_bytes,
        phases=(phase,),
    )


class RandomMemory:
    """Gives every configuration an arbitrary amount of memory, always the same one."""

    def __init__(self, seed: int, highest_bytes: int) -> None:
        self.seed, self.highest_bytes = seed, highest_bytes

    def __call__(self, profile, configuration, cluster, workload, *, replays=False):
        """Estimate by lot."""
        lot = random.Random(f"{self.seed} {configuration}")  # noqa: S311
        return an_estimate(lot.randint(1, self.highest_bytes), cluster.device.memory_bytes)


class FragmentedMemory(RandomMemory):
    """The same, and up to a third more as the allocator lays it out."""

    def __call__(self, profile, configuration, cluster, workload, *, replays=False):
        """Estimate by lot, and by a second one when replayed."""
        plain = super().__call__(profile, configuration, cluster, workload)
        lot = random.Random(f"{self.seed} laid out {configuration}")  # noqa: S311
        needed = int(plain.needed_bytes * lot.uniform(1, 4 / 3)) if replays else plain.needed_bytes
        return an_estimate(needed, cluster.device.memory_bytes)


class PlausibleMemory:
    """Sixteen bytes a parameter shared as ZeRO shares them, and activations by micro-batch and length."""

    def __init__(self, num_params: int) -> None:
        self.num_params = num_params

    def __call__(self, profile, configuration, cluster, workload, *, replays=False):
        """Estimate by the rule of thumb."""
        frozen, trained = {"full": (0, 16), "lora": (2, 0.2), "qlora": (0.6, 0.2)}[configuration.method]
        shards = configuration.num_processes
        kept = {"none": 1, "ddp": 1.3, "zero1": 0.4, "zero2": 0.3, "zero3": 1 / shards}[configuration.sharding]
        weights = frozen / (shards if configuration.sharding == "zero3" else 1)
        state = 0.8 if "8bit" in configuration.optim else 1.0
        tokens = configuration.per_device_train_batch_size * workload.sequence_tokens
        activations = tokens * (2**16 if configuration.gradient_checkpointing else 2**20)
        needed = int(self.num_params * (weights + trained * kept * state) + activations)
        return an_estimate(needed, cluster.device.memory_bytes)
