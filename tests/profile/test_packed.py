"""Checkpoints that come packed, GPTQ's and AWQ's: what they hold, and what their layers keep and take."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import nn

from autofit.errors import InputError
from autofit.memory.tensors import num_bytes_of
from autofit.profile.models import load_config
from autofit.profile.packed import AwqLinear, SavingLinear, packed_shapes
from autofit.profile.trace import trace, trace_steps
from autofit.runtime.live_bytes import LiveBytes
from autofit.sources.rows import read_case
from autofit.spec.configuration import Lora, Quantization
from tests.profile.tiny import CONFIGS, a_regime, every_layer_traced, highest_alive

LLAMA = {**CONFIGS["llama"], "num_hidden_layers": 3}
HIDDEN, INTERMEDIATE, KEYS, LAYERS = 128, 256, 64, 3
IN_A_LAYER = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * INTERMEDIATE
SIZE = (2, 192)


def packed_regime(quantization: dict[str, Any], **changes: Any) -> Any:
    """An adapter on the attention of packed weights."""
    values = {"quant_type": "gptq", "double_quant": False, "compute_dtype": "float16", "storage_dtype": "int32"}
    return a_regime(
        method="qlora",
        lora=Lora(r=4, target_modules=("q_proj", "v_proj")),
        quantization=Quantization(**{**values, **quantization}),
        **{"weights_dtype": "float16", "device": "cuda", **changes},
    )


def held_by_kind(regime: Any, config: dict[str, Any] = LLAMA) -> dict[str, int]:
    """Return the bytes of a model's tensors, by kind."""
    _, named = trace_steps(load_config(config, None, regime), regime, [SIZE])
    held: dict[str, int] = {}
    for _, tensor in named:
        held[tensor.kind] = held.get(tensor.kind, 0) + num_bytes_of(tensor)
    return held


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 128), (2, -1)])
def test_a_gptq_layer_holds_words_scales_zeros_and_an_order(bits, group_size):
    """Counted by hand: bits of each weight and of each group's zero, an fp16 scale, and 32 bits of each input."""
    held = held_by_kind(packed_regime({"bits": bits, "group_size": group_size, "kernel": "auto_gptq"}))
    inputs = {"qkvo": (4, HIDDEN), "up": (2, HIDDEN), "down": (1, INTERMEDIATE)}
    outputs_of_groups = 0
    for name, (_, size) in inputs.items():
        outputs = {"qkvo": 2 * HIDDEN + 2 * KEYS, "up": 2 * INTERMEDIATE, "down": HIDDEN}[name]
        outputs_of_groups += outputs * (1 if group_size == -1 else size // group_size)
    order = 4 * sum(count * size for count, size in inputs.values())
    by_hand = IN_A_LAYER * bits // 8 + outputs_of_groups * (bits / 8 + 2) + order
    assert held["quant_state"] == LAYERS * by_hand
    assert "quantized" not in held


def test_embeddings_head_and_norms_are_not_packed():
    """They stay in the dtype that was loaded, tables and all."""
    held = held_by_kind(packed_regime({"kernel": "auto_gptq"}))
    assert held["parameter"] == 2 * (2 * 1000 * HIDDEN + (2 * LAYERS + 1) * HIDDEN)


def test_words_that_fsdp_shards_are_parameters():
    """Seen as halves, packed weights and zeros are parameters of as many bytes; scales and order stay whole."""
    whole = held_by_kind(packed_regime({"kernel": "auto_gptq"}))
    seen = held_by_kind(packed_regime({"kernel": "auto_gptq", "storage_dtype": "float16"}))
    assert seen["quantized"] + seen["quant_state"] == whole["quant_state"]
    assert seen["quantized"] > 2 * seen["quant_state"]


def test_a_layer_that_unpacks_again_keeps_no_weight_for_backward():
    """auto_gptq's layer holds whole weights one at a time, gptqmodel's in training all of them until backward."""
    whole_weights = 2 * LAYERS * IN_A_LAYER
    peaks = {
        kernel: highest_alive(every_layer_traced(LLAMA, packed_regime({"kernel": kernel}), [SIZE])[0])
        for kernel in ("auto_gptq", "gptqmodel")
    }
    assert peaks["gptqmodel"] - peaks["auto_gptq"] == pytest.approx(whole_weights, rel=0.1)


def test_awq_packs_along_outputs():
    """Words of AWQ's gemm format lie the other way, as many of them; nothing says the order of inputs."""
    sizes = (HIDDEN, INTERMEDIATE)
    gptq, awq = (packed_shapes(*sizes, Quantization(quant_type=name)) for name in ("gptq", "awq"))
    assert gptq == {"qweight": (16, 256), "qzeros": (1, 32)}
    assert awq == {"qweight": (128, 32), "qzeros": (1, 32)}


@pytest.mark.parametrize(
    ("said", "config", "lora"),
    [
        ("multiples of 32", {"intermediate_size": 250}, Lora(target_modules=("q_proj",))),
        ("DoRA", {}, Lora(target_modules=("q_proj",), use_dora=True)),
        ("all-linear", {}, Lora()),
    ],
)
def test_what_packed_layers_do_not_take_is_refused_in_words(said, config, lora):
    """Odd sizes, DoRA, and peft's all-linear, which looks for linear layers."""
    regime = replace(packed_regime({"kernel": "auto_gptq"}), lora=lora)
    with pytest.raises(InputError, match=said) as error:
        held_by_kind(regime, {**LLAMA, **config})
    assert error.value.to_fix


@pytest.mark.parametrize(
    ("changes", "tokens"), [({"device": "cpu"}, 2048), ({}, 1024), ({"sequence_parallel_size": 2}, 4096)]
)
def test_awq_is_refused_where_another_kernel_runs(changes, tokens):
    """On a CPU, and where a product may have no more than 1,024 rows."""
    with pytest.raises(InputError, match="AWQ") as refused:
        trace("a small model", LLAMA, packed_regime({"quant_type": "awq"}, **changes), sequence_tokens=tokens)
    assert refused.value.to_fix


def test_awq_unpacks_again_in_backward():
    """No whole weight stays from forward to backward, as with auto_gptq's layer and unlike gptqmodel's for GPTQ."""
    peaks = {
        name: highest_alive(every_layer_traced(LLAMA, packed_regime({"quant_type": name}), [SIZE])[0])
        for name in ("awq", "gptq")
    }
    assert peaks["gptq"] - peaks["awq"] == pytest.approx(2 * LAYERS * IN_A_LAYER, rel=0.1)


def test_a_bf16_model_of_awq_is_loaded_in_fp16():
    """transformers casts it where a GPU is to run it, and GPTQ's it leaves."""
    row = {"model": "Qwen/Qwen2.5-0.5B", "method": "qlora", "gpus": "1xA100-80G", "seq_len": 2048, "autocast": "bf16"}
    dtypes = {
        name: read_case({**row, "quantization": {"bits": 4, "type": name}}).configuration.weights_dtype
        for name in ("awq", "gptq", "nf4")
    }
    assert dtypes == {"awq": "float16", "gptq": "bfloat16", "nf4": "bfloat16"}


def test_awqs_own_product_takes_and_keeps_as_much(monkeypatch):
    """gptqmodel's autograd function on this CPU, with its CUDA kernel replaced by what that allocates, to the byte."""
    gemm = pytest.importorskip("gptqmodel.nn_modules.qlinear.gemm_awq")
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    monkeypatch.setattr(
        gemm,
        "awq_dequantize_weights",
        lambda words, scales, *_: torch.empty(words.shape[0], words.shape[1] * 8, dtype=scales.dtype),
    )
    sizes = {"in_features": 256, "out_features": 512}
    stored = AwqTorchLinear(
        bits=4, group_size=128, sym=False, desc_act=False, bias=False, register_buffers=True, **sizes
    )

    class Real(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features = sizes["in_features"]
            for name in ("qweight", "qzeros", "scales"):
                self.register_buffer(name, getattr(stored, name))

        def forward(self, x: torch.Tensor) -> Any:
            return gemm.AwqGemmFn.apply(x, self.qweight, self.qzeros, self.scales, 4, 128, None, 512, "cuda", True)

    packed = Quantization(quant_type="awq", storage_dtype="int32", compute_dtype="float16")
    ours = AwqLinear(nn.Linear(*sizes.values(), bias=False, device="meta"), packed).to_empty(device="cpu")
    assert taken(ours, rows=2048, dtype=torch.float16) == taken(Real(), rows=2048, dtype=torch.float16)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptqmodels_own_layer_holds_and_takes_as_much(bits):
    """gptqmodel's layer in training on this CPU: stored, forward's peak, what stays for backward, to the byte.

    Once, before torch.compile takes its unpacking: `post_init` is not called.
    """
    qlinear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    sizes = {"in_features": 1024, "out_features": 2048}
    real = qlinear.TorchLinear(
        bits=bits, group_size=128, sym=True, desc_act=True, bias=False, register_buffers=True, **sizes
    )
    real._init_wf_unsqueeze_buffers()
    packed = Quantization(bits=bits, quant_type="gptq", storage_dtype="int32", compute_dtype="float16")
    ours = SavingLinear(nn.Linear(*sizes.values(), bias=False, device="meta"), packed).to_empty(device="cpu")
    for buffer in ours.buffers():
        buffer.zero_()
    assert taken(ours) == taken(real.train())


def taken(layer: Any, *, rows: int = 64, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int, int, int]:
    """Bytes that a layer holds, that its forward takes at most, that stay for backward, and that backward takes."""
    layer(torch.randn(rows, layer.in_features, dtype=dtype, requires_grad=True))
    x = torch.randn(rows, layer.in_features, dtype=dtype, requires_grad=True)
    gc.collect()
    with LiveBytes() as live:
        live.count_existing()
        live.reset_peak()
        before = live.now_bytes
        out = layer(x)
        peak, kept = live.peak_bytes - before, live.now_bytes - before
        gradient = torch.ones_like(out)
        live.reset_peak()
        out.backward(gradient)
        backward = live.peak_bytes - before
    return sum(buffer.nbytes for buffer in layer.buffers()), peak, kept, backward
