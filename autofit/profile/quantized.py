"""Stand-ins for bitsandbytes' quantised layers: its own autograd functions on parameters that can be fake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autofit.profile.dtypes import DTYPES
from autofit.spec.configuration import Quantization

_NESTED_BLOCK = 256
_BLOCK = 64


def quantize(model: nn.Module, quantization: Quantization) -> None:
    """Replace every linear layer but the head by a stand-in for bitsandbytes' Linear4bit, in place."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            model.set_submodule(name, _stand_in(module, quantization))
    if quantization.prepares_kbit:
        _upcast_rest(model)
    model.is_loaded_in_4bit = True
    model.is_quantized = True


def _upcast_rest(model: nn.Module) -> None:
    """As peft/utils/other.py, prepare_model_for_kbit_training: what is not quantised becomes fp32."""
    for parameter in model.parameters():
        parameter.requires_grad = False
        if parameter.dtype in (torch.float16, torch.bfloat16) and not hasattr(parameter, "quant_type"):
            parameter.data = parameter.data.to(torch.float32)


def _stand_in(linear: nn.Linear, quantization: Quantization) -> nn.Module:
    """A Linear4bit that peft recognises and that calls bitsandbytes' own autograd function.

    `Params4bit` cannot hold a fake tensor; a plain parameter and buffers of the same bytes can.
    """
    import bitsandbytes

    class FakeLinear4bit(bitsandbytes.nn.Linear4bit):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.compute_dtype = DTYPES[quantization.compute_dtype]
            self.weight_shape = torch.Size([linear.out_features, linear.in_features])
            storage = DTYPES[quantization.storage_dtype]
            elements = linear.in_features * linear.out_features
            packed = torch.empty(-(-elements // (2 * storage.itemsize)), 1, dtype=storage, device="meta")
            self.weight = nn.Parameter(packed, requires_grad=False)
            self.weight.compress_statistics = quantization.double_quant  # type: ignore[attr-defined]
            self.weight.quant_type = quantization.quant_type  # type: ignore[attr-defined]
            bias = linear.bias
            self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
            for name, tensor in _quant_state_tensors(elements, double_quant=quantization.double_quant).items():
                self.register_buffer(name, tensor, persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            dtype = x.dtype
            x = x.to(self.compute_dtype)
            bias = None if self.bias is None else self.bias.to(self.compute_dtype)
            state = _quant_state(self, quantization)
            return bitsandbytes.matmul_4bit(x, self.weight.t(), bias=bias, quant_state=state).to(dtype)

    return FakeLinear4bit()


def _quant_state_tensors(elements: int, *, double_quant: bool) -> dict[str, torch.Tensor]:
    """What bitsandbytes keeps beside the packed weight. Source: bitsandbytes/functional.py, quantize_4bit."""
    blocks = -(-elements // _BLOCK)
    shared = {"quant_code": torch.empty(16, device="meta")}
    if not double_quant:
        return {"quant_absmax": torch.empty(blocks, device="meta"), **shared}
    return {
        "quant_absmax": torch.empty(blocks, dtype=torch.uint8, device="meta"),
        "quant_nested_absmax": torch.empty(-(-blocks // _NESTED_BLOCK), device="meta"),
        "quant_nested_code": torch.empty(256, device="meta"),
        "quant_offset": torch.empty((), device="meta"),
        **shared,
    }


def _quant_state(module: Any, quantization: Quantization) -> Any:
    from bitsandbytes.functional import QuantState

    nested = None
    if quantization.double_quant:
        nested = QuantState(
            absmax=module.quant_nested_absmax,
            code=module.quant_nested_code,
            blocksize=_NESTED_BLOCK,
            dtype=torch.float32,
        )
    return QuantState(
        absmax=module.quant_absmax,
        shape=module.weight_shape,
        code=module.quant_code,
        blocksize=_BLOCK,
        quant_type=quantization.quant_type,
        dtype=module.compute_dtype,
        offset=module.quant_offset if quantization.double_quant else None,
        state2=nested,
    )


@contextmanager
def unpacking_as_an_operator() -> Iterator[None]:
    """Give older bitsandbytes an unpacking that fake tensors can go through: it calls its library with raw pointers.

    Allocates what the real one does. Source: bitsandbytes 0.43-0.45 functional.py, dequantize_4bit.
    """
    from bitsandbytes import functional

    if hasattr(torch.ops.bitsandbytes, "dequantize_4bit"):
        yield
        return
    real = functional.dequantize_4bit

    def dequantize_4bit(packed: torch.Tensor, quant_state: Any, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        scales = torch.empty(quant_state.absmax.shape) if quant_state.nested else None
        weight = torch.empty(quant_state.shape, dtype=quant_state.dtype)
        del scales
        return weight.t() if packed.shape[0] == 1 else weight

    functional.dequantize_4bit = dequantize_4bit
    try:
        yield
    finally:
        functional.dequantize_4bit = real
