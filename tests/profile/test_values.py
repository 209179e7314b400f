"""Models that decide by the values of their batch: they are given some, and their real steps are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import BitsAndBytesConfig

from autofit.errors import InputError
from autofit.memory.tape import phase_peaks
from autofit.profile import models
from autofit.profile.trace import trace
from autofit.runtime.live_bytes import LiveBytes
from autofit.spec.configuration import Lora, Quantization
from tests.profile.tiny import a_regime, every_layer_traced, highest_alive

BATCH, TOKENS = 5, 72
SEVERAL: dict[str, Any] = {"d_model": 32, "vocab_size": 500, "dropout": 0.0, "attention_dropout": 0.0}
ENCODER_DECODER: dict[str, Any] = {
    **SEVERAL,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "masked-lm": (
        AutoModelForMaskedLM,
        {"model_type": "flaubert", "emb_dim": 32, "n_layers": 3, "n_heads": 4, "n_words": 500},
    ),
    "sequence-classification": (AutoModelForSequenceClassification, {"model_type": "bart", **ENCODER_DECODER}),
}
"""By task: lengths that are added up, and the token that ends a sequence, which is looked for."""
T5: dict[str, Any] = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 128,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 500,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}


def real_peak(auto_class: Any, config: dict[str, Any], task: str, attention: str) -> int:
    """Train a real model for two steps on this machine; return the most bytes alive in the second above the first."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **values, use_cache=False)
    model: nn.Module = auto_class.from_config(made, dtype=torch.bfloat16, attn_implementation=attention).train()
    counter, peak = LiveBytes(), 0
    with counter:
        for tensor in [*model.parameters(), *model.buffers()]:
            counter.add(tensor)
        for _ in range(2):
            before = counter.now_bytes
            counter.reset_peak()
            ids = torch.full((BATCH, TOKENS), 10)
            ids[:, -1] = getattr(made, "eos_token_id", 10)
            labels = torch.zeros(BATCH, dtype=torch.int64) if task == "sequence-classification" else ids
            loss = model(input_ids=ids, labels=labels)["loss"]
            del ids, labels
            loss.backward()
            del loss
            peak = counter.peak_bytes - before
            model.zero_grad()
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("task", CASES)
def test_a_step_that_reads_values_needs_what_is_predicted(task: Any) -> None:
    """At a batch that was not traced, but for two integers a sequence."""
    auto_class, config = CASES[task]
    attention = "eager" if config["model_type"] == "flaubert" else "sdpa"
    profile = trace("tiny", config, a_regime(task=task, attention=attention), sequence_tokens=TOKENS)
    predicted = max(peak.kept[0] for peak in phase_peaks(profile, [BATCH], TOKENS))
    real = real_peak(auto_class, config, task, attention)
    assert 0 <= predicted - real <= 2 * 8 * BATCH


def test_t5_is_quantised_but_for_what_transformers_keeps() -> None:
    """`wo` stays as it is, which T5's own code relies on; the same layers are packed, and its step is traced."""
    regime = a_regime(device="cuda", method="qlora", lora=Lora(), quantization=Quantization(), task="seq2seq-lm")
    model = models.build(models.load_config({"model_type": "t5", **T5}, None, regime), regime)
    with torch.device("meta"):
        real = T5ForConditionalGeneration(T5Config(**T5))
        left = HfQuantizer.get_modules_to_not_convert(real, None, real._keep_in_fp32_modules)
        real = replace_with_bnb_linear(real, left, BitsAndBytesConfig(load_in_4bit=True))
    packed = [
        {
            name.replace("base_model.model.", "").replace(".base_layer", "")
            for name, module in each.named_modules()
            if "4bit" in type(module).__name__ and "lora" not in type(module).__module__
        }
        for each in (model, real)
    ]
    assert packed[0] == packed[1]
    assert not any(name.endswith("wo") for name in packed[0])
    (segments,) = every_layer_traced({"model_type": "t5", **T5}, regime, [(2, 64)])
    assert highest_alive(segments)


def test_what_a_model_computes_of_its_weights_is_not_known() -> None:
    """A step that reads its activations (I-BERT, quantisation's bounds) is refused with the line of its source."""
    config = {"model_type": "ibert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(InputError, match=r"depends on values .*quant_modules.py"):
        trace("ibert", {**config, "vocab_size": 100, "quant_mode": True}, a_regime(task="masked-lm", attention="eager"))
