"""`autofit data`, as a person and as a program sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import autofit
from autofit import cli
from autofit.report.words import share_words
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
    drawn = printed[printed.index("\nLengths") : printed.index("Cut at")].split()
    longest_drawn = max(int(each.replace(",", "")) for each in drawn if each.replace(",", "").isdecimal())
    num_longer = (longest_drawn < LENGTHS).sum()  # shares are a bin's, so one of 3,000 is a third of the least shown
    assert num_longer
    assert drawn[0:4] == ["Lengths", f"({share_words(num_longer / 3000)}", "are", "longer)"]


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


def test_a_model_of_the_hub_s_cache_brings_its_tokenizer(tmp_path):
    """What an earlier download left in the Hub's cache is found by the model's id, without the Hub."""
    folder = tmp_path / "hub" / "models--nobody--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc", encoding="utf-8")
    save_tokenizer(folder / "snapshots" / "abc")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "snapshots" / "abc" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    path = write_json_lines(tmp_path / "text.jsonl", rows_of("messages"))
    command = [sys.executable, "-m", "autofit", "data", str(path), "--model", "nobody/tiny", "--json"]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert json.loads(printed)["lengths"]["num_sequences"] == len(rows_of("messages"))


def test_without_a_tokenizer_it_says_what_to_give(tmp_path, capsys):
    """Text without a tokenizer, and a model whose tokenizer is not here, are refused with the option that helps."""
    path = write_json_lines(tmp_path / "text.jsonl", rows_of("text"))
    assert cli.run(["data", str(path)]) == 2
    assert "--tokenizer" in capsys.readouterr().err
    assert cli.run(["data", str(path), "--model", "meta-llama/Llama-3.1-8B", "--json"]) == 2
    assert "--tokenizer" in json.loads(capsys.readouterr().out)["error"]["to_fix"]


PLAN = ("plan", "--model", "meta-llama/Llama-3.1-8B", "--global-batch", "8", "--gpus", "1xA100-80G")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((), "give --seq-len, or --data"),
        (("--seq-len", "512", "--text-column", "text"), "--text-column has no effect without --data"),
        (("--seq-len", "512", "--data-all"), "--data-all has no effect without --data"),
        (("--data", "nowhere.jsonl"), "there is no data at 'nowhere.jsonl'"),
        (("--data", "LENGTHS", "--batching", "packed"), "no length of a row"),
        (("--data", "LENGTHS", "--batching", "packed", "--batching", "padded", "--seq-len", "512"), "padding_free"),
        (("--data", "LENGTHS", "--batching", "bucketed"), "equal, padded, padding_free, packed"),
    ],
    ids=str,
)
def test_a_plan_says_what_it_lacks(autofit, lengths_file, given, says):
    """A plan without a length, with an idle option, or with ways to batch that do not go together is refused."""
    result = autofit(*PLAN, *(str(lengths_file) if each == "LENGTHS" else each for each in given))
    assert result.exit_code == 2
    assert says in result.stderr


MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
}
ONE_PATH = ("--method", "full", "--no-gradient-checkpointing", "--gpus", "1xA100-80G")


@pytest.mark.slow
def test_a_plan_for_data_from_end_to_end(tmp_path, autofit, lengths_file):
    """From a file of lengths to a plan: cut where the model's positions end, memory for that, time for what there is.

    The peak is that of `estimate` for padded sequences all of that length, to the byte. Another cut is one of the
    plan's truncations, and what the same plan cut there takes. What is printed names each.
    """
    model = tmp_path / "config.json"
    model.write_text(json.dumps(MODEL), encoding="utf-8")
    data = ("--model", model, "--data", lengths_file, "--global-batch", "8", *ONE_PATH)
    made = json.loads(autofit("plan", *data, "--json").stdout)
    workload, batch = made["inputs"]["job"]["workload"], made["configuration"]["per_device_train_batch_size"]
    assert workload["sequence_tokens"] == 2048
    assert made["configuration"]["batching"] == "padded"
    optim = ("--optim", made["configuration"]["optim"], "--micro-batch", str(batch))
    fixed = ("--model", model, *ONE_PATH, *optim, "--gradient-accumulation-steps", str(8 // batch))
    whole = json.loads(autofit("estimate", *fixed, "--seq-len", "2048", "--batching", "padded", "--json").stdout)
    assert made["memory"] == whole["memory"]
    assert made["time"]["step_seconds"] <= whole["time"]["step_seconds"]
    cut = json.loads(autofit("estimate", *fixed, "--data", lengths_file, "--seq-len", "512", "--json").stdout)
    (found,) = [each for each in made["truncations"] if each["sequence_tokens"] == 512]
    assert found["epoch_seconds"] == cut["epoch"]["seconds"]
    lost = 1 - np.minimum(LENGTHS, 512).sum() / LENGTHS.sum()
    assert found["tokens_lost_fraction"] == pytest.approx(lost, abs=0.003)
    printed = autofit("plan", *data).stdout
    for words in ("sequences of at most 2,048 tokens", "where the model's positions end", "3,000 sequences of"):
        assert words in printed
    assert "375 steps" in printed


def test_python_plans_for_data_too(lengths_file):
    """A path is a path, and one column is one; a keyword that would be idle is refused as the option is."""
    job = {"model": "meta-llama/Llama-3.1-8B", "gpus": "1xA100-80G", "global_batch": 8}
    for given, says in (
        ({"data": lengths_file, "text_column": "nothing"}, "no column 'nothing'"),
        ({"data": lengths_file.parent / "none.jsonl"}, "there is no data"),
        ({"seq_len": 512, "text_column": "text"}, "--text-column has no effect"),
        ({}, "not given"),
    ):
        with pytest.raises(autofit.AutofitError) as refused:
            autofit.make_plan(**job, **given)
        assert says in refused.value.message


def test_a_script_says_where_and_the_data_how_often(lengths_file):
    """Given beside a script, a data set changes neither the length that the script has nor its global batch."""
    from autofit.api import silent, with_data
    from autofit.options import DataWish
    from tests.search.worlds import a_job

    job = a_job(8, 512)
    found = with_data(job, DataWish(data=str(lengths_file)), allow_hub=False, display=silent)
    assert found.workload.lengths.num_sequences == 3000
    assert (found.workload.sequence_tokens, found.workload.global_batch_sequences) == (512, 8)
    assert with_data(job, DataWish(), allow_hub=False, display=silent) == job
