"""Documents show what the program does now: their output blocks are made by running it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
GENERATED = ["README.md", "docs/cli.md", "docs/search.md"]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("document", GENERATED)
def test_no_output_is_stale(document):
    """Every block between cog's marks is what its commands print now; scripts/docs.sh writes them anew."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    finished = subprocess.run(
        [sys.executable, "-m", "cogapp", "--check", "--diff", document],
        cwd=CHECKOUT,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_ci_runs_the_command_that_is_printed():
    """The line of README under its mark installs for the tests and runs pytest, and CI reads the same mark."""
    block = README.split("<!-- the tests -->")[1].split("```")[1]
    assert block == "bash\nbash scripts/install.sh test && .venv/bin/python -m pytest -n 2\n"
    assert "<!-- the tests -->" in (CHECKOUT / ".ci" / "run").read_text(encoding="utf-8")


def test_readme_warns_of_the_other_autofit():
    """README says that PyPI's project of the same import name cannot be installed beside this one."""
    assert "cannot share an environment" in README


def test_exit_codes_are_documented_where_they_are_looked_for():
    """README, the page of the command line and `--help` name every exit code from 0 to 4."""
    for text in (README, (CHECKOUT / "docs" / "cli.md").read_text(encoding="utf-8")):
        for words in ("done", "training failed", "wrong input", "nothing fits", "out of memory"):
            assert words in text
