"""What a plan says of its data set, in a few short lines."""

from __future__ import annotations

from collections.abc import Iterator

from autofit.plan import Plan
from autofit.report.words import model_words, share_words
from autofit.spec.estimate import EpochEstimate
from autofit.spec.lengths import LengthDistribution, LengthPercentile
from autofit.timing.batches import packed_rows
from autofit.units import format_count, format_seconds

_SHOWN = (0.5, 0.95, 0.99)
_BATCHING_WORDS = {
    "equal": "every sequence padded to the same length",
    "padded": "padded to the longest of a micro-batch, in random order",
    "padding_free": "not padded, all sequences of a micro-batch in one row, which the script has to see to",
}


def lengths_words(lengths: LengthDistribution) -> str:
    """Write the few figures that a distribution is known by."""
    shown = [f"{percentile_name(each)} {each.tokens:,}" for each in lengths.percentiles if each.fraction in _SHOWN]
    return f"mean {lengths.mean_tokens:,.0f}, {', '.join(shown)}, longest {lengths.max_tokens:,} tokens"


def percentile_name(percentile: LengthPercentile) -> str:
    """Name a percentile as it is spoken of."""
    return "median" if percentile.fraction == 0.5 else f"p{percentile.fraction * 100:g}"


def sequences_words(plan: Plan) -> str:
    """Name what a global batch counts, and how long it can be."""
    workload = plan.inputs.job.workload
    if workload.lengths is None:
        return f"sequences of {workload.sequence_tokens:,} tokens"
    if plan.configuration.batching == "packed":
        return f"packed rows of {workload.sequence_tokens:,} tokens"
    return f"sequences of at most {workload.sequence_tokens:,} tokens"


def data_facts(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield lines on the data: what it is, where it is cut, how much of a batch it fills."""
    lengths = plan.inputs.job.workload.lengths
    if lengths is None:
        return
    sample = f", from a sample of {lengths.num_measured_sequences:,}" if lengths.is_sample else ""
    named = f"{lengths.num_sequences:,} sequences of {model_words(lengths.path)}{sample}"
    yield "data", f"{named}: {lengths_words(lengths)}"
    yield "cut", _cut_words(plan, lengths)
    if plan.epoch is not None:
        yield "filled", _filled_words(plan, lengths, plan.epoch)


def _cut_words(plan: Plan, lengths: LengthDistribution) -> str:
    cut = plan.inputs.job.workload.sequence_tokens
    if cut >= lengths.max_tokens:
        return "nowhere; memory is for batches of the longest sequence"
    where = ", where the model's positions end," if cut == plan.inputs.job.model.max_positions else ""
    sequences, tokens = share_words(lengths.share_above(cut)), share_words(lengths.share_lost(cut))
    return f"at {cut:,} tokens{where} {sequences} of the sequences, which loses {tokens} of all tokens"


def _filled_words(plan: Plan, lengths: LengthDistribution, epoch: EpochEstimate) -> str:
    """Say how much of the time goes into the data's own tokens."""
    batching, num_processes = plan.configuration.batching, plan.configuration.num_processes
    if batching == "packed":
        rows = packed_rows(lengths, plan.inputs.job.workload.sequence_tokens)
        return (
            f"rows {share_words(rows.fill_fraction)} full, packed by best fit as trl's bfd; a step trains "
            f"{epoch.mean_sequences:,.0f} sequences on average, {rows.mean_sequences:.1f} a row"
        )
    how = _BATCHING_WORDS[batching]
    causes = [*(["padding"] if batching != "padding_free" else []), *(["waiting"] if num_processes > 1 else [])]
    if not causes:
        return how
    slowest = f" for the slowest of {num_processes} processes" if num_processes > 1 else ""
    return f"{how}; {share_words(epoch.padding_fraction)} of the time is {' and '.join(causes)}{slowest}"


def epoch_line(epoch: EpochEstimate) -> str:
    """Write what training all data once takes."""
    line = f"{epoch.num_steps:,} steps for {format_count(epoch.tokens)} tokens"
    if epoch.seconds is None:
        return line
    dollars = "" if epoch.dollars is None else f", ${epoch.dollars:,.2f}"
    return f"{line}, {format_seconds(epoch.seconds)}{dollars}"
