"""What the launch tests start: a tiny Llama on disk and ordinary Trainer scripts that know nothing of autofit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.plans import TINY_LLAMA

TRAIN_SCRIPT = """
import sys
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

folder, output = sys.argv[1:3]
model = AutoModelForCausalLM.from_pretrained(folder)
generator = torch.Generator().manual_seed(0)
rows = [torch.randint(0, 256, (32,), generator=generator) for _ in range(64)]
trainer = Trainer(
    model=model,
    args=TrainingArguments(output_dir=output, max_steps=3, per_device_train_batch_size=1, learning_rate=1e-3,
                           logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True),
    train_dataset=[{"input_ids": row, "labels": row} for row in rows],
)
trainer.train()
trainer.save_model()
"""
"""Batch size, precision, adapter and strategy are left to the plan; the model is loaded before the arguments exist."""


LEAVE_GLOO = """
from autofit.runtime.run import leave_process_group
leave_process_group()
"""
"""The end of a script that ranks run without autofit's hooks, which see to it otherwise."""


def write_tiny_llama(folder: Path) -> Path:
    """Save a random Llama of 115k parameters, as a checkpoint from the Hub would be."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY_LLAMA)).save_pretrained(folder)
    return folder


def config_of(folder: Path) -> dict[str, object]:
    """Read the config.json of a saved model."""
    return dict(json.loads((folder / "config.json").read_text()))


def write_tiny_models(folder: Path) -> tuple[Path, Path]:
    """Save a random Llama and a random BERT with one tokenizer of 512 tokens, each in a folder of its own."""
    import torch
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama, bert = folder / "llama", folder / "bert"
    LlamaForCausalLM(LlamaConfig(**TINY_LLAMA | {"vocab_size": 512})).save_pretrained(llama)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(**sizes, vocab_size=512)).save_pretrained(bert)
    for each in (llama, bert):
        tiny_tokenizer().save_pretrained(each)
    return llama, bert


def tiny_tokenizer() -> Any:
    """Return a byte-level tokenizer, trained on the manual's topics."""
    from pydoc_data import topics

    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    made = ByteLevelBPETokenizer()
    made.train_from_iterator(list(topics.topics.values()), vocab_size=512, special_tokens=["<pad>", "</s>"])
    words = {"pad_token": "<pad>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, model_max_length=128, **words)
