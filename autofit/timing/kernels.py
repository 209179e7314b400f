"""Seconds of one micro-step's kernels, from the traced FLOPs and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from autofit.spec.profile import MONOMIALS, ON_HOST, Polynomial, Regime, RegimeProfile, Segment, SegmentKind
from autofit.timing.parameters import num_elements
from autofit.timing.rates import (
    EFFICIENT_RAMP_TOKENS,
    FLASH_RAMP_TOKENS,
    WHOLE_SQUARE_RAMP_TOKENS,
    Rates,
    known,
    runs_efficient_attention,
)
from autofit.units import BYTES_PER_ELEMENT

Seconds = npt.NDArray[np.float64]
"""One figure for each of several micro-batches."""
Amount = TypeVar("Amount", float, Seconds)

SQUARES = tuple(n for n, (_, s) in enumerate(MONOMIALS) if s == 2)
"""Which coefficients of a polynomial grow with the square of the length: in a transformer, attention's alone."""
UNFUSED_BYTES_PER_FLOP = 0.005
"""Attention without a fused kernel writes its scores and reads them again, some ten bytes for each.

A score is 4 FLOPs for each of a head's columns (at most 256), so at least this much. A mask is read once for all heads.
"""


class PassWork(Struct, frozen=True, kw_only=True):
    """What the forward or the backward pass of a micro-step does, over all layers of the real model."""

    product_flops: Polynomial
    """Of matrix products, fused attention left out."""
    attention_flops: Polynomial
    """Of fused attention, over the whole square of scores."""
    product_bytes: Polynomial
    """That both read and write."""
    other_bytes: Polynomial
    """That everything else reads and writes."""
    host_bytes: Polynomial
    """Activations that go to the host, or come back."""
    adapter_flops_per_token: float
    """Of products in fp32 where all others are in half precision: an adapter's, without autocast."""
    unpacked_bytes: float
    """Weights unpacked from four bits inside a product: written, and read again."""
    num_kernels: int


class MicroStepWork(Struct, frozen=True, kw_only=True):
    """What a micro-step does, as polynomials of its size. Made once for a profile."""

    regime: Regime
    attends_causally: bool
    forward: PassWork
    backward: PassWork
    recomputed_flops: Polynomial
    """Of what backward does again because forward did not keep it."""
    only_length: int | None = None
    """The one length that the polynomials hold for, which then have no powers of s."""


def micro_step_work(profile: RegimeProfile) -> MicroStepWork:
    """Add up a profile's segments, each as often as the real model has it."""
    layers = [segment for segment in profile.segments if segment.kind == "forward" and segment.layer is not None]
    checkpoints = profile.regime.gradient_checkpointing
    share = 1 / profile.regime.checkpoint_every_n_layers if checkpoints else 0.0
    return MicroStepWork(
        regime=profile.regime,
        attends_causally=profile.attends_causally,
        only_length=profile.only_length,
        forward=_pass_work(profile, "forward"),
        backward=_pass_work(profile, "backward"),
        recomputed_flops=_times(_total(profile, layers, "matmul_flops"), share),
    )


def _pass_work(profile: RegimeProfile, kind: SegmentKind) -> PassWork:
    segments = [segment for segment in profile.segments if segment.kind == kind]
    flops, other_bytes = (_total(profile, segments, name) for name in ("matmul_flops", "other_bytes"))
    squares = tuple(flops[n] if n in SQUARES else 0.0 for n in range(len(MONOMIALS)))
    attention = squares if _is_fused(squares, other_bytes) else (0.0,) * len(MONOMIALS)
    return PassWork(
        product_flops=_less(flops, attention),
        attention_flops=attention,
        product_bytes=_total(profile, segments, "matmul_bytes"),
        other_bytes=other_bytes,
        host_bytes=_host_bytes(profile),
        adapter_flops_per_token=_adapter_flops_per_token(profile, kind),
        unpacked_bytes=2
        * _unpacked_bytes_per_element(profile)
        * sum(profile.repeats(segment) * unpacked_for_products(profile, segment) for segment in segments),
        num_kernels=sum(profile.repeats(segment) * segment.num_kernels for segment in segments),
    )


def _is_fused(attention_flops: Polynomial, other_bytes: Polynomial) -> bool:
    scores_bytes = sum(other_bytes[n] for n in SQUARES)
    return scores_bytes < UNFUSED_BYTES_PER_FLOP * sum(attention_flops)


def _host_bytes(profile: RegimeProfile) -> Polynomial:
    """Add up the checkpoints that go to the host in forward; the same come back in backward."""
    total = (0.0,) * len(MONOMIALS)
    for segment in profile.segments:
        births = [event for event in segment.events if len(event) == 2 and event[1] == ON_HOST]
        for size, _ in births:
            total = _plus(total, _times(profile.sizes[size], profile.repeats(segment)))
    return total


def _adapter_flops_per_token(profile: RegimeProfile, kind: SegmentKind) -> float:
    """Count the products of fp32 adapters: one forward; two in backward, for inputs and weights, and what is redone.

    peft makes adapters fp32 and casts their inputs; under autocast they run in its dtype like all others.
    Source: peft/tuners/lora/layer.py 0.21 (`_cast_input_dtype`).
    """
    regime = profile.regime
    in_fp32 = regime.autocast == "no" and regime.adapter_dtype == "float32" and regime.weights_dtype != "float32"
    if not in_fp32 or regime.lora is None:
        return 0.0
    elements = sum(num_elements(tensor, profile) for tensor in profile.tensors if tensor.kind == "adapter")
    passes = 1 if kind == "forward" else 3 if regime.gradient_checkpointing else 2
    return 2.0 * elements * passes


def unpacked_for_products(profile: RegimeProfile, segment: Segment) -> float:
    """Weights, in elements, that a forward product unpacks inside itself: no trace sees them written and read again.

    Backward unpacks by an operator of its own, whose bytes the trace has among the others. A recomputed forward is as
    much as the backward that follows it.
    Source: bitsandbytes/autograd/_functions.py (`MatMul4Bit.backward`) and backends/cuda/ops.py (`gemm_4bit`), 0.50.
    """
    if segment.kind == "forward":
        return segment.dequantized_elements
    return segment.dequantized_elements / 2 if profile.regime.gradient_checkpointing else 0.0


def _unpacked_bytes_per_element(profile: RegimeProfile) -> int:
    quantization = profile.regime.quantization
    return BYTES_PER_ELEMENT[quantization.compute_dtype] if quantization else 0


class PassTime(Struct, Generic[Amount], frozen=True, kw_only=True):
    """The forward or the backward pass of one micro-batch on one device, by what each part is bound by."""

    product_seconds: Amount
    """Matrix products' arithmetic."""
    attention_seconds: Amount
    product_bytes_seconds: Amount
    """What products read and write. A part of it is hidden behind their arithmetic: see `device_seconds`."""
    memory_seconds: Amount
    """Everything that is no matrix product: its time is that of the bytes it moves."""
    dequantization_seconds: float
    host_link_seconds: Amount
    launch_seconds: float
    """What the host needs to issue the operations."""

    @property
    def arithmetic_seconds(self) -> Amount:
        """Of the tensor cores."""
        return self.product_seconds + self.attention_seconds

    @property
    def bytes_seconds(self) -> Amount:
        """Of the device's memory."""
        return self.product_bytes_seconds + self.memory_seconds + self.dequantization_seconds

    @property
    def device_seconds(self) -> Amount:
        """Kernels of one stream run one after the other, whatever resource each is bound by.

        Of a product both its arithmetic and its bytes count: it begins by reading and ends by writing, and the more
        bytes it moves for its arithmetic, the less of them is hidden. So large square products are a few per cent
        below the rate that the best of shapes reach, and small or flat ones (an adapter's) far below, as measured.
        Source: A800 192 and 215 TFLOPS at 2,048 and 8,192 rows, RTX 3090 Ti 71.5 and 81.3 (mli/transformers-benchmarks,
        issue 4 and micro_bench.ipynb): both follow from one rate each so, and from none by the larger of the two.
        """
        return self.arithmetic_seconds + self.bytes_seconds + self.host_link_seconds


class MicroStepTime(Struct, frozen=True, kw_only=True):
    """Forward and backward of one micro-batch on one device."""

    forward: PassTime[float]
    backward: PassTime[float]
    model_flops: float
    """Of products and attention, over the whole square of scores, without what is computed again."""

    def total(self, name: str) -> float:
        """Add up one figure of both passes."""
        return float(getattr(self.forward, name) + getattr(self.backward, name))


def micro_step_time(work: MicroStepWork, num_sequences: float, sequence_tokens: float, rates: Rates) -> MicroStepTime:
    """Time a micro-batch; see `micro_step_times`."""
    powers, square = _powers(work, num_sequences, sequence_tokens)
    flops = _plus(_plus(work.forward.product_flops, work.forward.attention_flops), _flops(work.backward))
    return MicroStepTime(
        forward=_pass_time(work.forward, powers, square, rates),
        backward=_pass_time(work.backward, powers, square, rates),
        model_flops=_value(_less(flops, work.recomputed_flops), powers),
    )


def micro_step_times(
    work: MicroStepWork, shapes: Sequence[tuple[float, float]], rates: Rates
) -> tuple[PassTime[Seconds], PassTime[Seconds]]:
    """Time forward and backward of micro-batches, given as sequences and tokens of a sequence.

    Of a tape of one length, other sequences (an average batch's) take as long as as many tokens of that length do: work
    in s is right, attention's in s² too much where they are shorter, and all of it counts as products.
    """
    found = [_powers(work, *shape) for shape in shapes]
    powers = tuple(np.array(column) for column in zip(*(powers for powers, _ in found), strict=True))
    square = np.array([square for _, square in found])
    return _pass_time(work.forward, powers, square, rates), _pass_time(work.backward, powers, square, rates)


def _powers(work: MicroStepWork, num_sequences: float, sequence_tokens: float) -> tuple[tuple[float, ...], float]:
    """Return the monomials of a micro-batch, and what its attention takes of the whole square's time."""
    if work.only_length is not None:
        num_sequences, sequence_tokens = num_sequences * sequence_tokens / work.only_length, work.only_length
    rows, tokens = work.regime.rows(num_sequences, sequence_tokens)
    square = square_share(work.regime, tokens, attends_causally=work.attends_causally)
    if work.regime.attention == "flex_attention" and work.regime.masks_one_row:  # blocks between sequences are left out
        share = square_share(work.regime, sequence_tokens, attends_causally=work.attends_causally)
        square = share * sequence_tokens / tokens
    return tuple(rows**b * tokens**s for b, s in MONOMIALS), square


def _flops(work: PassWork) -> Polynomial:
    return _plus(work.product_flops, work.attention_flops)


def _pass_time(work: PassWork, powers: tuple[Amount, ...], square: Amount, rates: Rates) -> PassTime[Amount]:
    bandwidth, rate = known(rates.memory_bytes_per_second), known(rates.matmul_flops_per_second)
    slower_seconds = 1 / (rates.fp32_flops_per_second or rate) - 1 / rate
    num_tokens = powers[MONOMIALS.index((1, 1))]
    attention = _value(work.attention_flops, powers) * square
    link = known(rates.host_bytes_per_second) if any(work.host_bytes) else math.inf
    return PassTime(
        product_seconds=_value(work.product_flops, powers) / rate
        + num_tokens * work.adapter_flops_per_token * slower_seconds,
        attention_seconds=attention / known(rates.attention_flops_per_second),
        product_bytes_seconds=_value(work.product_bytes, powers) / bandwidth,
        memory_seconds=_value(work.other_bytes, powers) / bandwidth,
        dequantization_seconds=work.unpacked_bytes / bandwidth,
        host_link_seconds=_value(work.host_bytes, powers) / link,
        launch_seconds=rates.launch_seconds * work.num_kernels,
    )


def square_share(regime: Regime, sequence_tokens: float, *, attends_causally: bool) -> float:
    """Return what a fused kernel's time is, over that of the whole square of scores at its full rate.

    Under a causal mask half the square is left out. sdpa with a mask of its own computes all of it.

    Args:
        regime: says which kernel runs.
        sequence_tokens: of what attention takes for one sequence; a row with a mask is one.
        attends_causally: whether the kernel knows that what lies ahead does not count.
    """
    efficient = runs_efficient_attention(regime)
    if not attends_causally or (efficient and regime.batching != "equal"):
        return 1 + WHOLE_SQUARE_RAMP_TOKENS / sequence_tokens
    ramp = EFFICIENT_RAMP_TOKENS if efficient else FLASH_RAMP_TOKENS
    return (1 + ramp / sequence_tokens) / 2


def _total(profile: RegimeProfile, segments: Iterable[Segment], name: str) -> Polynomial:
    total = (0.0,) * len(MONOMIALS)
    for segment in segments:
        total = _plus(total, _times(getattr(segment, name), profile.repeats(segment)))
    return total


def _plus(left: Polynomial, right: Polynomial) -> Polynomial:
    return tuple(a + b for a, b in zip(left, right, strict=True))


def _less(left: Polynomial, right: Polynomial) -> Polynomial:
    return tuple(a - b for a, b in zip(left, right, strict=True))


def _times(polynomial: Polynomial, factor: float) -> Polynomial:
    return tuple(factor * coefficient for coefficient in polynomial)


def _value(polynomial: Polynomial, powers: tuple[Amount, ...]) -> Amount:
    total = polynomial[0] * powers[0]
    for coefficient, power in zip(polynomial[1:], powers[1:], strict=True):
        total = total + coefficient * power
    return total
