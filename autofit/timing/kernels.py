"""Seconds of one micro-step's kernels: a roofline over the traced FLOPs and bytes."""

from __future__ import annotations

from dataclasses import dataclass

from autofit.spec.profile import MONOMIALS, Polynomial, RegimeProfile, Segment
from autofit.timing.rates import Rates, known
from autofit.units import BYTES_PER_ELEMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroStepTime:
    """Forward and backward of one micro-batch on one device."""

    matmul_seconds: float
    memory_seconds: float
    """Everything that is no matrix product: its time is that of the bytes it moves."""
    dequantization_seconds: float
    launch_seconds: float
    """What the host needs to issue the operations."""
    backward_seconds: float
    """The device's part of backward, which gradients can be reduced behind."""

    @property
    def device_seconds(self) -> float:
        """Kernels of one stream run one after the other, whatever resource each is bound by."""
        return self.matmul_seconds + self.memory_seconds + self.dequantization_seconds

    @property
    def seconds(self) -> float:
        """The host runs ahead of the device, so the slower of the two sets the pace."""
        return max(self.device_seconds, self.launch_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class _SegmentTime:
    matmul_seconds: float
    memory_seconds: float
    dequantization_seconds: float

    @property
    def seconds(self) -> float:
        return self.matmul_seconds + self.memory_seconds + self.dequantization_seconds


def micro_step_time(
    profile: RegimeProfile, num_sequences: float, sequence_tokens: float, rates: Rates
) -> MicroStepTime:
    """Add up the segments of one micro-step, each as often as the real model has it."""
    powers = _powers(*profile.regime.rows(num_sequences, sequence_tokens))
    times = [(segment, _segment_time(profile, segment, powers, rates)) for segment in profile.segments]
    return MicroStepTime(
        matmul_seconds=sum(time.matmul_seconds for _, time in times),
        memory_seconds=sum(time.memory_seconds for _, time in times),
        dequantization_seconds=sum(time.dequantization_seconds for _, time in times),
        launch_seconds=rates.launch_seconds * sum(profile.repeats(s) * s.num_kernels for s in profile.segments),
        backward_seconds=sum(time.seconds for segment, time in times if segment.kind == "backward"),
    )


def _segment_time(profile: RegimeProfile, segment: Segment, powers: tuple[float, ...], rates: Rates) -> _SegmentTime:
    """Time a segment as a roofline: a product takes as long as its FLOPs or its bytes, whichever is longer.

    Source: Williams et al. 2009 (roofline).
    """
    repeats, bandwidth = profile.repeats(segment), known(rates.memory_bytes_per_second)
    flops_seconds = _value(segment.matmul_flops, powers) / known(rates.matmul_flops_per_second)
    unpacked_bytes = _unpacked_bytes_per_element(profile) * unpacked_for_products(profile, segment)
    return _SegmentTime(
        matmul_seconds=repeats * max(flops_seconds, _value(segment.matmul_bytes, powers) / bandwidth),
        memory_seconds=repeats * _value(segment.other_bytes, powers) / bandwidth,
        dequantization_seconds=repeats * 2 * unpacked_bytes / bandwidth,
    )


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


def _powers(num_sequences: float, sequence_tokens: float) -> tuple[float, ...]:
    return tuple(num_sequences**b * sequence_tokens**s for b, s in MONOMIALS)


def _value(polynomial: Polynomial, powers: tuple[float, ...]) -> float:
    return sum(coefficient * power for coefficient, power in zip(polynomial, powers, strict=True))
