"""Times the search: configurations a second on one core, how it grows, and the whole process beside other estimators.

    python benchmarks/search.py [--processes]

The first part needs no process but this one. `--processes` times whole ones; the peers among them are those of
`benchmarks/make_peers.sh`, on PYTHONPATH:

    PYTHONPATH=$(bash benchmarks/make_peers.sh) python benchmarks/search.py --processes
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

if __package__ in {None, ""}:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from autofit.memory.optimizers import OPTIMIZERS
from autofit.search import candidates
from autofit.search.allowed import Allowed, allowed
from autofit.search.evaluate import Evaluator
from autofit.search.rank import Ranking
from autofit.search.table import tabulate
from autofit.sources.hardware import parse_cluster
from autofit.sources.models import resolve_model
from autofit.sources.profiles import SHIPPED_FOLDER, read_pack
from autofit.spec.hardware import Cluster
from autofit.spec.job import Job, Restrictions, Workload
from autofit.spec.profile import ProfileSet
from autofit.spec.regimes import regime_of
from benchmarks.speed import machine

MODEL = "meta-llama/Llama-3.1-8B"
MODELS = (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    MODEL,
    "meta-llama/Llama-3.1-70B",
)
PLANNED = (
    (MODELS[0], "1xA100-80G"),
    (MODELS[1], "8xA100-80G"),
    (MODEL, "1xA100-80G"),
    (MODEL, "8xA100-80G"),
    (MODELS[3], "8xH100-80G"),
)
NUM_RUNS = 3
NUM_PROCESSES = 5
GOAL_PER_SECOND = 1_000_000
PEERS = ("fitcheck-llm 0.3.1", "ftuneai 0.4.1")
ROW = {
    "model": MODEL, "method": "lora", "quantization": None, "weights_dtype": "bfloat16", "micro_batch_size": 1,
    "seq_len": 4096, "lora_rank": 16, "lora_target_modules": ["q_proj", "v_proj"], "gradient_checkpointing": True,
    "attention": "sdpa", "optimizer": "adamw_torch", "sharding": "none", "gpus": "1xA100-80G", "autocast": "bf16",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", action="store_true", help="also time whole processes")
    options = parser.parse_args(arguments)
    print(f"{machine()}\n")
    spaces()
    growth()
    alone()
    if options.processes:
        processes()
    return 0


def a_job(model: str, global_batch: int, **restrictions: object) -> Job:
    """Return a job on a shipped model."""
    return Job(
        model=resolve_model(model),
        workload=Workload(sequence_tokens=4096, global_batch_sequences=global_batch),
        restrictions=Restrictions(**restrictions),  # type: ignore[arg-type]
    )


def stored(model: str) -> ProfileSet:
    """Return the shipped profiles of a model, decoded."""
    packs = (read_pack(path) for path in sorted(SHIPPED_FOLDER.glob("*.json.xz")))
    return {profile.regime: profile for pack in packs if pack[0].model == model for profile in pack}


def searched(job: Job, cluster: Cluster, profiles: ProfileSet, evaluator: Evaluator | None = None) -> tuple[int, int]:
    """Search once, from the job to the choice; return how many configurations there were, and how many were evaluated.

    The others fell to rules, or are not modelled.
    """
    left = allowed(job, cluster)
    table = tabulate(left, evaluator or an_evaluator(job, cluster, profiles, left))
    fitting = np.flatnonzero(table.fits)
    ranking = Ranking(table, "cost")
    if fitting.size:
        ranking.best(fitting)
    unmodelled = left.unmodelled.total() + table.unmodelled.total()
    return len(table) + left.fallen.total() + unmodelled + table.num_untraced, len(table)


def an_evaluator(job: Job, cluster: Cluster, profiles: ProfileSet, left: Allowed) -> Evaluator:
    """Return one that has worked out nothing yet."""
    sizes = {micro_batch for block in left.blocks for micro_batch, _ in block.splits}
    return Evaluator(cluster, job.workload, profiles, tuple(sizes))


def timed(search: Callable[[], tuple[int, int]]) -> tuple[float, int, int]:
    """Return the fewest seconds of a few runs, and what was found."""
    found, seconds = (0, 0), []
    for _ in range(NUM_RUNS):
        began = time.process_time()
        found = search()
        seconds.append(time.process_time() - began)
    return min(seconds), *found


def spaces() -> None:
    """Print configurations a second for spaces of growing size."""
    profiles = stored(MODEL)
    every = tuple(OPTIMIZERS)
    print(f"| space, {MODEL} | configurations | evaluated | s | a second | again, s | a second |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for words, gpus, global_batch, restrictions in (
        ("unasked, 8 GPUs, 64 sequences", "8xA100-80G", 64, {}),
        (f"{len(every)} optimizers", "8xA100-80G", 64, {"optims": every}),
        (
            f"{len(every)} optimizers, 1, 2, 4 or 8 GPUs",
            "8xA100-80G",
            64,
            {"optims": every, "num_processes": (1, 2, 4, 8)},
        ),
        ("the same, 5,040 sequences", "8xA100-80G", 5040, {"optims": every, "num_processes": (1, 2, 4, 8)}),
        ("the same, 720,720 sequences", "8xA100-80G", 720_720, {"optims": every, "num_processes": (1, 2, 4, 8)}),
    ):
        job, cluster = a_job(MODEL, global_batch, **restrictions), parse_cluster(gpus)
        seconds, num, evaluated = timed(partial(searched, job, cluster, profiles))
        evaluator = an_evaluator(job, cluster, profiles, allowed(job, cluster))
        again, _, _ = timed(partial(searched, job, cluster, profiles, evaluator))
        figures = f"{seconds:.3f} | {num / seconds:,.0f} | {again:.3f} | {num / again:,.0f}"
        print(f"| {words} | {num:,} | {evaluated:,} | {figures} |", flush=True)
    print(
        f"\nThe goal is {GOAL_PER_SECOND:,} configurations a second of one core. What is not evaluated fell to rules."
    )
    print("Again: with what is worked out once for a profile, a layout or an optimizer still there.")


def growth() -> None:
    """Print the time of one search over layers and over GPUs."""
    print("\n| layers | model | configurations | seconds of one core |\n| ---: | --- | ---: | ---: |")
    for model in MODELS:
        profiles = stored(model)
        job, cluster = a_job(model, 64), parse_cluster("8xA100-80G")
        seconds, num, _ = timed(partial(searched, job, cluster, profiles))
        print(f"| {next(iter(profiles.values())).num_layers} | {model} | {num} | {seconds:.3f} |", flush=True)
    print("\n| GPUs | configurations | seconds of one core |\n| ---: | ---: | ---: |")
    profiles = stored(MODEL)
    for gpus in ("2xH100-80G", "8xH100-80G", "8x8xH100-80G", "64x8xH100-80G"):
        cluster = parse_cluster(gpus)
        job = a_job(MODEL, 8 * cluster.num_devices)
        seconds, num, _ = timed(partial(searched, job, cluster, profiles))
        print(f"| {cluster.num_devices} | {num} | {seconds:.3f} |", flush=True)


def alone() -> None:
    """Print what evaluating every configuration by itself takes, in the same process with the same caches."""
    profiles, cluster = stored(MODEL), parse_cluster("8xA100-80G")
    job = a_job(MODEL, 64)
    every = [each for each in candidates(job, cluster) if regime_of(each, cluster.device) in profiles]
    sizes = tuple({each.per_device_train_batch_size for each in every})

    def one_by_one() -> tuple[int, int]:
        evaluator = Evaluator(cluster, job.workload, profiles, sizes)
        return len(every), sum(evaluator.evaluate(each).fits for each in every)

    seconds, num, _ = timed(one_by_one)
    together, _, _ = timed(lambda: searched(job, cluster, profiles))
    print(f"\nThe first space one by one: {seconds:.3f} s for {num}; together {together:.3f} s.", flush=True)


def processes() -> None:
    """Print the time of whole processes, ours and others' on the same model."""
    with tempfile.TemporaryDirectory(prefix="autofit-search-") as folder:
        environment = {**os.environ, "AUTOFIT_CACHE": folder, "OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": folder}
        environment["PYTHONDONTWRITEBYTECODE"] = ""  # an installed package has its bytecode: the first run writes it
        config = resolve_model(MODEL)
        (Path(folder) / "config.json").write_text(json.dumps(config.config), encoding="utf-8")
        print(f"\n| whole process | median of {NUM_PROCESSES}, s | fastest, s | median of processor, s | least, s |")
        print("| --- | ---: | ---: | ---: | ---: |")
        for words, command in commands(Path(folder), config.num_params or 0):
            took = [process(command, environment) for _ in range(NUM_PROCESSES + 1)][1:]
            figures = [f"{least(each):.2f}" for each in zip(*took, strict=True) for least in (statistics.median, min)]
            print(f"| {words} | {' | '.join(figures)} |", flush=True)
        print(
            "\nProcessor: user and system of the process, which compares better than its wall time on a busy machine."
        )


def commands(folder: Path, num_params: int) -> list[tuple[str, list[str]]]:
    """Return what is timed, with its words."""
    ours = [sys.executable, "-m", "autofit"]
    found = [("autofit --help", [*ours, "--help"])]
    for model, gpus in PLANNED:
        asked = ["--model", model, "--gpus", gpus, "--seq-len", "4096", "--global-batch", "64"]
        found.append((f"autofit plan, {model}, {gpus}", [*ours, "plan", *asked]))
    process([*found[-1][1], "-o", str(folder / "run")], {**os.environ, "AUTOFIT_CACHE": str(folder)})
    explained = f"autofit explain PLAN, {PLANNED[-1][0]}, {PLANNED[-1][1]}"
    found.append((explained, [*ours, "explain", str(folder / "run" / "plan.json")]))
    offline = (
        "import sys; from types import SimpleNamespace as N; import accelerate.commands.estimate as e; "
        "e.verify_on_hub = lambda *_: N(config={}, library_name='transformers'); "
        f"asked = [{str(folder)!r}, '--library_name', 'transformers']; "
        "e.estimate_command(e.estimate_command_parser().parse_args(asked))"
    )
    found.append(("accelerate estimate-memory, the Hub's answer given", [sys.executable, "-c", offline]))
    for name in PEERS:
        asked = (
            f"import json; from benchmarks.peers import PEERS; "
            f"PEERS[{name!r}]({ROW!r}, json.load(open({str(folder / 'config.json')!r})), {num_params})"
        )
        found.append((name, [sys.executable, "-c", asked]))
    return found


def process(command: Sequence[str], environment: dict[str, str]) -> tuple[float, float]:
    """Run a command; return its wall time and its processor time.

    Raises:
        RuntimeError: it failed.
    """
    before, began = os.times(), time.perf_counter()
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - began, os.times()
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]} failed:\n{child.stderr[-2000:]}")
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, spent


if __name__ == "__main__":
    sys.exit(main())
