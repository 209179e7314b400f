"""A plan beside what it would be if one thing were another, for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from autofit.plan import Plan
from autofit.report.plan import bullets, decision, plain_table
from autofit.report.words import excess_words, price_words, tokens_words
from autofit.search.whatif import Answer, binding_reasons
from autofit.search.words import describe
from autofit.units import GIB


def whatif_report(made: Plan, found: Sequence[Answer], *, width: int) -> Group:
    """Lay out the plan and each answer for a terminal of `width` columns."""
    parts: list[RenderableType] = [
        Text(decision(made), style="bold"),
        bullets("What holds it back", binding_reasons(made)),
    ]
    planned = [answer for answer in found if answer.plan is not None]
    if planned:
        parts.append(answers_table(made, planned, width=width))
    refused = [
        f"{answer.words}: {' '.join((answer.refused or '').splitlines()[:2])}" for answer in found if answer.refused
    ]
    parts.append(bullets("Not possible", refused))
    return Group(*parts)


def answers_table(made: Plan, planned: Sequence[Answer], *, width: int) -> RenderableType:
    """Set each answer beside the plan: what it needs, how fast and how dear, and in which configuration."""
    shows_setup = width >= 100
    columns = ["", "needs GiB", "tokens/s", "$/M tokens", "a token costs", *(["as"] if shows_setup else [])]
    table = plain_table("If it were otherwise, everything left open chosen best for it", *columns)
    for words, plan in [("as planned", made), *((answer.words, answer.plan) for answer in planned)]:
        assert plan is not None, "only what was planned is listed"
        setup = [describe(plan.configuration)] if shows_setup else []
        is_other = not shows_setup and plan.configuration.method != made.configuration.method
        name = f"{words}{_other_step(made, plan)}" + (f": {plan.configuration.method}" if is_other else "")
        table.add_row(name, *_cells(made, plan), *setup, style="bold" if plan is made else "")
    if shows_setup:
        table.columns[-1].justify = "left"
    return table


def _other_step(made: Plan, plan: Plan) -> str:
    """Say how many sequences a step trains where packing makes it another number: then steps are not alike."""
    before, after = (
        each.epoch.mean_sequences if each.epoch else each.inputs.job.workload.global_batch_sequences
        for each in (made, plan)
    )
    return "" if round(before) == round(after) else f" ({after:,.0f} sequences a step, not {before:,.0f})"


def _cells(made: Plan, plan: Plan) -> tuple[str, ...]:
    speed = plan.time.tokens_per_second
    return (
        f"{plan.memory.needed_bytes / GIB:.2f}",
        "?" if speed is None else tokens_words(speed),
        price_words(plan.cost),
        _against(made, plan),
    )


def _against(made: Plan, plan: Plan) -> str:
    """Compare prices of a token, in dollars where both have them, else in device-hours on the same device."""
    if plan is made:
        return ""
    same_device = made.inputs.cluster.device.name == plan.inputs.cluster.device.name
    before, after = (
        each.cost.device_hours_per_million_tokens if same_device else each.cost.dollars_per_million_tokens
        for each in (made, plan)
    )
    if not before or after is None:
        return "?"
    return excess_words(after / before - 1)
