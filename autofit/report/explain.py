"""An estimate taken apart, for people: what each term is, by which formula and from where; and what is alive when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autofit.memory.explain import ExplainedPhase, ExplainedTerm, HeldTensors, Symbols
from autofit.plan import Plan
from autofit.report.plan import bullets, facts_grid, headline, memory_table, plain_table
from autofit.report.words import SHARDING_WORDS, excess_words
from autofit.search.evaluate import usable_bytes
from autofit.search.why import Knob, Rival
from autofit.search.words import describe, misfit_words
from autofit.units import GIB, MIB, format_bytes, format_seconds

NUM_TENSORS_SHOWN = 5
WIDTH_WITH_SETUP = 140
SMALLEST_SHOWN_BYTES = GIB // 200
STAGE_MARKS = {
    "W": ("weights", "quantized_weights", "master_weights", "gathered_weights", "buffers"),
    "O": ("optimizer_state", "optimizer_temporaries"),
    "G": ("gradients", "communication_buckets", "offload_buffers"),
    "A": ("activations", "batch", "workspaces", "allocator_rounding"),
}
"""What each letter of a bar stands for."""
STAGE_WORDS = {
    "W": "weights, master and gathered ones too",
    "O": "optimizer",
    "G": "gradients and buckets",
    "A": "activations and the rest",
}


def explanation_report(
    plan: Plan,
    symbols: Symbols,
    phases: Sequence[ExplainedPhase],
    *,
    stored_peak_allocated_bytes: int | None,
    knobs: Sequence[Knob] | None,
    width: int,
) -> Group:
    """Lay out an explanation for a terminal of `width` columns."""
    parts: list[RenderableType] = [headline(plan)]
    if changed := age_words(stored_peak_allocated_bytes, plan.memory.peak_allocated_bytes):
        parts.append(Text(f"\n{changed}", style="bold"))
    parts += [] if knobs is None else [knobs_table(plan, knobs, width=width)]
    parts += [memory_table(plan.memory, width=width), *definitions(symbols, phases)]
    peak = max(phases, key=lambda phase: phase.bytes)
    parts += [tensors_table(phase, is_peak=phase is peak) for phase in phases if shows_tensors(phase, peak)]
    routing = [reason for reason in plan.reasons if reason.startswith("routing")]
    parts += [bullets("Of", routing)] if routing else []
    return Group(*parts)


def knobs_table(plan: Plan, knobs: Sequence[Knob], *, width: int) -> RenderableType:
    """Set beside each knob its other values, each with what it needs and what a token costs."""
    if not knobs:
        return Text("\nWhy: nothing to set beside it; the search that is possible here has no other configuration.")
    shows_setup = width >= WIDTH_WITH_SETUP
    columns = ["knob", "instead", "needs GiB", "a step", "a token costs", *(["as"] if shows_setup else [])]
    table = plain_table("Why: what the other values of each knob would need and cost, all else chosen best", *columns)
    for column in {1, len(columns) - 1} if shows_setup else {1}:
        table.columns[column].justify = "left"
    for knob in knobs:
        for number, rival in enumerate(knob.rivals):
            name = "" if number else f"{knob.name.replace('_', ' ')} {knob.value}"
            table.add_row(name, rival.value, *_rival_cells(plan, rival), *_setup(rival, shown=shows_setup))
    return table


def _rival_cells(plan: Plan, rival: Rival) -> tuple[str, ...]:
    step = "?" if rival.step_seconds is None else format_seconds(rival.step_seconds)
    needed = f"{rival.needed_bytes / GIB:.2f}"
    if rival.misfit == "none":
        return needed, step, excess_words(rival.excess_fraction)
    if rival.misfit != "device memory":
        return needed, step, f"does not fit {misfit_words(rival.misfit)}"
    excess = rival.needed_bytes - usable_bytes(plan.memory.budget_bytes)
    return needed, step, f"{format_bytes(excess)} too much"


def _setup(rival: Rival, *, shown: bool) -> tuple[str, ...]:
    return (describe(rival.configuration),) if shown else ()


def shows_tensors(phase: ExplainedPhase, peak: ExplainedPhase) -> bool:
    """Tell whether a phase's activations are worth a table: a hundredth of the peak or more."""
    return sum(held.total_bytes for held in phase.activations) * 100 >= peak.bytes


def age_words(stored_bytes: int | None, bytes_now: int) -> str:
    """Say that a stored plan's figure is another than today's; nothing where it is the same."""
    if stored_bytes is None or stored_bytes == bytes_now:
        return ""
    told, found = format_bytes(stored_bytes), format_bytes(bytes_now)
    return f"The plan says {told} allocated; here it comes to {found}, so it was made with other releases."


def definitions(symbols: Symbols, phases: Sequence[ExplainedPhase]) -> Iterable[RenderableType]:
    """Write down every term once: what it is, by which formula, from where."""
    terms = {term.name: term for phase in phases for term in phase.terms}
    yield Text("\nTerms", style="bold")
    yield facts_grid((name.replace("_", " "), term_text(term)) for name, term in terms.items())
    yield facts_grid([("letters", symbols_words(symbols))])


def term_text(term: ExplainedTerm) -> Text:
    """Write a term's meaning, its formula and its sources, a line each."""
    return Text.assemble(term.meaning, f"\n= {term.formula}", (f"\nfrom {'; '.join(term.sources)}", "dim"))


def symbols_words(symbols: Symbols) -> str:
    """Write what the letters of formulas stand for."""
    return (
        f"P = {symbols.num_params:,} parameters as stored, T = {symbols.num_trained_params:,} train, "
        f"N = {symbols.num_processes}, b = {symbols.micro_batch_sequences}, s = {symbols.sequence_tokens:,}, "
        f"h = {symbols.hidden_size:,}, {symbols.num_layers} layers; w: bytes of an element as stored"
    )


def tensors_table(phase: ExplainedPhase, *, is_peak: bool) -> Table:
    """List the largest groups of equal tensors at the highest moment of a phase."""
    name = phase.name.replace("_", " ")
    title = f"Alive in {name} ({format_bytes(phase.bytes)}{', the peak' if is_peak else ''}), GiB"
    table = plain_table(title, "made in", "GiB", "tensors", "MiB each", "bytes each")
    for held in phase.activations[:NUM_TENSORS_SHOWN]:
        table.add_row(*_tensor_cells(held))
    rest = sum(held.total_bytes for held in phase.activations[NUM_TENSORS_SHOWN:])
    if rest >= SMALLEST_SHOWN_BYTES:
        table.add_row("smaller ones", f"{rest / GIB:.2f}", "", "", "")
    return table


def _tensor_cells(held: HeldTensors) -> tuple[str, ...]:
    made_in = held.born_in.replace("_", " ") + (", in a kernel" if held.inside_kernel else "")
    size = held.tensor_bytes / MIB
    return made_in, f"{held.total_bytes / GIB:.2f}", str(held.num_tensors), f"{size:.4g}", held.formula


def stages_report(plans: Sequence[Plan], *, width: int) -> Group:
    """Draw the peak of each stage as a bar of letters, one for each kind of memory, to one scale."""
    cells = max(10, width - 34)
    largest = max(plan.memory.peak_allocated_bytes for plan in plans)
    budget = plans[0].memory.budget_bytes
    grid = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "left"):
        grid.add_column(justify=justify, no_wrap=True)
    grid.add_row(Text("stage", style="dim"), Text("GiB", style="dim"), Text("allocated at the peak", style="dim"))
    for plan in plans:
        peak = plan.memory.peak_allocated_bytes
        fits = "" if plan.memory.fits else " does not fit"
        style = "" if plan.memory.fits else "red"
        drawn = stage_bar(plan, cells_of_largest=cells, largest_bytes=largest)
        grid.add_row(plan.configuration.sharding, f"{peak / GIB:.2f}", Text(f"{drawn}{fits}", style=style))
    words = "  ".join(f"{mark}: {STAGE_WORDS[mark]}" for mark in STAGE_MARKS)
    meanings = facts_grid((plan.configuration.sharding, SHARDING_WORDS[plan.configuration.sharding]) for plan in plans)
    devices = plans[0].inputs.cluster
    title = f"{devices.num_devices} x {devices.device.name}, {format_bytes(budget)} each"
    return Group(Text(title, style="bold"), "", grid, "", Text(words), "", meanings)


def stage_bar(plan: Plan, *, cells_of_largest: int, largest_bytes: int) -> str:
    """Write as many letters as each kind of memory has its share of the largest peak."""
    phase = max(plan.memory.phases, key=lambda each: each.bytes)
    drawn, done = "", 0
    for mark, terms in STAGE_MARKS.items():
        done += sum(phase.terms.get(term, 0) for term in terms)
        drawn += mark * (round(done / largest_bytes * cells_of_largest) - len(drawn))
    return drawn
