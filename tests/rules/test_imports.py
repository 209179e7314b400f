"""Planning costs no training stack, and the command line starts at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes"}


def modules_after(statement):
    """Return the top-level modules a fresh interpreter has after a statement."""
    program = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


@pytest.mark.parametrize(
    "module", ["autofit", "autofit.cli", "autofit.plan", "autofit.report.plan", "autofit.sources.hardware"]
)
def test_planning_modules_load_no_training_stack(module):
    """Importing what plans loads none of torch, transformers, peft, accelerate, deepspeed and bitsandbytes."""
    assert not modules_after(f"import {module}") & HEAVY


def test_the_command_line_loads_only_what_help_needs():
    """Importing the command line loads neither rich nor numpy: `--help` needs none of them."""
    assert not modules_after("import autofit.cli") & {"rich", "numpy", "yaml", "pydantic"}


def test_a_command_line_of_words_and_numbers_is_read_without_pydantic():
    """typer imports pydantic to validate; names and plain numbers need none of it."""
    words = ["plan", "--model", "no/such", "--seq-len", "8", "--global-batch", "4", "--gpus", "1xA100-80G"]
    assert "pydantic" not in modules_after(f"from autofit.cli import run; assert run({words}) == 2")
