"""torch's flex_attention, compiled for a GPU, as transformers calls it; and the making of its block masks.

Everything around the compiled functions is transformers' own code, run as it is: which keys are repeated, how sinks are
added, what a mask is made of. In place of the compiled functions stand one operator each for forward and backward, with
what they allocate and keep, and a block mask made of as many blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch
import transformers
from msgspec import Struct
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from autofit.errors import InputError
from autofit.spec.profile import Regime

BLOCK_TOKENS = 128
"""Queries, and keys, of one block of a mask. Source: torch v2.13 torch/nn/attention/flex_attention.py,
_DEFAULT_SPARSE_BLOCK_SIZE, which transformers leaves as it is."""
SMALLEST_HEAD = 16
"""Source: torch v2.13 torch/_inductor/kernel/flex/flex_attention.py, flex_attention ("NYI: embedding dimension")."""
_INTEGRATION = "transformers.integrations.flex_attention"
_MASKS = "transformers.masking_utils"

_library = torch.library.Library("autofit", "DEF")
_library.define("flex_attention(Tensor query, Tensor key, Tensor value, bool is_causal) -> (Tensor, Tensor, Tensor)")
_library.define(
    "flex_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, "
    "Tensor grad_logsumexp) -> (Tensor, Tensor, Tensor)"
)


def _forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _is_causal: bool) -> Any:  # noqa: FBT001
    from torch._higher_order_ops.flex_attention import flex_attention_fake_impl

    return flex_attention_fake_impl(query, key, value, None, (), 1.0, {})  # type: ignore[arg-type]


def _backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    grad_logsumexp: torch.Tensor,
) -> Any:
    from torch._higher_order_ops.flex_attention import flex_attention_backward_fake_tensor_mode as fake

    joint: Any = None
    return fake(query, key, value, out, logsumexp, grad_out, grad_logsumexp, joint, joint, (), 1.0, {})[:3]


_library.impl("flex_attention", _forward, "Meta")
_library.impl("flex_attention_backward", _backward, "Meta")


@register_flop_formula(torch.ops.autofit.flex_attention, get_raw=True)
def _forward_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_args: Any, **_kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, *_for_every_head(query, key, value)))


@register_flop_formula(torch.ops.autofit.flex_attention_backward, get_raw=True)
def _backward_flops(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_args: Any, **_kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(grad_out.shape, query.shape, *_for_every_head(query, key, value)))


def _for_every_head(query: torch.Tensor, *shared: torch.Tensor) -> list[tuple[int, ...]]:
    """Shapes of what queries share, with a head for each of theirs: arithmetic is not shared."""
    return [(*tensor.shape[:1], query.shape[1], *tensor.shape[2:]) for tensor in shared]


class _CompiledFlexAttention(torch.autograd.Function):
    """Kept from forward to backward: query, key, value, output, fp32 row sums, and the block mask.

    In forward an fp32 number more for each row and head (`max_scores`), until the kernel has run, and the row sums
    once more, as natural logarithms, as transformers asks for them.
    Source: torch v2.13 torch/_inductor/kernel/flex/flex_attention.py, flex_attention (`logsumexp`, `max_scores`);
    torch/_higher_order_ops/flex_attention.py, FlexAttentionAutogradOp; torch/nn/attention/flex_attention.py,
    _finalize_outputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        is_causal: bool,  # noqa: FBT001 - torch passes by position
        *mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, logsumexp, _ = torch.ops.autofit.flex_attention(query, key, value, is_causal)
        ctx.save_for_backward(query, key, value, out, logsumexp, *mask)
        return out, logsumexp * math.log(2)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor, grad_logsumexp: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, logsumexp, *mask = ctx.saved_tensors
        if grad_out.stride() != out.stride():
            grad_out = torch.empty_like(out).copy_(grad_out)
        grads = torch.ops.autofit.flex_attention_backward(grad_out, query, key, value, out, logsumexp, grad_logsumexp)
        return (*grads, *[None] * (1 + len(mask)))


def flex_backward(grad_out: torch.Tensor, *_args: Any, **_kwargs: Any) -> tuple[int, ...]:
    """An fp32 number for each row and head: `delta`, and another for the gradient of the row sums.

    The gradients of queries, keys and values are the results, in their own dtypes, those of shared keys added up inside
    the kernel. If the compiler fuses the two into one the second is not there: a bound.
    Source: torch v2.13 torch/_inductor/kernel/flex/flex_attention.py, flex_attention_backward (`delta`,
    `grad_lse_exp2`, `grad_query`, `broadcasted_grad_value`).
    """
    rows = math.prod(grad_out.shape[:-1])
    return rows * 4, rows * 4


class _QueryOnCuda(Struct, frozen=True):
    """A query on fake CPU memory that says it is on a GPU: transformers asks for no row sums on a CPU."""

    tensor: torch.Tensor
    is_causal: bool

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


def _attention_forward(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap transformers' function, and refuse what its compiled form refuses, or what is not counted."""

    def forward(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        if kwargs.get("dropout", 0.0):
            raise InputError(
                "flex_attention has no dropout, and the model's config asks for it in attention",
                to_fix="use --attention sdpa or eager, or set the config's attention dropout to 0",
            )
        if kwargs.get("position_bias") is not None:
            raise InputError(
                f"{type(module).__name__} learns a bias that it adds to its scores; what flex_attention allocates for "
                "that bias's gradient is not modelled",
                to_fix="use --attention sdpa or eager",
            )
        smallest = min(query.shape[-1], value.shape[-1])
        if smallest < SMALLEST_HEAD:
            raise InputError(
                f"flex_attention takes heads of at least {SMALLEST_HEAD}; the model has {smallest}",
                to_fix="use --attention sdpa or eager",
            )
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        if len({tensor.dtype for tensor in (query, key, value)}) > 1:
            raise InputError(
                f"flex_attention takes one dtype; queries are {query.dtype}, keys {key.dtype}, values {value.dtype}",
                to_fix="use --attention sdpa or eager, or train under autocast (--precision bf16)",
            )
        is_causal = bool(getattr(module, "is_causal", True))
        return plain(module, _QueryOnCuda(query, is_causal), key, value, *args, **kwargs)

    return forward


def _compiled(
    query: _QueryOnCuda, key: torch.Tensor, value: torch.Tensor, *_args: Any, block_mask: Any = None, **kwargs: Any
) -> Any:
    """What torch.compile makes of flex_attention, in transformers' form."""
    parts = () if block_mask is None else block_mask.as_tuple()
    mask = [part for part in parts if isinstance(part, torch.Tensor)]
    out, logsumexp = _CompiledFlexAttention.apply(query.tensor, key, value, query.is_causal, *mask)  # type: ignore[no-untyped-call]
    aux = kwargs.get("return_aux")
    if aux is None:
        return (out, logsumexp) if kwargs.get("return_lse") else out
    from torch.nn.attention.flex_attention import AuxOutput

    return out, AuxOutput(lse=logsumexp)


def block_mask(
    mask_mod: Callable[..., torch.Tensor],
    B: int,  # noqa: N803 - torch's own names
    H: int | None,  # noqa: N803
    Q_LEN: int,  # noqa: N803
    KV_LEN: int,  # noqa: N803
    **_kwargs: Any,
) -> Any:
    """A block mask is compiled with what it is made from, so there is no mask of s^2: each block's entries are summed.

    Of a micro-batch of b sequences and n blocks of 128 tokens b n^2 numbers are there in 64 bits for a moment, and
    b n^2 in 32 bits, four times, from forward to the end of backward. What the compiler does not fuse (sorting) runs as
    without it; what it may fuse besides is counted. A test compiles it for a CPU: no buffer there is larger.
    Source: torch v2.13 torch/nn/attention/flex_attention.py, create_block_mask, _convert_mask_to_block_mask,
    _dense_to_ordered (`fallback_to_eager`); transformers 5.23 masking_utils.py, flex_attention_mask (`_compile=True`).
    """
    from torch.nn.attention.flex_attention import _create_sparse_block_from_block_mask

    rows, columns = (-(-length // BLOCK_TOKENS) for length in (Q_LEN, KV_LEN))
    sums = torch.empty(B, H or 1, rows, columns, dtype=torch.int64)
    blocks = (sums > 0).to(torch.int8), (sums == BLOCK_TOKENS**2).to(torch.int8)
    del sums
    return _create_sparse_block_from_block_mask(blocks, mask_mod, (Q_LEN, KV_LEN), BLOCK_TOKENS, BLOCK_TOKENS)


def _has_holes(*_args: Any, **_kwargs: Any) -> bool:
    return False


@contextmanager
def flex_in_transformers(regime: Regime) -> Iterator[None]:
    """transformers' flex_attention with its compiled functions replaced; nothing where the regime has another.

    Raises:
        InputError: torch has no backward for it on the device, or the installed transformers calls it in another way.
    """
    if regime.attention != "flex_attention":
        yield
        return
    if regime.device != "cuda":
        raise InputError(
            "torch's flex_attention has no backward on a CPU",
            to_fix="use --attention sdpa or eager",
        )
    with ExitStack() as stack:
        try:
            integration, masks = import_module(_INTEGRATION), import_module(_MASKS)
            functions: Any = import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
            _put(stack, integration, "compile_friendly_flex_attention", _compiled)
            _put(stack, integration, "create_block_mask", block_mask)
            _put(stack, masks, "create_block_mask", block_mask)
            if regime.batching == "padded":
                _put(stack, masks, "fast_all", _has_holes)
        except (ImportError, AttributeError) as error:
            raise InputError(
                f"transformers {transformers.__version__} calls flex_attention in a way that is not traced: {error}",
                to_fix="install transformers 5.23, or use --attention sdpa",
            ) from error
        plain = functions["flex_attention"]
        functions["flex_attention"] = _attention_forward(plain)
        try:
            yield
        finally:
            del functions["flex_attention"]  # uncovers the library's own


def _put(stack: ExitStack, module: Any, name: str, new: Callable[..., Any]) -> None:
    stack.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, new)
