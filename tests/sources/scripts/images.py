"""Fine-tunes a vision-language model on rows that hold one or two images each."""

import sys

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

MODEL = sys.argv[1]
OUTPUT = sys.argv[2]
IMAGE_TOKEN, TOKENS_OF_AN_IMAGE, SIDE, LENGTH = 200, 16, 56, 64


class Rows(Dataset):
    """Every third row has two images."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        num_images = 1 + (index % 3 == 0)
        text = list(range(LENGTH - num_images * TOKENS_OF_AN_IMAGE))
        ids = [*[IMAGE_TOKEN] * (num_images * TOKENS_OF_AN_IMAGE), *text]
        return {"input_ids": ids, "pixel_values": torch.zeros(num_images, 3, SIDE, SIDE)}


def collate(rows):
    """Stack ids and labels; images of all rows lie one after another."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    pixels = torch.cat([row["pixel_values"] for row in rows])
    return {"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE_TOKEN, -100), "pixel_values": pixels}


def main():
    """Train."""
    model = AutoModelForImageTextToText.from_pretrained(MODEL)
    arguments = TrainingArguments(
        output_dir=OUTPUT, per_device_train_batch_size=2, max_steps=10, bf16=True, remove_unused_columns=False
    )
    Trainer(model=model, args=arguments, train_dataset=Rows(), data_collator=collate).train()


if __name__ == "__main__":
    main()
