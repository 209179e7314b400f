"""Data sets on disk, written by the libraries that write them, and files that nobody should have to expect."""

from __future__ import annotations

import gzip
import json
import os

import pyarrow as pa
import pytest
from pyarrow import parquet

from autofit.errors import InputError
from autofit.sources import dataset_json
from autofit.sources.dataset_arrow import ArrowChunk, row_bytes
from autofit.sources.dataset_files import open_dataset
from autofit.sources.lengths import read_lengths
from tests.sources.corpora import (
    TEMPLATE,
    TEXTS,
    WRITERS,
    rows_of,
    save_dataset,
    save_dataset_dict,
    save_tokenizer,
    write_json_lines,
    write_parquet,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Return the folder of a tokenizer with a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return str(folder)


def rows_in(path):
    """Return all rows of a data set."""
    data = open_dataset(path)
    chunks = list(data.chunks(data.columns))
    return [row for chunk in chunks for row in chunk.take(range(len(chunk.sizes_bytes)))]


@pytest.mark.parametrize("layout", ["text", "messages"])
@pytest.mark.parametrize("name", WRITERS)
def test_what_libraries_write_is_read_back(tmp_path, name, layout):
    """Every kind of file and folder gives the rows that were written, in order, and no row of another split."""
    rows = rows_of(layout)
    path = WRITERS[name](tmp_path / name, rows)
    assert rows_in(path) == rows


def test_a_split_can_be_named_by_its_folder(tmp_path):
    """Of a saved DatasetDict the training split is read, or the one whose folder is given."""
    rows = rows_of("text")
    path = save_dataset_dict(tmp_path / "both", rows)
    assert len(rows_in(path)) == len(rows)
    assert len(rows_in(path / "test")) == 2


def test_rows_are_numbered_from_the_file_s_first(tmp_path, monkeypatch, tokenizer):
    """A row that cannot be read is named by its number in its file, however the file was read in pieces."""
    monkeypatch.setattr(dataset_json, "CHUNK_LINES", 7)
    rows = [*rows_of("text")[:23], {"text": 17}]
    with pytest.raises(InputError, match=r"row 24 of .*column text holds int '17', not text"):
        read_lengths(str(write_json_lines(tmp_path / "d.jsonl", rows)), model=None, tokenizer=tokenizer)


NESTED = pa.array(
    [
        [{"role": "user", "content": "ab", "tags": ["x", "yz"]}, {"role": "me", "content": None, "tags": None}],
        None,
        [],
        [{"role": "", "content": "é", "tags": []}],
    ]
)


def test_sizes_of_nested_rows():
    """The bytes of a row are those of all text in it, and 8 for each value, list and structure around it."""
    tags = 8 + (8 + 1) + (8 + 2)
    messages = (8 + (8 + 4) + (8 + 2) + tags) + (8 + (8 + 2) + 8 + 8)
    assert row_bytes(NESTED).tolist() == [8 + messages, 8, 8, 8 + (8 + 8 + (8 + 2) + 8)]
    assert row_bytes(NESTED.slice(1)).tolist() == row_bytes(NESTED).tolist()[1:]
    assert row_bytes(pa.array(["a", "bcd"]).dictionary_encode()).tolist() == [9, 11]
    assert row_bytes(pa.array([b"abc", None], pa.large_binary())).tolist() == [11, 8]
    assert row_bytes(pa.array([1, None])).tolist() == [8, 8]


def test_lengths_of_lists_need_no_python_objects(tmp_path):
    """Token ids in columns are counted without taking them; where a row has none that is said, not guessed."""
    write_parquet(tmp_path / "d.parquet", [{"input_ids": [1] * n} for n in (3, 0, 5)])
    data = open_dataset(tmp_path / "d.parquet")
    (chunk,) = data.chunks(["input_ids"])
    assert chunk.list_lengths("input_ids").tolist() == [3, 0, 5]
    batch = pa.RecordBatch.from_pydict({"input_ids": [[1], None]})
    assert ArrowChunk(file=tmp_path, first_row=1, batch=batch).list_lengths("input_ids") is None


HOSTILE = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n  \n",
    "empty.jsonl.gz": gzip.compress(b""),
    "empty.json": b"[]",
    "empty.parquet": b"",
    "text.parquet": b"this is no parquet file, though it is long enough for one",
    "latin.jsonl": '{"text": "caf\xe9"}\n'.encode("latin-1"),
    "utf16.jsonl": '{"text": "a"}\n'.encode("utf-16"),
    "notgz.jsonl.gz": b'{"text": "a"}\n',
    "cut.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 5000)[:-20],
    "cut.jsonl": b'{"text": "a"}\n{"text": "b',
    "cut.json": b'[{"text": "a"}, {"tex',
    "array.jsonl": b"[1, 2]\n",
    "numbers.json": b"[1, 2]",
    "deep.jsonl": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "nan.jsonl": b'{"text": NaN}\n',
    "mixed.jsonl": b'{"text": "a"}\n{"content": "b"}\n',
    "null.jsonl": b'{"text": "a"}\n{"text": null}\n',
    "number.jsonl": b'{"text": 3}\n',
    "nocolumns.jsonl": b"{}\n",
    "unknown.jsonl": b'{"question": "a", "answer": "b"}\n',
    "preferences.jsonl": b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n',
    "several.jsonl": b'{"text": "a", "messages": []}\n',
    "nomessages.jsonl": b'{"messages": []}\n',
    "nullmessages.jsonl": b'{"messages": null}\n',
    "nullcontent.jsonl": b'{"messages": [{"role": "user", "content": null}]}\n',
    "norole.jsonl": b'{"messages": [{"content": "a"}]}\n',
    "strings.jsonl": b'{"messages": ["a"]}\n',
    "halfprompt.jsonl": b'{"prompt": "a", "completion": null}\n',
    "ids.jsonl": b'{"input_ids": "abc"}\n',
    "noids.jsonl": b'{"input_ids": []}\n',
    "negative.jsonl": b'{"length": -4}\n',
    "share.jsonl": b'{"length": 0.5}\n',
    "yes.jsonl": b'{"length": true}\n',
    "tools.jsonl": b'{"messages": [{"role": "user", "content": "a"}], "tools": "{"}\n',
    "data.csv": b"text\na\n",
    "data.txt": b"a",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_read_is_refused(tmp_path, tokenizer, name):
    """Whatever a file holds, the answer is a refusal that names the file or what it holds, and what to do."""
    path = tmp_path / name
    path.write_bytes(HOSTILE[name])
    with pytest.raises(InputError) as refused:
        read_lengths(str(path), model=None, tokenizer=tokenizer)
    assert refused.value.to_fix
    assert name in refused.value.message or "column" in refused.value.message
    assert "..." not in refused.value.message
    assert len(refused.value.message) < 500


def test_a_parquet_file_cut_short_is_refused(tmp_path, tokenizer):
    """Without its footer, or with damaged pages, a Parquet file is refused by name."""
    path = write_parquet(tmp_path / "d.parquet", rows_of("text"))
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:200] + bytes(2000) + content[2200:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"d\.parquet.*cannot be read"):
            read_lengths(str(path), model=None, tokenizer=tokenizer)


def test_text_in_columns_that_is_no_utf8_is_refused(tmp_path, tokenizer):
    """Bytes that claim to be text are refused, and so is a column of bytes."""
    bad = pa.array([b"caf\xe9"]).view(pa.string())
    parquet.write_table(pa.table({"text": bad}), tmp_path / "d.parquet")
    parquet.write_table(pa.table({"text": [b"abc"]}), tmp_path / "bytes.parquet")
    for name, says in (("d.parquet", "cannot be read"), ("bytes.parquet", "holds bytes")):
        with pytest.raises(InputError, match=says):
            read_lengths(str(tmp_path / name), model=None, tokenizer=tokenizer)


def test_messages_with_nulls_are_read_as_without(tmp_path):
    """The nulls that a table puts in place of missing keys do not reach the chat template, which may ask for them."""
    tokenizer = str(tmp_path / "tokenizer")
    save_tokenizer(tokenizer, template=TEMPLATE + "{% if 'tool_calls' in messages[0] %}<|calls|>{% endif %}")
    plain = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    nulls = [{"messages": [{**message, "tool_calls": None, "name": None} for message in plain[0]["messages"]]}]
    lengths = [
        read_lengths(str(write_json_lines(tmp_path / f"{number}.jsonl", rows)), model=None, tokenizer=tokenizer)
        for number, rows in enumerate((plain, nulls))
    ]
    assert lengths[0].mean_tokens == lengths[1].mean_tokens


def test_one_line_of_ten_megabytes(tmp_path, tokenizer):
    """A line far longer than any other is one row, and its length is what the tokenizer makes of it."""
    long = {"text": "word " * 100_000, "notes": "x" * 10_000_000}
    path = write_json_lines(tmp_path / "d.jsonl", [{"text": "a"}, long, {"text": "b"}])
    found = read_lengths(str(path), model=None, tokenizer=tokenizer)
    assert found.num_sequences == 3
    assert found.max_tokens > 100_000


def test_an_endless_line_and_an_endless_array_are_refused(tmp_path, monkeypatch):
    """What would have to be in memory whole is bounded, and the refusal says by what."""
    monkeypatch.setattr(dataset_json, "MAX_LINE_BYTES", 2**20)
    monkeypatch.setattr(dataset_json, "MAX_ARRAY_BYTES", 2**20)
    (tmp_path / "line.jsonl").write_bytes(b'{"text": "' + b"a" * 2**20 + b'"}\n')
    (tmp_path / "array.json").write_bytes(b'[{"text": "' + b"a" * 2**20 + b'"}]')
    for name in ("line.jsonl", "array.json"):
        with pytest.raises(InputError, match="1 MiB or more"):
            open_dataset(tmp_path / name)


def test_a_byte_order_mark_is_no_text(tmp_path):
    """A mark at the beginning of a file, as some editors write it, is passed over."""
    for name, body in (("d.jsonl", b'{"length": 3}\n'), ("d.json", b'[{"length": 3}]')):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + body)
        assert rows_in(tmp_path / name) == [{"length": 3}]


def test_nothing_outside_the_folder_is_read(tmp_path):
    """A link or a list that leads out of the folder is refused, not followed; a link that is given itself is read."""
    outside = write_json_lines(tmp_path / "secret.jsonl", rows_of("text"))
    links = tmp_path / "links"
    links.mkdir()
    (links / "train.jsonl").symlink_to(outside)
    saved = save_dataset(tmp_path / "saved", rows_of("text"))
    state = json.loads((saved / "state.json").read_text())
    for escape in ("../secret.jsonl", str(outside), "../../../../etc/passwd"):
        state["_data_files"] = [{"filename": escape}]
        (saved / "state.json").write_text(json.dumps(state))
        with pytest.raises(InputError, match="leads out of the folder"):
            open_dataset(saved)
    both = save_dataset_dict(tmp_path / "both", rows_of("text"))
    (both / "dataset_dict.json").write_text(json.dumps({"splits": ["../saved"]}))
    with pytest.raises(InputError, match="leads out of the folder"):
        open_dataset(both)
    with pytest.raises(InputError, match="leads out of the folder"):
        open_dataset(links)
    assert len(rows_in(links / "train.jsonl")) == len(TEXTS)


FOLDERS = {
    "nothing": ({}, "no file of a kind"),
    "kinds": ({"a.jsonl": b"{}\n", "b.parquet": b""}, "several kinds"),
    "splits": ({"test.jsonl": b"{}\n", "validation.jsonl": b"{}\n"}, "which of these files"),
    "state": ({"state.json": b"[]"}, "no _data_files"),
    "numbers": ({"state.json": b'{"_data_files": 3}'}, "no _data_files"),
    "names": ({"state.json": b'{"_data_files": [3]}'}, "which is not there"),
    "none": ({"state.json": b'{"_data_files": []}'}, "holds no rows"),
    "dict": ({"dataset_dict.json": b'{"splits": ["a", "b"]}'}, "none of them is called train"),
    "missing": ({"dataset_dict.json": b'{"splits": ["train"]}'}, "no _data_files"),
    "arrow": ({"state.json": b'{"_data_files": [{"filename": "a.arrow"}]}', "a.arrow": b"abc"}, "cannot be read"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_say_too_little_are_refused(tmp_path, name):
    """A folder without data, with several kinds or splits, or with damaged lists is refused with what is wrong."""
    files, says = FOLDERS[name]
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=says):
        open_dataset(tmp_path)


@pytest.mark.parametrize("path", ["nowhere.jsonl", "a\0b", "x" * 5000, "", "~nobody/x"])
def test_no_path_is_a_traceback(path):
    """What is no path, or leads nowhere, is refused."""
    with pytest.raises(InputError):
        open_dataset(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    """A named pipe is no data set, and nothing is read from it."""
    os.mkfifo(tmp_path / "d.jsonl")
    with pytest.raises(InputError, match="there is no data"):
        open_dataset(tmp_path / "d.jsonl")
