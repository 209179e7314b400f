"""What a person reads of the rules."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from autofit.report.rules import rules_table
from autofit.search.rules import RULES
from autofit.spec.software import Software


@pytest.mark.parametrize("width", [100, 130])
def test_a_rule_is_named_in_one_piece(width):
    """A name can be copied, as other output and the documents write it, wherever sources are shown."""
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(rules_table(RULES, Software(), width=width))
    words = {line.split(" ")[0] for line in console.file.getvalue().splitlines()}
    assert {rule.name for rule in RULES} <= words
