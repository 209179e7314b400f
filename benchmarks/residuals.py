"""Writes the residuals that intervals come from: each published row's measured figures over the predicted ones.

    python benchmarks/residuals.py ACCURACY.json ... [--real-stack REAL_STACK.json] > autofit/memory/data/residuals.json

The first files are what `benchmarks/accuracy.py --json` printed, one for each transformers release; the other what
`benchmarks/real_stack.py --json` printed (sharded runs on CPU ranks: allocated only).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from autofit.memory.uncertainty import FIGURES
from autofit.sources.hardware import parse_cluster
from autofit.spec.regimes import FIRST_WITH_FLASH

PUBLISHED = Path(__file__).parent / "data" / "published_memory.jsonl"
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one JSON list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("accuracy", nargs="+", type=Path)
    parser.add_argument("--real-stack", type=Path)
    options = parser.parse_args(arguments)
    published = {row["id"]: row for row in map(json.loads, PUBLISHED.read_text(encoding="utf-8").splitlines())}
    rows = [row for path in options.accuracy for row in from_accuracy(json.loads(path.read_text()), published)]
    if options.real_stack:
        rows += from_real_stack(json.loads(options.real_stack.read_text()))
    sys.stdout.write("[\n" + ",\n".join(" " + json.dumps(row) for row in rows) + "\n]\n")
    return 0


def from_accuracy(compared: Sequence[Row], published: dict[str, Row]) -> Iterator[Row]:
    """Turn compared rows into residuals; refused ones, and those that contradict their description, have none."""
    for row in compared:
        ratios = {
            figure: round(row["measured_bytes"][figure] / row["predicted_bytes"][figure], 6)
            for figure in FIGURES
            if figure in row["measured_bytes"] and row["predicted_bytes"].get(figure)
        }
        if ratios and not row["refused"] and not row["contradicts"]:
            source = published[row["id"]]["source"].partition(" row ")[0]
            yield {"id": row["id"], "source": source, **_kind(published[row["id"]], ratios)}


def _kind(row: Row, ratios: dict[str, float]) -> Row:
    cluster = parse_cluster(row["gpus"])
    runs_flash = (cluster.device.compute_capability or FIRST_WITH_FLASH) >= FIRST_WITH_FLASH
    named = {"eager": "eager", "sdpa": "flash" if runs_flash else "efficient"}
    attention = named.get(row["attention"], "flash")
    kind = {"method": row["method"], "attention": attention, "is_sharded": cluster.num_devices > 1}
    return {"kind": kind, "ratios": ratios}


def from_real_stack(results: Sequence[Row]) -> Iterator[Row]:
    """Turn cells of the real stack into residuals of what is allocated."""
    for result in results:
        method, sharding = result["cell"].split("-")[:2]
        method = "qlora" if method.startswith(("qlora", "int8")) else method
        yield {
            "id": result["cell"],
            "source": "benchmarks/real_stack.py: the real engines on CPU ranks",
            "kind": {"method": method, "attention": "flash", "is_sharded": sharding != "none"},
            "ratios": {"peak_allocated": round(result["measured_bytes"] / result["predicted_bytes"], 6)},
        }


if __name__ == "__main__":
    sys.exit(main())
