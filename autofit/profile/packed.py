"""Stand-ins for the linear layers of checkpoints that come packed, GPTQ's and AWQ's.

The packages that have the real ones need a GPU to be imported whole. What is stored, and what forward and backward
allocate, is theirs; unpacking a weight, which a kernel does, is one operator that reads the packed tensors and writes
the weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.amp import custom_bwd, custom_fwd

from autofit.errors import InputError
from autofit.profile.dtypes import DTYPES
from autofit.profile.layers import layer_stacks
from autofit.spec.configuration import Quantization
from autofit.spec.profile import Regime

_WORD_BITS = 32
AWQ_FUSED_ROWS = 1024
"""Source: gptqmodel 7.7 nn_modules/qlinear/gemm_awq.py, AwqGemmFn.forward (`rows > 1024`)."""
_ROUTERS = ("gate", "router")
"""Last part of the name of what chooses experts, which is never packed. Source: fms-acceleration-peft
gptqmodel/models/mixtral.py, auto_gptq 0.7 modeling/mixtral.py (`layer_modules` without it)."""

_library = torch.library.Library("autofit", "FRAGMENT")
_library.define("unpack(Tensor[] packed, int rows, int columns, ScalarType dtype) -> Tensor")


def _unpacked(packed: list[torch.Tensor], rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return packed[0].new_empty((rows, columns), dtype=dtype)


_library.impl("unpack", _unpacked, "CompositeExplicitAutograd")
_library.impl("unpack", _unpacked, "Meta")


class PackedLinear(nn.Module):
    """What is stored of one linear layer; no `nn.Linear`, and so none of peft's `all-linear`.

    Packed words are buffers, and parameters where they are stored in a floating dtype so that FSDP shards them.
    Source: auto_gptq 0.7 nn_modules/qlinear/qlinear_tritonv2.py and gptqmodel 7.7 nn_modules/qlinear/__init__.py
    (`_register_gptq_buffers`, AWQuantLinear); fms-acceleration-peft autogptq_utils.py
    (build_patch_to_view_tensor_to_parameter_for_fsdp_gptq).
    """

    def __init__(self, linear: nn.Module, quantization: Quantization) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = _sizes(linear)
        self.in_features, self.out_features = self.infeatures, self.outfeatures
        self.unpacked_dtype = DTYPES[quantization.compute_dtype]
        is_sharded = quantization.storage_dtype != "int32"
        for name, shape in packed_shapes(self.infeatures, self.outfeatures, quantization).items():
            if not is_sharded:
                words = torch.empty(shape, dtype=torch.int32, device="meta")
                self.register_buffer(f"quant_{name}", words, persistent=False)
                continue
            storage = DTYPES[quantization.storage_dtype]
            columns = shape[1] * torch.int32.itemsize // storage.itemsize
            stored = torch.empty((shape[0], columns), dtype=storage, device="meta")
            setattr(self, f"packed_{name}", nn.Parameter(stored, requires_grad=False))
        groups = num_groups(self.infeatures, quantization.group_size)
        scales = torch.empty(groups, self.outfeatures, dtype=torch.float16, device="meta")
        self.register_buffer("quant_scales", scales, persistent=False)
        if quantization.quant_type == "gptq":
            order = torch.empty(self.infeatures, dtype=torch.int32, device="meta")
            self.register_buffer("quant_g_idx", order, persistent=False)
        bias: Any = linear.bias
        kept = None if bias is None else torch.empty(bias.shape, dtype=torch.float16, device="meta")
        self.register_buffer("quant_bias", kept, persistent=False)

    @property
    def qweight(self) -> torch.Tensor:
        """The packed weight, where peft reads the device of a layer."""
        return self.packed()[0]

    def packed(self) -> list[torch.Tensor]:
        """Every stored tensor that unpacking reads, the packed weight first."""
        own = {**self._parameters, **self._buffers}
        return [tensor for name, tensor in own.items() if tensor is not None and not name.endswith("bias")]

    def unpack(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole weight, inputs by outputs, as a kernel writes it."""
        weight: torch.Tensor = torch.ops.autofit.unpack(self.packed(), self.infeatures, self.outfeatures, dtype)
        return weight


class RecomputingLinear(PackedLinear):
    """`auto_gptq`'s Triton layer: unpacks in forward and again in backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Source: auto_gptq 0.7 and fms-acceleration-peft, qlinear_tritonv2.py, QuantLinear.forward."""
        product: torch.Tensor = _RecomputedProduct.apply(x.reshape(-1, x.shape[-1]), self)  # type: ignore[no-untyped-call]
        out = product.half().reshape(*x.shape[:-1], self.outfeatures)
        return out if self.quant_bias is None else out + self.quant_bias


class SavingLinear(PackedLinear):
    """gptqmodel's layer for GPTQ in training: unpacks by torch's operators, and autograd keeps the weight for backward.

    Its Triton kernel is for evaluation only. torch.compile, which it asks for, may fuse what is written out here; a
    method that is compiled for every layer anew soon passes dynamo's limit and runs as it is.
    """

    def __init__(self, linear: nn.Module, quantization: Quantization) -> None:
        super().__init__(linear, quantization)
        self.max_code = 2**quantization.bits - 1
        self.code_dtype = torch.int16 if quantization.bits == 8 else torch.int8
        per_word = _WORD_BITS // quantization.bits
        for name, shape in {"quant_shifts_of_zeros": (1, 1, per_word), "quant_shifts": (1, per_word, 1)}.items():
            self.register_buffer(name, torch.empty(shape, dtype=torch.int32, device="meta"), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Source: gptqmodel 7.7 nn_modules/qlinear/torch.py, TorchLinear._forward_eager; tritonv2.py, forward."""
        weight = self._unpacked_by_torch()
        if weight.dtype != x.dtype:
            weight = weight.to(x.dtype)
        out = torch.matmul(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], self.outfeatures)
        if self.quant_bias is not None:
            out.add_(self.quant_bias.to(out.dtype))
        return out

    def _unpacked_by_torch(self) -> torch.Tensor:
        """Source: gptqmodel 7.7 nn_modules/qlinear/__init__.py, dequantize_weight and _dequantize_from_codes."""
        zeros = torch.bitwise_right_shift(self.quant_qzeros.unsqueeze(2), self.quant_shifts_of_zeros).to(
            self.code_dtype
        )
        zeros = torch.bitwise_and(zeros, self.max_code).reshape(self.quant_qzeros.shape[0], -1)
        shifted = torch.bitwise_right_shift(self.quant_qweight.unsqueeze(1), self.quant_shifts).to(self.code_dtype)
        codes = torch.bitwise_and(shifted, self.max_code)
        del shifted
        codes = codes.reshape(self.infeatures, self.outfeatures)
        weight: torch.Tensor = self.quant_scales[self.quant_g_idx.long()] * (codes - zeros[self.quant_g_idx.long()])
        return weight


class _RecomputedProduct(torch.autograd.Function):
    """Source: auto_gptq 0.7 nn_modules/triton_utils/dequant.py, QuantLinearFunction."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        ctx.layer = layer
        return x @ layer.unpack(layer.unpacked_dtype)

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return grad_output @ ctx.layer.unpack(ctx.layer.unpacked_dtype).t(), None


class AwqLinear(PackedLinear):
    """gptqmodel's CUDA layer for AWQ, with more rows than `AWQ_FUSED_ROWS`: unpacks in forward and in backward.

    What its kernel allocates is the weight, in the dtype of the scales.
    Source: gptqmodel 7.7 gptqmodel_ext/awq/quantization/gemm_cuda_gen.cu, dequantize_weights_cuda.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Source: gptqmodel 7.7 nn_modules/qlinear/gemm_awq.py, AwqGEMMLinear.forward."""
        computed = x.dtype if x.dtype in {torch.float16, torch.bfloat16} else torch.float16
        out: torch.Tensor = _AwqProduct.apply(x.to(computed).contiguous(), self)  # type: ignore[no-untyped-call]
        return out.to(x.dtype)


class _AwqProduct(torch.autograd.Function):
    """Source: gptqmodel 7.7 nn_modules/qlinear/gemm_awq.py, AwqGemmFn: backward runs without autocast."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        ctx.layer, ctx.dtype, ctx.shape = layer, x.dtype, x.shape
        weight = layer.unpack(x.dtype)
        out = torch.matmul(x.reshape(-1, x.shape[-1]), weight)
        if layer.quant_bias is not None:
            out = out + layer.quant_bias
        return out.reshape(*x.shape[:-1], layer.outfeatures)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        weight = ctx.layer.unpack(ctx.dtype).to(grad_output.dtype)
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        return torch.matmul(rows, weight.transpose(-1, -2)).reshape(ctx.shape), None


def shortest_sequence_tokens(quantization: Quantization | None) -> int:
    """Return the fewest tokens of a sequence, by eights, with which every product takes the path that is traced.

    Up to `AWQ_FUSED_ROWS` rows AWQ's layer multiplies packed weights in a kernel of its own, which allocates eight fp32
    copies of its result.
    """
    is_awq = quantization is not None and quantization.quant_type == "awq"
    return AWQ_FUSED_ROWS + 8 if is_awq else 1


def refuse_awq_elsewhere(regime: Regime, sequence_tokens: int | None) -> None:
    """Refuse AWQ where another of its kernels runs than the one that is traced.

    Raises:
        InputError: on a CPU, for short sequences, or where processes share them.
    """
    if regime.quantization is None or regime.quantization.quant_type != "awq":
        return
    if regime.device == "cpu":
        raise InputError(
            "on a CPU other layers multiply AWQ's packed weights, which are not modelled", to_fix="plan for a GPU"
        )
    shortest = shortest_sequence_tokens(regime.quantization)
    if regime.sequence_parallel_size > 1 or (sequence_tokens is not None and sequence_tokens < shortest):
        raise InputError(
            f"up to {AWQ_FUSED_ROWS} tokens at once AWQ's layers multiply by another kernel, which is not modelled",
            to_fix=f"plan sequences of more than {AWQ_FUSED_ROWS} tokens, each on one process",
        )


def packed_shapes(inputs: int, outputs: int, quantization: Quantization) -> dict[str, tuple[int, int]]:
    """Return the shapes of the packed weight and of the packed zeros, in 32-bit words."""
    per_word = _WORD_BITS // quantization.bits
    zeros = (num_groups(inputs, quantization.group_size), outputs // per_word)
    weight = (inputs // per_word, outputs) if quantization.quant_type == "gptq" else (inputs, outputs // per_word)
    return {"qweight": weight, "qzeros": zeros}


def num_groups(inputs: int, group_size: int) -> int:
    """Return how many groups of inputs have a scale of their own."""
    return 1 if group_size == -1 else math.ceil(inputs / group_size)


def pack(model: nn.Module, quantization: Quantization) -> None:
    """Replace the linear layers that such a checkpoint has packed by stand-ins, in place: all inside the layers.

    Embeddings, head, norms and what chooses experts are not packed.
    Source: optimum 2.3 gptq/quantizer.py, convert_model (`block_name_to_quantize`); auto_gptq 0.7 modeling/_base.py,
    from_quantized (`layer_modules`).

    Raises:
        InputError: a layer's sizes are no multiple of what is packed together, or experts are one tensor.
    """
    from transformers.pytorch_utils import Conv1D

    for stack, layers in layer_stacks(model):
        for name, module in list(layers.named_modules()):
            _refuse_fused_experts(f"{stack}.{name}", module)
            if isinstance(module, (nn.Linear, Conv1D)) and name.rpartition(".")[2] not in _ROUTERS:
                _refuse_odd_sizes(f"{stack}.{name}", module)
                layers.set_submodule(name, _stand_in(module, quantization))


def _stand_in(linear: nn.Module, quantization: Quantization) -> PackedLinear:
    if quantization.quant_type == "awq":
        return AwqLinear(linear, quantization)
    if quantization.kernel == "gptqmodel":
        return SavingLinear(linear, quantization)
    return RecomputingLinear(linear, quantization)


def peft_layers() -> dict[type[nn.Module], type[nn.Module]]:
    """Return which of peft's own layers goes around a packed one, as peft's dispatcher says for the real one.

    Source: peft/tuners/lora/gptq.py, dispatch_gptq; awq.py, dispatch_awq.
    """
    from peft.tuners.lora import awq, gptq

    of_gptq = getattr(gptq, "GPTQLoraLinear", None) or gptq.QuantLinear
    return {AwqLinear: awq.AwqLoraLinear, PackedLinear: of_gptq}


def _refuse_odd_sizes(name: str, linear: nn.Module) -> None:
    inputs, outputs = _sizes(linear)
    if inputs % _WORD_BITS or outputs % _WORD_BITS:
        raise InputError(
            f"{name} has {inputs} inputs and {outputs} outputs, and kernels take multiples of {_WORD_BITS} only",
            to_fix="plan the checkpoint that it was made from, quantised by bitsandbytes (--method qlora)",
        )


def _refuse_fused_experts(name: str, module: nn.Module) -> None:
    """Experts that are one tensor are no linear layers, and no loader finds a place for their packed weights."""
    if any(parameter.dim() > 2 for parameter in module.parameters(recurse=False)):
        raise InputError(
            f"{name} holds its experts in one tensor, and a packed checkpoint has each by itself",
            to_fix="plan the checkpoint that it was made from, or a release of transformers whose experts are linear "
            "layers",
        )


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer or of GPT-2's Conv1D, which keeps its weight transposed."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    weight: Any = linear.weight
    return weight.shape[0], weight.shape[1]
