"""Stand-ins for bitsandbytes' quantised layers: its own autograd functions on parameters that can be fake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

from autofit.errors import InputError
from autofit.profile.dtypes import DTYPES
from autofit.profile.packed import pack
from autofit.spec.configuration import Quantization
from autofit.spec.hardware import DeviceKind

aten = torch.ops.aten

_NESTED_BLOCK = 256
_BLOCK = 64
_OUTLIER_THRESHOLD = 6.0
"""`llm_int8_threshold`. Source: transformers/utils/quantization_config.py, BitsAndBytesConfig."""
OUTLIER_COLUMNS = 7
"""Columns of a linear layer's input that are taken to hold a value beyond the threshold; how many is a matter of data.

Source: arXiv 2208.07339, section 3: outliers lie in at most seven feature dimensions of models up to 13B."""
_TABLE_NAMES = ("lm_head", "embed_tokens", "wte", "wpe")


def quantize(model: nn.Module, quantization: Quantization, device: DeviceKind) -> None:
    """Replace the linear layers that transformers would replace by stand-ins for the real ones, in place.

    Source: transformers/integrations/bitsandbytes.py, replace_with_bnb_linear; of what comes packed see `packed`.

    Raises:
        InputError: a module to be left out is not in the model, or its packed layers cannot be known.
    """
    if quantization.comes_packed:
        pack(model, quantization)
    else:
        _replace_linears(model, quantization, device)
    for parameter in model.parameters():
        parameter.requires_grad = False
    if quantization.prepares_kbit:
        _upcast_rest(model, recasts_tables=quantization.recasts_tables)
    model.is_loaded_in_8bit = quantization.is_int8
    model.is_loaded_in_4bit = not quantization.comes_packed and quantization.bits == 4
    model.is_quantized = True


def _replace_linears(model: nn.Module, quantization: Quantization, device: DeviceKind) -> None:
    left_out = _left_out(model, quantization)
    for name, module in list(model.named_modules()):
        if _is_linear(module) and not _matches(name, left_out):
            stand_in = _eight_bit(module, device) if quantization.is_int8 else _four_bit(module, quantization)
            model.set_submodule(name, stand_in)


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return type(module) is nn.Linear or isinstance(module, Conv1D)


def _left_out(model: nn.Module, quantization: Quantization) -> list[str]:
    """Modules that stay as they are: those named, or else head, last module and tied ones; and T5's `wo`.

    A class names what fp16 is too narrow for, and that is not quantised either, whatever the dtype.
    Source: transformers/quantizers/base.py, HfQuantizer.get_modules_to_not_convert; quantizer_bnb_4bit.py,
    _process_model_before_weight_loading (`_keep_in_fp32_modules`).
    """
    kept = sorted(getattr(model, "_keep_in_fp32_modules", None) or [])
    if not quantization.skip_modules:
        return [*_keys_not_converted()(model), *kept]
    names = [name for name, _ in model.named_modules()]
    for pattern in quantization.skip_modules:
        if not any(_matches(name, [pattern]) for name in names):
            raise InputError(
                f"the model has no module {pattern!r} to leave unquantised",
                to_fix="name modules that the model has (llm_int8_skip_modules)",
            )
    _refuse_tied_head(model, list(quantization.skip_modules))
    return [*quantization.skip_modules, *kept]


def _refuse_tied_head(model: nn.Module, left_out: list[str]) -> None:
    """A head that shares the embedding's table cannot be packed without it."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    name = next((name for name, module in model.named_modules() if module is head), "")
    if head is not None and head.weight is embeddings.weight and not _matches(name, left_out):
        raise InputError(
            f"skip_modules leaves {name} to be quantised, which shares its weight with the embedding",
            to_fix=f"add {name} to skip_modules, which replaces transformers' own choice",
        )


def _keys_not_converted() -> Any:
    """transformers' own choice, where the installed release keeps it."""
    try:
        from transformers.quantizers.base import get_keys_to_not_convert
    except ImportError:  # before transformers 5
        from transformers.integrations.bitsandbytes import get_keys_to_not_convert
    return get_keys_to_not_convert


def _matches(name: str, patterns: list[str]) -> bool:
    """Whether a module is one of those named: from a dotted name's start or at its end."""
    return any(name == key or name.startswith(f"{key}.") or name.endswith(key) for key in patterns)


def _upcast_rest(model: nn.Module, *, recasts_tables: bool) -> None:
    """What is not quantised becomes fp32; TRL's SFTTrainer then casts embeddings and head to bf16 again.

    Source: peft/utils/other.py, prepare_model_for_kbit_training; trl/trainer/utils.py 0.11-0.13,
    peft_module_casting_to_bf16.
    """
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) and not hasattr(parameter, "quant_type"):
            parameter.data = parameter.data.to(torch.float32)
    if not recasts_tables:
        return
    for name, module in model.named_modules():
        is_table = any(table in name for table in _TABLE_NAMES) and "norm" not in name
        if is_table and getattr(getattr(module, "weight", None), "dtype", None) == torch.float32:
            module.to(torch.bfloat16)


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer or of GPT-2's Conv1D, which keeps its weight transposed."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    weight: Any = linear.weight
    return weight.shape[0], weight.shape[1]


def _frozen(tensor: Any) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)


def _four_bit(linear: nn.Module, quantization: Quantization) -> nn.Module:
    """A Linear4bit that peft recognises and that calls bitsandbytes' own autograd function.

    `Params4bit` cannot hold a fake tensor; a plain parameter and buffers of the same bytes can.
    """
    import bitsandbytes

    class FakeLinear4bit(bitsandbytes.nn.Linear4bit):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.in_features, self.out_features = _sizes(linear)
            self.compute_dtype = DTYPES[quantization.compute_dtype]
            self.weight_shape = torch.Size([self.out_features, self.in_features])
            storage = DTYPES[quantization.storage_dtype]
            elements = self.in_features * self.out_features
            packed = torch.empty(-(-elements // (2 * storage.itemsize)), 1, dtype=storage, device="meta")
            self.weight = nn.Parameter(packed, requires_grad=False)
            self.weight.compress_statistics = quantization.double_quant  # type: ignore[attr-defined]
            self.weight.quant_type = quantization.quant_type  # type: ignore[attr-defined]
            self.bias = _frozen(linear.bias)
            for name, tensor in _quant_state_tensors(elements, double_quant=quantization.double_quant).items():
                self.register_buffer(name, tensor, persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            dtype = x.dtype
            x = x.to(self.compute_dtype)
            bias = None if self.bias is None else self.bias.to(self.compute_dtype)
            state = _quant_state(self, quantization)
            return bitsandbytes.matmul_4bit(x, self.weight.t(), bias=bias, quant_state=state).to(dtype)

        def dequantized(self) -> torch.Tensor:
            """The whole weight, as peft's DoRA asks for it in each forward."""
            weight = bitsandbytes.functional.dequantize_4bit(self.weight, _quant_state(self, quantization))
            return weight  # type: ignore[no-any-return]

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


def _eight_bit(linear: nn.Module, device: DeviceKind) -> nn.Module:
    """A Linear8bitLt that peft recognises, with its int8 weight and a scale for each row.

    On a CPU bitsandbytes unpacks the weight for each product (MatMul8bitFp); a GPU multiplies int8 (MatMul8bitLt).
    Source: bitsandbytes/nn/modules.py and autograd/_functions.py 0.50.
    """
    import bitsandbytes

    class FakeLinear8bitLt(bitsandbytes.nn.Linear8bitLt):  # type: ignore[misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.in_features, self.out_features = _sizes(linear)
            weight = torch.empty(self.out_features, self.in_features, dtype=torch.int8, device="meta")
            self.weight = nn.Parameter(weight, requires_grad=False)
            self.bias = _frozen(linear.bias)
            self.index = None
            self.register_buffer("quant_scb", torch.empty(self.out_features, device="meta"), persistent=False)
            self.state = self._state()

        def _state(self) -> Any:
            state = bitsandbytes.MatmulLtState()
            state.threshold, state.has_fp16_weights = _OUTLIER_THRESHOLD, False
            state.CB, state.SCB = self.weight.detach(), self.quant_scb
            return state

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.bias is not None and self.bias.dtype != x.dtype:
                self.bias.data = self.bias.data.to(x.dtype)
            if device == "cuda":
                return _product_on_cuda(x, self.weight, self.bias, self._state())
            return bitsandbytes.matmul(x, self.weight, bias=self.bias, state=self._state())  # type: ignore[no-any-return]

        def dequantized(self) -> torch.Tensor:
            """The whole weight in fp32. Source: bitsandbytes 0.50 _ops.py, int8_vectorwise_dequant."""
            return self.weight.detach() * self.quant_scb.view(-1, 1) * (1 / 127)

    return FakeLinear8bitLt()


def _product_on_cuda(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: Any) -> torch.Tensor:
    """bitsandbytes' own MatMul8bitLt, whose kernels are written out here in operators that fake tensors can go through.

    Their fakes leave the number of outlier columns open and show nothing of what they allocate.
    """
    from bitsandbytes.autograd import _functions
    from torch.utils.flop_counter import flop_registry

    patches: list[tuple[Any, str, Any]] = [
        (_functions.F, "int8_vectorwise_quant", _quantized_rows),
        (torch.ops.bitsandbytes, "int8_mixed_scaled_mm", _mixed_product),
        (_functions.logger, "disabled", True),  # it warns of each cast to fp16
    ]
    saved = [getattr(where, name) for where, name, _ in patches]
    flop_registry[aten._int_mm] = _int8_product_flops
    for where, name, new in patches:
        setattr(where, name, new)
    try:
        return _functions.MatMul8bitLt.apply(x, weight, None, bias, state)  # type: ignore[no-any-return]
    finally:
        for (where, name, _), old in zip(patches, saved, strict=True):
            setattr(where, name, old)
        del flop_registry[aten._int_mm]


def _int8_product_flops(left: torch.Tensor, right: torch.Tensor, *_args: Any, **_kwargs: Any) -> int:
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


def _quantized_rows(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Source: bitsandbytes 0.50 backends/cuda/ops.py, int8_vectorwise_quant."""
    scales = torch.empty(x.numel() // x.shape[-1], dtype=torch.float32)
    rows = torch.empty(x.shape, dtype=torch.int8)
    outliers = x.abs() >= threshold
    columns = torch.empty(OUTLIER_COLUMNS, dtype=torch.int64)
    del outliers
    return rows, scales, columns


def _mixed_product(
    x: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    weight_scales: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The int8 product, unscaled to fp16 and cast, plus that of the columns with outliers in the input's dtype.

    Source: bitsandbytes 0.50 backends/default/ops.py, int8_mixed_scaled_mm and int8_scaled_mm;
    backends/cuda/ops.py, int8_linear_matmul and int8_mm_dequant.
    """
    of_input = x[:, columns].contiguous()
    of_weight = (weight[:, columns].contiguous() * weight_scales.view(-1, 1) * (1 / 127)).to(x.dtype).t()
    product = _unscaled(torch._int_mm(rows, weight.t()), bias, x.dtype)
    return product.addmm(of_input, of_weight), of_input


def _unscaled(product: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty_like(product, dtype=torch.float16)
    if bias is not None and bias.dtype != torch.float16:
        out.add_(bias)
    return out.to(dtype)


@contextmanager
def unpacking_as_an_operator() -> Iterator[None]:
    """Let fake tensors through where libraries unpack a whole weight.

    Older bitsandbytes calls its library with raw pointers; DoRA knows real quantised parameters only. Each allocates
    what the real one does. Source: bitsandbytes 0.43-0.45 functional.py, dequantize_4bit; peft/utils/integrations.py,
    dequantize_module_weight.
    """
    patches = [*_older_unpacking(), *_unpacking_for_dora()]
    saved = [getattr(where, name) for where, name, _ in patches]
    for where, name, new in patches:
        setattr(where, name, new)
    try:
        yield
    finally:
        for (where, name, _), old in zip(patches, saved, strict=True):
            setattr(where, name, old)


def _older_unpacking() -> list[tuple[ModuleType, str, Any]]:
    from bitsandbytes import functional

    def dequantize_4bit(packed: torch.Tensor, quant_state: Any, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        scales = torch.empty(quant_state.absmax.shape) if quant_state.nested else None
        weight = torch.empty(quant_state.shape, dtype=quant_state.dtype)
        del scales
        return weight.t() if packed.shape[0] == 1 else weight

    if hasattr(torch.ops.bitsandbytes, "dequantize_4bit"):
        return []
    return [(functional, "dequantize_4bit", dequantize_4bit)]


def _unpacking_for_dora() -> list[tuple[ModuleType, str, Any]]:
    from peft.tuners.lora import dora

    real = dora.dequantize_module_weight

    def dequantize_module_weight(module: nn.Module) -> torch.Tensor:
        unpack = getattr(module, "dequantized", None)
        weight: torch.Tensor = unpack() if unpack is not None else real(module)
        return weight

    return [(dora, "dequantize_module_weight", dequantize_module_weight)]
