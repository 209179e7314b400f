"""Make `autofit/sources/data/gpus.json` from a table of published GPU figures.

    python tools/make_gpu_catalogue.py TABLE.json autofit/sources/data/gpus.json

The table has one object per GPU, with the sources of its figures; `autofit/sources/data/README.md` has the rules.
"""

# ruff: noqa: INP001 -- a script, not a package
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from msgspec import Struct

PCIE_X16_GB_S = {3: 15.75, 4: 31.5, 5: 63.0, 6: 121.0}
"""One direction, sixteen lanes, after line coding. Source: PCI-SIG, specifications 3.0 to 6.0."""
HOST_FRACTION = 0.88
"""Measured host-to-device copy over the link's theoretical rate: 55.4 of 63 GB/s, H200, PCIe 5.
Source: stas00/ml-engineering, compute/accelerator."""


class Row(Struct, frozen=True, kw_only=True):
    """How a GPU of the table is called, by people and by its driver."""

    name: str
    label_gb: int
    aliases: tuple[str, ...] = ()
    reported: tuple[str, ...] = ()
    """What `nvidia-smi --query-gpu=name` prints."""


def _geforce(model: str) -> tuple[str, ...]:
    return (f"NVIDIA GeForce RTX {model}", f"GeForce RTX {model}")


ROWS: dict[str, tuple[Row, ...]] = {
    "P100-16GB": (Row(name="P100-16G", label_gb=16, reported=("Tesla P100-SXM2-16GB", "Tesla P100-PCIE-16GB")),),
    "V100-SXM2-16GB": (
        Row(name="V100-SXM2-16G", label_gb=16, aliases=("V100", "V100-SXM"), reported=("Tesla V100-SXM2-16GB",)),
    ),
    "V100-SXM2-32GB": (
        Row(
            name="V100-SXM2-32G",
            label_gb=32,
            aliases=("V100", "V100-SXM"),
            reported=("Tesla V100-SXM2-32GB", "Tesla V100-SXM3-32GB"),
        ),
    ),
    "V100-PCIe-16/32GB": (
        Row(name="V100-PCIe-16G", label_gb=16, reported=("Tesla V100-PCIE-16GB",)),
        Row(name="V100-PCIe-32G", label_gb=32, reported=("Tesla V100-PCIE-32GB",)),
    ),
    "T4": (Row(name="T4-16G", label_gb=16, reported=("Tesla T4",)),),
    "RTX 2080 Ti": (Row(name="RTX2080Ti-11G", label_gb=11, aliases=("2080Ti",), reported=_geforce("2080 Ti")),),
    "RTX 3060 12GB": (Row(name="RTX3060-12G", label_gb=12, aliases=("3060",), reported=_geforce("3060")),),
    "RTX 3080 10GB": (Row(name="RTX3080-10G", label_gb=10, aliases=("3080",), reported=_geforce("3080")),),
    "RTX 3090": (Row(name="RTX3090-24G", label_gb=24, aliases=("3090",), reported=_geforce("3090")),),
    "RTX 3090 Ti": (Row(name="RTX3090Ti-24G", label_gb=24, aliases=("3090Ti",), reported=_geforce("3090 Ti")),),
    "RTX 4060 Ti 16GB": (Row(name="RTX4060Ti-16G", label_gb=16, aliases=("4060Ti",), reported=_geforce("4060 Ti")),),
    "RTX 4070 Ti": (Row(name="RTX4070Ti-12G", label_gb=12, aliases=("4070Ti",), reported=_geforce("4070 Ti")),),
    "RTX 4080": (Row(name="RTX4080-16G", label_gb=16, aliases=("4080",), reported=_geforce("4080")),),
    "RTX 4090": (Row(name="RTX4090-24G", label_gb=24, aliases=("4090",), reported=_geforce("4090")),),
    "RTX 5070 Ti": (Row(name="RTX5070Ti-16G", label_gb=16, aliases=("5070Ti",), reported=_geforce("5070 Ti")),),
    "RTX 5080": (Row(name="RTX5080-16G", label_gb=16, aliases=("5080",), reported=_geforce("5080")),),
    "RTX 5090": (Row(name="RTX5090-32G", label_gb=32, aliases=("5090",), reported=_geforce("5090")),),
    "A10": (Row(name="A10-24G", label_gb=24, reported=("NVIDIA A10",)),),
    "A10G": (Row(name="A10G-24G", label_gb=24, reported=("NVIDIA A10G",)),),
    "A16 (per GPU, 4 per board)": (Row(name="A16-16G", label_gb=16, reported=("NVIDIA A16",)),),
    "A30": (Row(name="A30-24G", label_gb=24, reported=("NVIDIA A30",)),),
    "A40": (Row(name="A40-48G", label_gb=48, reported=("NVIDIA A40",)),),
    "RTX A4000": (Row(name="RTXA4000-16G", label_gb=16, aliases=("A4000",), reported=("NVIDIA RTX A4000",)),),
    "RTX A5000": (Row(name="RTXA5000-24G", label_gb=24, aliases=("A5000",), reported=("NVIDIA RTX A5000",)),),
    "RTX A6000": (Row(name="RTXA6000-48G", label_gb=48, aliases=("A6000",), reported=("NVIDIA RTX A6000",)),),
    "RTX 6000 Ada": (
        Row(
            name="RTX6000Ada-48G",
            label_gb=48,
            aliases=("6000Ada", "RTX6000AdaGeneration"),
            reported=("NVIDIA RTX 6000 Ada Generation",),
        ),
    ),
    "RTX PRO 6000 Blackwell WS": (
        Row(
            name="RTXPRO6000-96G",
            label_gb=96,
            aliases=("RTXPRO6000Blackwell", "PRO6000"),
            reported=("NVIDIA RTX PRO 6000 Blackwell Workstation Edition",),
        ),
    ),
    "L4": (Row(name="L4-24G", label_gb=24, reported=("NVIDIA L4",)),),
    "L40": (Row(name="L40-48G", label_gb=48, reported=("NVIDIA L40",)),),
    "L40S": (Row(name="L40S-48G", label_gb=48, reported=("NVIDIA L40S",)),),
    "A100-40GB PCIe": (Row(name="A100-PCIe-40G", label_gb=40, reported=("NVIDIA A100-PCIE-40GB", "A100-PCIE-40GB")),),
    "A100-40GB SXM": (
        Row(
            name="A100-SXM-40G",
            label_gb=40,
            aliases=("A100", "A100-SXM4"),
            reported=("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ),
    ),
    "A100-80GB PCIe": (Row(name="A100-PCIe-80G", label_gb=80, reported=("NVIDIA A100 80GB PCIe",)),),
    "A100-80GB SXM": (
        Row(
            name="A100-SXM-80G",
            label_gb=80,
            aliases=("A100", "A100-SXM4"),
            reported=("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ),
    ),
    "H100-80GB PCIe": (Row(name="H100-PCIe-80G", label_gb=80, reported=("NVIDIA H100 PCIe",)),),
    "H100-80GB SXM": (
        Row(name="H100-SXM-80G", label_gb=80, aliases=("H100", "H100-SXM5"), reported=("NVIDIA H100 80GB HBM3",)),
    ),
    "H100 NVL 94GB": (Row(name="H100-NVL-94G", label_gb=94, aliases=("H100-94G",), reported=("NVIDIA H100 NVL",)),),
    "H200-141GB SXM": (Row(name="H200-SXM-141G", label_gb=141, aliases=("H200",), reported=("NVIDIA H200",)),),
    "GH200-96GB": (Row(name="GH200-96G", label_gb=96, reported=("NVIDIA GH200 480GB",)),),
    "GH200-141/144GB": (
        Row(name="GH200-141G", label_gb=141, aliases=("GH200-144G",), reported=("NVIDIA GH200 144G HBM3e",)),
    ),
    "B200-180GB (192 physical) SXM": (
        Row(name="B200-SXM-180G", label_gb=180, aliases=("B200", "B200-192G"), reported=("NVIDIA B200",)),
    ),
    "GB200-186GB (per GPU)": (
        Row(name="GB200-186G", label_gb=186, aliases=("GB200-192G",), reported=("NVIDIA GB200",)),
    ),
    "B300-288GB SXM": (Row(name="B300-SXM-288G", label_gb=288, aliases=("B300",), reported=("NVIDIA B300 SXM6 AC",)),),
    "GB300 (per GPU)": (Row(name="GB300-288G", label_gb=288, reported=("NVIDIA GB300",)),),
    "MI210": (Row(name="MI210-64G", label_gb=64),),
    "MI250X (128GB, 2 GCDs)": (Row(name="MI250X-128G", label_gb=128),),
    "MI300X": (Row(name="MI300X-192G", label_gb=192),),
    "MI325X": (Row(name="MI325X-256G", label_gb=256),),
    "MI355X": (Row(name="MI355X-288G", label_gb=288),),
    "Gaudi2": (Row(name="Gaudi2-96G", label_gb=96),),
    "Gaudi3": (Row(name="Gaudi3-128G", label_gb=128),),
}


OOM, START = "torch's out-of-memory message", "torch total_memory in Ultralytics' first line"
TORCH_TOTAL: dict[str, tuple[int, str]] = {
    "P100-16G": (16269, f"{START}, Tesla P100-PCIE-16GB, torch 2.1.2 (public notebook)"),
    "V100-PCIe-32G": (32510, f"{START}, Tesla V100-PCIE-32GB, torch 1.11 (YOLOv5 tutorial)"),
    "T4-16G": (14909, f"{OOM}, 14.56 GiB: github.com/AlphaGPU/leetgpu-challenges/issues/52"),
    "RTX3060-12G": (11910, f"{START}, RTX 3060, torch 2.10+cu128 (public log)"),
    "RTX4070Ti-12G": (12007, f"{START}, RTX 4070 Ti, torch 2.1.1+cu121 (public log)"),
    "RTX4090-24G": (24084, f"{OOM}, 23.52 GiB: github.com/Soul-AILab/SoulX-FlashTalk/issues/5"),
    "RTX5090-32G": (32112, f"{OOM}, 31.36 GiB: github.com/TrajectoryCrafter/TrajectoryCrafter/issues/20"),
    "A10G-24G": (22517, f"{OOM}, 21.99 GiB: github.com/mistralai/mistral-finetune/issues/69"),
    "A30-24G": (24164, f"{START}, NVIDIA A30, torch 2.8+cu128 (public notebook)"),
    "RTX6000Ada-48G": (48520, f"{START}, ECC off, torch 2.7+cu128 (public notebook)"),
    "L4-24G": (22563, f"{START}, NVIDIA L4, torch 2.11+cu128 (public notebook)"),
    "L40-48G": (45465, f"{OOM}, 44.40 GiB: github.com/NVlabs/Eagle/issues/68"),
    "L40S-48G": (45486, f"{OOM}, 44.42 GiB: github.com/stepfun-ai/Step-Video-T2V/issues/8"),
    "H100-SXM-80G": (81008, f"{OOM}, 79.11 GiB: github.com/vllm-project/vllm/issues/27508"),
    "H200-SXM-141G": (143155, f"{OOM}, 139.80 GiB (many public logs)"),
    "B200-SXM-180G": (182630, f"{OOM}, 178.35 GiB (many public logs)"),
}
"""Total memory in MiB that torch prints, where the table has none; the lowest found, as drivers differ by up to 2 %."""


def platform(row: dict[str, Any]) -> str:
    """Return the software the GPU is driven by: cuda, rocm or hpu."""
    if str(row["name"]).startswith("MI"):
        return "rocm"
    return "hpu" if str(row["name"]).startswith("Gaudi") else "cuda"


def torch_mib(row: dict[str, Any], name: str) -> int | None:
    """Return torch's total memory, unless it exceeds nvidia-smi's: then the two are of different parts."""
    torch, smi = row["usable_mib_torch_total_memory"], row["usable_mib_nvidia_smi"]
    if torch is None and name in TORCH_TOTAL:
        return TORCH_TOTAL[name][0]
    return None if torch and smi and torch > smi else torch


def cuda_rows(table: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Row]]:
    """Return the rows from whose figures those of other CUDA GPUs may be derived."""
    return [(row, names) for row in table for names in ROWS[row["name"]] if platform(row) == "cuda"]


def smallest_torch_per_smi(table: list[dict[str, Any]]) -> float:
    """Return the smallest published torch-to-nvidia-smi ratio of a CUDA GPU."""
    pairs = [(torch_mib(row, names.name), row["usable_mib_nvidia_smi"]) for row, names in cuda_rows(table)]
    return min(torch / smi for torch, smi in pairs if torch and smi)


def smallest_usable_per_label(table: list[dict[str, Any]], per_smi: float) -> float:
    """Return the smallest share of a CUDA GPU's label (in GiB) that torch is known or bound to see."""
    known = [
        ((torch_mib(row, names.name) or (row["usable_mib_nvidia_smi"] or 0) * per_smi), names.label_gb)
        for row, names in cuda_rows(table)
    ]
    return min(mib / (label_gb * 1024) for mib, label_gb in known if mib)


def usable(row: dict[str, Any], names: Row, per_smi: float, per_label: float) -> tuple[int, str]:
    """Return the MiB torch sees, and how that is known."""
    if torch := torch_mib(row, names.name):
        return torch, "torch"
    if smi := row["usable_mib_nvidia_smi"]:
        return int(smi * per_smi), f"nvidia-smi {smi} MiB x {per_smi:.4f}"
    return int(names.label_gb * 1024 * per_label), f"label {names.label_gb} GiB x {per_label:.4f}"


def bridge_gb_s(row: dict[str, Any]) -> float | None:
    """Return the rate of an NVLink bridge, which is bought apart and joins two cards."""
    bridged = "bridge" in str(row["nvlink"]) and platform(row) == "cuda"
    return row["peer_bandwidth_gb_s_per_direction"] if bridged else None


def links(row: dict[str, Any]) -> dict[str, float | None]:
    """Return peer and host bandwidth, one direction; of cards that may be bridged, what every pair has: PCIe."""
    pcie = PCIE_X16_GB_S.get(row["pcie_gen"])
    other_host_link = "x8" in row["notes"] or "C2C" in str(row["nvlink"])
    return {
        "peer_gb_s": pcie if bridge_gb_s(row) else row["peer_bandwidth_gb_s_per_direction"],
        "host_gb_s": round(pcie * HOST_FRACTION, 2) if pcie and not other_host_link else None,
    }


def convert(row: dict[str, Any], names: Row, per_smi: float, per_label: float) -> dict[str, Any]:
    """Return one catalogue row."""
    usable_mib, usable_from = usable(row, names, per_smi, per_label)
    figures = {
        "usable_mib": usable_mib,
        "compute_capability": row["compute_capability"],
        "bf16_tflops": row["dense_bf16_tflops"],
        "fp16_tflops": row["dense_fp16_tensor_tflops"] or row.get("fp16_non_tensor_tflops"),
        "tf32_tflops": row["tf32_tflops"],
        "fp32_tflops": row["fp32_tflops"],
        "bandwidth_gb_s": row["mem_bandwidth_gb_s"],
        **links(row),
        "dollars_per_hour": row["cloud_usd_per_hour_low"],
    }
    return {
        "name": names.name,
        "aliases": [names.name.rsplit("-", 1)[0], *names.aliases],
        "reported_names": list(names.reported),
        "platform": platform(row),
        "label_gb": names.label_gb,
        "nvidia_smi_mib": row["usable_mib_nvidia_smi"],
        "usable_from": usable_from,
        "figures": {key: value for key, value in figures.items() if value is not None},
        "bridge_gb_s": bridge_gb_s(row),
        "dollars_per_hour_high": row["cloud_usd_per_hour_high"],
        "sources": [
            *row["sources"],
            *(TORCH_TOTAL[names.name][1:] if usable_mib == TORCH_TOTAL.get(names.name, (0,))[0] else []),
        ],
        "price_sources": row["price_sources"],
        "notes": row["notes"],
    }


def catalogue(table: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the whole document."""
    per_smi = smallest_torch_per_smi(table)
    per_label = smallest_usable_per_label(table, per_smi)
    gpus = [convert(row, names, per_smi, per_label) for row in table for names in ROWS[row["name"]]]
    return {"smallest_torch_per_nvidia_smi": per_smi, "smallest_usable_per_label": per_label, "gpus": gpus}


def main(arguments: list[str]) -> None:
    """Read the table, write the catalogue."""
    table, target = (Path(argument) for argument in arguments)
    document = catalogue(json.loads(table.read_text(encoding="utf-8"))["gpus"])
    target.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
