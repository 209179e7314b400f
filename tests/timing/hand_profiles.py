"""Profiles small enough to work out by hand."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from autofit.spec.configuration import Lora, Quantization
from autofit.spec.profile import Polynomial, Regime, RegimeProfile, Segment, StaticTensor

NOTHING: Polynomial = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def constant(value: float) -> Polynomial:
    """Return a polynomial that depends on neither batch nor length."""
    return (value, 0.0, 0.0, 0.0, 0.0, 0.0)


def per_token(value: float) -> Polynomial:
    """Return a polynomial that grows with the tokens of a micro-batch."""
    return (0.0, 0.0, 0.0, value, 0.0, 0.0)


def a_regime(**changes: Any) -> Regime:
    """Full fine-tuning under bf16 autocast on a GPU, with what is given changed."""
    method = changes.get("method", "full")
    values: dict[str, Any] = {
        "method": method,
        "quantization": Quantization() if method == "qlora" else None,
        "lora": None if method == "full" else Lora(),
        "weights_dtype": "float32" if method == "full" else "bfloat16",
        "adapter_dtype": "float32",
        "autocast": "bf16",
        "gradient_checkpointing": False,
        "use_reentrant": False,
        "attention": "sdpa",
        "device": "cuda",
    }
    return Regime(**values | changes)


def a_segment(**changes: Any) -> Segment:
    """Return a segment that does nothing but what is given."""
    values: dict[str, Any] = {
        "name": "layer",
        "kind": "forward",
        "layer": 0,
        "events": (),
        "matmul_flops": NOTHING,
        "matmul_bytes": NOTHING,
        "other_bytes": NOTHING,
        "num_kernels": 0,
    }
    return Segment(**values | changes)


def a_profile(
    *,
    num_params: int = 1_000_000_000,
    num_layers: int = 1,
    segments: tuple[Segment, ...] = (),
    regime: Regime | None = None,
    tensors: tuple[StaticTensor, ...] | None = None,
) -> RegimeProfile:
    """Return a model of one weight matrix that trains, unless told what else."""
    regime = regime or a_regime()
    whole = StaticTensor(
        name="weight", num_elements=num_params, dtype=regime.weights_dtype, trains=True, repeats=False, kind="parameter"
    )
    return RegimeProfile(
        model="by hand",
        regime=regime,
        num_layers=num_layers,
        num_traced_layers=num_layers,
        hidden_size=64,
        vocab_size=256,
        tensors=tensors or (whole,),
        sizes=(),
        segments=segments,
        versions={"torch": "2.13.0"},
    )


def an_adapted_profile(num_frozen: int, num_trained: int) -> RegimeProfile:
    """Return a frozen bf16 model with an fp32 adapter."""
    frozen = StaticTensor(
        name="base", num_elements=num_frozen, dtype="bfloat16", trains=False, repeats=False, kind="parameter"
    )
    adapter = replace(frozen, name="lora", num_elements=num_trained, dtype="float32", trains=True, kind="adapter")
    return a_profile(regime=a_regime(method="lora"), tensors=(frozen, adapter))
