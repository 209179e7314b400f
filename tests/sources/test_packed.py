"""What a config says of weights that come packed: planned as it is, or refused for what is not known of it."""

from __future__ import annotations

from typing import Any

import pytest

import autofit
from autofit.errors import InputError
from autofit.sources.models import resolve_model
from autofit.sources.packed import with_packed_weights
from autofit.spec.job import QuantizationWish, Restrictions

GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMM"}


def read(declared: dict[str, Any], **allowed: Any) -> Restrictions:
    """Return the restrictions of a model whose config declares this."""
    return with_packed_weights(Restrictions(**allowed), {"quantization_config": declared})


@pytest.mark.parametrize("methods", [(), ("lora",), ("qlora",), ("full", "lora")])
def test_an_adapter_on_packed_weights_is_qlora_whatever_it_is_called(methods):
    """Unasked, and as `lora`; bits and groups are the config's, preparation the user's."""
    found = read(
        {**GPTQ, "bits": 8, "group_size": -1}, methods=methods, quantization=QuantizationWish(prepares_kbit=True)
    )
    assert found.methods == ("qlora",)
    assert found.quantization == QuantizationWish(bits=8, quant_type="gptq", group_size=-1, prepares_kbit=True)


def test_awq_is_read_under_both_names_of_its_format():
    """`version` is the older name of `format`."""
    newer = {name: value for name, value in AWQ.items() if name != "version"} | {"format": "gemm"}
    assert read(AWQ) == read(newer)
    assert read(AWQ).quantizations == (QuantizationWish(quant_type="awq", group_size=64),)


def test_what_is_not_packed_is_left_as_it_was():
    """No declaration, and bitsandbytes' own, which quantises what is loaded."""
    asked = Restrictions(methods=("full",))
    assert with_packed_weights(asked, {}) is asked
    assert with_packed_weights(asked, {"quantization_config": {"quant_method": "bitsandbytes"}}) is asked


@pytest.mark.parametrize(
    ("declared", "allowed", "said"),
    [
        (GPTQ, {"methods": ("full",)}, "trains the weights themselves"),
        (GPTQ, {"methods": ("freeze",)}, "trains the weights themselves"),
        (GPTQ, {"quantization": QuantizationWish(quant_type="fp4")}, "another quantisation"),
        ({**GPTQ, "bits": 3}, {}, "3 bits"),
        ({**GPTQ, "bits": "four"}, {}, "'four' bits"),
        ({**GPTQ, "group_size": 100}, {}, "groups of 100"),
        ({**GPTQ, "checkpoint_format": "marlin"}, {}, "marlin"),
        ({**GPTQ, "lm_head": True}, {}, "lm_head"),
        ({**GPTQ, "modules_in_block_to_quantize": [["q_proj"]]}, {}, "in part"),
        ({**AWQ, "bits": 8}, {}, "8 bits"),
        ({**AWQ, "version": "gemv"}, {}, "gemv"),
        ({**AWQ, "modules_to_not_convert": ["gate"]}, {}, "in part"),
    ],
)
def test_what_is_not_known_is_refused_in_words(declared, allowed, said):
    """What was given, and what to do."""
    with pytest.raises(InputError, match=said) as refused:
        read(declared, **allowed)
    assert refused.value.to_fix


def test_ids_of_the_catalogue_say_how_they_are_packed():
    """The same shapes as the model they were made from, with groups as their cards have them."""
    packed, plain = resolve_model("TheBloke/Llama-2-70B-GPTQ"), resolve_model("meta-llama/Llama-2-70b-hf")
    declared = packed.config.pop("quantization_config")
    assert packed.config == plain.config
    assert (declared["quant_method"], declared["bits"], declared["group_size"]) == ("gptq", 4, -1)


def test_generating_from_packed_weights_is_refused():
    """Kernels for that pack weights anew, which nothing here counts."""
    with pytest.raises(InputError, match="generating from it"):
        autofit.estimate_inference(model="TheBloke/Mistral-7B-v0.1-GPTQ", gpus="1xA100-80G", seq_len=512)


def test_whose_layers_multiply_is_said_of_a_packed_checkpoint_alone():
    """Of another it would be without effect."""
    with pytest.raises(InputError, match="packed-kernel") as refused:
        autofit.estimate(
            model="mistralai/Mistral-7B-v0.1", gpus="1xA100-80G", seq_len=512, method="qlora", packed_kernel="auto_gptq"
        )
    assert refused.value.to_fix
