"""What DeepSpeed does with gradients, on a backward pass worked out by hand."""

from __future__ import annotations

import numpy as np
from msgspec.structs import replace

from autofit.memory.tape import bucket_gradient_bytes, phase_peaks
from autofit.spec.profile import ACTIVATION, GRADIENT
from tests.timing.hand_profiles import a_profile, a_regime, a_segment, constant

BUCKET = 64 * 64 * 2
"""hidden_size squared elements of bf16."""


def peak_of(*gradients: int, way: str) -> float:
    """Return the peak of a backward pass that makes one gradient after another, above one activation of 100 bytes."""
    regime = a_regime(device="cpu", weights_dtype="bfloat16", autocast="no")
    sizes = tuple(constant(size) for size in (100, *gradients))
    events = ((0, ACTIVATION), *((n + 1, GRADIENT) for n in range(len(gradients))))
    segment = a_segment(name="layer_backward", kind="backward", layer=None, events=events)
    profile = replace(a_profile(regime=regime, segments=(segment,)), sizes=sizes)
    elements = profile.hidden_size**2
    assert bucket_gradient_bytes(profile, elements) == BUCKET
    return float(np.max([getattr(peak, way)[0] for peak in phase_peaks(profile, [1], 1, elements)]))


def test_gradients_that_are_kept_add_up():
    """Without sharding every gradient stays: their sum."""
    assert peak_of(BUCKET, 10, 20, way="kept") == 100 + BUCKET + 30


def test_a_gradient_that_fits_the_bucket_is_gone_at_once():
    """Copied into the bucket, it is freed: never two at a time."""
    assert peak_of(BUCKET, BUCKET, 10, way="bucketed") == 100 + BUCKET
    assert peak_of(BUCKET, BUCKET, 10, way="handed_over") == 100 + BUCKET


def test_a_gradient_too_large_for_the_bucket_waits_for_the_next():
    """It is reduced when the next gradient arrives, so both are there for a moment, but not a third."""
    large = BUCKET + 2
    assert peak_of(large, 50, way="bucketed") == 100 + large + 50
    assert peak_of(large, large, large, way="bucketed") == 100 + 2 * large
    assert peak_of(50, large, 10, 10, way="bucketed") == 100 + large + 10
    assert peak_of(large, large, large, way="handed_over") == 100 + large
