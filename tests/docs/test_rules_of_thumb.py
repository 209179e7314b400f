"""Each row of docs/rules_of_thumb.md: our figure is what is written there, and stands to the rule as the page says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
PAGE = (CHECKOUT / "docs" / "rules_of_thumb.md").read_text(encoding="utf-8")


def the_script():
    """Import scripts/rules_of_thumb.py."""
    spec = importlib.util.spec_from_file_location("rules_of_thumb", CHECKOUT / "scripts" / "rules_of_thumb.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = the_script()


def written(row):
    """Return the cells of the first row of the page whose first cell is `row`."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def ours_in(cell):
    """Return the figure in brackets."""
    return float(cell.split("(")[1].rstrip(")"))


@pytest.mark.parametrize("sharding", SCRIPT.ZERO_PAPER)
def test_model_states_by_stage_are_the_papers(sharding):
    """7.5B parameters on 64 GPUs come to 120, 31.4, 16.6 and 1.9 GB for stages 0 to 3, as the page says."""
    ours = SCRIPT.zero_model_states_gb(sharding)
    assert ours == pytest.approx(SCRIPT.ZERO_PAPER[sharding], abs=0.05)
    assert written(sharding) == [f"{SCRIPT.ZERO_PAPER[sharding]}", f"{ours:.1f}"]


@pytest.mark.slow
@pytest.mark.parametrize("method", SCRIPT.LLAMA_FACTORY)
def test_llama_factorys_7b(method):
    """Theirs is an upper bound of ours for one short sequence on 7B, and at most three times as much."""
    cell = written(method)[0]
    ours = SCRIPT.allocated_gb(f"7B {method}")
    assert cell == f"{SCRIPT.LLAMA_FACTORY[method][0]} ({ours:.1f})"
    assert ours <= SCRIPT.LLAMA_FACTORY[method][0] * 1.2
    assert ours * 3 >= SCRIPT.LLAMA_FACTORY[method][0]


@pytest.mark.slow
@pytest.mark.parametrize("method", SCRIPT.LLAMA_FACTORY)
def test_llama_factorys_table_grows_with_the_model(method):
    """In every row ours grows from 7B to 65B, as theirs does, and by about as much."""
    ours = [ours_in(cell) for cell in written(method)[:4]]
    assert ours == sorted(ours)
    theirs = SCRIPT.LLAMA_FACTORY[method]
    assert ours[3] / ours[0] == pytest.approx(theirs[3] / theirs[0], rel=0.4)


@pytest.mark.slow
def test_sixteen_bytes_a_parameter():
    """A Trainer in mixed precision holds 16 bytes of each of 6,738,415,616 parameters, in pure bf16 half of it."""
    for name, num_bytes in (("7B Full", 16), ("7B pure", 8)):
        terms = [SCRIPT.term_gb(name, term) for term in ("weights", "gradients", "optimizer_state")]
        assert sum(terms) * 1e9 == pytest.approx(num_bytes * 6_738_415_616, rel=1e-4)
        assert terms[2] == pytest.approx(2 * terms[0], rel=1e-4)
    for term in ("weights", "gradients", "optimizer_state"):
        assert written(term.replace("_", " "))[1:] == [
            f"{SCRIPT.term_gb(name, term):.1f}" for name in ("7B Full", "7B pure")
        ]


@pytest.mark.slow
def test_int8_weights_are_a_byte_and_do_not_train():
    """The weights of 7B in int8 are 7 GB as the rule has it; gradients and state are the adapter's, far under 1 GB."""
    weights = SCRIPT.term_gb("7B int8", "quantized_weights") + SCRIPT.term_gb("7B int8", "weights")
    assert weights == pytest.approx(7, rel=0.05)
    assert SCRIPT.term_gb("7B int8", "gradients") + SCRIPT.term_gb("7B int8", "optimizer_state") < 1
    rows = list(SCRIPT.int8())[2:]
    assert rows == [line for line in PAGE.splitlines() if line in rows]


@pytest.mark.slow
def test_inference_is_no_factor_of_the_weights():
    """One short sequence needs less than 1.2 times the weights, eight long ones more."""
    rows = list(SCRIPT.inference())[2:]
    assert rows == [line for line in PAGE.splitlines() if line in rows]
    ratios = [
        float(cells[4]) / float(cells[2]) for cells in ([c.strip() for c in r.strip("|").split("|")] for r in rows)
    ]
    assert ratios[0] < 1.2 < ratios[-1]


@pytest.mark.slow
def test_double_quantisation_saves_what_the_paper_says():
    """0.37 bit a quantised parameter, 3 GB on 65B."""
    assert SCRIPT.saved_bits() == pytest.approx(0.373, abs=0.001)
    saved = SCRIPT.term_gb("65B once", "quantized_weights") - SCRIPT.term_gb("65B QLoRA-4", "quantized_weights")
    assert saved == pytest.approx(3, rel=0.02)
    assert f"| that is, GB | 3 | {saved:.2f} |" in PAGE


@pytest.mark.slow
def test_65b_trains_on_one_card_of_48_gb():
    """The paper's run is planned on one A6000, with room to spare, and the page says how much."""
    plan = SCRIPT.plan_65b()
    assert plan.memory.fits
    assert plan.configuration.method == "qlora"
    needs, has = plan.memory.needed_bytes / 2**30, plan.memory.budget_bytes / 2**30
    assert f"| needs on a card of 48 GB, GiB | fits | {needs:.1f} of {has:.1f} |" in PAGE


@pytest.mark.slow
def test_paged_state_is_the_hosts():
    """Paging moves state to the host byte for byte, all but that of tensors under 100,000 elements."""
    plain = SCRIPT.term_gb("65B QLoRA-4", "optimizer_state")
    paged = SCRIPT.term_gb("65B paged", "optimizer_state")
    assert paged < plain * 0.6
    host = SCRIPT.answer("65B paged")["memory"]["host_bytes"] / 1e9
    assert paged + host == pytest.approx(plain, rel=0.02)
