"""What CUDA's kernels allocate for themselves, where no dispatch sees it: operator -> bytes of each temporary.

A function takes the operator's arguments, and names the source that its bytes come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from autofit.profile.kernels import attention, flex
from autofit.spec.profile import Regime

aten = torch.ops.aten
TemporaryBytes = Callable[..., tuple[int, ...]]
_INT64_BYTES = 8
_QUANTIZED_BLOCK = 64


def softmax_backward(grad: torch.Tensor, *_args: Any, **_kwargs: Any) -> tuple[int, ...]:
    """`grad * output`, in grad's dtype; log_softmax has no such temporary.

    Source: torch v2.13 aten/src/ATen/native/cuda/SoftMax.cu, softmax_backward_cuda_out.
    """
    return (_bytes(grad),)


def embedding_backward(grad: torch.Tensor, indices: torch.Tensor, *_args: Any, **_kwargs: Any) -> tuple[int, ...]:
    """For each token an fp32 row, two sorted copies of the ids, and four arrays of offsets in 64 bits.

    Up to 3072 tokens of a micro-batch CUDA takes another kernel, without any of these: there it is a bound.
    Source: torch v2.13 aten/src/ATen/native/cuda/Embedding.cu, embedding_dense_backward_cuda;
    EmbeddingBackwardKernel.cu, embedding_backward_cuda_kernel.
    """
    tokens = indices.numel()
    return (*[tokens * _INT64_BYTES] * 6, tokens * grad.shape[-1] * 4)


def index_put(
    _self: torch.Tensor,
    indices: Sequence[torch.Tensor | None],
    _values: torch.Tensor,
    accumulate: bool = False,  # noqa: FBT001, FBT002 - the operator's own signature
    *_args: Any,
    **_kwargs: Any,
) -> tuple[int, ...]:
    """Where values are added: the linear indices, their sorted copies, and what the sort works in, 64 bits each.

    Source: torch v2.13 aten/src/ATen/native/cuda/Indexing.cu, index_put_with_sort_kernel.
    """
    given = [index for index in indices if index is not None]
    if not accumulate or not given:
        return ()
    count = math.prod(torch.broadcast_shapes(*(index.shape for index in given)))
    return tuple([count * _INT64_BYTES] * 6)


def masked_scatter(x: torch.Tensor, mask: torch.Tensor, *_args: Any, **_kwargs: Any) -> tuple[int, ...]:
    """A sum in 64 bits up to each element, and the mask for every element where it was one for many.

    Source: torch v2.13 aten/src/ATen/native/cuda/IndexKernel.cpp, masked_scatter__cuda; IndexKernel.cu,
    launch_masked_scatter_kernel (`mask.contiguous()`); TensorAdvancedIndexing.cpp, masked_scatter.
    """
    copied = x.numel() * mask.element_size() if mask.numel() != x.numel() else 0
    return tuple(size for size in (x.numel() * _INT64_BYTES, copied) if size)


def masked_scatter_backward(
    grad: torch.Tensor, mask: torch.Tensor, sizes: Sequence[int], *_args: Any, **_kwargs: Any
) -> tuple[int, ...]:
    """The mask for every element, and for each one that was written where it lies, 64 bits for each dimension.

    Source: torch v2.13 aten/src/ATen/native/TensorAdvancedIndexing.cpp, masked_scatter_backward_symint;
    cuda/IndexKernel.cpp, masked_select_out_cuda_impl; cuda/Nonzero.cu, nonzero_cuda_out_impl.
    """
    copied = grad.numel() * mask.element_size() if mask.numel() != grad.numel() else 0
    return tuple(size for size in (copied, math.prod(sizes) * grad.dim() * _INT64_BYTES) if size)


def sort(x: torch.Tensor, *_args: Any, **_kwargs: Any) -> tuple[int, ...]:
    """The positions to be sorted along, and copies of keys and positions to sort between.

    Rows of at most 4096 elements are sorted in place, without any of these: there it is a bound.
    Source: torch v2.13 aten/src/ATen/native/cuda/SortStable.cu, launch_stable_sort_kernel; Sort.h,
    should_use_small_sort; cub's DeviceRadixSort on separate input and output.
    """
    positions = x.numel() * _INT64_BYTES
    return positions, positions, _bytes(x)


def product(a: torch.Tensor, b: torch.Tensor, *_args: Any, **_kwargs: Any) -> tuple[int, ...]:
    """A copy of each factor that cuBLAS cannot read where it lies: neither its rows nor its columns are dense.

    Source: torch v2.13 aten/src/ATen/native/cuda/Blas.cpp, prepare_matrix_for_cublas, prepare_batch_matrix_for_cublas.
    """
    return tuple(_bytes(factor) for factor in (a, b) if not _blas_reads(factor))


def added_product(_bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
    """The same; the added tensor takes none: it is read by the epilogue or copied into the result.

    Source: torch v2.13 aten/src/ATen/native/cuda/Blas.cpp, addmm_out_cuda_impl.
    """
    return product(a, b)


def unpacked_weight(
    activations: torch.Tensor,
    _packed: torch.Tensor,
    shape: Sequence[int],
    _absmax: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[int, ...]:
    """The whole weight unpacked; with double quantisation its scales too, in fp32, before and after the offset.

    For at most 1536 rows a bound: there a kernel that unpacks as it multiplies is taken, by a table of measured shapes.
    Source: bitsandbytes 0.50 backends/cuda/ops.py, _gemm_4bit_use_custom_cuda, _dequant_linear_fallback.
    """
    elements = math.prod(shape)
    nested = kwargs.get("absmax_8bit", args[3] if len(args) > 3 else None) is not None
    scales = (elements // _QUANTIZED_BLOCK * 4,) * 2 if nested else ()
    return (*scales, elements * activations.element_size())


def int8_quantized(activations: torch.Tensor, threshold: float = 0.0, *_args: Any, **_kwargs: Any) -> tuple[int, ...]:
    """Where outliers are looked for: the absolute values, and a byte for each.

    Source: bitsandbytes 0.50 backends/cuda/ops.py, int8_vectorwise_quant.
    """
    return (_bytes(activations), activations.numel()) if threshold > 0 else ()


def int8_dequantized(
    accumulated: torch.Tensor,
    _row_stats: torch.Tensor,
    _column_stats: torch.Tensor,
    dtype: torch.dtype | None = None,
    *_args: Any,
    **_kwargs: Any,
) -> tuple[int, ...]:
    """The kernel writes fp16; another dtype is converted from it.

    Source: bitsandbytes 0.50 backends/cuda/ops.py, int8_mm_dequant.
    """
    return () if dtype in (None, torch.float16) else (accumulated.numel() * 2,)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _blas_reads(matrix: torch.Tensor) -> bool:
    rows, columns = matrix.shape[-2:]
    row_stride, column_stride = matrix.stride()[-2:]
    dense_rows = column_stride == 1 and row_stride >= max(1, columns)
    dense_columns = row_stride == 1 and column_stride >= max(1, rows)
    return dense_rows or dense_columns or min(rows, columns) <= 1


INSIDE_CUDA: dict[str, TemporaryBytes] = {
    "aten._softmax_backward_data.default": softmax_backward,
    "aten._scaled_dot_product_flash_attention_backward.default": attention.flash_backward,
    "aten._scaled_dot_product_efficient_attention.default": attention.efficient_forward,
    "autofit.flex_attention_backward.default": flex.flex_backward,
    "aten.embedding_dense_backward.default": embedding_backward,
    "aten.index_put.default": index_put,
    "aten.index_put_.default": index_put,
    "aten._index_put_impl_.default": index_put,
    "aten.masked_scatter.default": masked_scatter,
    "aten.masked_scatter_backward.default": masked_scatter_backward,
    "aten.sort.default": sort,
    "aten.sort.stable": sort,
    "aten.mm.default": product,
    "aten.bmm.default": product,
    "aten.addmm.default": added_product,
    "aten.baddbmm.default": added_product,
    "bitsandbytes.gemm_4bit.default": unpacked_weight,
    "bitsandbytes.int8_vectorwise_quant.default": int8_quantized,
    "bitsandbytes.int8_mm_dequant.default": int8_dequantized,
}
"""By the operator's name; those of libraries that are not imported are left out."""


def temporaries(regime: Regime) -> dict[Any, TemporaryBytes]:
    """Return the table of in-kernel temporaries of a regime's device; empty for a CPU rank, whose counter sees none."""
    if regime.device != "cuda":
        return {}
    table = dict(INSIDE_CUDA)
    backward = attention.efficient_backward(regime)
    table["aten._scaled_dot_product_efficient_attention_backward.default"] = backward
    found = {_operator(name): entry for name, entry in table.items()}
    return {operator: entry for operator, entry in found.items() if operator is not None}


def _operator(name: str) -> Any:
    found: Any = torch.ops
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
