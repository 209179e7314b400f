"""`--deepspeed`: what a DeepSpeed configuration of the user's own fixes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from autofit.errors import InputError, nearest
from autofit.spec.configuration import ZERO_STAGES, Offload, ZeroSettings

AUTO = "auto"
"""What transformers fills in; here it is decided as without the file."""
AS_WRITTEN: Mapping[str, Any] = {
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "allgather_partitions": True,
    "round_robin_gradients": False,
    "stage3_gather_16bit_weights_on_model_save": True,
}
"""Settings of the `zero_optimization` block that are modelled, and written, with one value."""
PLACES = ("offload_optimizer", "offload_param")
WITHOUT_EFFECT = frozenset({"steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer"})
"""Settings of the whole file on which neither memory nor what is trained depends."""
INSTEAD: Mapping[str, str] = {
    "optimizer": "leave it out, and say which with --optim: the script's Trainer makes it",
    "scheduler": "leave it out: the script's own is used",
    "train_micro_batch_size_per_gpu": "leave it out, and say it with --micro-batch",
    "train_batch_size": "leave it out: it follows from the other options",
    "gradient_accumulation_steps": "leave it out: it follows from the global batch, or has an option of that name",
}
_BLOCK = "zero_optimization"


class DeepSpeedFile(Struct, frozen=True, kw_only=True):
    """What a file decides; None: it leaves it open."""

    stage: int
    offload: Offload
    precision: str | None
    settings: ZeroSettings


def read_deepspeed_file(path: Path) -> DeepSpeedFile:
    """Read the `zero_optimization` block, and which half precision is on.

    Whatever else the file says would be lost in what a plan writes, and is refused unless it is "auto".

    Raises:
        InputError: it cannot be read, has no stage from 1 to 3, or decides something that is not taken from it.
    """
    content = _content(path)
    block = content.pop(_BLOCK, {})
    halves = [name for name in ("bf16", "fp16") if _is_on(content.pop(name, {}), name, path)]
    if not isinstance(block, dict):
        raise InputError(f"{str(path)!r}: {_BLOCK} is no object.", to_fix="correct the file")
    stage = block.pop("stage", None)
    if isinstance(stage, bool) or stage not in ZERO_STAGES.values():
        raise InputError(
            f"{str(path)!r}: the stage of {_BLOCK} is {stage!r}.",
            to_fix="give 1, 2 or 3; stage 0 is --sharding ddp, without DeepSpeed",
        )
    for name, value in content.items():
        if name not in WITHOUT_EFFECT:
            raise InputError(
                f"{str(path)!r}: {name} is {_shown(value)}, which is not taken from a DeepSpeed configuration.",
                to_fix=INSTEAD.get(name, f'set it to "{AUTO}", or leave it out'),
            )
    if len(halves) > 1:
        raise InputError(f"{str(path)!r} switches on bf16 and fp16.", to_fix="leave one of them out")
    places = [_is_offloaded(block.pop(name, None), name, path) for name in PLACES]
    if places == [False, True]:
        raise InputError(
            f"{str(path)!r}: parameters alone are offloaded, which is not modelled.",
            to_fix="offload the optimizer's state too, or nothing",
        )
    offload: Offload = "optimizer_and_parameters" if places[1] else "optimizer" if places[0] else "none"
    return DeepSpeedFile(
        stage=stage,
        offload=offload,
        precision=halves[0] if halves else None,
        settings=_settings(block, path),
    )


def _content(path: Path) -> dict[str, Any]:
    """Read a file, without what it leaves to others."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return _without_auto(content)
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror}", to_fix="give a readable file") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is not JSON: {error}", to_fix="correct the file") from error
    raise InputError(f"{str(path)!r} is not a JSON object.", to_fix="give a DeepSpeed configuration")


def _without_auto(content: dict[str, Any]) -> dict[str, Any]:
    """Drop what is left to others, in blocks too; a block of nothing else goes with it."""
    inner = {name: _without_auto(value) if isinstance(value, dict) else value for name, value in content.items()}
    return {name: value for name, value in inner.items() if value not in (AUTO, {})}


def _is_on(block: Any, name: str, path: Path) -> bool:
    """Tell whether a half precision is switched on; DeepSpeed's own loss scaling is what a plan writes."""
    enabled = block.get("enabled", False) if isinstance(block, dict) else None
    if not isinstance(enabled, bool):
        raise InputError(f"{str(path)!r}: {name} is {_shown(block)}.", to_fix='give {"enabled": true}')
    return enabled


def _is_offloaded(place: Any, name: str, path: Path) -> bool:
    device = place.get("device", "none") if isinstance(place, dict) else place
    if device in (None, "none"):
        return False
    if device != "cpu":
        raise InputError(f"{str(path)!r}: {name} is {_shown(place)}.", to_fix='modelled are "cpu" and "none"')
    return True


def _settings(block: Mapping[str, Any], path: Path) -> ZeroSettings:
    known = set(ZeroSettings.__struct_fields__)
    given: dict[str, Any] = {}
    for name, value in block.items():
        if name in AS_WRITTEN:
            if value is not AS_WRITTEN[name]:
                raise InputError(
                    f"{str(path)!r}: {name} is {_shown(value)}, which is not modelled.",
                    to_fix=f"set it to {_shown(AS_WRITTEN[name])}, or leave it out",
                )
        elif name not in known:
            raise InputError(
                f"{str(path)!r}: {name} of {_BLOCK} is not modelled.",
                to_fix=f"leave it out; the nearest that are: {nearest(name, sorted(known))}",
            )
        else:
            given[name] = _flag(name, value, path) if name == "overlap_comm" else _elements(name, value, path)
    return ZeroSettings(**given)


def _flag(name: str, value: Any, path: Path) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{str(path)!r}: {name} is {_shown(value)}.", to_fix="give true or false")
    return value


def _elements(name: str, value: Any, path: Path) -> int:
    """Read a number of elements, which people write as 5e8 too."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    least = 0 if name.startswith("stage3_") else 1
    if not is_number or not least <= value < 2**63 or value != int(value):
        raise InputError(
            f"{str(path)!r}: {name} is {_shown(value)}.", to_fix=f"give a whole number of elements, at least {least}"
        )
    return int(value)


def _shown(value: Any) -> str:
    return json.dumps(value)
