"""What this machine has: GPUs as nvidia-smi reports them, the processor's instruction sets, the host's memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from autofit.errors import InputError
from autofit.sources.gpus import Catalogue, Gpu, device
from autofit.spec.hardware import Device
from autofit.units import MIB

QUERY = ("index", "uuid", "name", "memory.total", "memory.free", "compute_cap")
LABEL_TOLERANCE_FRACTION = 0.1
"""nvidia-smi shows up to 8 % less than the label (T4, older driver); variants of one name differ by a fifth or more."""
BF16_CPU_FLAGS = ("avx512_bf16", "amx_bf16")
_TO_FIX = "name the GPUs to plan for, for instance --gpus 2xA100-80G, or train on CPU ranks with --gpus 2xCPU-8G"


class VisibleGpu(Struct, frozen=True, kw_only=True):
    """One line of nvidia-smi's answer."""

    index: str
    uuid: str
    name: str
    total_mib: int
    free_mib: int
    compute_capability: str


def query_nvidia_smi() -> str:
    """Ask nvidia-smi for the GPUs of this machine, one line of comma-separated values each.

    Raises:
        InputError: there is no nvidia-smi, or it fails.
    """
    if shutil.which("nvidia-smi") is None:
        raise InputError("no GPU is visible: nvidia-smi is not on the PATH.", to_fix=_TO_FIX)
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"nvidia-smi does not answer: {error}", to_fix=_TO_FIX) from error
    if answer.returncode:
        raise InputError(f"nvidia-smi fails: {(answer.stdout + answer.stderr).strip()}", to_fix=_TO_FIX)
    return answer.stdout


def visible_gpus(answer: str, environment: Mapping[str, str]) -> tuple[VisibleGpu, ...]:
    """Return the GPUs of nvidia-smi's answer that CUDA_VISIBLE_DEVICES leaves visible.

    Raises:
        InputError: none is left, or a line cannot be read.
    """
    gpus = tuple(_parse_line(line) for line in answer.splitlines() if line.strip())
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    visible = gpus if chosen is None else tuple(_chosen(gpus, [part.strip() for part in chosen.split(",")]))
    if not visible:
        hidden = f" CUDA_VISIBLE_DEVICES={chosen!r} hides {len(gpus)}." if gpus else ""
        raise InputError(f"no GPU is visible.{hidden}", to_fix=_TO_FIX)
    return visible


def num_gpus_here(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int | None:
    """Count the GPUs that a process here would see; None where that is not known.

    A container may have GPUs and no nvidia-smi: only where there is no device file either is there no GPU.

    Args:
        environment: the process's.
        devices: where device files are; `dxg` is the GPU of a Windows host.
    """
    try:
        answer = query_nvidia_smi()
    except InputError:
        has_files = any(devices.glob("nvidia[0-9]*")) or (devices / "dxg").exists()
        return None if has_files or shutil.which("nvidia-smi") else 0
    try:
        return len(visible_gpus(answer, environment))
    except InputError:
        return 0 if environment.get("CUDA_VISIBLE_DEVICES", "-") in {"", "-1"} else None


def detected_device(gpus: Sequence[VisibleGpu], known: Catalogue) -> Device:
    """Return the device all visible GPUs are, with the smallest memory that is free on one of them.

    Raises:
        InputError: they are not of one kind, or the kind is not in the catalogue.
    """
    kinds = sorted({(gpu.name, gpu.total_mib) for gpu in gpus})
    if len(kinds) > 1:
        raise InputError(
            "the visible GPUs differ: " + ", ".join(f"{name} with {mib} MiB" for name, mib in kinds) + ".",
            to_fix="choose equal ones, for instance CUDA_VISIBLE_DEVICES="
            + ",".join(gpu.index for gpu in gpus if (gpu.name, gpu.total_mib) == kinds[0]),
        )
    whole = device(_catalogued(gpus[0], known))
    free_bytes = min(gpu.free_mib for gpu in gpus) * MIB
    return replace(whole, memory_bytes=min(free_bytes, whole.memory_bytes))


def cpu_computes_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bfloat16, by its flags; False where they cannot be read."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return any(flag in flags for flag in BF16_CPU_FLAGS)


def host_memory_bytes() -> int | None:
    """Return this machine's physical memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _parse_line(line: str) -> VisibleGpu:
    parts = [part.strip() for part in line.split(",")]
    numbers = parts[3:5]
    if len(parts) != len(QUERY) or not all(number.isdigit() for number in numbers):
        raise InputError(f"nvidia-smi says {line.strip()!r}, which has no memory figures.", to_fix=_TO_FIX)
    index, uuid, name, total, free, capability = parts
    return VisibleGpu(
        index=index, uuid=uuid, name=name, total_mib=int(total), free_mib=int(free), compute_capability=capability
    )


def _chosen(gpus: Sequence[VisibleGpu], chosen: Sequence[str]) -> list[VisibleGpu]:
    """Follow CUDA's rule: in order, up to the first entry that names no device.

    Source: CUDA C++ Programming Guide, CUDA_VISIBLE_DEVICES.
    """
    found = []
    for entry in chosen:
        if entry.upper().startswith("MIG-"):
            raise InputError(
                "CUDA_VISIBLE_DEVICES names a MIG slice, whose memory nvidia-smi does not give by device.",
                to_fix="describe the slice, for instance --gpus A100-MIG-20G:usable_mib=19968,compute_capability=8.0",
            )
        match = [gpu for gpu in gpus if entry and (gpu.index == entry or gpu.uuid.startswith(entry))]
        if len(match) != 1:
            break
        found.append(match[0])
    return found


def _catalogued(seen: VisibleGpu, known: Catalogue) -> Gpu:
    for gpu in known.reported_as(seen.name):
        if abs(seen.total_mib / (gpu.label_gb * 1024) - 1) <= LABEL_TOLERANCE_FRACTION:
            return gpu
    name = "".join(seen.name.removeprefix("NVIDIA ").split())
    raise InputError(
        f"the visible GPU is {seen.name!r} with {seen.total_mib} MiB, which is not in the catalogue.",
        to_fix=f"describe it, for instance --gpus 1x{name}-{round(seen.total_mib / 1024)}G:usable_mib={seen.free_mib},"
        f"compute_capability={seen.compute_capability},bf16_tflops=...,bandwidth_gb_s=...",
    )
