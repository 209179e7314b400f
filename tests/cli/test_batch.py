"""`estimate --batch` and the Python interface come to what `estimate --json` prints, row by row and in order."""

from __future__ import annotations

import codecs
import json

import msgspec
import pytest

import autofit
from autofit.errors import InputError
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


WRONG = {
    b"5": "line 1 is not a JSON object",
    b"[" * 100_000: "line 1 is not JSON",
    b'{"id": 1, "notes": "caf\xe9"}': "line 1 is not JSON",
    b'{"id": 1}': "no model",
    b'{"id": 1, "model": 5}': "model is 5",
    b'{"id": 1, "model": ""}': "model is ''",
    b'{"id": 1, "model": "\\ud800"}': "neither a path nor in the catalogue",
    b'{"id": 1, "model": "/bin/ls"}': "is not text",
    b'{"id": 1, "model": "none/config.json"}': "there is no 'none/config.json'",
    b'{"id": 1, "gpus": "2xFOO"}': "'FOO' is not a known GPU",
    b'{"id": 1, "gpus": "0xA100-80G"}': "asks for 0 devices",
    b'{"id": 1, "seq_len": "512"}': "seq_len is '512'",
    b'{"id": 1, "seq_len": true}': "seq_len is True",
    b'{"id": 1, "seq_len": 1e3}': "seq_len is 1000.0",
    b'{"id": 1, "micro_batch_size": 99999999999999999999}': "micro_batch_size is 99999999999999999999",
    b'{"id": 1, "method": ["lora"]}': "method is ['lora']",
    b'{"id": 1, "gradient_checkpointing": "false"}': "gradient_checkpointing is 'false'",
    b'{"id": 1, "outputs_kept": 1}': "outputs_kept is 1",
    b'{"id": 1, "tf32": "yes"}': "tf32 is 'yes'",
    b'{"id": 1, "sharding": {}}': "sharding is {}",
    b'{"id": 1, "offload": []}': "offload is []",
    b'{"id": 1, "optimizer": ""}': "optimizer is ''",
    b'{"id": 1, "method": "qlora", "quantization": {"bits": 4, "skip": "lm_head"}}': "skips 'lm_head'",
    b'{"id": 1, "lora_rank": "8"}': "lora.r",
}


@pytest.mark.parametrize(("line", "words"), WRONG.items(), ids=range(len(WRONG)))
def test_a_wrong_row_is_answered_with_what_is_wrong(autofit, tmp_path, line, words):
    """Whatever stands in a line, it is answered in its place, and the line after it too."""
    complete = json.loads(line) if line.startswith(b"{") and b"\xe9" not in line else None
    if complete is not None and complete != {"id": 1}:
        line = json.dumps({name: value for name, value in ROW.items() if name != "id"} | complete).encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line + b"\n" + json.dumps(ROW | {"id": "after", "gpus": "1xH900"}).encode())
    first, second = answers(autofit("estimate", "--batch", path))
    assert words in first["refused"]
    assert first["id"] == (None if complete is None else 1)
    assert (second["id"], "H900" in second["refused"]) == ("after", True)


@pytest.mark.parametrize("row_id", ["\ud800", 10**30, "a\u2028b", None, {"a": [1.5, True]}], ids=ascii)
def test_an_id_comes_back_as_it_was_given(autofit, tmp_path, row_id):
    """Also one that is no text, or that UTF-8 or 64 bits do not hold."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW | {"id": row_id, "gpus": "1xH900"}), encoding="utf-8")
    assert answers(autofit("estimate", "--batch", path))[0]["id"] == row_id


def test_only_a_line_feed_ends_a_row(autofit, tmp_path):
    """A line separator inside a text is part of it, as JSON has it; a byte order mark and a carriage return are not."""
    row = json.dumps(ROW | {"id": "a\u2028\x85b", "gpus": "1xH900"}, ensure_ascii=False).encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + row + b"\r\n\r\n" + row + b"\r\n")
    found = answers(autofit("estimate", "--batch", path))
    assert [answer["id"] for answer in found] == ["a\u2028\x85b"] * 2
    assert all("H900" in answer["refused"] for answer in found)


def test_of_no_rows_nothing_is_said(autofit, tmp_path):
    """An empty file is no mistake."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"")
    assert answers(autofit("estimate", "--batch", path)) == []


def test_a_tracer_that_dies_takes_no_other_row_with_it(monkeypatch, tmp_path, autofit, rows_file):
    """Where a process ends in the middle of tracing several code paths, each is traced in a process of its own."""
    monkeypatch.setenv("AUTOFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("autofit.sources.profiles.MAX_TRACERS", 1)

    def trace(model, regimes, sequence_tokens):
        if any(regime.gradient_checkpointing for regime in regimes):
            raise InputError("the process ended")
        return [InputError(f"traced {regime.method}") for regime in regimes]

    monkeypatch.setattr("autofit.sources.profiles.answers_of_subprocess", trace)
    rows = [ROW | {"id": n, "seq_len": 77, "gradient_checkpointing": dies} for n, dies in enumerate((False, True))]
    rows.append(rows[0] | {"id": 2, "method": "full", "quantization": None})
    found = answers(autofit("estimate", "--batch", rows_file(*rows)))
    assert [answer["refused"] for answer in found] == ["traced qlora", "the process ended", "traced full"]


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
