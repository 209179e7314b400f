"""A plan as a tired reader wants it: the decision, whether it fits, what it costs, what comes next if it does not."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autofit.plan import Plan, Rung, adaptation
from autofit.report.data import data_facts, epoch_line, sequences_words
from autofit.report.words import (
    SHARDING_WORDS,
    batch_words,
    checkpointing_words,
    further_words,
    method_words,
    model_words,
    precision_words,
    price_words,
    share_words,
    tokens_words,
)
from autofit.spec.configuration import Configuration
from autofit.spec.estimate import STAGES, MemoryEstimate, Phase, Stages
from autofit.timing import estimate_cost
from autofit.timing.batches import step_tokens
from autofit.timing.binding import binding_resource
from autofit.units import GIB, format_bytes, format_count, format_seconds, format_three_digits
from autofit.writers.render import ACCELERATE_FILE, PLAN_FILE
from autofit.writers.scripts import launch_options

_BAR_CELLS = 40
_SMALLEST_SHOWN_BYTES = GIB // 200


def plan_report(plan: Plan, *, width: int) -> Group:
    """Lay out the whole plan for a terminal of `width` columns."""
    parts: list[RenderableType] = [found_table(plan.inputs.job.found)] if plan.inputs.job.found else []
    if (words := adaptation(plan)) is not None:
        parts.append(Text(f"{words}\n", style="bold red"))
    parts += [headline(plan), memory_table(plan.memory, width=width)]
    if plan.alternatives:
        parts.append(methods_table(plan, width=width))
    if plan.fallbacks:
        parts.append(ladder_table(plan, width=width))
    if plan.truncations:
        parts.append(truncations_table(plan))
    parts += [bullets("Why", plan.reasons), bullets("Not known", unknowns(plan))]
    return Group(*parts)


def found_table(found: Mapping[str, str]) -> RenderableType:
    """Show what was read from the script, and where it says so, for the user to check."""
    return Group(Text("Read from the script", style="bold"), facts_grid(found.items()), "")


def headline(plan: Plan) -> Group:
    """State the decision, and under it how full, how fast and how dear."""
    return Group(Text(decision(plan), style="bold"), facts_grid(_facts(plan)))


def facts_grid(facts: Iterable[tuple[str, str | Text]]) -> Table:
    """Set names beside their facts, which fold under each other where the terminal is narrow."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, fact in facts:
        grid.add_row(f"  {name}", fact)
    return grid


def decision(plan: Plan) -> str:
    """Write the plan as one sentence."""
    given, used = plan.inputs.cluster.num_devices, plan.configuration.num_processes
    devices = f"{used}{f' of {given}' if used < given else ''} x {plan.inputs.cluster.device.name}"
    return f"{method_words(plan.configuration)} of {model_words(plan.inputs.job.model.name)} on {devices}"


def _facts(plan: Plan) -> Iterable[tuple[str, str | Text]]:
    configuration = plan.configuration
    yield "batch", f"{batch_words(configuration)} {sequences_words(plan)}"
    yield from data_facts(plan)
    yield "sharding", SHARDING_WORDS[configuration.sharding]
    setup = (precision_words(configuration), configuration.optim, checkpointing_words(configuration))
    yield "setup", ", ".join([*setup, *further_words(configuration)])
    yield "memory", memory_line(plan.memory)
    yield "", memory_figures(plan.memory)
    if plan.memory.stages is not None:
        yield "stages", stages_line(plan.memory.stages, plan.configuration)
    if plan.time.step_seconds is not None:
        yield "speed", speed_line(plan)
    if plan.cost.device_hours_per_million_tokens is not None:
        yield "price", price_line(plan)
    if plan.epoch is not None:
        yield "epoch", epoch_line(plan.epoch)
    if plan.run is not None:
        yield "run", run_line(plan)


def memory_line(memory: MemoryEstimate) -> Text:
    """Draw how much of the budget is needed, and say which figure that is."""
    fraction = memory.needed_bytes / memory.budget_bytes
    style = "green" if memory.fits else "bold red"
    verdict = "" if memory.fits else ", does not fit"
    return Text.assemble(
        (bar(fraction), style),
        f" {memory.needed_bytes / GIB:.2f} of {format_bytes(memory.budget_bytes)} ({fraction:.0%}{verdict})",
    )


def bar(fraction: float) -> str:
    """Draw a share in ASCII, which survives every terminal and every log."""
    filled = min(_BAR_CELLS, max(0, round(fraction * _BAR_CELLS)))
    return "[" + "#" * filled + "." * (_BAR_CELLS - filled) + "]"


def memory_figures(memory: MemoryEstimate) -> str:
    """Name each figure that was computed, from the innermost: tensors, allocator, process."""
    figures = {
        "allocated": (memory.peak_allocated_bytes, memory.peak_allocated_interval_bytes),
        "reserved": (memory.peak_reserved_bytes, memory.peak_reserved_interval_bytes),
        "whole process": (memory.process_bytes, memory.process_interval_bytes),
    }
    known = {
        name: f"{name} {num_bytes / GIB:.2f}{_bounds(interval)}"
        for name, (num_bytes, interval) in figures.items()
        if num_bytes is not None
    }
    if "reserved" in known and memory.needed_reserved_bytes not in {None, memory.peak_reserved_bytes}:
        known["reserved"] += f" (not less than {(memory.needed_reserved_bytes or 0) / GIB:.2f})"
    return ", ".join(known.values()) + " GiB"


def stages_line(stages: Stages, configuration: Configuration) -> str:
    """Say what is allocated outside the steady steps, and what of it is on a node's host."""
    known = {name.replace("_", " "): stage for name in STAGES if (stage := getattr(stages, name)) is not None}
    details = {"evaluation": f" ({configuration.per_device_eval_batch_size} a batch)"}
    device = ", ".join(f"{name}{details.get(name, '')} {stage.device_bytes / GIB:.2f}" for name, stage in known.items())
    host = ", ".join(f"{name} {stage.host_bytes / GIB:.2f}" for name, stage in known.items() if stage.host_bytes)
    return f"allocated {device} GiB" + (f"; host memory of a node {host} GiB" if host else "")


def _bounds(interval_bytes: tuple[int, int] | None) -> str:
    """Write where a figure lies if it is off as published runs were; nothing where none were."""
    if interval_bytes is None:
        return ""
    low, high = interval_bytes
    return f" ({low / GIB:.2f} to {high / GIB:.2f})"


def speed_line(plan: Plan) -> str:
    """Write the rate over all devices with its bounds, and what holds it back."""
    time = plan.time
    if time.step_seconds is None or time.tokens_per_second is None:
        return "not known"
    bounds = ""
    if time.tokens_per_second_lower is not None and time.tokens_per_second_upper is not None:
        bounds = f" ({tokens_words(time.tokens_per_second_lower)} to {tokens_words(time.tokens_per_second_upper)})"
    utilization = time.model_flops_utilization_fraction
    mfu = "" if utilization is None else f", MFU {utilization:.0%}"
    bound = binding_resource(time.terms, plan.configuration, plan.inputs.cluster)
    step = f"{format_seconds(time.step_seconds)} a step{mfu}{f', bound by {bound}' if bound else ''}"
    return f"{tokens_words(time.tokens_per_second)} tokens/s{bounds}, {step}"


def price_line(plan: Plan) -> str:
    """Write what a million tokens cost, in dollars where the device has a price and in device-hours where not."""
    cost = plan.cost
    if cost.dollars_per_million_tokens is not None and cost.dollars_per_device_hour is not None:
        origin = plan.inputs.cluster.device.price_origin or "the lowest price found"
        price = f"at ${cost.dollars_per_device_hour:.2f} per device-hour, {origin}"
        return f"${format_three_digits(cost.dollars_per_million_tokens)} per million tokens {price}"
    assert cost.device_hours_per_million_tokens is not None, "asked for only where there are some"
    hours = format_three_digits(cost.device_hours_per_million_tokens)
    return f"{hours} device-hours per million tokens; this device has no price"


def run_line(plan: Plan) -> str:
    """Write what the whole run takes: hours, and dollars where the device has a price."""
    run, length = plan.run, plan.inputs.job.run
    assert run is not None, "asked for only where there is one"
    assert length is not None, "a run has a length"
    epochs = "" if length.epochs is None else f"{length.epochs:g} epochs, "
    line = f"{epochs}{format_count(run.tokens)} tokens"
    if run.hours is None or run.device_hours is None:
        return f"{line}; how long they take is not known"
    dollars = "; this device has no price" if run.dollars is None else f", ${run.dollars:,.2f}"
    return (
        f"{line} in {format_seconds(run.hours * 3600)}, {format_three_digits(run.device_hours)} device-hours{dollars}"
    )


def memory_table(memory: MemoryEstimate, *, width: int) -> RenderableType:
    """Show bytes by term (rows) and phase (columns): the phases that come nearest to the peak, as many as fit."""
    phases = nearest_to_peak(memory.phases, num_phases=max(1, (width - 34) // 14))
    terms = [term for term in dict.fromkeys(term for phase in phases for term in phase.terms) if shows(phases, term)]
    peak = max(phases, key=lambda phase: phase.bytes, default=None)
    table = plain_table(
        "Memory of the most loaded device, GiB", "term", *(phase.name.replace("_", " ") for phase in phases)
    )
    for term in terms:
        table.add_row(term.replace("_", " "), *(_gib_cell(phase.terms.get(term)) for phase in phases))
    table.add_row("sum", *(Text(_gib_cell(phase.bytes), style="bold" if phase is peak else "") for phase in phases))
    return table


def shows(phases: Iterable[Phase], term: str) -> bool:
    """Tell whether a term would show as anything but 0.00 GiB in some phase."""
    return any(phase.terms.get(term, 0) >= _SMALLEST_SHOWN_BYTES for phase in phases)


def nearest_to_peak(phases: Sequence[Phase], *, num_phases: int) -> list[Phase]:
    """Choose the largest phases and keep them in the order of the step."""
    largest = sorted(phases, key=lambda phase: -phase.bytes)[:num_phases]
    return [phase for phase in phases if phase in largest]


def _gib_cell(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / GIB:.2f}"


class _Column(Struct, frozen=True, kw_only=True):
    """One column of a table of rungs; the least important ones go first where the terminal is narrow."""

    title: str
    cell: Callable[[Plan, Rung], str]
    min_width: int = 0
    """Narrowest terminal that shows it."""


def methods_table(plan: Plan, *, width: int) -> Table:
    """Set the best of each method side by side, the chosen one first; of one that does not fit what comes nearest."""
    columns = (
        _Column(title="method", cell=lambda _, rung: rung.configuration.method),
        *_SETUP_COLUMNS,
        _Column(title="tokens/s", cell=_rate_cell),
        _Column(title="$/M tokens", cell=_price_cell, min_width=60),
    )
    return _rung_table("The best of each method", columns, plan, (_as_rung(plan), *plan.alternatives), width=width)


def ladder_table(plan: Plan, *, width: int) -> Table:
    """List what is tried next if memory runs out, each rung with its price in time and money."""
    columns = (
        _Column(title="then", cell=lambda _, rung: f"{plan.fallbacks.index(rung) + 1}. {rung.configuration.method}"),
        *_SETUP_COLUMNS,
        _Column(title="a step", cell=_step_cell, min_width=60),
        _Column(title="slower by", cell=_slower_cell),
        _Column(title="$/M tokens", cell=_price_cell, min_width=100),
    )
    title = "If it runs out of memory all the same: a new process, the same global batch"
    return _rung_table(title, columns, plan, plan.fallbacks, width=width)


def truncations_table(plan: Plan) -> Table:
    """List what cutting sequences at other lengths would save and lose, the planned length among them."""
    table = plain_table(
        "What this configuration would need and take if sequences were cut at",
        *("tokens", "sequences cut", "tokens lost", "allocated GiB", "an epoch", "$"),
    )
    for each in plan.truncations:
        table.add_row(
            f"{each.sequence_tokens:,}",
            share_words(each.sequences_cut_fraction),
            share_words(each.tokens_lost_fraction),
            f"{each.peak_allocated_bytes / GIB:.2f}",
            "?" if each.epoch_seconds is None else format_seconds(each.epoch_seconds),
            "?" if each.epoch_dollars is None else f"{each.epoch_dollars:,.2f}",
            style="bold" if each.sequence_tokens == plan.inputs.job.workload.sequence_tokens else "",
        )
    return table


def _rung_table(title: str, columns: Sequence[_Column], plan: Plan, rungs: Iterable[Rung], *, width: int) -> Table:
    shown = [column for column in columns if column.min_width <= width]
    table = plain_table(title, *(column.title for column in shown))
    for rung in rungs:
        style = "bold" if rung.configuration == plan.configuration else ""
        table.add_row(*(column.cell(plan, rung) for column in shown), style=style)
    return table


def _as_rung(plan: Plan) -> Rung:
    return Rung(
        configuration=plan.configuration,
        peak_allocated_bytes=plan.memory.peak_allocated_bytes,
        needed_bytes=plan.memory.needed_bytes,
        step_seconds=plan.time.step_seconds,
    )


def _batch_cell(_: Plan, rung: Rung) -> str:
    return f"{rung.configuration.per_device_train_batch_size} x {rung.configuration.gradient_accumulation_steps}"


def _sharding_cell(plan: Plan, rung: Rung) -> str:
    """Name the sharding; on how many devices only where a plan could choose that."""
    used, restrictions = rung.configuration.num_processes, plan.inputs.job.restrictions
    on = f" on {used}" if len(restrictions.num_processes) > 1 else ""
    return f"{rung.configuration.sharding}{on}{'' if rung.configuration.offload == 'none' else ', host'}"


def _checkpointing_cell(_: Plan, rung: Rung) -> str:
    return "yes" if rung.configuration.gradient_checkpointing else "no"


def _rate_cell(plan: Plan, rung: Rung) -> str:
    if not rung.fits:
        return "-"
    if rung.step_seconds is None:
        return "?"
    return tokens_words(step_tokens(plan.inputs.job.workload, rung.configuration) / rung.step_seconds)


def _price_cell(plan: Plan, rung: Rung) -> str:
    """Price a rung: it trains the same tokens in a step as the plan, and pays for the devices it uses."""
    if not rung.fits:
        return "-"
    inputs, time = plan.inputs, replace(plan.time, step_seconds=rung.step_seconds)
    return price_words(estimate_cost(time, inputs.cluster, inputs.job.workload, rung.configuration))


def _step_cell(_: Plan, rung: Rung) -> str:
    return "?" if rung.step_seconds is None else format_seconds(rung.step_seconds)


def _slower_cell(plan: Plan, rung: Rung) -> str:
    if rung.step_seconds is None or plan.time.step_seconds is None:
        return "?"
    return f"{rung.step_seconds / plan.time.step_seconds - 1:+.0%}"


_SETUP_COLUMNS = (
    _Column(title="batch x acc.", cell=_batch_cell),
    _Column(title="sharding", cell=_sharding_cell),
    _Column(title="optim", cell=lambda _, rung: rung.configuration.optim, min_width=85),
    _Column(title="ckpt", cell=_checkpointing_cell, min_width=75),
    _Column(
        title="needs GiB", cell=lambda _, rung: f"{rung.needed_bytes / GIB:.2f}{'' if rung.fits else ' (too much)'}"
    ),
)


def unknowns(plan: Plan) -> tuple[str, ...]:
    """Name each figure the plan does not hold, so that a blank is never read as a zero."""
    memory, device = plan.memory, plan.inputs.cluster.device
    on_gpu = device.kind == "cuda"
    open_questions = [
        (on_gpu and memory.peak_reserved_bytes is None, "what the caching allocator reserves"),
        (on_gpu and memory.process_bytes is None, "CUDA context and communication buffers"),
        (
            not plan.configuration.evaluation.is_known,
            "memory of an evaluation: how many logits are kept, or what a generated sequence caches, is not known",
        ),
        (
            on_gpu and plan.configuration.optim.startswith("galore"),
            "what cuSOLVER takes to decompose a gradient: a workspace that nobody has compared is counted",
        ),
        (device.memory_is_estimated, f"what torch sees of {device.name}: derived from a similar device"),
        (plan.time.step_seconds is None, f"the speed of {device.name}: the rates it would follow from are not known"),
        (on_gpu and plan.cost.dollars_per_device_hour is None, f"the price of {device.name}; --price gives it"),
    ]
    return tuple(words for is_open, words in open_questions if is_open)


def files_report(files: Sequence[Path]) -> RenderableType:
    """List what was written, by folder."""
    return bullets("Written", by_folder(files))


def by_folder(files: Iterable[Path]) -> list[str]:
    """Name each folder once, with the names of its files."""
    names: dict[Path, list[str]] = {}
    for path in files:
        names.setdefault(path.parent, []).append(path.name)
    return [f"{folder}: {', '.join(sorted(inside))}" for folder, inside in names.items()]


def next_commands(plan: Plan, run_folder: Path | None) -> Text:
    """Write the commands that start what was planned, whole and on lines of their own, to be copied."""
    if run_folder is None:
        return Text(
            "\nAdd -o FOLDER to write the files. What every other choice would need and cost: "
            "autofit explain FOLDER/plan.json",
            style="dim",
        )
    script = [plan.inputs.job.script or "train.py", *plan.inputs.job.script_arguments]
    plain = ["accelerate", "launch", "--config_file", str(run_folder / ACCELERATE_FILE), *launch_options(plan), *script]
    own = ["autofit", "launch", "--plan", str(run_folder / PLAN_FILE), *_after_dashes(script)]
    return Text.assemble(
        ("\nStart it with autofit, which applies, verifies, measures and falls back\n", "bold"),
        f"  {shlex.join(own)}\n",
        ("Start it without; the script must set what training_arguments.json says\n", "bold"),
        f"  {shlex.join(plain)}\n",
        ("See what every other choice would need and cost\n", "bold"),
        f"  {shlex.join(['autofit', 'explain', str(run_folder / PLAN_FILE)])}",
    )


def _after_dashes(script: Sequence[str]) -> list[str]:
    return [script[0], *(["--", *script[1:]] if len(script) > 1 else [])]


def bullets(title: str, lines: Iterable[str]) -> RenderableType:
    """Write a titled list; nothing at all where there is nothing to list."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for line in lines:
        grid.add_row(" -", line)
    return Group(Text(f"\n{title}", style="bold"), grid) if grid.row_count else Group()


def plain_table(title: str, *columns: str) -> Table:
    """Start a table without lines: the first column to the left, figures to the right."""
    table = Table(box=None, title=f"\n{title}", title_justify="left", title_style="bold", padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(f"{column}", justify="left" if number == 0 else "right", overflow="fold", header_style="dim")
    return table
