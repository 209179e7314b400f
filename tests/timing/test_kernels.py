"""The time of kernels, against products and attention that others measured on GPUs."""

from __future__ import annotations

import json
from importlib import resources

import numpy as np
import pytest

from autofit.sources.gpus import catalogue, device, find
from autofit.spec.hardware import Cluster
from autofit.timing.kernels import micro_step_time, micro_step_work, square_share
from autofit.timing.rates import (
    DEVICE_DEVIATION,
    attention_flops_per_second,
    matmul_fraction,
    rates_of,
    slowest_fraction,
)
from tests.timing.hand_profiles import a_profile, a_regime, a_segment, constant

HALF = a_regime(weights_dtype="bfloat16", autocast="no")


def measured_device(name):
    """Return a device of the catalogue."""
    return device(find(name, catalogue()))


def product_tflops(name, rows, columns, inner, dtype="bfloat16"):
    """Predict the rate of one product."""
    flops = 2.0 * rows * columns * inner
    moved = 2.0 * (rows * inner + inner * columns + rows * columns)
    profile = a_profile(
        segments=(a_segment(matmul_flops=constant(flops), matmul_bytes=constant(moved)),),
        regime=a_regime(weights_dtype=dtype, autocast="no"),
    )
    rates = rates_of(profile.regime, Cluster(device=measured_device(name), num_devices_per_node=1))
    return flops / micro_step_time(micro_step_work(profile), 1, 1, rates).forward.device_seconds / 1e12


@pytest.mark.parametrize(
    ("name", "rows", "columns", "inner", "tflops", "tolerance"),
    [
        ("A100-PCIe-80G", 2048, 2048, 2048, 192.5, 0.05),
        ("A100-PCIe-80G", 8192, 8192, 8192, 215.3, 0.05),
        ("RTX3090-24G", 2048, 2048, 2048, 71.5, 0.10),
        ("RTX3090-24G", 8192, 8192, 8192, 81.3, 0.12),
        ("RTX4090-24G", 8192, 8192, 8192, 158.6, 0.05),
        ("RTXA6000-48G", 8192, 8192, 8192, 95, 0.30),
        ("A100-SXM-80G", 8192, 8192, 8192, 230, 0.15),
        ("A100-SXM-80G", 2048, 2048, 2048, 233.0, 0.10),
        ("A100-SXM-80G", 3200, 3200, 3200, 244.3, 0.10),
        ("H100-SXM-80G", 2048, 2048, 2048, 515.2, 0.15),
        ("H100-SXM-80G", 2048, 4096, 4096, 613.7, 0.10),
        ("H100-SXM-80G", 2048, 8192, 8192, 721.6, 0.10),
        ("H100-SXM-80G", 10240, 10240, 10240, 719.7, 0.10),
    ],
)
def test_products_are_as_fast_as_measured(name, rows, columns, inner, tflops, tolerance):
    """Rates of half-precision products by shape.

    Source: mli/transformers-benchmarks (A800 PCIe, RTX 3090 Ti for the 3090, 4090, A6000, A100), triton-lang/triton
    issues 3551 (A100) and 2339 (H100), zzc0721/torch-performance-test-data issue 79 (H100, its largest).
    """
    assert product_tflops(name, rows, columns, inner) == pytest.approx(tflops, rel=tolerance)


def test_flat_products_are_bound_by_memory():
    """An adapter's product, 16 columns wide, runs at less than an eighth of a square one's rate."""
    assert product_tflops("A100-SXM-80G", 16384, 16, 4096) < product_tflops("A100-SXM-80G", 16384, 4096, 4096) / 8


CAUSAL = {
    "A100-SXM-80G": {512: 99, 1024: 133, 2048: 155, 4096: 173, 8192: 182, 16384: 189},
    "H100-SXM-80G": {512: 163, 1024: 221, 2048: 265, 4096: 294, 8192: 308, 16384: 328},
}


@pytest.mark.parametrize("name", CAUSAL)
def test_attention_is_as_fast_as_measured_at_every_length(name):
    """Dao-AILab/flash-attention README: forward and backward with a causal mask, heads of 128, half the square counted.

    All twelve figures within 7 %.
    """
    rate = attention_flops_per_second(HALF, measured_device(name), "bf16")
    for tokens, tflops in CAUSAL[name].items():
        predicted = rate / (2 * square_share(HALF, tokens, attends_causally=True)) / 1e12
        assert predicted == pytest.approx(tflops, rel=0.07), tokens


@pytest.mark.parametrize(("tokens", "milliseconds"), [(2048, 1.476), (4096, 4.994), (8192, 18.497), (16384, 70.931)])
def test_attention_follows_products_where_tensor_cores_bind_it(tokens, milliseconds):
    """FlashAttention-2 on an RTX 5090, forward and backward of 4 x 16 heads of 128 columns, causal: within 10 %.

    Source: pypi.org fastflash-attention 0.1.0. Seven products of the half square, two of them forward's.
    """
    flops = 7 * 4 * 16 * 128 * tokens**2
    rate = attention_flops_per_second(HALF, measured_device("RTX5090-32G"), "bf16")
    seconds = flops * 2 * square_share(HALF, tokens, attends_causally=True) / rate
    assert 1e3 * seconds == pytest.approx(milliseconds, rel=0.1)


def test_attention_on_a_workstation_card_is_below_its_data_sheet():
    """gpu-mode/ring-attention issue 10: 78.64 TFLOPS on an RTX A5000, 8,192 tokens without a mask, heads of 64 columns.

    We count heads of 128, which are a tenth faster (Dao-AILab/flash-attention README, A100); so 0 to 10 % above.
    """
    rate = attention_flops_per_second(HALF, measured_device("RTXA5000-24G"), "bf16")
    assert 1.0 < rate / square_share(HALF, 8192, attends_causally=False) / 78.64e12 < 1.1


@pytest.mark.parametrize("name", ["L4-24G", "L40S-48G", "RTX3090-24G", "RTX4090-24G"])
def test_attention_is_not_faster_than_products(name):
    """What a card's power allows of its tensor cores holds for attention too."""
    a_card = measured_device(name)
    reached = matmul_fraction(name, "bf16") * a_card.bf16_flops_per_second
    assert 0.8 * reached < attention_flops_per_second(HALF, a_card, "bf16") < reached


def test_attention_without_a_causal_mask_is_the_whole_square():
    """The same source, whole square: H100 248 294 320 326 335 338 TFLOPS, within 4 %."""
    rate = attention_flops_per_second(HALF, measured_device("H100-SXM-80G"), "bf16")
    for tokens, tflops in {512: 248, 1024: 294, 2048: 320, 4096: 326, 8192: 335, 16384: 338}.items():
        predicted = rate / square_share(HALF, tokens, attends_causally=False) / 1e12
        assert predicted == pytest.approx(tflops, rel=0.04), tokens


def test_the_memory_efficient_kernel_has_its_own_pace():
    """The same source, xformers with a causal mask on an A100: 58 72 82 87 91 92 TFLOPS, within 2 %."""
    efficient = a_regime(sdpa_kernel="efficient")
    rate = attention_flops_per_second(efficient, measured_device("A100-SXM-80G"), "bf16")
    for tokens, tflops in {512: 58, 1024: 72, 2048: 82, 4096: 87, 8192: 91, 16384: 92}.items():
        predicted = rate / (2 * square_share(efficient, tokens, attends_causally=True)) / 1e12
        assert predicted == pytest.approx(tflops, rel=0.02), tokens


def test_a_mask_computes_the_whole_square_in_the_slower_kernel():
    """sdpa with padding takes the memory-efficient kernel, and leaves nothing out: over 3.5 times as long."""
    padded = a_regime(batching="padded")
    a100 = measured_device("A100-SXM-80G")
    slow, fast = (
        square_share(regime, 4096, attends_causally=True) / attention_flops_per_second(regime, a100, "bf16")
        for regime in (padded, HALF)
    )
    assert slow > 3.5 * fast


@pytest.mark.parametrize(("name", "forward", "backward"), [("A100-SXM-80G", 0.9, 0.85), ("H100-SXM-80G", 1.25, 1.03)])
def test_flex_attention_is_as_fast_as_published(name, forward, backward):
    """Of seven parts of its FLOPs two are forward's and five backward's, each at its share of FlashAttention-2's rate.

    Source: pytorch.org/blog/flexattention; pytorch.org/blog/pytorch-at-gtc.
    """
    flex, flash = (
        attention_flops_per_second(a_regime(attention=attention), measured_device(name), "bf16")
        for attention in ("flex_attention", "flash_attention_2")
    )
    assert flash / flex == pytest.approx(2 / 7 / forward + 5 / 7 / backward)


def test_flex_attention_leaves_out_what_lies_between_packed_sequences():
    """Four sequences in one row take as long as each alone, though their mask is over all of the row."""
    square = (0.0, 0.0, 0.0, 0.0, 1e6, 0.0)
    profile = a_profile(
        segments=(a_segment(matmul_flops=square),), regime=a_regime(attention="flex_attention", batching="packed")
    )
    rates = rates_of(profile.regime, Cluster(device=measured_device("A100-SXM-80G"), num_devices_per_node=1))
    work = micro_step_work(profile)
    one, four = (micro_step_time(work, count, 1024, rates).forward.attention_seconds for count in (1, 4))
    assert one > 0
    assert four == pytest.approx(4 * one)


def test_the_slowest_of_a_node_is_as_slow_as_random_draws():
    """The mean of the least of n normal draws, taken 20,000 times, for 2, 8 and 64 devices, within 5 % of the loss."""
    random = np.random.default_rng(0)
    for num_devices in (2, 8, 64):
        drawn = 1 + DEVICE_DEVIATION * random.standard_normal((20_000, num_devices)).min(axis=1).mean()
        assert 1 - slowest_fraction(num_devices) == pytest.approx(1 - drawn, rel=0.05)
    assert slowest_fraction(1) == 1


def test_unfused_attention_runs_as_products():
    """Where scores are written to memory the square is of ordinary products, not of a fused kernel."""
    square = (0.0, 0.0, 0.0, 0.0, 0.0, 4.0 * 128)
    scores = (0.0, 0.0, 0.0, 0.0, 0.0, 20.0)
    fused, eager = (
        micro_step_work(a_profile(segments=(a_segment(matmul_flops=square, other_bytes=written),)))
        for written in (constant(0.0), scores)
    )
    assert (sum(fused.forward.attention_flops), sum(fused.forward.product_flops)) == (512, 0)
    assert (sum(eager.forward.attention_flops), sum(eager.forward.product_flops)) == (0, 512)


def test_measured_rates_are_over_the_catalogues_peaks():
    """Every row of the measured rates names devices of the catalogue, and divides by their data sheets' peaks."""
    rows = json.loads(resources.files("autofit.timing").joinpath("data/matmul_rates.json").read_text())["rates"]
    figures = {gpu.name: gpu.figures for gpu in catalogue().gpus}
    for row in rows:
        named = [name for name in figures if name.startswith(row["device"])]
        assert named, row["device"]
        for dtype, peak in row["datasheet_tflops"].items():
            assert {getattr(figures[name], f"{dtype}_tflops") for name in named} == {peak}, (row["device"], dtype)
            assert matmul_fraction(named[0], dtype) == row["measured_tflops"][dtype] / peak
