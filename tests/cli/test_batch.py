"""`estimate --batch` and the Python interface come to what `estimate --json` prints, row by row and in order."""

from __future__ import annotations

import json

import msgspec
import pytest

import autofit
from autofit.plan import to_json
from tests.sources.test_rows import ROW

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 256,
}


@pytest.fixture
def rows_file(tmp_path):
    """Return a function that writes rows to a file, one a line."""

    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
        return path

    return write


def answers(result):
    """Return the objects that a command printed, one a line."""
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_row_is_answered_in_order(autofit, rows_file):
    """What cannot be estimated is refused in its place with the reason; the rest of the file is not lost."""
    bad = (ROW | {"id": "a", "gpus": "1xH900"}, "{", "", "[1]", ROW | {"id": "b", "optimizer": "sgdd"})
    path = rows_file(*bad, ROW | {"id": ["c"], "model": {}})
    found = answers(autofit("estimate", "--batch", path))
    assert [answer["id"] for answer in found] == ["a", None, None, "b", ["c"]]
    reasons = ("H900", "line 2 is not JSON", "line 4 is not a JSON object", "sgdd", "model is {}")
    assert all(reason in answer["refused"] for answer, reason in zip(found, reasons, strict=True))


def test_options_beside_a_batch_are_refused(autofit, rows_file):
    """An option that the rows would silently override is refused."""
    result = autofit("estimate", "--batch", rows_file(ROW), "--method", "lora")
    assert result.exit_code == 2
    assert "--batch" in result.stderr


def test_a_missing_batch_is_refused(autofit, tmp_path):
    """A file that is not there is wrong input."""
    result = autofit("estimate", "--batch", tmp_path / "none.jsonl")
    assert result.exit_code == 2
    assert "none.jsonl" in result.stderr


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"methd": "lora"}, "'methd'"),
        ({"method": "lora", "lora_r": 0}, "lora_r=0"),
        ({"method": "lora", "lora_r": "8"}, "lora_r='8'"),
        ({"lora_r": 8}, "--lora-r has no effect"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "both"),
        ({"batching": ["padded", "packed"]}, "--batching leaves several"),
        ({"method": "lora", "load_in_4bit": True}, "--load-in-4bit"),
        ({"checkpoint_offload": True}, "--checkpoint-offload has no effect"),
        ({"use_liger_kernel": True, "loss": "chunked"}, "--use-liger-kernel"),
        ({"sharding": "zero3"}, "cannot be used on 1 device"),
        ({"num_replicas": 2, "sharding": "ddp"}, "2 replicas"),
    ],
    ids=str,
)
def test_python_refuses_what_the_command_line_refuses(given, words):
    """A keyword that is misspelt, of the wrong kind, out of bounds, idle or contradictory is named."""
    with pytest.raises(autofit.AutofitError) as refused:
        autofit.estimate(model="gpt2", gpus="1xA100-80G", seq_len=8, **given)
    assert words in refused.value.message


@pytest.mark.slow
def test_a_batch_and_python_say_what_the_command_line_says(tmp_path, autofit, rows_file, monkeypatch):
    """One configuration asked for in all three ways has the same memory, time and cost, to the byte."""
    from autofit import estimate

    monkeypatch.setenv("AUTOFIT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG), encoding="utf-8")
    printed = autofit(
        "estimate", "--model", path, "--gpus", "2xA100-80G", "--seq-len", 64, "--method", "lora", "--lora-r", 4,
        "--micro-batch", 3, "--optim", "adamw_torch", "--gradient-checkpointing", "--json",
    )  # fmt: skip
    assert printed.exit_code == 0, printed.stderr
    made = estimate(
        model=path,
        gpus="2xA100-80G",
        seq_len=64,
        method="lora",
        lora_r=4,
        micro_batch=3,
        optim="adamw_torch",
        gradient_checkpointing=True,
    )
    assert to_json(made) == printed.stdout.rstrip("\n")
    row = {"id": 7, "model": str(path), "gpus": "2xA100-80G", "seq_len": 64, "method": "lora", "lora_rank": 4}
    rest = {"micro_batch_size": 3, "optimizer": "adamw_torch", "gradient_checkpointing": True, "peak_reserved_gib": 1}
    found = answers(autofit("estimate", "--batch", rows_file(row | rest, {"id": 8}, row | rest)))
    memory, time = (msgspec.to_builtins(part) for part in (made.memory, made.time))
    assert found[0] == {"id": 7, "memory": json.loads(json.dumps(memory)), "time": json.loads(json.dumps(time))}
    assert found[2] == found[0]
    assert "no model" in found[1]["refused"]
    quick = answers(autofit("estimate", "--batch", rows_file(row | rest), "--no-replay"))
    assert quick[0]["memory"]["peak_reserved_bytes"] is None
