"""The libraries of this environment: whose behaviour a profile records, and whose refusals the rules are about."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
from collections.abc import Iterable

from autofit.spec.software import Software

TRACED_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def installed_versions(libraries: Iterable[str] = TRACED_LIBRARIES) -> dict[str, str]:
    """Return the versions of libraries in this environment, without importing them; what is not there is left out."""
    versions = {}
    for name in libraries:
        try:
            versions[name] = _version(importlib.metadata.distribution(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _version(found: importlib.metadata.Distribution) -> str:
    """Read a version from the head of its metadata: parsing all of it, with its readme, takes milliseconds each."""
    stated = re.search(r"^Version: *(\S+)", found.read_text("METADATA") or "", re.MULTILINE)
    return stated.group(1) if stated else found.version


def software_here(libraries: Iterable[str], *, trains_here: bool) -> Software:
    """Describe this environment.

    Args:
        libraries: names of distributions to look for.
        trains_here: whether the training will run in it; otherwise what is missing here may be there.
    """
    return Software(
        versions=installed_versions(libraries),
        is_complete=trains_here,
        builds_extensions=can_build_extensions() if trains_here else None,
    )


def can_build_extensions() -> bool:
    """Tell whether ninja and a C++ compiler are on the PATH, which torch asks for before it compiles an extension.

    Source: torch/utils/cpp_extension.py 2.13, verify_ninja_availability, get_cxx_compiler.
    """
    return shutil.which("ninja") is not None and shutil.which(os.environ.get("CXX", "c++")) is not None
