"""flex_attention as it is compiled for a GPU, against what torch itself keeps and allocates on a CPU."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import masking_utils
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autofit.errors import InputError
from autofit.profile.kernels import flex, kernels_of
from autofit.profile.trace import trace
from autofit.spec.profile import MONOMIALS
from tests.profile.tiny import CONFIGS, a_regime

FLEX = a_regime(device="cuda", attention="flex_attention")
BATCH, HEADS, SHARED, TOKENS, HEAD_SIZE = 2, 4, 2, 300, 16
Shapes = Counter[tuple[tuple[int, ...], torch.dtype]]


class _Module(torch.nn.Module):
    is_causal = True


def kept(run: Any) -> Shapes:
    """Count what a function saves for backward, by shape and dtype."""
    found: Shapes = Counter()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tuple(tensor.shape), tensor.dtype] += 1
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return found


def inputs() -> tuple[torch.Tensor, ...]:
    """Make query, key and value as models do: heads are transposed, keys shared by two queries each."""
    shapes = [(BATCH, TOKENS, heads, HEAD_SIZE) for heads in (HEADS, SHARED, SHARED)]
    return tuple(torch.randn(s, dtype=torch.bfloat16).requires_grad_().transpose(1, 2) for s in shapes)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Collect the graphs of flex_attention as it is compiled with gradients, which torch refuses on CPUs only."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    torch._dynamo.reset()
    return []


@pytest.mark.slow
def test_what_is_kept_is_what_torch_keeps(graphs: list[torch.fx.GraphModule]) -> None:
    """The partition of torch's own compiler keeps the same tensors for backward, and gives the same gradients."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    def as_it_is(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    partition = min_cut_rematerialization_partition
    backend = aot_autograd(fw_compiler=as_it_is, bw_compiler=as_it_is, partition_fn=partition)
    compiled = torch.compile(flex_attention, backend=backend)
    query, key, value = inputs()
    mask = create_block_mask(lambda _b, _h, q, k: q >= k, BATCH, None, TOKENS, TOKENS, "cpu")
    results: dict[str, torch.Tensor] = {}

    def run() -> None:
        aux = AuxRequest(lse=True)
        results["out"], _ = compiled(query, key, value, block_mask=mask, enable_gqa=True, return_aux=aux)

    real = kept(run)
    grads = torch.autograd.grad(results["out"].transpose(1, 2).contiguous().sum(), (query, key, value))

    with FakeTensorMode(allow_non_fake_inputs=True), kernels_of(FLEX):
        ours = inputs()
        block = masking_utils.flex_attention_mask(BATCH, TOKENS, TOKENS)
        attend = ALL_ATTENTION_FUNCTIONS["flex_attention"]

        def imitate() -> None:
            results["ours"], _ = attend(_Module(), *ours, block)

        imitated = kept(imitate)
        our_grads = torch.autograd.grad(results["ours"].sum(), ours)
    assert imitated == real
    assert [(g.shape, g.stride()) for g in our_grads] == [(g.shape, g.stride()) for g in grads]
    assert results["ours"].stride() == results["out"].transpose(1, 2).stride()
    assert len(graphs) == 2


@pytest.mark.slow
def test_a_compiled_block_mask_has_no_square() -> None:
    """Inductor's code for a packed row's mask allocates nothing larger than 64 bits a block; the mask is as ours."""
    from torch._inductor.utils import run_and_get_code
    from torch.nn.attention.flex_attention import create_block_mask

    torch._dynamo.reset()
    numbers, positions = torch.zeros(1, 640, dtype=torch.int64), torch.arange(640)[None]
    packed = masking_utils.packed_sequence_compatibility_function(
        masking_utils.causal_mask_function, positions, numbers
    )
    real, codes = run_and_get_code(torch.compile(create_block_mask), packed, 1, None, 640, 640, "cpu")
    allocated = re.findall(r"= empty_strided_cpu\(\((.*?)\), \(.*?\), torch\.(\w+)\)", "\n".join(codes))
    sizes = [
        torch.Size(int(n) for n in shape.split(",") if n.strip()).numel() * getattr(torch, dtype).itemsize
        for shape, dtype in allocated
    ]
    blocks = -(-640 // flex.BLOCK_TOKENS)
    assert sizes
    assert max(sizes) == blocks**2 * 8
    with FakeTensorMode():
        ours = flex.block_mask(packed, 1, None, 640, 640)
    tensors = [part for part in ours.as_tuple() if isinstance(part, torch.Tensor)]
    expected = [part for part in real.as_tuple() if isinstance(part, torch.Tensor)]
    assert [(t.shape, t.dtype) for t in tensors] == [(t.shape, t.dtype) for t in expected]


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_no_mask_grows_with_the_square(batching: str) -> None:
    """Of padded batches and packed rows no tensor takes more than 64 bits for each block of 128 x 128 scores."""
    profile = trace("llama", CONFIGS["llama"], a_regime(device="cuda", attention="flex_attention", batching=batching))
    squares = [n for n, (_, s) in enumerate(MONOMIALS) if s == 2]
    assert max(size[n] for size in profile.sizes for n in squares) <= 8 / flex.BLOCK_TOKENS**2
    assert profile.attends_causally


def test_what_flex_attention_cannot_do_is_refused() -> None:
    """A CPU's backward, dropout, a learnt bias and small heads are refused in words."""
    with pytest.raises(InputError, match="no backward on a CPU"), kernels_of(a_regime(attention="flex_attention")):
        pass
    with FakeTensorMode(allow_non_fake_inputs=True), kernels_of(FLEX):
        attend = ALL_ATTENTION_FUNCTIONS["flex_attention"]
        tensors = inputs()
        with pytest.raises(InputError, match="no dropout"):
            attend(_Module(), *tensors, None, dropout=0.1)
        with pytest.raises(InputError, match="bias"):
            attend(_Module(), *tensors, None, position_bias=torch.zeros(1))
        with pytest.raises(InputError, match="at least 16"):
            attend(_Module(), *(tensor[..., :8] for tensor in tensors), None)
        with pytest.raises(InputError, match="one dtype"):
            attend(_Module(), tensors[0].float(), *tensors[1:], None)
    assert ALL_ATTENTION_FUNCTIONS["flex_attention"] is flex_attention_forward


def test_a_class_without_it_is_refused() -> None:
    """transformers' GPT-2 has flex_attention, its BLOOM has none."""
    bloom = {"model_type": "bloom", "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100}
    with pytest.raises(InputError, match="no flex_attention attention for 'bloom'"):
        trace("bloom", bloom, FLEX)
