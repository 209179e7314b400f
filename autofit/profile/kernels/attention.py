"""Which attention kernel CUDA runs, and what it allocates inside.

A CPU has one fused kernel, and takes s^2 memory where that does not apply. CUDA has three: flash, memory-efficient and
none ("math"), each with conditions. What a fused kernel returns and keeps for backward is what torch's own meta
functions of that kernel say; this module chooses between them and knows their insides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import transformers.modeling_utils
from msgspec import Struct
from torch.nn import functional

from autofit.errors import InputError
from autofit.profile.dtypes import DTYPES
from autofit.spec.profile import Regime

aten = torch.ops.aten
HALVES = (torch.float16, torch.bfloat16)
Kernel = Literal["flash", "efficient", "math"]

MAX_FLASH_HEAD_SIZE = 256
"""Source: torch v2.13 aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, check_head_dim_size_flash."""
FIRST_EFFICIENT_WITH_GROUPS = (2, 14)
"""torch release from which the memory-efficient kernel takes keys shared by queries.

Source: pytorch pull request 191085; before, can_use_mem_efficient_attention in sdp_utils.cpp refuses them."""
_FLASH_ALIGNMENT = 8
_MASK_ALIGNMENT = 8
_MAX_SPLITS = 200


class _Query(Struct, frozen=True):
    """What the choice depends on."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    is_causal: bool
    enable_gqa: bool

    @property
    def head_sizes(self) -> tuple[int, int, int]:
        return self.query.shape[-1], self.key.shape[-1], self.value.shape[-1]

    @property
    def groups(self) -> bool:
        """Whether queries share keys."""
        return self.query.shape[1] != self.key.shape[1]

    @property
    def is_plain(self) -> bool:
        """Four dimensions, one batch size, last dimensions dense, heads that match or may be shared."""
        tensors = (self.query, self.key, self.value)
        if any(t.dim() != 4 or t.stride(-1) != 1 for t in tensors) or len({t.shape[0] for t in tensors}) > 1:
            return False
        same_heads = self.key.shape[1] == self.value.shape[1]
        return same_heads and (not self.groups or (self.enable_gqa and self.query.shape[1] % self.key.shape[1] == 0))


def choose_kernel(asked: _Query, regime: Regime, torch_release: tuple[int, int]) -> Kernel:
    """Flash where the device has it, without a mask, in half precision; else memory-efficient; else s^2 scores.

    Until torch 2.14 the memory-efficient kernel takes no keys that queries share, so fp32, or a GPU before 8.0, takes
    s^2 there. Source: torch v2.13 aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, select_sdp_backend,
    can_use_flash_attention, can_use_mem_efficient_attention.
    """
    if asked.is_plain and regime.flash_kernel and regime.sdpa_kernel == "auto" and _fits_flash(asked):
        return "flash"
    if asked.is_plain and _fits_efficient(asked, regime, torch_release):
        return "efficient"
    return "math"


def _fits_flash(asked: _Query) -> bool:
    head_size, *others = asked.head_sizes
    same_sizes = all(size == head_size for size in others) and head_size <= MAX_FLASH_HEAD_SIZE
    square = not asked.is_causal or asked.query.shape[2] == asked.key.shape[2]
    return asked.mask is None and asked.query.dtype in HALVES and same_sizes and square


def _fits_efficient(asked: _Query, regime: Regime, torch_release: tuple[int, int]) -> bool:
    """Flash runs from compute capability 8.0 on, where also the other kernel knows bf16 and aligns fp32 by 4."""
    head_size, key_size, value_size = asked.head_sizes
    dtype = asked.query.dtype
    known = dtype in (torch.float16, torch.float32) or (dtype == torch.bfloat16 and regime.flash_kernel)
    alignment = 8 if dtype in HALVES else 4 if regime.flash_kernel else 1
    aligned = head_size == key_size and head_size % alignment == 0 and value_size % alignment == 0
    return known and aligned and (not asked.groups or torch_release >= FIRST_EFFICIENT_WITH_GROUPS)


def attention_as_on_cuda(regime: Regime) -> Callable[..., torch.Tensor]:
    """The flash-attn package has no masks: it leaves padding out, so a sequence is counted at its longest.

    Its kernels keep and allocate what torch's copy of them does. Source: flash-attn 2.8
    csrc/flash_attn/flash_api.cpp, mha_fwd, mha_bwd; flash_attn/flash_attn_interface.py, FlashAttnFunc.
    """
    release = torch_release()

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002 - the operator's own signature
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if regime.attention == "flash_attention_2":
            _insist_on_flash_attn(query, regime)
            return _flash(query, key, value, dropout_p, is_causal=is_causal or attn_mask is not None, scale=scale)
        if regime.sdpa_kernel == "efficient":
            key, value = _for_every_head(key, query), _for_every_head(value, query)
        asked = _Query(query, key, value, attn_mask, is_causal, enable_gqa)
        kernel = choose_kernel(asked, regime, release)
        if kernel == "flash":
            return _flash(query, key, value, dropout_p, is_causal=is_causal, scale=scale)
        if kernel == "efficient":
            return _efficient(asked, dropout_p, scale)
        mask = None if attn_mask is None else _additive(attn_mask, query.dtype)
        math = aten._scaled_dot_product_attention_math
        out: torch.Tensor = math(
            query, key, value, mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )[0]
        return out

    return attend


@contextmanager
def flash_attn_in_transformers(regime: Regime) -> Iterator[None]:
    """A query in fp32 is cast with its keys and values; keys that queries share are not repeated; nothing is copied.

    For sequences of equal length. Put in place of transformers' function for sdpa, for a model is built for sdpa where
    flash-attn cannot be imported. Source: transformers 5.23 integrations/flash_attention.py, flash_attention_forward,
    get_target_dtype; 4.48 the same.
    """
    functions: Any = getattr(transformers.modeling_utils, "ALL_ATTENTION_FUNCTIONS", None)
    if regime.attention != "flash_attention_2" or regime.batching != "equal" or functions is None:
        yield
        return
    sdpa = functions["sdpa"]
    functions["sdpa"] = _flash_attention_forward(regime)
    try:
        yield
    finally:
        functions["sdpa"] = sdpa


def _flash_attention_forward(regime: Regime) -> Callable[..., tuple[torch.Tensor, None]]:
    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,  # noqa: FBT001 - transformers' own signature
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if query.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):  # autocast casts them itself
            query, key, value = (tensor.to(DTYPES[regime.weights_dtype]) for tensor in (query, key, value))
        value_size, padding = value.shape[-1], query.shape[-1] - value.shape[-1]
        if padding:
            value = functional.pad(value, (0, padding))
        causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
        out = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, scale=scaling, is_causal=causal, enable_gqa=True
        )
        out = out.transpose(1, 2)
        return out[..., :value_size] if padding else out, None

    return forward


def torch_release() -> tuple[int, int]:
    """Major and minor number of the installed torch."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _for_every_head(shared: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A pinned kernel that takes no shared keys is given copies of them, or torch would refuse it."""
    if torch_release() >= FIRST_EFFICIENT_WITH_GROUPS or shared.shape[1] == query.shape[1]:
        return shared
    return shared.repeat_interleave(query.shape[1] // shared.shape[1], dim=1)


def _insist_on_flash_attn(query: torch.Tensor, regime: Regime) -> None:
    if query.dtype in HALVES and query.shape[-1] <= MAX_FLASH_HEAD_SIZE and regime.flash_kernel:
        return
    raise InputError(
        f"flash-attn 2 cannot run here: it needs a GPU of compute capability 8.0, fp16 or bf16, and heads of at most "
        f"{MAX_FLASH_HEAD_SIZE}; the query is {query.dtype} with heads of {query.shape[-1]}",
        to_fix="use --attention sdpa, or compute in bf16 on a recent GPU",
    )


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float,
    *,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """Heads are padded to a multiple of 8 before, and cut after. Kept: output, fp32 row sums, 24 bytes of random state.

    Source: torch v2.13 aten/src/ATen/native/transformers/attention.cpp, pad_last_dim; torch/_meta_registrations.py,
    meta__scaled_dot_product_flash_attention.
    """
    head_size = query.shape[-1]
    padding = -head_size % _FLASH_ALIGNMENT
    if padding:
        query, key, value = (functional.pad(tensor, (0, padding)) for tensor in (query, key, value))
    scale = head_size**-0.5 if scale is None else scale
    attend = aten._scaled_dot_product_flash_attention
    out: torch.Tensor = attend(query, key, value, dropout_p, is_causal, scale=scale)[0]
    return out[..., :head_size] if padding else out


def _efficient(asked: _Query, dropout_p: float, scale: float | None) -> torch.Tensor:
    """The mask becomes additive, its rows aligned to 8, and stands for every head without a copy.

    Kept: output, and fp32 row sums, their number rounded up to 32. Source: torch v2.13
    aten/src/ATen/native/transformers/attention.cpp, convert_boolean_attn_mask_, preprocess_mask, pad_bias;
    torch/_meta_registrations.py, meta__scaled_dot_product_efficient_attention.
    """
    query, key, value = asked.query, asked.key, asked.value
    bias = None
    if asked.mask is not None:
        bias = _aligned(_additive(asked.mask, query.dtype))
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    keeps = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    out: torch.Tensor = aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, keeps, dropout_p, asked.is_causal, scale=scale
    )[0]
    return out


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as what is added to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.where(mask, 0.0, torch.full((), float("-inf"), dtype=dtype))


def _aligned(bias: torch.Tensor) -> torch.Tensor:
    """The mask, copied into longer rows if they do not begin at multiples of 8 elements."""
    if all(stride % _MASK_ALIGNMENT == 0 for stride in bias.stride()[:-1]):
        return bias
    columns = bias.shape[-1]
    return functional.pad(bias, (0, -columns % _MASK_ALIGNMENT))[..., :columns]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def flash_backward(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *_args: Any, **_kwargs: Any
) -> tuple[int, ...]:
    """Softmax's row sums and the accumulator of dq in fp32; dk, dv for every head where queries share keys.

    Shapes (batch, heads, tokens, head size). A gradient that is not dense in (batch, tokens, heads, head size) is
    copied first. Source: torch v2.13 aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd, and
    attention_backward.cu, _flash_attention_backward; the same in flash-attn 2.8.
    """
    batch, heads, tokens, head_size = query.shape
    rounded_tokens = _round_up(tokens, 128)
    rounded_size = _round_up(head_size, 32 if head_size <= 128 else 64)
    copied = 0 if grad_out.transpose(1, 2).is_contiguous() else grad_out.numel() * grad_out.element_size()
    row_sums = batch * heads * rounded_tokens * 4
    accumulator = batch * rounded_tokens * heads * rounded_size * 4
    expanded = batch * key.shape[2] * heads * head_size * query.element_size() if key.shape[1] != heads else 0
    return tuple(size for size in (copied, row_sums, accumulator, expanded, expanded) if size)


def efficient_forward(
    query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_args: Any, **_kwargs: Any
) -> tuple[int, ...]:
    """An fp32 accumulator of the output, for half precision and heads larger than 128.

    Source: torch v2.13 mem_eff_attention/kernel_forward.h, kNeedsOutputAccumulatorBuffer (the kernels that hold the
    output in registers take at most 128, kernels/cutlassF.h).
    """
    if query.dtype not in HALVES or max(query.shape[-1], value.shape[-1]) <= 128:
        return ()
    return (query.shape[0] * query.shape[1] * query.shape[2] * value.shape[-1] * 4,)


def efficient_backward(regime: Regime) -> Callable[..., tuple[int, ...]]:
    """In fp32 `delta`, a number for each row, and a workspace in which dq is accumulated.

    dq by blocks of queries, with 16 bytes before each. Heads larger than 128 in half precision accumulate dk and dv as
    well, in at most 200 pieces or one for each head. Inputs in fp32 have delta computed before the kernel, from
    products as large as the output. A gradient that is not dense in (batch, tokens, heads, head size) is copied first.
    Where queries share keys (torch 2.14), dk and dv for every head.
    Source: torch v2.13 mem_eff_attention/kernel_backward.h, workspace_size, kNeedsAccumGradQ, kKernelComputesDelta;
    attention_backward.cu, _efficient_attention_backward; kernels/cutlassB.h for the blocks.
    """

    def inside(
        grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[int, ...]:
        batch, heads, tokens, head_size = query.shape
        largest = max(head_size, value.shape[-1])
        is_half = query.dtype in HALVES
        rows = 128 if is_half and largest > 64 else 64
        columns = 128 if rows == 128 and largest <= 128 and regime.flash_kernel else 64
        block = rows * columns * 4 + 16
        workspace = batch * heads * -(-tokens // rows) * -(-head_size // columns) * block
        if is_half and largest > 128:
            pieces = batch * heads + _MAX_SPLITS
            workspace += pieces * columns * 4 * (_round_up(head_size, rows) + _round_up(value.shape[-1], rows))
        copied = 0 if grad_out.transpose(1, 2).is_contiguous() else grad_out.numel() * grad_out.element_size()
        delta = batch * heads * tokens * 4
        before = 0 if is_half else grad_out.numel() * 4 + delta
        shared = key.shape[1] != heads
        expanded = [batch * heads * t.shape[2] * t.shape[3] * t.element_size() for t in (key, value) if shared]
        return tuple(size for size in (copied, delta, max(before, workspace), *expanded) if size)

    return inside
