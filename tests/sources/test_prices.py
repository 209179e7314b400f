"""`--price`: a number, or a list of one's own, in place of the catalogue's prices."""

from __future__ import annotations

import json

import pytest

from autofit import cli
from autofit.errors import InputError
from autofit.sources.hardware import parse_cluster
from autofit.sources.market import hardware, other_sizes
from autofit.sources.prices import priced, read_prices


@pytest.fixture
def a_list(tmp_path):
    """Return a list with one GPU on demand and spot, one on demand alone, and one spelt as people do."""
    path = tmp_path / "prices.yaml"
    path.write_text("A100-80G: {on-demand: 1.5, spot: 0.75}\nh100: 3\nrtx 4090: {spot: 0.2}\n", encoding="utf-8")
    return path


def price_of(gpus, text):
    """Return what a GPU costs, and whose price that is."""
    device = priced(parse_cluster(gpus), read_prices(text)).device
    return device.dollars_per_hour, device.price_origin


def test_a_number_is_the_price_of_whatever_is_planned_on():
    """One price holds for any hardware; free is a price; none given leaves the catalogue's."""
    assert price_of("2xA100-80G", "1.25") == (1.25, "as given")
    assert price_of("A100-80G", "0") == (0, "as given")
    assert price_of("A100-80G", None) == (parse_cluster("A100-80G").device.dollars_per_hour, None)


def test_a_list_takes_the_place_of_the_catalogue(a_list):
    """Names are read as --gpus reads them, on demand unless spot is asked for; what is not listed has no price."""
    assert price_of("A100-80G", str(a_list)) == (1.5, "on-demand, by prices.yaml")
    assert price_of("A100-80G", f"{a_list}:spot") == (0.75, "spot, by prices.yaml")
    assert price_of("A100-80G", f"{a_list}:on-demand")[0] == 1.5
    assert price_of("H100-80G", str(a_list))[0] == 3
    assert price_of("H100-80G", f"{a_list}:spot") == (None, None)
    assert price_of("RTX4090", str(a_list)) == (None, None)
    assert price_of("L4", str(a_list)) == (None, None)


def test_json_is_read_too(tmp_path):
    """A list may be written by a program."""
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"A100-80G": {"spot": 0.5}}), encoding="utf-8")
    assert price_of("A100-80G", f"{path}:spot")[0] == 0.5


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("A100: 1", "different memory"),
        ("A9000: 1", "not a known GPU"),
        ("A100-80G: free", "is no price"),
        ("A100-80G: -1", "is no price"),
        ("A100-80G: .nan", "is no price"),
        ("A100-80G: true", "is no price"),
        ("A100-80G: {reserved: 1}", "no kind of price"),
        ("[1, 2]", "no list of prices"),
        ("", "no list of prices"),
        ("a: [", "not YAML"),
        ("A100-80G: 1\nA100-80G: 2", "two prices of 'A100-80G'"),
        ("A100-80G: 1\nA100-SXM-80G: 2", "two prices, the second as 'A100-SXM-80G'"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path, content, words):
    """What cannot be a price or a GPU is said, and nothing is planned with it."""
    path = tmp_path / "prices.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words) as refusal:
        read_prices(str(path))
    assert refusal.value.to_fix


@pytest.mark.parametrize("text", ["nowhere.yaml", "nowhere.yaml:spot", "-3", "nan", "inf", "cheap"])
def test_what_is_neither_is_refused(text):
    """A file that is not there and a number that is no price are wrong input."""
    with pytest.raises(InputError):
        read_prices(text)


def test_any_is_what_the_list_has(a_list):
    """With a list `any` offers its GPUs alone, within the budget at its prices."""
    found = hardware(["any"], 6.0, read_prices(str(a_list)))
    assert {(each.device.name, each.num_devices) for each in found} == {
        ("A100-SXM-80G", 1),
        ("A100-SXM-80G", 2),
        ("A100-SXM-80G", 4),
        ("H100-SXM-80G", 1),
        ("H100-SXM-80G", 2),
    }


def test_other_sizes_have_no_price_where_one_was_given():
    """A price that somebody gave says nothing about the same GPU with other memory; the catalogue's prices do."""
    given = priced(parse_cluster("A100-80G"), read_prices("9"))
    assert [each.dollars_per_hour for each in other_sizes(given.device)] == [None]
    assert [each.dollars_per_hour is None for each in other_sizes(parse_cluster("A100-80G").device)] == [False]


def test_figures_of_a_name_are_given_too():
    """A price after a GPU's colon is not the catalogue's."""
    assert parse_cluster("A100-80G:dollars_per_hour=2").device.price_origin == "as given"


COMMAND = ["plan", "--model", "HuggingFaceTB/SmolLM2-135M", "--seq-len", "512", "--global-batch", "8"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--tokens", "1e9", "--epochs", "2"], "both given"),
        (["--epochs", "2"], "no effect without --data"),
        (["--tokens", "inf"], "not a positive number"),
        (["--price", "nowhere.yaml"], "cannot read"),
    ],
)
def test_a_run_that_is_none_is_refused(more, words, capsys):
    """Tokens or epochs, a positive number of them, and a price: anything else is wrong input, said in words."""
    assert cli.run([*COMMAND, "--gpus", "1xA100-80G", *more]) == 2
    assert words in capsys.readouterr().err
