"""CUDA's semantics on fake CPU tensors; figures are worked out by hand from the source that an entry names."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from autofit.errors import InputError
from autofit.memory.tape import CUDA_BLOCK_BYTES
from autofit.profile.fakes import fill_with_fakes
from autofit.profile.kernels import kernels_of, substitutes, temporaries
from autofit.profile.kernels.attention import FIRST_EFFICIENT_WITH_GROUPS, efficient_backward, torch_release
from autofit.profile.kernels.autocast import autocast_as_on_cuda, cuda_policy
from autofit.profile.kernels.inside import (
    INSIDE_CUDA,
    embedding_backward,
    index_put,
    masked_scatter,
    masked_scatter_backward,
    product,
    sort,
    unpacked_weight,
)
from autofit.profile.kernels.table import markdown
from autofit.profile.recorder import RawSegment, Recorder
from autofit.spec.configuration import Lora, Quantization
from autofit.spec.profile import INSIDE
from tests.profile.tiny import CONFIGS, a_regime, every_layer_traced, highest_alive

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "cuda_semantics.md"
ON_CUDA = a_regime(device="cuda")
ON_TURING = a_regime(device="cuda", flash_kernel=False)
PINNED = a_regime(device="cuda", sdpa_kernel="efficient")
FLASH, EFFICIENT = "ScaledDotProductFlashAttention", "ScaledDotProductEfficientAttention"

# Names as on torch's page on automatic mixed precision, in its list of what CUDA autocasts to float32.
DOCUMENTED_FP32 = {
    "cumsum": lambda x: x.cumsum(0),
    "exp": torch.exp,
    "layer_norm": lambda x: functional.layer_norm(x, (8,)),
    "log_softmax": lambda x: functional.log_softmax(x, -1),
    "logsumexp": lambda x: torch.logsumexp(x, 0),
    "mse_loss": lambda x: functional.mse_loss(x, x),
    "norm": lambda x: torch.ops.aten.norm.Scalar(x, 2),
    "norm of rows": lambda x: torch.ops.aten.norm.ScalarOpt_dim(x, 2, [-1]),
    "pow": lambda x: x.pow(2),
    "rsqrt": torch.rsqrt,
    "softmax": lambda x: functional.softmax(x, -1),
    "softplus": functional.softplus,
    "sum": lambda x: x.sum(-1),
}
DOCUMENTED_HALF = {"matmul": lambda x: x.float() @ x.float().t(), "mv": lambda x: x.float().mv(x.float()[0])}


def recorded(regime: Any, run: Any) -> RawSegment:
    """Record what `run` allocates on fake tensors with a regime's kernels."""
    recorder = Recorder(temporaries(regime), substitutes(regime))
    recorder.mark("layer", "forward", 0)
    with FakeTensorMode(), kernels_of(regime), recorder:
        run(recorder)
    return recorder.segments[-1]


def birth_sizes(segment: RawSegment) -> list[int]:
    """Bytes of everything born, in order."""
    return [event[0] for event in segment.events if len(event) == 2]


def kept_bytes(regime: Any, run: Any) -> int:
    """Bytes that autograd keeps for a function's backward, besides its input."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode(), kernels_of(regime):
        x = torch.empty(64, 64, dtype=torch.bfloat16, requires_grad=True)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            out = run(x)
        kept.pop(id(x.untyped_storage()), None)
        del out
    return sum(kept.values())


def test_every_operator_that_cuda_autocasts_has_a_policy():
    """The lists in torch's header name exactly the operators for which torch has a kernel at CUDA's autocast key."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")
    assert {f"aten::{name}" for name in cuda_policy()} == set(registered)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*DOCUMENTED_FP32, *DOCUMENTED_HALF])
def test_autocast_gives_the_dtype_that_torch_documents_for_cuda(name, dtype):
    """Operators of the page's float32 list return fp32 for halves, those of the other list halves for fp32."""
    with FakeTensorMode(), autocast_as_on_cuda(), torch.autocast("cpu", dtype):
        x = torch.empty(8, 8, dtype=dtype)
        out = {**DOCUMENTED_FP32, **DOCUMENTED_HALF}[name](x)
    assert out.dtype == (torch.float32 if name in DOCUMENTED_FP32 else dtype)


def test_autocast_promotes_and_refuses_as_on_cuda():
    """addcmul takes the widest dtype; binary cross entropy is refused; a dtype that the caller chose stays."""
    with FakeTensorMode(), autocast_as_on_cuda(), torch.autocast("cpu", torch.bfloat16):
        half, full = torch.empty(8, dtype=torch.bfloat16), torch.empty(8)
        assert torch.addcmul(half, half, full).dtype == torch.float32
        assert torch.addcmul(half, half, half).dtype == torch.bfloat16
        assert functional.softmax(half, -1, dtype=torch.bfloat16).dtype == torch.bfloat16
        assert torch.ones(8, dtype=torch.long).sum().dtype == torch.long
        with pytest.raises(RuntimeError, match="unsafe to autocast"):
            functional.binary_cross_entropy(half, half)


def test_who_asks_whether_autocast_is_on_means_cuda():
    """Without a device's name torch answers for CUDA; in a trace that is what is on, and afterwards it is off again."""
    with autocast_as_on_cuda():
        assert not torch.is_autocast_enabled()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.is_autocast_enabled()
            assert not torch.is_autocast_enabled("cuda")
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.is_autocast_enabled()


def test_only_layers_that_are_not_quantised_convert_their_adapters_input():
    """Under autocast peft makes a layer's seven inputs fp32 for LoRA, and their gradients, and none for QLoRA."""
    config = {**CONFIGS["llama"], "num_hidden_layers": 2, "intermediate_size": 320}
    num_tokens, widths = 128, (128, 320)
    converted = {}
    for method, quantization in (("lora", None), ("qlora", Quantization())):
        regime = a_regime(method=method, quantization=quantization, lora=Lora(), device="cuda", autocast="bf16")
        (segments,) = every_layer_traced(config, regime, [(2, 64)])
        births = [size for segment in segments if segment.layer == 1 for size in birth_sizes(segment)]
        converted[method] = [births.count(4 * num_tokens * width) for width in widths]
    attention_and_mlp, down = (a - b for a, b in zip(converted["lora"], converted["qlora"], strict=True))
    assert (attention_and_mlp, down) == (2 * 6, 2)


def test_operators_that_only_a_cpu_casts_are_let_through():
    """A CPU's autocast runs traces, paddings and cross entropy in fp32; CUDA's lists name none of them."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        x = torch.empty(8, 8, dtype=torch.bfloat16)
        calls = (torch.trace, lambda x: functional.pad(x[None], (1, 1), "reflect"))
        assert {call(x).dtype for call in calls} == {torch.float32}
        with autocast_as_on_cuda():
            assert {call(x).dtype for call in calls} == {torch.bfloat16}


def test_a_cpu_has_its_own_kernels_again_afterwards():
    """After a regime for a GPU a CPU's is traced with the CPU's casts, dropout, softmax and attention."""
    with kernels_of(a_regime(device="cuda", autocast="bf16")):
        pass
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        x = torch.empty(1, 2, 16, 16, dtype=torch.bfloat16, requires_grad=True)
        assert functional.layer_norm(x, (16,)).dtype == torch.bfloat16
        assert functional.dropout(x).grad_fn.name() == "MulBackward0"
        assert "ForCpu" in functional.scaled_dot_product_attention(x, x, x).grad_fn.name()
        assert torch.addcmul(x, x, x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "norms"),
    [
        (transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=32), 3),
        (transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50), 4),
    ],
)
def test_layer_norms_of_a_real_model_return_fp32_under_cudas_autocast(config, norms):
    """Each layer norm of GPT-2 and of BERT does, also after a linear layer that returned bf16."""
    seen = Counter()
    with torch.device("meta"):
        model = transformers.AutoModelForMaskedLM if config.model_type == "bert" else transformers.AutoModelForCausalLM
        built = model.from_config(config)
    with FakeTensorMode():
        fill_with_fakes(built)
        for module in built.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_hook(lambda _m, args, out: seen.update([(args[0].dtype, out.dtype)]))
        with autocast_as_on_cuda(), torch.autocast("cpu", torch.bfloat16):
            built(input_ids=torch.zeros(1, 8, dtype=torch.long))
    assert sum(seen.values()) == norms
    assert {out for _, out in seen} == {torch.float32}


def test_a_model_with_rms_norms_is_the_same_under_both_autocasts(monkeypatch):
    """Llama's norms, rotary embedding and loss ask for fp32 themselves: the two policies allocate the same tensors."""
    regime = a_regime(device="cuda", weights_dtype="float32", autocast="bf16")
    config = {**CONFIGS["llama"], "num_hidden_layers": 2}
    (ours,) = every_layer_traced(config, regime, [(2, 64)])
    monkeypatch.setattr("autofit.profile.kernels.autocast_as_on_cuda", lambda: kernels_of(a_regime()))
    (theirs,) = every_layer_traced(config, regime, [(2, 64)])
    assert [birth_sizes(segment) for segment in ours] == [birth_sizes(segment) for segment in theirs]


def test_gpt2_needs_more_under_cudas_autocast():
    """Its residual stream is fp32 after each norm on a GPU, and bf16 on a CPU."""
    config = {**CONFIGS["gpt2"], "n_layer": 2, "attn_pdrop": 0, "resid_pdrop": 0}
    peaks = {}
    for device in ("cpu", "cuda"):
        regime = a_regime(device=device, weights_dtype="float32", autocast="bf16")
        (segments,) = every_layer_traced(config, regime, [(2, 256)])
        peaks[device] = highest_alive(segments)
    assert peaks["cuda"] > 1.02 * peaks["cpu"]


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize(("dtype", "num_born"), [(torch.float16, 1), (torch.bfloat16, 2)])
def test_a_softmax_to_fp32_is_one_kernel_on_cuda_for_fp16_only(name, dtype, num_born):
    """Of fp16 one fp32 result is born; bf16 is converted first, and the copy dies with the operator."""

    def run(recorder: Recorder) -> None:
        x = torch.zeros(512, 512, dtype=dtype)
        recorder.mark("layer", "forward", 1)
        for call in (getattr(functional, name), getattr(torch, name)):
            out = call(x, dim=-1, dtype=torch.float32)
            assert out.dtype == torch.float32

    assert birth_sizes(recorded(ON_CUDA, run)) == [512 * 512 * 4] * 2 * num_born


def test_softmax_returns_its_gradient_in_halves():
    """The gradient of an fp16 softmax to fp32 comes back in fp16 from the one kernel."""
    with FakeTensorMode(), kernels_of(ON_CUDA):
        x = torch.zeros(8, 8, dtype=torch.float16, requires_grad=True)
        functional.softmax(x, dim=-1, dtype=torch.float32).sum().backward()
        assert x.grad.dtype == torch.float16


def test_dropout_keeps_a_byte_for_each_element_on_cuda():
    """A bool mask, where a CPU keeps noise in the input's dtype; nothing when it does not train or drops nothing."""
    elements = 64 * 64
    assert kept_bytes(ON_CUDA, lambda x: functional.dropout(x, 0.1)) == elements
    assert kept_bytes(a_regime(), lambda x: functional.dropout(x, 0.1)) == 2 * elements
    assert kept_bytes(ON_CUDA, lambda x: functional.dropout(x, 0.1, training=False)) == 0
    assert kept_bytes(ON_CUDA, lambda x: functional.dropout(x, 0.0)) == 0


def test_layer_norm_keeps_its_statistics_in_fp32_on_cuda():
    """Of 64 rows in bf16, the two statistics take 512 bytes, twice what a CPU keeps."""

    def run(recorder: Recorder) -> None:
        x = torch.zeros(64, 32, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.zeros(32, dtype=torch.bfloat16)
        recorder.mark("layer", "forward", 1)
        functional.layer_norm(x, (32,), weight, weight).sum().backward()

    assert sorted(birth_sizes(recorded(ON_CUDA, run)))[:4].count(256) >= 2
    assert 256 not in birth_sizes(recorded(a_regime(), run))


def test_an_rms_norm_is_one_kernel_on_cuda():
    """Kept of 64 rows are the weight and an fp32 number each; a CPU keeps fp32 copies of the input."""
    weight_bytes, row_bytes = 64 * 2, 64 * 4

    def norm(x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (64,), torch.ones(64, dtype=torch.bfloat16, requires_grad=True))

    assert kept_bytes(ON_CUDA, norm) == weight_bytes + row_bytes
    assert kept_bytes(a_regime(), norm) > 2 * 64 * 64 * 4
    with FakeTensorMode(), kernels_of(ON_CUDA):
        x = torch.zeros(8, 64, dtype=torch.bfloat16, requires_grad=True)
        out = norm(x)
        out.sum().backward()
        assert (out.shape, out.dtype, x.grad.dtype) == (x.shape, x.dtype, x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_experts_products_have_the_shape_of_real_ones(dtype):
    """Tokens of two experts, forward and backward, as torch multiplies them on a CPU."""

    def results() -> list[tuple[Any, ...]]:
        tokens = torch.zeros(16, 32, dtype=dtype, requires_grad=True)
        weights = torch.zeros(2, 32, 8, dtype=dtype, requires_grad=True)
        out = torch._grouped_mm(tokens, weights, offs=torch.tensor([8, 16], dtype=torch.int32))
        out.backward(torch.ones_like(out))
        return [(tensor.shape, tensor.dtype) for tensor in (out, tokens.grad, weights.grad)]

    found: list[Any] = []
    recorded(a_regime(), lambda _recorder: found.extend(results()))
    assert found == results()


def attention_inputs(dtype: torch.dtype, heads: int = 4, shared: int = 4, head_size: int = 64) -> list[torch.Tensor]:
    """Queries, keys and values as models make them: (batch, heads, tokens, head size), views of dense projections."""
    return [
        torch.zeros(2, 64, n, head_size, dtype=dtype, requires_grad=True).transpose(1, 2)
        for n in (heads, shared, shared)
    ]


@pytest.mark.parametrize(
    ("regime", "dtype", "asked", "kernel"),
    [
        (ON_CUDA, torch.bfloat16, {"is_causal": True}, FLASH),
        (ON_CUDA, torch.bfloat16, {"is_causal": True, "enable_gqa": True}, FLASH),
        (ON_CUDA, torch.float32, {"is_causal": True}, EFFICIENT),
        (ON_CUDA, torch.bfloat16, {"mask": True}, EFFICIENT),
        (ON_TURING, torch.float16, {"is_causal": True}, EFFICIENT),
        (ON_TURING, torch.float32, {"is_causal": True}, EFFICIENT),
        (PINNED, torch.bfloat16, {"is_causal": True}, EFFICIENT),
        (PINNED, torch.float16, {"is_causal": True, "enable_gqa": True}, EFFICIENT),
    ],
)
def test_attention_takes_the_kernel_that_cuda_takes(regime, dtype, asked, kernel):
    """As select_sdp_backend chooses: by device, dtype, mask and what is pinned."""
    asked = dict(asked)
    with FakeTensorMode(), kernels_of(regime):
        query, key, value = attention_inputs(dtype, shared=2 if asked.get("enable_gqa") else 4)
        mask = torch.ones(2, 1, 64, 64, dtype=torch.bool) if asked.pop("mask", None) else None
        out = functional.scaled_dot_product_attention(query, key, value, mask, **asked)
        assert kernel in out.grad_fn.name()
        assert out.shape == query.shape


@pytest.mark.parametrize(
    ("regime", "dtype", "head_size", "shared"),
    [(ON_TURING, torch.bfloat16, 64, 4), (ON_CUDA, torch.float32, 30, 4), (ON_TURING, torch.float16, 64, 2)],
)
def test_attention_without_a_fused_kernel_makes_all_scores(regime, dtype, head_size, shared):
    """bf16 or shared keys on Turing (before torch 2.14), and heads that are not aligned: scores in fp32 are born."""
    if shared != 4 and torch_release() >= FIRST_EFFICIENT_WITH_GROUPS:
        pytest.skip("this torch's memory-efficient kernel takes shared keys")

    def run(_recorder: Recorder) -> None:
        query, key, value = attention_inputs(dtype, shared=shared, head_size=head_size)
        functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shared != 4)

    assert 2 * 4 * 64 * 64 * 4 in birth_sizes(recorded(regime, run))


def test_masked_attention_keeps_the_mask_once_and_no_scores():
    """The mask is added in the query's dtype, for all heads at once; scores are never born."""

    def run(recorder: Recorder) -> None:
        query, key, value = attention_inputs(torch.bfloat16)
        mask = torch.ones(2, 1, 64, 64, dtype=torch.bool)
        recorder.mark("layer", "forward", 1)
        functional.scaled_dot_product_attention(query, key, value, mask)

    sizes = birth_sizes(recorded(ON_CUDA, run))
    additive, output, row_sums = 2 * 64 * 64 * 2, 2 * 4 * 64 * 64 * 2, 2 * 4 * 64 * 4
    assert sorted(size for size in sizes if size > 16) == sorted([additive, output, row_sums])


def test_flash_backward_allocates_what_its_source_says():
    """Worked out by hand for 2 x 4 heads of 64, 2 of them shared, and 64 tokens rounded to 128."""

    def run(recorder: Recorder) -> None:
        query, key, value = attention_inputs(torch.bfloat16, shared=2)
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        gradient = torch.zeros(2, 64, 4, 64, dtype=torch.bfloat16).transpose(1, 2)
        recorder.mark("loss_backward", "backward")
        out.backward(gradient)

    events = recorded(ON_CUDA, run).events
    inside = [event[0] for event in events if len(event) == 2 and event[1] == INSIDE]
    row_sums, accumulator, expanded = 2 * 4 * 128 * 4, 2 * 128 * 4 * 64 * 4, 2 * 64 * 4 * 64 * 2
    assert inside == [row_sums, accumulator, expanded, expanded]


@pytest.mark.parametrize(
    ("dtype", "head_size", "regime", "sizes"),
    [
        # delta: 2 x 4 heads x 64 rows; one block of 64 queries with 64 columns, and 16 bytes
        (torch.float16, 64, ON_TURING, (2048, 8 * (64 * 64 * 4 + 16))),
        # one block of 128 queries with 128 columns on Ampere, with two of 64 columns before
        (torch.float16, 128, ON_CUDA, (2048, 8 * (128 * 128 * 4 + 16))),
        (torch.float16, 128, ON_TURING, (2048, 8 * 2 * (128 * 64 * 4 + 16))),
        # fp32: four products for each output, then their sums: more than the workspace
        (torch.float32, 64, ON_CUDA, (2048, 2 * 4 * 64 * 64 * 4 + 2048)),
        # heads of 256: dq's four blocks of 64 columns, and 208 pieces of dk and dv, 64 rows of 256
        (torch.float16, 256, ON_TURING, (2048, 8 * 4 * (128 * 64 * 4 + 16) + 208 * 64 * 4 * 512)),
    ],
)
def test_efficient_backward_allocates_what_its_source_says(dtype, head_size, regime, sizes):
    """Worked out by hand from kernel_backward.h and the blocks in cutlassB.h."""
    gradient = torch.empty(2, 64, 4, head_size, dtype=dtype, device="meta").transpose(1, 2)
    query, key, value = (torch.empty(2, 4, 64, head_size, dtype=dtype, device="meta") for _ in range(3))
    assert efficient_backward(regime)(gradient, query, key, value) == sizes


@pytest.mark.parametrize(("dtype", "autocast"), [("bfloat16", "no"), ("bfloat16", "bf16"), ("float32", "bf16")])
def test_flash_attn_casts_an_fp32_query_and_repeats_no_keys(dtype, autocast):
    """Queries in fp32, as after kbit preparation, become the weights' or autocast's bf16, with the keys' own heads."""
    regime = a_regime(device="cuda", attention="flash_attention_2", weights_dtype=dtype, autocast=autocast)
    seen: list[tuple[torch.dtype, int]] = []

    def flash(query: torch.Tensor, key: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        seen.append((query.dtype, key.shape[1]))
        return query

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), kernels_of(regime):
        patch.setattr("autofit.profile.kernels.attention._flash", flash)
        attend = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast != "no"):
            out, _ = attend(torch.nn.Module(), *attention_inputs(torch.float32, shared=2), None, is_causal=True)
    assert seen == [(torch.bfloat16, 2)]
    assert out.shape == (2, 64, 4, 64)
    assert transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"] is not attend


def test_embedding_backward_has_an_fp32_row_for_each_token():
    """Of 5 x 1000 tokens in bf16 with 64 channels: 1.28 MB, and six arrays of 64-bit numbers."""
    gradient, ids = torch.empty(5, 1000, 64, device="meta"), torch.empty(5, 1000, dtype=torch.long, device="meta")
    assert sum(embedding_backward(gradient, ids)) == 5000 * 64 * 4 + 6 * 5000 * 8


def test_index_put_sorts_only_where_it_adds():
    """Writing sorts nothing; adding to 100 rows sorts 100 numbers."""
    target, rows = torch.empty(10, 4, device="meta"), torch.empty(100, dtype=torch.long, device="meta")
    values = torch.empty(100, 4, device="meta")
    assert index_put(target, [rows], values) == ()
    assert index_put(target, [rows], values, True) == (800,) * 6


def test_writing_images_into_embeddings_counts_every_element():
    """2 x 10 tokens of 4 elements, 6 of which are images': sums in 64 bits, and where each of 24 elements lies."""
    embeddings, mask = torch.empty(2, 10, 4, device="meta"), torch.empty(2, 10, 1, dtype=torch.bool, device="meta")
    assert masked_scatter(embeddings, mask, None) == (80 * 8, 80)
    assert masked_scatter(embeddings, mask.expand(2, 10, 4).clone(), None) == (80 * 8,)
    assert masked_scatter_backward(embeddings, mask, (6, 4)) == (80, 24 * 3 * 8)


def test_a_sort_works_in_copies_of_keys_and_positions():
    """Of 10,000 numbers in 32 bits: their positions twice in 64 bits, and themselves once."""
    assert sum(sort(torch.empty(10_000, dtype=torch.int32, device="meta"))) == 10_000 * (8 + 8 + 4)


def test_products_copy_what_blas_cannot_read():
    """Rows or columns that lie dense are read where they are, however far apart; others are copied."""
    matrix = torch.empty(8, 64, 64, device="meta")
    strided = torch.empty(8, 64, 128, device="meta")[..., ::2]
    assert product(matrix, matrix.mT) == ()
    assert product(matrix[:, ::2], matrix.expand(8, 64, 64)) == ()
    assert product(strided, matrix) == (8 * 64 * 64 * 4,)


def test_a_quantised_product_unpacks_the_weight_and_its_scales():
    """4096 x 1024 weights to bf16; with double quantisation 65,536 scales to fp32, before and after the offset."""
    x, scales = torch.empty(2, 1024, dtype=torch.bfloat16, device="meta"), torch.empty(65536, device="meta")
    shape = (4096, 1024)
    assert unpacked_weight(x, x, shape, scales, 64, "nf4") == (2**23,)
    assert unpacked_weight(x, x, shape, scales, 64, "nf4", absmax_8bit=scales) == (2**18, 2**18, 2**23)


def test_attention_that_cannot_run_is_refused():
    """flash-attn 2 takes no fp32, and torch has no backward of flex_attention on a CPU."""
    with FakeTensorMode(), kernels_of(a_regime(device="cuda", attention="flash_attention_2")):
        query, key, value = attention_inputs(torch.float32)
        with pytest.raises(InputError, match="flash-attn 2 cannot run"):
            functional.scaled_dot_product_attention(query, key, value)
    with pytest.raises(InputError, match="flex_attention"), kernels_of(a_regime(attention="flex_attention")):
        pass


def test_a_cpu_rank_has_no_temporaries_in_kernels():
    """The counter of a CPU rank sees no kernel's inside, so a prediction for it has none."""
    assert temporaries(a_regime()) == {}
    assert len(temporaries(ON_CUDA)) > len(INSIDE_CUDA) / 2


def test_the_document_is_what_the_code_says():
    """docs/cuda_semantics.md holds the tables as they are made now."""
    assert markdown() in DOCUMENT.read_text(encoding="utf-8")


def _real_cases() -> dict[str, Any]:
    half = {"dtype": torch.bfloat16}

    def attend(**asked: Any) -> Any:
        def run(device: str) -> Any:
            shape = (2, 8, 512, 64)
            query, key, value = (torch.zeros(shape, **half, device=device, requires_grad=True) for _ in range(3))
            mask = torch.ones(2, 1, 512, 512, dtype=torch.bool, device=device) if asked.get("mask") else None
            return lambda: functional.scaled_dot_product_attention(query, key, value, mask).sum().backward()

        return run

    def one(function: Any, *shape: int, **options: Any) -> Any:
        def run(device: str) -> Any:
            x = torch.zeros(shape, **{**half, **options}, device=device, requires_grad=True)
            return lambda: function(x).sum().backward()

        return run

    def embed(device: str) -> Any:
        table = torch.zeros(1000, 256, **half, device=device, requires_grad=True)
        ids = torch.zeros(8, 1024, dtype=torch.long, device=device)
        return lambda: functional.embedding(ids, table).sum().backward()

    def to_fp32(x: torch.Tensor) -> torch.Tensor:
        return functional.softmax(x, -1, dtype=torch.float32)

    return {
        "flash": attend(),
        "memory-efficient": attend(mask=True),
        "softmax of bf16": one(to_fp32, 512, 2048),
        "softmax of fp16": one(to_fp32, 512, 2048, dtype=torch.float16),
        "dropout": one(lambda x: functional.dropout(x, 0.1), 512, 2048),
        "layer norm": one(lambda x: functional.layer_norm(x, (2048,)), 4096, 2048),
        "embedding": embed,
    }


@pytest.mark.gpu
@pytest.mark.parametrize("name", _real_cases())
def test_a_real_gpu_allocates_what_is_traced(name):
    """Forward and backward of one operator reach on a GPU, above their start, what the trace of it says.

    To 1 %, besides the few kB of a kernel's semaphores and partial sums. Attention on compute capability 9.0 and later
    is pinned to flash, for cuDNN's workspace is not known.
    """
    make = _real_cases()[name]
    torch.backends.cuda.enable_cudnn_sdp(False)
    run = make("cuda")
    run()
    run = make("cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated() - start

    def traced(recorder: Recorder) -> None:
        run = make("cpu")
        recorder.mark("layer", "forward", 1)
        run()

    alive = highest = 0
    for event in recorded(ON_CUDA, traced).events:
        size = -(-event[0] // CUDA_BLOCK_BYTES) * CUDA_BLOCK_BYTES
        alive += size if len(event) == 2 else -size
        highest = max(highest, alive)
    assert highest == pytest.approx(measured, rel=0.01, abs=2**16)
