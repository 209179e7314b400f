"""The page of typical jobs: its table is what is planned now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
PAGE = (CHECKOUT / "docs" / "decisions.md").read_text(encoding="utf-8")
STORED = ("4", "5", "6")
"""Rows whose traced steps come with the package; the others take minutes to trace."""


@pytest.mark.slow
def test_the_table_is_what_is_planned():
    """Full fine-tuning of an 8B on 2, 4 and 8 A100 is planned as the page says, to the last digit."""
    script = CHECKOUT / "scripts" / "decisions.py"
    child = subprocess.run([sys.executable, script, *STORED], capture_output=True, text=True, check=True)
    rows = [line for line in child.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(STORED)
    assert set(rows) <= set(PAGE.splitlines())


def test_every_job_of_the_table_is_explained():
    """There are twelve rows, twelve commands and twelve sentences."""
    lines = PAGE.splitlines()
    for begins in ("| {} |", "{}. "):
        assert [sum(line.startswith(begins.format(number)) for line in lines) for number in range(1, 13)] == [1] * 12
    assert sum(line.startswith("autofit plan ") for line in lines) == 12
