"""Steps that are traced at the planned length alone: loops over tokens or chunks, and what pads to whole blocks."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from autofit.errors import InputError
from autofit.memory.fused_losses import CHUNK_ENTRIES, CHUNK_TOKENS, bound_on
from autofit.memory.tape import phase_peaks
from autofit.memory.unroll import unroll
from autofit.profile.fit import by_tokens, evaluate
from autofit.profile.loops import MAX_OPERATORS, ROUND_TOKENS, Growth, refuse_long_loop
from autofit.profile.trace import trace
from autofit.sources.profiles import merged, pack_name, stored_profiles, write_pack
from autofit.spec.job import Model
from autofit.spec.libraries import installed_versions
from autofit.spec.profile import RegimeProfile
from autofit.timing.kernels import micro_step_time, micro_step_work
from autofit.timing.rates import rates_of
from tests.profile.tiny import CONFIGS, a_regime, every_layer_traced, highest_alive, real_peak, tool
from tests.search.worlds import a_cluster

BATCH = 5
"""Was not traced."""
depths = tool("compare_depths")
MINIMAX: dict[str, Any] = {
    **depths.SMALL,
    "model_type": "minimax",
    "head_dim": 16,
    "block_size": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 10,
}
MAMBA: dict[str, Any] = {
    "model_type": "mamba",
    "vocab_size": 500,
    "hidden_size": 32,
    "state_size": 8,
    "num_hidden_layers": 8,
}
CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "a loop over tokens": (MAMBA, 11, {"attention": "eager"}),
    "a loop over chunks, layers of two kinds": (depths.config_of("qwen3_next"), 70, {}),
    "its checkpoints": (MINIMAX, 70, {"gradient_checkpointing": True}),
    "a scan between two multiples of its chunk": (depths.config_of("mamba2"), 100, {"attention": "eager"}),
}
"""A config, a length and what of the regime changes."""


def at_one_length(config: dict[str, Any], tokens: int, **regime: Any) -> RegimeProfile:
    """Trace a length alone, without trying several first."""
    return trace("tiny", config, a_regime(**regime), sequence_tokens=tokens, at_one_length=True)


def predicted(profile: RegimeProfile, tokens: int, batch: int = BATCH) -> int:
    """Return the highest moment of a step."""
    return int(max(peak.kept[0] for peak in phase_peaks(profile, [batch], tokens)))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_real_step_at_the_length_needs_what_is_predicted(case):
    """To the byte, at a batch that was not traced, with the layers written out from a few."""
    config, tokens, regime = CASES[case]
    profile = at_one_length(config, tokens, **regime)
    assert profile.only_length == tokens
    assert predicted(profile, tokens) == real_peak(config, (BATCH, tokens), **regime)


@pytest.mark.slow
def test_a_step_of_other_tensors_at_each_length_is_traced_at_the_planned_one():
    """Its tape says so, has a full trace's births, frees all of them, and no other length is estimated with it."""
    tokens = 200
    profile = trace("tiny", MINIMAX, a_regime(), sequence_tokens=tokens)
    assert (profile.min_sequence_tokens, profile.max_sequence_tokens) == (tokens, tokens)
    assert not profile.holds_for(tokens - 1)
    assert not profile.holds_for(tokens + 1)
    (whole,) = every_layer_traced(MINIMAX, a_regime(), [(BATCH, tokens)])
    births = sorted(event[0] for segment in whole for event in segment.events if len(event) == 2)
    written_out = unroll(profile, BATCH, tokens)
    assert sorted(written_out.num_bytes[written_out.is_birth].tolist()) == births
    assert predicted(profile, tokens) == highest_alive(whole)


@pytest.mark.slow
def test_more_operators_than_are_traced_are_refused_with_a_length_that_is_traced():
    """Before the long step is run."""
    with pytest.raises(InputError, match="loops over its tokens") as refused:
        trace("tiny", MINIMAX, a_regime(), sequence_tokens=10**8)
    assert "--seq-len" in refused.value.to_fix


@pytest.mark.parametrize(("few", "more"), [(1_000, 3_000), (100, 107), (50_000, 240_000)])
def test_the_length_that_is_offered_is_the_longest_that_is_traced(few, more):
    """One that is a little longer would have too many operators, and is refused."""
    growth = Growth(tokens=(16, 32), operators=(few, more))
    longest = growth.longest_tokens()
    refuse_long_loop("Model", longest, growth)
    assert growth.at(longest) <= MAX_OPERATORS < growth.at(longest + ROUND_TOKENS)
    with pytest.raises(InputError, match=f"{longest:,}"):
        refuse_long_loop("Model", longest + ROUND_TOKENS, growth)


@pytest.mark.slow
def test_packed_rows_of_a_loop_are_refused():
    """How often it runs depends on the micro-batch."""
    with pytest.raises(InputError, match="packed row"):
        trace("tiny", MINIMAX, a_regime(batching="packed"), sequence_tokens=200)


def masked(tokens: int) -> RegimeProfile:
    """Trace padded batches on a GPU, whose masks are padded to 8 columns."""
    return trace("llama", CONFIGS["llama"], a_regime(batching="padded", device="cuda"), sequence_tokens=tokens)


@pytest.mark.slow
def test_masks_that_are_padded_are_counted_where_they_are():
    """Lengths of a multiple of 8 share one tape, which has no padding; another has a tape of its own, which has."""
    even, odd = masked(1000), masked(1001)
    assert (even.multiple_tokens, even.only_length) == (8, None)
    assert not even.holds_for(1001)
    assert odd.only_length == 1001
    (whole,) = every_layer_traced(CONFIGS["llama"], odd.regime, [(BATCH, 1001)])
    assert predicted(odd, 1001) == pytest.approx(highest_alive(whole), rel=1e-3)
    assert predicted(even, 1001) < predicted(odd, 1001)


@pytest.mark.slow
def test_packed_rows_are_counted_with_the_most_padding():
    """A row is as long as the micro-batch makes it, so a length that is no multiple of 8 counts for every row."""
    regime = a_regime(batching="packed", device="cuda")
    profile = trace("llama", CONFIGS["llama"], regime, sequence_tokens=101)
    for batch in (4, 8):
        (whole,) = every_layer_traced(CONFIGS["llama"], regime, [(batch, 101)])
        assert 0 <= predicted(profile, 101, batch) / highest_alive(whole) - 1 < (0.01 if batch == 4 else 0.15)


@pytest.fixture(scope="module")
def tape() -> RegimeProfile:
    """Return a tape of 64 tokens."""
    return at_one_length(CONFIGS["llama"], 64)


def test_a_tape_of_one_length_is_found_for_it_alone(tape, tmp_path, monkeypatch):
    """It is kept beside those of other lengths, and a length that no tape holds for has none."""
    monkeypatch.setenv("AUTOFIT_CACHE", str(tmp_path))
    other = replace(tape, min_sequence_tokens=65, max_sequence_tokens=65)
    pack = merged((tape,), [other])
    assert len(pack) == 2
    model = Model(name="tiny", config=CONFIGS["llama"], origin="config file")
    write_pack(tmp_path / "profiles" / pack_name(model.config, installed_versions()), pack)
    for tokens, expected in ((64, tape), (65, other), (66, None)):
        assert stored_profiles(model, [tape.regime], tokens).get(tape.regime) == expected


def test_a_tape_of_every_length_of_a_multiple_is_preferred_where_it_holds(tape, tmp_path, monkeypatch):
    """What holds for any length may count padding that a multiple has not."""
    monkeypatch.setenv("AUTOFIT_CACHE", str(tmp_path))
    every = replace(tape, min_sequence_tokens=1, max_sequence_tokens=None)
    multiples = replace(every, multiple_tokens=8)
    model = Model(name="tiny", config=CONFIGS["llama"], origin="config file")
    write_pack(tmp_path / "profiles" / pack_name(model.config, installed_versions()), merged((every,), [multiples]))
    assert stored_profiles(model, [tape.regime], 64)[tape.regime].multiple_tokens == 8
    assert stored_profiles(model, [tape.regime], 65)[tape.regime].multiple_tokens == 1


@pytest.mark.parametrize("per_sequence", [4 * 64 * 1000, 4 * 63 * 1000, 7])
def test_bytes_for_each_token_are_said_where_they_are_whole(per_sequence):
    """The value at the length stays the same, exactly."""
    said = by_tokens((16.0, float(per_sequence), 0.0, 0.0, 0.0, 0.0), 64)
    assert evaluate(said, (3, 64)) == 16 + 3 * per_sequence
    assert bool(said[3]) == (per_sequence % 64 == 0)


def test_a_chunk_of_a_fused_loss_is_bounded_in_a_tape_of_one_length_too(tape):
    """Its rows, one fewer than tokens, are known by what they come to at that length."""
    rows = (0.0, -4.0 * CHUNK_ENTRIES, 0.0, 4.0 * CHUNK_ENTRIES, 0.0, 0.0)
    several = replace(
        tape, regime=replace(tape.regime, loss="chunked"), min_sequence_tokens=1, max_sequence_tokens=None
    )
    alone = replace(several, min_sequence_tokens=64, max_sequence_tokens=64)
    collapsed = by_tokens((0.0, evaluate(rows, (1, 64)), 0.0, 0.0, 0.0, 0.0), 64)
    assert collapsed != rows
    assert bound_on(collapsed, alone, 64) == bound_on(rows, several, 64) == 4 * CHUNK_TOKENS * CHUNK_ENTRIES
    assert bound_on(tuple(2 * each for each in collapsed), alone, 64) is None


def test_shorter_sequences_take_as_long_as_as_many_tokens(tape):
    """Of a tape of one length, which does not say how its work grows with s."""
    rates = rates_of(tape.regime, a_cluster(1))
    work = micro_step_work(tape)
    seconds = {size: micro_step_time(work, *size, rates).forward.device_seconds for size in ((2, 32), (1, 64), (1, 32))}
    assert seconds[2, 32] == seconds[1, 64] > seconds[1, 32]
