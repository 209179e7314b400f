"""Takes autocast's copies of adapters out of a tape: FSDP1 gathers adapters in 16 bits, and there is nothing to copy.

The tape of its regime is traced with fp32 adapters all the same, for peft converts an adapter's input to the dtype that
is stored. Source: peft/tuners/tuners_utils.py 0.21, `_cast_input_dtype`; torch v2.13 distributed/fsdp/_flat_param.py
(`_use_unsharded_views`).
"""

from __future__ import annotations

from msgspec.structs import replace

from autofit.spec.profile import ACTIVATION, MONOMIALS, Event, RegimeProfile

HALF_BYTES = 2


def without_adapter_casts(profile: RegimeProfile) -> RegimeProfile:
    """Return the tape with copies of fp32 adapters in 16 bits as tensors of no bytes; any other tape as it is."""
    regime = profile.regime
    if regime.lora is None or regime.autocast == "no" or regime.adapter_dtype != "float32":
        return profile
    casts = {tensor.num_elements * HALF_BYTES for tensor in profile.tensors if tensor.kind == "adapter"}
    fixed = {n for n, size in enumerate(profile.sizes) if size[0] in casts and not any(size[1:])}
    nothing = len(profile.sizes)

    def emptied(event: Event) -> Event:
        return (nothing, *event[1:]) if event[0] in fixed and event[1] == ACTIVATION else event

    return replace(
        profile,
        sizes=(*profile.sizes, (0.0,) * len(MONOMIALS)),
        segments=tuple(
            replace(segment, events=tuple(emptied(event) for event in segment.events)) for segment in profile.segments
        ),
    )
