"""Times what a user waits for, as whole processes.

    python benchmarks/speed.py [--profile]

`--profile` also traces an 8B and a 405B model under one regime, which takes a minute.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

NUM_RUNS = 10
PLANNED = "HuggingFaceTB/SmolLM2-135M-Instruct"
PLAN = ("plan", "--model", PLANNED, "--seq-len", "1024", "--global-batch", "64", "--gpus", "1xA100-80G", "--json")
PROFILED = ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-405B")
GOALS_SECONDS = {"autofit --help": 0.15, "autofit plan, from a stored profile": 0.6}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the machine, then each time beside its goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="also trace an 8B and a 405B model")
    options = parser.parse_args(arguments)
    print(f"{machine()}\n")
    print("| what | median of 10, s | fastest, s | median of processor, s | least, s | goal, s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory(prefix="autofit-speed-") as cache:
        environment = {**os.environ, "AUTOFIT_CACHE": cache}
        timed("autofit --help", ("--help",), environment)
        run(PLAN, environment)  # traces what is not shipped, once
        timed("autofit plan, from a stored profile", PLAN, environment)
    if options.profile:
        print("\n| profile of one regime, nothing cached | s |\n| --- | ---: |")
        for model in PROFILED:
            print(f"| {model} | {profile_seconds(model):.1f} |", flush=True)
    return 0


def machine() -> str:
    """Say what the times were taken on, and how busy it was."""
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores ({_cpu_name()}), Python {platform.python_version()}, load average {load:.1f}"


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if sys.platform == "linux" else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


def run(arguments: Sequence[str], environment: dict[str, str]) -> tuple[float, float]:
    """Run autofit as a process of its own; return its wall time and its processor time.

    Raises:
        RuntimeError: it failed.
    """
    command = [str(Path(sys.executable).parent / "autofit"), *arguments]
    before, began = os.times(), time.perf_counter()
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - began, os.times()
    if child.returncode:
        raise RuntimeError(f"autofit {' '.join(arguments)} failed:\n{child.stderr}")
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, spent


def timed(name: str, arguments: Sequence[str], environment: dict[str, str]) -> None:
    """Print the median of a few runs."""
    took = zip(*(run(arguments, environment) for _ in range(NUM_RUNS)), strict=True)
    figures = [f"{least(each):.2f}" for each in took for least in (statistics.median, min)]
    print(f"| {name} | {' | '.join(figures)} | {GOALS_SECONDS[name]} |", flush=True)


def profile_seconds(model: str) -> float:
    """Trace full fine-tuning with checkpointing in a process of its own, imports included."""
    from autofit.sources.models import resolve_model
    from autofit.sources.profiles import trace_in_subprocess
    from autofit.spec.profile import Regime

    regime = Regime(
        method="full",
        quantization=None,
        lora=None,
        weights_dtype="bfloat16",
        adapter_dtype="float32",
        autocast="no",
        gradient_checkpointing=True,
        use_reentrant=False,
        attention="sdpa",
        device="cuda",
    )
    resolved = resolve_model(model)
    began = time.perf_counter()
    trace_in_subprocess(resolved, [regime], sequence_tokens=1024)
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
