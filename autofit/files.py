"""Where autofit keeps what it knows on this machine, and how it writes a file that others may be reading."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def user_cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return `$AUTOFIT_CACHE`, or autofit's folder in the user's cache."""
    if "AUTOFIT_CACHE" in environment:
        return Path(environment["AUTOFIT_CACHE"])
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autofit"


def calibration_path(cache: Path) -> Path:
    """Return the file of fitted calibrations in the user's cache: to see that there is none takes no more than this."""
    return cache / "calibration.json"


def replace_text(path: Path, text: str) -> None:
    """Write a file that a reader sees either as it was or whole."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.chmod(0o755 if path.suffix == ".sh" else 0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
