"""In which dtype a checkpoint is stored: a file's header says so without its weights, else `config.json` does."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

from autofit.spec.configuration import Dtype

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SAFETENSORS_DTYPES: dict[str, Dtype] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
LENGTH_BYTES = 8
LARGEST_HEADER_BYTES = 100_000_000
"""Source: safetensors 0.8, `MAX_HEADER_SIZE`."""


def stored_dtype(config: Mapping[str, Any], folder: Path | None = None) -> Dtype | None:
    """Return the dtype that most of a checkpoint's weights are stored in; None where nothing says so.

    transformers writes `dtype`, before 4.56 `torch_dtype`, into the config of every model that it saves, of a model
    with several parts into each. Source: transformers/configuration_utils.py 5.23; safetensors' README, "Format".

    Args:
        config: content of config.json.
        folder: where it lies, if it does on this machine.
    """
    found = _of_file(folder) if folder is not None else None
    return found or _of_config(config)


def _of_config(config: Mapping[str, Any]) -> Dtype | None:
    for part in (config, config.get("text_config")):
        for name in ("dtype", "torch_dtype"):
            said = part.get(name) if isinstance(part, Mapping) else None
            if found := next((known for known in get_args(Dtype) if known == said), None):
                return cast("Dtype", found)
    return None


def _of_file(folder: Path) -> Dtype | None:
    file = folder / WEIGHTS
    try:
        if not file.is_file():
            names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
            file = folder / min(names)
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(LENGTH_BYTES), "little")
            header = json.loads(opened.read(length)) if length <= LARGEST_HEADER_BYTES else {}
        num_bytes: Counter[str] = Counter()
        for name, tensor in header.items():
            if name != "__metadata__":
                begin, end = tensor["data_offsets"]
                num_bytes[tensor["dtype"]] += end - begin
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # no weights here, or none that transformers could read either
    most = num_bytes.most_common(1)
    return SAFETENSORS_DTYPES.get(most[0][0]) if most else None
