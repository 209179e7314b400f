"""How fast a device really computes, as a share of its data sheet. A missing figure stays missing."""

from __future__ import annotations

import statistics
from functools import cache
from importlib import resources
from typing import Literal

import msgspec
from msgspec import Struct

from autofit.spec.configuration import Configuration
from autofit.spec.hardware import Cluster, Device
from autofit.spec.profile import Regime
from autofit.timing.links import Fabric, fabric_of

ProductDtype = Literal["fp32", "tf32", "fp16", "bf16"]
"""What a matrix product multiplies in; it sums in fp32."""

DEVICE_DEVIATION = 0.0176
"""Standard deviation of the rates of equal devices, of which the slowest sets the pace of all.

Source: stas00/ml-engineering compute/accelerator, "not all accelerators are created equal": 5 % and more between the
fastest and the slowest of a node's eight, which is 2.85 deviations.
"""
ACHIEVABLE_MEMORY_FRACTION = 0.87
"""Share of the memory's data sheet that a large element by element kernel moves.

Source: mli/transformers-benchmarks, vector multiplication of the largest size: RTX 3090 Ti 860 of 1008 GB/s
(micro_bench.ipynb), A800 PCIe 1727 of 1935 (issue 4); the mean of 0.853 and 0.893.
"""
LAUNCH_SECONDS = 1.1e-5
"""What the host needs to issue one traced operation, so that a small step cannot go faster.

Source: measured, processor time of a training step of a Llama of 16 layers and 64 columns, which computes next to
nothing, over its traced operations (transformers 5.23, torch 2.13, one core of an EPYC): 7.3 us (LoRA), 8.7 (full),
11.4 and 13.7 (the same, recomputed); the middle. What the CUDA driver takes for a launch is not in it. On GPUs a
product of 128 rows, which is all launch, takes 3.2 us (RTX 4090) to 12.2 (A800): mli/transformers-benchmarks, issue 4.
"""
ARITHMETIC_SPREAD = (0.95, 1.10)
"""The shortest and the longest time over the expected one, as published rates differ.

Source: zzc0721/torch-performance-test-data, issues 79, 97, 108, 126, 140, 180 and 185 and pull request 15: the mean of
4,096, 8,192 and 10,240 rows over the best size, in half precision: 0.94 and 0.89 on A100 PCIe, 0.96 and 0.95 on H100,
0.95 twice on A40 and on A10G, 0.97 on V100, 0.93 and 0.98 on RTX 5090, 0.91 and 0.90 on A4000, 0.88 on P100. Their
bytes make it 0.92 on an A100 here and 0.89 on an H100 (`PassTime`); the measurements spread around those, up to 1.08.
mli/transformers-benchmarks README has 230 TFLOPS of an A100 SXM at 8,192 rows, which is 1.10 with its bytes apart. Two
cards are left out, as throttled: its RTX A6000 (95 of 123) and the first's issue 200, an RTX 5090 (179 of 234).
Attention is within 7 %, see below.
"""
MEMORY_SPREAD = (0.945, 1.02)
"""Source: those of `ACHIEVABLE_MEMORY_FRACTION`: 927 of 1008 GB/s at a smaller size, and 860."""
LAUNCH_SPREAD = (0.66, 1.25)
"""Source: the least and the most that were measured for `LAUNCH_SECONDS`; hooks of engines are within it."""
COLLECTIVE_SPREAD = (0.95, 1.4)
"""Source: tests/timing/test_links.py, predicted over measured bandwidth of nccl-tests, by size and device."""
FLASH_FRACTIONS: dict[tuple[int, int], float] = {
    (8, 0): 195 / 312,
    (9, 0): 335 / 989,
    (10, 0): 346 / 2250,
    (10, 3): 346 / 2250,
}
"""Share of the dense peak that FlashAttention-2 reaches, forward and backward, on long sequences; by capability.

Source: Dao-AILab/flash-attention README, speed with a causal mask and heads of 128 columns: A100 and H100, continued to
infinite length (`FLASH_RAMP_TOKENS`); flash-attention issue 1589, B200 (346 TFLOPS: version 2 does not know Blackwell).
"""
FLASH_OVER_PRODUCTS: dict[tuple[int, int], float] = dict.fromkeys(((8, 6), (8, 9), (12, 0)), 222 / 234)
"""The same as a share of what products reach, on chips whose tensor cores are slow for their other units.

There they bind attention too, so it follows the clock that products were measured at, which is above the data sheet's
on GeForce cards and below it on workstation cards. Source: pypi.org fastflash-attention 0.1.0, RTX 5090: FlashAttention
2.8.4 with a causal mask and heads of 128 columns takes 4.994, 18.497 and 70.931 ms for 4,096 to 16,384 tokens (217, 221
and 224 TFLOPS, continued to infinite length), where products reach 234. gpu-mode/ring-attention issue 10, RTX A5000:
78.6 TFLOPS with heads of 64, 0.87 of what products reach if those are as on an A4000 and A6000 (0.81 of 111.1).
"""
USUAL_FLASH_FRACTION = FLASH_FRACTIONS[8, 0]
"""Where the capability is not known, or newer than any measured."""
EFFICIENT_FRACTIONS: dict[tuple[int, int], float] = {(9, 0): 140 / 989}
USUAL_EFFICIENT_FRACTION = 95 / 312
"""The same of the memory-efficient kernel.

Source: as above, `xformers` on an A100. For an H100 its chart has FlashAttention 1 instead, made for Ampere likewise.
"""
_FLEX_PACE = {(8, 0): (0.90, 0.85), (9, 0): (1.25, 1.03)}
_BACKWARD_TO_FORWARD_FLOPS = 2.5
FLEX_FRACTIONS: dict[tuple[int, int], float] = {
    capability: (1 + _BACKWARD_TO_FORWARD_FLOPS) / (1 / forward + _BACKWARD_TO_FORWARD_FLOPS / backward)
    for capability, (forward, backward) in _FLEX_PACE.items()
}
"""Rate of compiled flex_attention over FlashAttention-2's, forward and backward together; by capability.

Source: pytorch.org/blog/flexattention: on an A100 with a causal mask 90 % of FlashAttention-2 forward and 85 %
backward; pytorch.org/blog/pytorch-at-gtc, abstract of the session on FlexAttention: on an H100 25 % faster forward
and 3 % backward. Backward has 2.5 times the FLOPs. Of other chips nothing is published: as on an A100.
"""
USUAL_FLEX_FRACTION = FLEX_FRACTIONS[8, 0]
"""Where the capability is not known, or is of none of them."""
FLASH_RAMP_TOKENS = 512
"""Under a causal mask a sequence of s tokens takes (s + this) / s of what its half square would.

Blocks on the diagonal are computed whole, and short rows fill few multiprocessors. Source: the same figures, all twelve
of each GPU: A100, 99 133 155 173 182 189 TFLOPS from 512 to 16,384 tokens, are 195 s / (s + 512) within 4 %; H100,
163 221 265 294 308 328, are 335 s / (s + 512) within 3 %.
"""
WHOLE_SQUARE_RAMP_TOKENS = 170
"""The same without a causal mask. Source: as above, 248 294 320 326 335 338 TFLOPS on an H100."""
EFFICIENT_RAMP_TOKENS = 330
"""Source: as above, xformers with a causal mask on an A100: 58 72 82 87 91 92 TFLOPS."""


class MeasuredRate(Struct, frozen=True, kw_only=True):
    """What the best of square matrix products reached on one device, and its data sheet."""

    device: str
    """A catalogue name, or what several of them begin with."""
    measured_tflops: dict[ProductDtype, float]
    datasheet_tflops: dict[ProductDtype, float]


class MeasuredRates(Struct, frozen=True, kw_only=True):
    """The devices that somebody measured."""

    source: str
    rates: tuple[MeasuredRate, ...]


@cache
def measured_rates() -> MeasuredRates:
    """Read the measured rates that ship with autofit."""
    text = resources.files("autofit.timing").joinpath("data/matmul_rates.json").read_bytes()
    return msgspec.json.decode(text, type=MeasuredRates)


class Rates(Struct, frozen=True, kw_only=True):
    """What a step's work is divided by. None: not known for this device."""

    matmul_flops_per_second: float | None
    fp32_flops_per_second: float | None
    """Of products that stay in fp32 beside those in half precision."""
    attention_flops_per_second: float | None
    """Of a fused attention kernel."""
    memory_bytes_per_second: float | None
    host_bytes_per_second: float | None
    """Over the link to the host's memory, one direction."""
    fabric: Fabric
    launch_seconds: float


def rates_of(regime: Regime, cluster: Cluster, *, tf32: bool = False, num_devices: int = 1) -> Rates:
    """Return what a regime's operations run at on the slowest of so many devices of a cluster."""
    device, dtype = cluster.device, product_dtype(regime, tf32=tf32)
    slowest = slowest_fraction(num_devices)
    return Rates(
        matmul_flops_per_second=_scaled(matmul_flops_per_second(device, dtype), slowest),
        fp32_flops_per_second=_scaled(matmul_flops_per_second(device, "tf32" if tf32 else "fp32"), slowest),
        attention_flops_per_second=_scaled(attention_flops_per_second(regime, device, dtype), slowest),
        memory_bytes_per_second=_scaled(device.memory_bytes_per_second, ACHIEVABLE_MEMORY_FRACTION),
        host_bytes_per_second=device.host_bytes_per_second,
        fabric=fabric_of(cluster),
        launch_seconds=LAUNCH_SECONDS,
    )


@cache
def slowest_fraction(num_devices: int) -> float:
    """Return the rate of the slowest of so many devices over that of an average one, as it is expected.

    Source: Blom 1958, the expected extreme of so many draws from a normal distribution.
    """
    if num_devices == 1:
        return 1.0
    deviations = statistics.NormalDist().inv_cdf((num_devices - 0.375) / (num_devices + 0.25))
    return 1 - DEVICE_DEVIATION * deviations


def nominal_rates(cluster: Cluster) -> Rates:
    """Return the rates of a device nobody has, to order configurations where a real rate is missing.

    Only the ratios count. Source: assumed, orders of magnitude of a server's CPU core. No figure made with them is
    ever shown as a time.
    """
    return Rates(
        matmul_flops_per_second=1e11,
        fp32_flops_per_second=1e11,
        attention_flops_per_second=1e11,
        memory_bytes_per_second=1e10,
        host_bytes_per_second=1e10,
        fabric=Fabric(
            num_devices_per_node=cluster.num_devices_per_node,
            within_bytes_per_second=1e9,
            between_bytes_per_second=1e9,
            is_switched=False,
        ),
        launch_seconds=LAUNCH_SECONDS,
    )


def product_dtype(regime: Regime, *, tf32: bool = False) -> ProductDtype:
    """Return what a regime's matrix products multiply in.

    fp32 means without tensor cores: torch allows TF32 only where a script asks for it.
    Source: torch/backends/cuda/__init__.py; transformers/training_args.py (`tf32` defaults to None, torch's default).
    """
    half: dict[str, ProductDtype] = {"bfloat16": "bf16", "float16": "fp16"}
    if regime.autocast != "no":
        return regime.autocast
    return half.get(regime.weights_dtype, "tf32" if tf32 else "fp32")


def peak_flops_per_second(device: Device, dtype: ProductDtype) -> float | None:
    """Return the data sheet's dense peak."""
    return {
        "bf16": device.bf16_flops_per_second,
        "fp16": device.fp16_flops_per_second,
        "tf32": device.tf32_flops_per_second,
        "fp32": device.fp32_flops_per_second,
    }[dtype]


def matmul_flops_per_second(device: Device, dtype: ProductDtype) -> float | None:
    """Return the rate of the best size: the peak times the share of it that was measured on this device.

    Other sizes are slower by the time that their bytes take (`PassTime`).
    """
    return _scaled(peak_flops_per_second(device, dtype), matmul_fraction(device.name, dtype))


@cache
def matmul_fraction(device_name: str, dtype: ProductDtype) -> float:
    """Return the share of the dense peak that large products reach on a device.

    Where nobody has published it: the median over the devices that somebody measured. It may be above 1: GeForce cards
    run above the clock that their data sheets count with.
    """
    for row in measured_rates().rates:
        if device_name.startswith(row.device) and dtype in row.measured_tflops:
            return row.measured_tflops[dtype] / row.datasheet_tflops[dtype]
    return statistics.median(
        row.measured_tflops[dtype] / row.datasheet_tflops[dtype]
        for row in measured_rates().rates
        if dtype in row.measured_tflops
    )


def attention_flops_per_second(regime: Regime, device: Device, dtype: ProductDtype) -> float | None:
    """Return the rate of the fused attention kernel that a regime runs."""
    peak = peak_flops_per_second(device, dtype)
    capability = device.compute_capability or (0, 0)
    if runs_efficient_attention(regime):
        return _scaled(peak, EFFICIENT_FRACTIONS.get(capability, USUAL_EFFICIENT_FRACTION))
    flash = _scaled(peak, FLASH_FRACTIONS.get(capability, USUAL_FLASH_FRACTION))
    if capability in FLASH_OVER_PRODUCTS:
        flash = _scaled(matmul_flops_per_second(device, dtype), FLASH_OVER_PRODUCTS[capability])
    if regime.attention == "flex_attention":
        return _scaled(flash, FLEX_FRACTIONS.get(capability, USUAL_FLEX_FRACTION))
    return flash


def runs_efficient_attention(regime: Regime) -> bool:
    """Tell whether sdpa falls back to the memory-efficient kernel: without flash, or with a mask."""
    if regime.attention != "sdpa":
        return False
    return not regime.flash_kernel or regime.sdpa_kernel == "efficient" or regime.batching != "equal"


def missing_figures(configuration: Configuration, rates: Rates, cluster: Cluster) -> tuple[str, ...]:
    """Name the figures that a configuration's time needs and no source gives, each with its key in --gpus."""
    uses_host = configuration.optim.startswith("paged") or configuration.offload != "none"
    needed = (
        (rates.matmul_flops_per_second, "rate of matrix products in this precision (bf16_tflops, fp16_tflops ...)"),
        (rates.memory_bytes_per_second, "memory bandwidth (bandwidth_gb_s)"),
        (configuration.num_processes == 1 or rates.fabric.is_known, _missing_link(cluster)),
        (
            not (uses_host or configuration.checkpoint_offload) or rates.host_bytes_per_second,
            "bandwidth to the host (host_gb_s)",
        ),
    )
    return tuple(words for known, words in needed if not known)


def _missing_link(cluster: Cluster) -> str:
    between_nodes = cluster.num_nodes > 1 and cluster.inter_node_bytes_per_second is None
    return "bandwidth between nodes (inter_node_gb_s)" if between_nodes else "bandwidth between devices (peer_gb_s)"


def _scaled(rate: float | None, fraction: float) -> float | None:
    return None if rate is None else rate * fraction


def known(rate: float | None) -> float:
    """Return a rate that `missing_figures` has found to be there."""
    assert rate is not None, "a missing figure is refused before any time is computed"
    return rate
