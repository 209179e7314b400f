"""The command line as a test calls it: in this process, with what it printed."""

from __future__ import annotations

import pytest
from msgspec import Struct

from autofit import cli


class Result(Struct, frozen=True, kw_only=True):
    """What one command did."""

    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def autofit(capsys, monkeypatch):
    """Return a function that runs one command; the terminal is wide, so that messages are not folded."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        exit_code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(exit_code=exit_code, stdout=captured.out, stderr=captured.err)

    return run
