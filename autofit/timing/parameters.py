"""What a model's parameters add up to, counted once for a profile."""

from __future__ import annotations

from msgspec import Struct

from autofit.spec.profile import RegimeProfile, StaticTensor
from autofit.units import BYTES_PER_ELEMENT

_ELEMENT_BYTES = {**BYTES_PER_ELEMENT, "float64": 8, "int64": 8, "int32": 4, "bool": 1}
_SHARDABLE = frozenset({"parameter", "adapter", "quantized"})


class ParameterTotals(Struct, frozen=True, kw_only=True):
    """Parameters as the model holds them; buffers and quantisation state are none, and are never sharded."""

    num_trained: int
    trained_bytes: int
    """Also of their gradients."""
    whole_bytes: int
    num_matrices: int
    """Weights that are no vectors: about as many as modules that own one."""
    num_units: int
    """What FSDP gathers together: the layers, and the rest."""
    num_adapters: int
    """An adapter's weights, each of which FSDP1 gathers by itself."""
    num_adapter_params: int = 0
    """The parameters in them."""
    after_adapters_fraction: float = 1.0
    """Of a layer's products, by their weights: those after the last that is adapted; all where none is, and none where
    layers differ in what is adapted."""
    packed_bytes: int = 0
    """Of a checkpoint that comes packed: what of it are buffers."""

    @property
    def trained_bytes_per_param(self) -> float:
        """Bytes of a trained parameter, on average."""
        return self.trained_bytes / self.num_trained if self.num_trained else 0.0


def parameter_totals(profile: RegimeProfile) -> ParameterTotals:
    """Add up the parameters of the real model."""
    parameters = [tensor for tensor in profile.tensors if tensor.kind in _SHARDABLE]
    trained = [tensor for tensor in parameters if tensor.trains]
    quantization = profile.regime.quantization
    packed = quantization is not None and quantization.comes_packed
    adapters = [tensor for tensor in trained if tensor.kind == "adapter"]
    return ParameterTotals(
        num_trained=sum(num_elements(tensor, profile) for tensor in trained),
        trained_bytes=sum(_bytes(tensor, profile) for tensor in trained),
        whole_bytes=sum(_bytes(tensor, profile) for tensor in parameters),
        num_matrices=max(1, sum(_count(tensor, profile) for tensor in parameters if tensor.rows > 1)),
        num_units=profile.num_layers + 1,
        num_adapters=sum(_count(tensor, profile) for tensor in adapters),
        num_adapter_params=sum(num_elements(tensor, profile) for tensor in adapters),
        after_adapters_fraction=_after_adapters_fraction(profile),
        packed_bytes=sum(_bytes(t, profile) for t in profile.tensors if t.kind == "quant_state") if packed else 0,
    )


def _after_adapters_fraction(profile: RegimeProfile) -> float:
    """Return what of a layer's products comes after the last that is adapted.

    A module's adapters follow its weight, and modules are in the order in which a layer names them, in which it runs
    them too in transformers' models.
    Source: peft/tuners/lora/layer.py 0.21 (`LoraLayer`: `base_layer` is set first).
    """
    if not any(tensor.kind == "adapter" for tensor in profile.tensors):
        return 1.0
    weights, adapted = list[int](), 0
    for tensor in profile.tensors:
        if tensor.repeats and tensor.kind == "adapter":
            adapted = len(weights)
        elif tensor.repeats and tensor.kind in _SHARDABLE and tensor.rows > 1:
            weights.append(tensor.num_elements)
    return sum(weights[adapted:]) / sum(weights) if adapted else 0.0


def num_elements(tensor: StaticTensor, profile: RegimeProfile) -> int:
    """Count a tensor's elements over the layers of the real model."""
    return tensor.num_elements * _count(tensor, profile)


def _count(tensor: StaticTensor, profile: RegimeProfile) -> int:
    return profile.num_layers if tensor.repeats else 1


def _bytes(tensor: StaticTensor, profile: RegimeProfile) -> int:
    return num_elements(tensor, profile) * _ELEMENT_BYTES[tensor.dtype]
