"""The rules as people read them: what does not go together, why, and for which releases."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autofit.search.rules import Rule
from autofit.search.rules.rule import DescribedRule
from autofit.spec.software import Software

NARROWEST_WITH_SOURCES = 100
"""Columns of a terminal that has room for where each rule comes from."""


def rules_table(rules: Iterable[Rule], software: Software, *, width: int) -> RenderableType:
    """List rules with their releases beside what is installed; those that do not hold for it are dim."""
    described = [rule.described(software) for rule in rules]
    shows_sources = width >= NARROWEST_WITH_SOURCES
    table = Table(box=None, padding=(0, 2, 1, 0))
    table.add_column("rule", header_style="dim", overflow="fold", ratio=2, no_wrap=shows_sources)
    table.add_column("releases", header_style="dim", overflow="fold", ratio=2)
    table.add_column("because", header_style="dim", overflow="fold", ratio=4)
    if shows_sources:
        table.add_column("source", header_style="dim", overflow="fold", ratio=4)
    for rule in described:
        cells = [rule.name, _releases(rule), rule.reason, *([rule.source] if shows_sources else [])]
        table.add_row(*cells, style="" if rule.holds else "dim")
    num_holding = sum(rule.holds for rule in described)
    return Group(table, Text(f"{num_holding} of {len(described)} rules hold for what is installed here."))


def _releases(rule: DescribedRule) -> str:
    releases = "any release" if rule.releases == ">=0" else rule.releases
    here = f"here {rule.installed}" if rule.installed else "not installed here"
    holds = "" if rule.holds else ", does not hold"
    avoided = ", avoided unless asked for" if rule.only_avoided else ""
    return f"{rule.library} {releases} ({here}{holds}{avoided})"
