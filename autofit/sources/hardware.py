"""`--gpus`: from what a user writes, such as `2xA100-80G`, to a cluster of equal devices."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from autofit.errors import InputError, nearest
from autofit.search.rules import LIBRARIES
from autofit.sources.detect import (
    cpu_computes_bf16,
    detected_device,
    host_memory_bytes,
    query_nvidia_smi,
    visible_gpus,
)
from autofit.sources.gpus import FIGURE_NAMES, Catalogue, Figures, Gpu, SizedName, catalogue, device, find, split_size
from autofit.spec.hardware import Cluster, Device
from autofit.spec.libraries import software_here
from autofit.units import GIB, parse_bytes

MOST_DEVICES = 1_000_000
_TEXT = re.compile(r"(?:(?P<first>[-+]?\d+)\s*[xX]\s*)?(?:(?P<second>[-+]?\d+)\s*[xX]\s*)?(?P<device>.+)", re.DOTALL)
_FORMS = "2xA100-80G, A100-80G, 4x8xH100-80G (nodes x devices), 2xCPU-8G, auto, or a .yaml file"


class ClusterFigures(Struct, frozen=True, kw_only=True):
    """What a user may say of the machines around the devices."""

    inter_node_gb_s: float | None = None
    """10^9 bytes a second from one node to the others, one direction."""
    host_memory_gib: float | None = None
    """GiB of one node's memory."""


_CLUSTER_KEYS = ClusterFigures.__struct_fields__
_KEYS = (*FIGURE_NAMES, *_CLUSTER_KEYS)


def parse_cluster(
    text: str,
    *,
    detect: Callable[[], str] = query_nvidia_smi,
    environment: Mapping[str, str] | None = None,
) -> Cluster:
    """Read what `--gpus` was given.

    Args:
        text: `[NODESx][DEVICESx]NAME[:KEY=VALUE,...]`, a YAML file in place of the name, or `auto`.
        detect: asks for the GPUs of this machine; called for `auto` only.
        environment: where CUDA_VISIBLE_DEVICES is looked up; the process's own by default.

    Raises:
        InputError: it names no known device, or says something impossible.
    """
    num_nodes, num_devices, rest = _split_counts(text)
    if rest.casefold() == "auto":
        return _detected(text, detect, os.environ if environment is None else environment)
    named, figures, around = _describe(rest)
    return Cluster(
        device=_device(named, figures, catalogue()),
        num_nodes=num_nodes,
        num_devices_per_node=num_devices,
        inter_node_bytes_per_second=None if around.inter_node_gb_s is None else around.inter_node_gb_s * 1e9,
        host_memory_bytes=None if around.host_memory_gib is None else int(around.host_memory_gib * GIB),
        software=software_here(LIBRARIES, trains_here=False),
    )


def _split_counts(text: str) -> tuple[int, int, str]:
    match = _TEXT.fullmatch(text.strip())
    if match is None:
        raise InputError("--gpus is empty.", to_fix=f"write {_FORMS}")
    first, second = (int(match[group]) if match[group] else 1 for group in ("first", "second"))
    if min(first, second) < 1:
        raise InputError(f"{text!r} asks for {min(first, second)} devices.", to_fix=f"ask for one or more: {_FORMS}")
    if first * second > MOST_DEVICES:
        raise InputError(f"{text[:40]!r} asks for more devices than there are.", to_fix=f"at most {MOST_DEVICES:,}")
    nodes, devices = (first, second) if match["second"] else (1, first)
    return nodes, devices, match["device"].strip()


def _detected(text: str, detect: Callable[[], str], environment: Mapping[str, str]) -> Cluster:
    if text.strip().casefold() != "auto":
        raise InputError(
            f"{text!r} gives a number to auto, which counts the devices itself.", to_fix="write auto alone"
        )
    gpus = visible_gpus(detect(), environment)
    return Cluster(
        device=detected_device(gpus, catalogue()),
        num_devices_per_node=len(gpus),
        host_memory_bytes=host_memory_bytes(),
        software=software_here(LIBRARIES, trains_here=True),
    )


def _describe(rest: str) -> tuple[str | Gpu, Figures, ClusterFigures]:
    """Return what names the device and what is said of it."""
    path, _, after = rest.rpartition(":") if "=" in rest.rpartition(":")[2] else (rest, "", "")
    if path.casefold().endswith((".yaml", ".yml")):
        gpu, around = _read_description(Path(path))
        if after:
            raise InputError(f"{rest!r} gives figures beside a file.", to_fix=f"write them into {path}")
        return gpu, Figures(), around
    name, colon, given = rest.partition(":")
    figures, around = _figures(_pairs(given, rest) if colon else {}, origin=rest)
    return name.strip(), figures, around


def _device(named: str | Gpu, figures: Figures, known: Catalogue) -> Device:
    if isinstance(named, Gpu):
        return device(named)
    name = split_size(named)
    if re.fullmatch(r"cpu[-_\s]*", name.base, re.IGNORECASE):
        return _cpu(name, figures)
    if figures != Figures() and not known.called(named):
        return device(_custom(name, figures, known))
    return device(find(named, known), figures)


def _cpu(name: SizedName, figures: Figures) -> Device:
    """Return a CPU rank; its size is a budget for tensors, in binary units unless it says GB."""
    if not name.size or figures != Figures():
        raise InputError(
            f"{name.whole!r} is not a CPU rank with a memory budget.",
            to_fix="write CPU-8G: a rank that may use 8 GiB for tensors, and nothing else",
        )
    unit = name.unit if len(name.unit) > 1 else f"{name.unit}iB"
    return Device(
        name=name.whole.upper(),
        kind="cpu",
        memory_bytes=parse_bytes(f"{name.size} {unit}"),
        computes_bf16=cpu_computes_bf16(),
        sources=("the budget is the user's; bf16 by /proc/cpuinfo",),
    )


def _custom(name: SizedName, figures: Figures, known: Catalogue) -> Gpu:
    """Return a device the catalogue does not have, from its name's memory size and its figures."""
    if figures.usable_mib is None and not name.label_gb:
        raise InputError(
            f"{name.whole!r} is not a known GPU and its memory is not given.",
            to_fix=f"write NAME-48G:KEY=VALUE,...; nearest known GPUs: {nearest(name.whole, known.names)}",
        )
    return _new_gpu(name.whole, name.label_gb or 0, figures, known)


def _new_gpu(name: str, label_gb: float, figures: Figures, known: Catalogue) -> Gpu:
    exact = figures.usable_mib is not None
    cautious_mib = int(label_gb * 1024 * known.smallest_usable_per_label)
    return Gpu(
        name=name,
        label_gb=int(label_gb),
        usable_from="torch" if exact else f"label {label_gb:g} GiB x {known.smallest_usable_per_label:.4f}",
        figures=figures if exact else replace(figures, usable_mib=cautious_mib),
        sources=("described by the user",),
    )


def _pairs(given: str, origin: str) -> dict[str, Any]:
    """Split `bf16_tflops=180,bandwidth_gb_s=900`; a value that is a number becomes one."""
    pairs = dict(part.split("=", 1) for part in given.split(",") if part.count("=") == 1)
    if len(pairs) != len(given.split(",")):
        raise InputError(
            f"{origin!r} has something other than distinct KEY=VALUE pairs after the colon.",
            to_fix=f"write for instance :bf16_tflops=180,bandwidth_gb_s=900; the keys are {', '.join(_KEYS)}",
        )
    return {key.strip(): value.strip() for key, value in pairs.items()}


def _figures(given: Mapping[str, Any], *, origin: str) -> tuple[Figures, ClusterFigures]:
    """Sort figures into those of a device and those of the machines around it.

    Raises:
        InputError: a key is not known, or a value is not a positive number.
    """
    if unknown := [str(key) for key in given if key not in _KEYS]:
        raise InputError(f"{origin!r} has the unknown key {unknown[0]!r}.", to_fix=f"the keys are {', '.join(_KEYS)}")
    for key, value in given.items():
        if key != "compute_capability" and not _is_positive(value):
            raise InputError(
                f"{origin!r} gives {key}={value!r}, which is not a positive number.", to_fix="give one, or leave it out"
            )
    around = {key: float(value) for key, value in given.items() if key in _CLUSTER_KEYS}
    own = {key: _figure(key, value) for key, value in given.items() if key in FIGURE_NAMES}
    return Figures(**own), ClusterFigures(**around)


def _figure(key: str, value: Any) -> Any:
    if key == "compute_capability":
        return str(value)
    return int(float(value)) if key == "usable_mib" else float(value)


def _is_positive(value: Any) -> bool:
    try:
        return math.isfinite(float(value)) and float(value) > 0
    except (TypeError, ValueError):
        return False


def _read_description(path: Path) -> tuple[Gpu, ClusterFigures]:
    """Read a YAML file with `name`, optionally `label_gb`, and the keys that may follow a name's colon.

    Raises:
        InputError: the file cannot be read, is not such a description, or leaves the memory open.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}",
            to_fix="give a readable .yaml file",
        ) from error
    except yaml.YAMLError as error:
        raise InputError(f"{str(path)!r} is not YAML: {error}", to_fix="correct the file") from error
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        raise InputError(
            f"{str(path)!r} does not describe a GPU.",
            to_fix=f"write `name: MyGPU`, `label_gb: 48` and any of {', '.join(_KEYS)}, one a line",
        )
    label_gb = content.pop("label_gb", 0)
    name = content.pop("name")
    figures, around = _figures(content, origin=str(path))
    if figures.usable_mib is None and not _is_positive(label_gb):
        raise InputError(f"{str(path)!r} does not say how much memory {name} has.", to_fix="add label_gb or usable_mib")
    return _new_gpu(name, float(label_gb), figures, catalogue()), around
