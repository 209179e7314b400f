"""A Trainer that evaluates a set of its own and keeps the logits for its metrics."""

import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

folder, output = sys.argv[1:3]
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
rows = [{"input_ids": torch.arange(32), "labels": torch.arange(32)} for _ in range(20)]
arguments = TrainingArguments(
    output,
    per_device_train_batch_size=2,
    per_device_eval_batch_size=3,
    eval_accumulation_steps=2,
    eval_strategy="epoch",
    report_to="none",
)
metrics = (lambda predictions: {"shape": len(predictions.predictions)}) if "metrics" in sys.argv else None
trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:10], compute_metrics=metrics)
trainer.train()
