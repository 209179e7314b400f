"""`autofit data`, as a person and as a program sees it."""

from __future__ import annotations

import json

import numpy as np
import pytest

import autofit
from autofit import cli
from tests.sources.corpora import rows_of, save_tokenizer, write_json_lines

LENGTHS = np.random.default_rng(4).lognormal(6, 1, 3000).astype(int) + 1


@pytest.fixture(scope="module")
def lengths_file(tmp_path_factory):
    """Return a file of JSON lines that says how long its sequences are."""
    path = tmp_path_factory.mktemp("data") / "lengths.jsonl"
    return write_json_lines(path, [{"length": int(length)} for length in LENGTHS])


def test_a_person_reads_what_there_is(lengths_file, capsys):
    """Mean, percentiles and longest are on the first line; each length to cut at says what it loses."""
    assert cli.run(["data", str(lengths_file)]) == 0
    printed = capsys.readouterr().out
    first = printed.splitlines()[0]
    assert f"3,000 sequences, mean {LENGTHS.mean():,.0f}" in first
    assert f"longest {LENGTHS.max():,} tokens" in first
    assert "every sequence" in printed
    row = next(line.split() for line in printed.splitlines() if line.startswith("2,048 ") and "%" in line)
    assert float(row[1].rstrip("%")) == pytest.approx(100 * (LENGTHS > 2048).mean(), abs=0.5)


def test_a_program_reads_the_same(lengths_file, capsys):
    """With --json stdout is one object with the distribution and the cuts, equal to what Python gets."""
    assert cli.run(["data", str(lengths_file), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    made = autofit.measure_data(lengths_file)
    assert printed["lengths"]["num_sequences"] == made.lengths.num_sequences == 3000
    assert [cut["sequence_tokens"] for cut in printed["cuts"]] == [cut.sequence_tokens for cut in made.cuts]
    last = printed["cuts"][-1]
    assert (last["sequence_tokens"], last["sequences_cut_fraction"]) == (LENGTHS.max(), 0)
    assert last["tokens_lost_fraction"] == pytest.approx(0, abs=1e-12)


def test_text_is_counted_by_the_model_s_tokenizer(tmp_path, capsys):
    """A model's folder holds its tokenizer; --tokenizer names another one."""
    save_tokenizer(tmp_path / "model")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    path = write_json_lines(tmp_path / "text.jsonl", rows_of("text"))
    for option in ("--model", "--tokenizer"):
        assert cli.run(["data", str(path), option, str(tmp_path / "model"), "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)["lengths"]
        assert printed["tokenizer"] == str(tmp_path / "model")
        assert printed["num_sequences"] == len(rows_of("text"))


def test_without_a_tokenizer_it_says_what_to_give(tmp_path, capsys):
    """Text without a tokenizer, and a model whose tokenizer is not here, are refused with the option that helps."""
    path = write_json_lines(tmp_path / "text.jsonl", rows_of("text"))
    assert cli.run(["data", str(path)]) == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert cli.run(["data", str(path), "--model", "meta-llama/Llama-3.1-8B", "--json"]) == 2
    assert "--tokenizer" in json.loads(capsys.readouterr().out)["error"]["to_fix"]
