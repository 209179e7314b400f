"""Texts, a tokenizer made from them, and the files that trainers read, written with the libraries that write them."""

from __future__ import annotations

import gzip
import json
from pydoc_data import topics

TEXTS = [text for _, text in sorted(topics.topics.items()) if text][:60]
"""Real English, of every Python."""
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if tools %}<|tools|>{{ tools | tojson }}{% endif %}"
)


def save_tokenizer(folder, *, template=TEMPLATE):
    """Train a byte-level BPE on the texts and save it as transformers does."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.ByteLevelBPETokenizer()
    backend.train_from_iterator(TEXTS[:10], vocab_size=600, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = backend._tokenizer
    bos = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.post_processor = tokenizers.processors.Sequence([tokenizers.processors.ByteLevel(), bos])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")  # noqa: S106
    made.chat_template = template
    made.save_pretrained(folder)
    return made


def rows_of(layout):
    """Return the texts as rows of a layout that trainers know."""
    half = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in TEXTS]
    return {
        "text": [{"text": text} for text in TEXTS],
        "messages": [{"messages": _turns(*each)} for each in half],
        "prompt": [{"prompt": a, "completion": b} for a, b in half],
        "prompt messages": [{"prompt": _turns(*each)[:1], "completion": _turns(*each)[1:]} for each in half],
        "conversations": [
            {"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]} for a, b in half
        ],
    }[layout]


def _turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_json_lines(path, rows):
    """Write rows as JSON lines, through gzip where the name says so."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write_json(path, rows):
    """Write rows as one JSON array."""
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_parquet(path, rows):
    """Write rows with pyarrow, in several row groups."""
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=17)
    return path


def save_dataset(path, rows):
    """Write rows as datasets saves them, in two shards."""
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(path, num_shards=2)
    return path


def save_dataset_dict(path, rows):
    """Write rows as the training split of two."""
    import datasets

    splits = {"test": datasets.Dataset.from_list(rows[:2]), "train": datasets.Dataset.from_list(rows)}
    datasets.DatasetDict(splits).save_to_disk(path)
    return path


def write_shards(path, rows):
    """Write a folder of files of JSON lines, with one that is not trained on."""
    path.mkdir()
    write_json_lines(path / "train-00000-of-00002.jsonl", rows[:20])
    write_json_lines(path / "train-00001-of-00002.jsonl.gz", rows[20:])
    write_json_lines(path / "test-00000-of-00001.jsonl", rows[:3])
    return path


WRITERS = {
    "d.jsonl": write_json_lines,
    "d.jsonl.gz": write_json_lines,
    "d.json": write_json,
    "lines.json": write_json_lines,
    "d.parquet": write_parquet,
    "saved": save_dataset,
    "dict": save_dataset_dict,
    "shards": write_shards,
}
