"""Trains a causal language model on a text file, with every setting on the command line or in a YAML or JSON file.

python run_clm.py --model_name_or_path MODEL --train_file text.txt --output_dir out --per_device_train_batch_size 4
python run_clm.py run_clm.yaml
"""

import sys
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from pydoc_data import topics

from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the model."})
    gguf_file: str | None = field(default=None, metadata={"help": "GGUF file in that folder."})
    from_scratch: bool = field(default=False, metadata={"help": "Only take the model's config."})


@dataclass
class DataArguments:
    """What it is trained on."""

    train_file: str | None = field(default=None, metadata={"help": "Text file; by default the Python manual's topics."})
    block_size: int = field(default=256, metadata={"help": "Tokens of a training sequence."})


def parse():
    """Read the command line, or the file that it names."""
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(sys.argv[1])
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        return parser.parse_json_file(sys.argv[1])
    return parser.parse_args_into_dataclasses()


def main():
    """Train, and save the model."""
    model_args, data_args, training_args = parse()
    set_seed(training_args.seed)

    source = {"gguf_file": model_args.gguf_file} if model_args.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **source)
    if model_args.from_scratch:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path, **source)
        model = AutoModelForCausalLM.from_config(config)
    else:
        if model_args.gguf_file:
            source["quantization_config"] = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **source)

    if data_args.train_file:
        texts = Path(data_args.train_file).read_text().split("\n\n")
    else:
        texts = [topics.topics[name] for name in sorted(topics.topics)]

    def group(rows):
        ids = list(chain(*tokenizer(rows["text"])["input_ids"]))
        size = data_args.block_size
        blocks = [ids[start : start + size] for start in range(0, len(ids) // size * size, size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    with training_args.main_process_first(desc="grouping texts"):
        dataset = Dataset.from_dict({"text": texts}).map(group, batched=True, remove_columns=["text"])

    trainer = Trainer(model=model, args=training_args, train_dataset=dataset, data_collator=default_data_collator)
    result = trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(training_args.output_dir)
    trainer.save_metrics("train", result.metrics)


if __name__ == "__main__":
    main()
