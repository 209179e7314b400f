"""Puts rendered files into a run folder: whole or not at all, and never over a file that autofit did not write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from autofit.errors import InputError
from autofit.files import replace_text
from autofit.writers.render import PLAN_FILE


def write_files(files: Mapping[str, str], run_folder: Path) -> None:
    """Write each file beside its place and move it there; the plan last, so that a plan means a complete folder.

    Raises:
        InputError: the folder cannot be written, or holds files of these names that are not autofit's.
    """
    try:
        str(run_folder).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the name of the run folder {str(run_folder)!r} is not UTF-8, which its files are written in.",
            to_fix="give another folder with -o",
        ) from error
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        refuse_foreign_files(files, run_folder)
        for name in sorted(files, key=lambda name: name == PLAN_FILE):
            replace_text(run_folder / name, files[name])
    except OSError as error:
        raise InputError(
            f"cannot write to the run folder {str(run_folder)!r}: {error.strerror}",
            to_fix="give a folder that can be written, with -o",
        ) from error


def refuse_foreign_files(names: Mapping[str, str], run_folder: Path) -> None:
    """Raise InputError if writing would overwrite a file in a folder that has no plan of ours."""
    present = sorted(name for name in names if (run_folder / name).exists())
    if present and not holds_plan(run_folder):
        raise InputError(
            f"the run folder {str(run_folder)!r} has {', '.join(present)}, which autofit did not write.",
            to_fix="give another folder with -o, or move these files away",
        )


def holds_plan(run_folder: Path) -> bool:
    """Tell whether the folder has a plan.json that some release of autofit wrote."""
    try:
        content = msgspec.json.decode((run_folder / PLAN_FILE).read_bytes())
    except (OSError, msgspec.DecodeError):
        return False
    return isinstance(content, dict) and {"schema_version", "configuration"} <= content.keys()
