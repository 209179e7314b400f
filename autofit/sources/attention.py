"""Which attention a model gets where none is asked for, read from the source of the installed transformers.

To import its class would take seconds.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from autofit.spec.configuration import Attention

_CLASS = re.compile(r"^class (\w+)\(([^)]*)\):", re.MULTILINE)
_SAYS_SDPA = re.compile(r"^    _supports_sdpa(?:: bool)? = (True|False)", re.MULTILINE)
_IMPORT = re.compile(r"^from \.\.(\w+)\.(modeling_\w+) import (\([^)]*\)|.*)", re.MULTILINE)
_OTHER_FOLDER = re.compile(r'\("([\w-]+)", "(\w+)"\)')


def usual_attention(config: Mapping[str, Any]) -> Attention:
    """Return sdpa, or eager where the installed transformers has no sdpa for the model's class.

    A class says so itself, or the class that it is made from; what says nothing has none. Of a model whose class is not
    found, and where transformers is not installed, sdpa is said: a trace then refuses what is not there.
    Source: transformers/modeling_utils.py 5.23, PreTrainedModel._supports_sdpa, _check_and_adjust_attn_implementation.
    """
    folder = _models_folder()
    architectures = config.get("architectures")
    if folder is None or not architectures:
        return "sdpa"
    name, files = str(architectures[0]), _folder_of(folder, str(config.get("model_type"))).glob("modeling_*.py")
    answers = [_has_sdpa(path, name) for path in sorted(files) if name in _classes(path)]
    return "eager" if False in answers else "sdpa"


@cache
def _models_folder() -> Path | None:
    found = importlib.util.find_spec("transformers")
    return Path(found.origin).parent / "models" if found and found.origin else None


def _folder_of(folder: Path, model_type: str) -> Path:
    """Return where a type's code lies: under its own name, or as the table for the others says.

    Source: transformers/models/auto/auto_mappings.py 5.23, SPECIAL_MODEL_TYPE_TO_MODULE_NAME.
    """
    name = model_type.replace("-", "_")
    if not (folder / name).is_dir():
        for path in (folder / "auto" / "auto_mappings.py", folder / "auto" / "configuration_auto.py"):
            if path.is_file():
                others = dict(_OTHER_FOLDER.findall(path.read_text(encoding="utf-8")))
                name = others.get(model_type, name)
    return folder / name


def _has_sdpa(path: Path, name: str) -> bool | None:
    """Tell whether a class has sdpa; None where it is not found."""
    if name == "PreTrainedModel":
        return False
    bases, body = _classes(path).get(name, ((), ""))
    if said := _SAYS_SDPA.search(body):
        return said[1] == "True"
    elsewhere = _imported(path)
    found = (_has_sdpa(elsewhere.get(base, path), base) for base in bases)
    return next((answer for answer in found if answer is not None), None)


@cache
def _classes(path: Path) -> dict[str, tuple[tuple[str, ...], str]]:
    """Return the bases and the body of each class of a file."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    heads = list(_CLASS.finditer(text))
    ends = [*(head.start() for head in heads[1:]), len(text)]
    return {
        head[1]: (tuple(base.strip() for base in head[2].split(",")), text[head.end() : end])
        for head, end in zip(heads, ends, strict=True)
    }


def _imported(path: Path) -> dict[str, Path]:
    """Return the files that a file takes classes of other models from."""
    text = path.read_text(encoding="utf-8")
    return {
        name.strip(): path.parent.parent / folder / f"{module}.py"
        for folder, module, names in _IMPORT.findall(text)
        for name in names.strip("()").split(",")
    }
