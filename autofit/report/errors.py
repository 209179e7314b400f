"""A refusal as text for a person and as JSON for a program."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from autofit.errors import AutofitError


def error_text(error: AutofitError) -> Text:
    """Write what is wrong, what to change, and a command that helps, each on lines of its own."""
    text = Text.assemble(("error: ", "bold red"), error.message)
    if error.to_fix:
        text.append_text(Text.assemble(("\nTo fix: ", "bold"), error.to_fix))
    if error.hint:
        text.append_text(Text.assemble(("\nHint: ", "bold"), error.hint))
    return text


def guess_warning(refusal: AutofitError) -> Text:
    """Say what kept a script from being run, and that all that follows is guessed."""
    text = Text.assemble(("The script could not be run here: ", "bold red"), refusal.message)
    text.append_text(Text.assemble(("\nTo fix: ", "bold"), refusal.to_fix or ""))
    return text.append("\nEvery value below is guessed from its source: check each.", "bold red")


def error_json(error: AutofitError) -> dict[str, Any]:
    """Give the same three parts and the exit code as one JSON object."""
    return {
        "error": {
            "kind": type(error).__name__,
            "exit_code": error.exit_code,
            "message": error.message,
            "to_fix": error.to_fix,
            "hint": error.hint,
        }
    }
