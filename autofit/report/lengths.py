"""How long a data set's sequences are, in a few lines: what a length to cut at is chosen by."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.text import Text

from autofit.report.data import percentile_name
from autofit.report.plan import facts_grid, plain_table
from autofit.report.words import model_words, share_words
from autofit.spec.lengths import Cut, LengthDistribution, LengthPercentile
from autofit.units import format_count

_BAR_CELLS = 40
_NUM_BARS = 8
_CUT_WORDS = (
    "cut, lost: shares of the sequences and of the tokens. padding: of micro-batches in random order, padded to their "
    "longest. packed: by best fit, as trl's bfd."
)


def lengths_report(lengths: LengthDistribution, cuts: Iterable[Cut]) -> Group:
    """Lay out a distribution: what was read, percentiles, a picture, and what cutting would lose."""
    facts = [
        ("read", read_words(lengths)),
        ("measured", measured_words(lengths)),
        ("tokens", percentiles_words(lengths)),
        ("epoch", f"{format_count(lengths.epoch_tokens(lengths.max_tokens))} tokens"),
    ]
    extent = f"mean {lengths.mean_tokens:,.0f}, longest {lengths.max_tokens:,} tokens"
    title = f"{model_words(lengths.path)}: {lengths.num_sequences:,} sequences, {extent}"
    tables = (picture(lengths), cuts_table(lengths, cuts))
    return Group(Text(title, style="bold"), facts_grid(facts), *tables)


def read_words(lengths: LengthDistribution) -> str:
    """Write what became a sequence."""
    by = "" if lengths.tokenizer is None else f"; tokens of {model_words(lengths.tokenizer)}"
    return f"{lengths.read_as}{by}"


def measured_words(lengths: LengthDistribution) -> str:
    """Write whether all was measured, and how sure a sample is."""
    if not lengths.is_sample:
        return "every sequence"
    words = f"a random sample of {lengths.num_measured_sequences:,}; the longest of it and of the largest rows"
    if lengths.mean_interval_tokens is None:
        return words
    low, high = lengths.mean_interval_tokens
    return f"{words}; mean {low:,.0f} to {high:,.0f}, intervals hold with 95 %; --data-all measures every sequence"


def percentiles_words(lengths: LengthDistribution) -> str:
    """List percentiles; of a sample with where those of all sequences lie."""
    return ", ".join(f"{percentile_name(each)} {each.tokens:,}{_interval(each)}" for each in lengths.percentiles)


def _interval(percentile: LengthPercentile) -> str:
    if percentile.interval_tokens is None:
        return ""
    low, high = percentile.interval_tokens
    return f" ({low:,} to {high:,})"


def picture(lengths: LengthDistribution) -> RenderableType:
    """Draw the share of the sequences in equal steps of length, up to the longest of 99.9 %."""
    top = lengths.percentiles[-1].tokens
    width = max(1, -(-top // _NUM_BARS))
    edges = [width * step for step in range(1, -(-top // width) + 1)]
    shares = [lengths.share_above(edge - width) - lengths.share_above(edge) for edge in edges]
    if edges and lengths.share_above(0) < 1:
        shares[0] += 1 - lengths.share_above(0)
    longer = lengths.share_above(edges[-1]) if edges else 0
    title = f"Lengths ({share_words(longer)} are longer)" if longer else "Lengths"
    table = plain_table(title, "up to", "share", "")
    table.columns[2].justify = "left"
    for edge, share in zip(edges, shares, strict=True):
        table.add_row(f"{edge:,}", f"{share:.1%}", "#" * round(_BAR_CELLS * share / max(shares)))
    return table


def cuts_table(lengths: LengthDistribution, cuts: Iterable[Cut]) -> RenderableType:
    """List what cutting at some lengths would lose, and how full batches would be."""
    table = plain_table("Cut at", "tokens", "cut", "lost", "padding of 4", "of 16", "rows, packed", "filled")
    for cut in cuts:
        at = cut.sequence_tokens
        table.add_row(
            f"{at:,}",
            share_words(cut.sequences_cut_fraction),
            share_words(cut.tokens_lost_fraction),
            *(share_words(1 - lengths.mean_cut(at) / lengths.expected_longest(num, at)) for num in (4, 16)),
            f"{cut.packed.num_rows:,}",
            share_words(cut.packed.fill_fraction),
        )
    return Group(table, Text(_CUT_WORDS, style="dim"))
