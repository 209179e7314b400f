"""Times `autofit estimate --batch` as a whole process, over thousands of rows whose profiles are stored.

    python benchmarks/batch.py [--rows N] [--cache FOLDER] [--write FILE]

Rows are drawn at random, always the same ones. Code paths that ship no profile are traced before anything is timed, in
a quarter of an hour; in no time if `--cache` names the folder of an earlier run. `--write` keeps the rows in a file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed import machine

MODELS = (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolLM2-360M",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B",
    "Qwen/Qwen2.5-7B",
    "Qwen/Qwen3-0.6B",
    "openai-community/gpt2",
)
"""The first five ship profiles."""
GPUS = ("1xT4-16G", "1xRTX4090-24G", "1xA100-40G", "1xA100-80G", "1xH100-80G", "2xA100-80G", "4xA100-80G", "8xH100-80G")
ZERO = ("ddp", "zero1", "zero2", "zero3")
SHARDINGS = {"full": (*ZERO, "fsdp_full_shard", "fsdp2_full_shard"), "lora": (*ZERO, "fsdp2_full_shard"), "qlora": ZERO}
OPTIMIZERS = (
    ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"),
    ("adamw_torch", "adamw_torch_fused", "sgd"),
)
"""Without and with FSDP."""
NF4 = {"bits": 4, "type": "nf4", "double_quant": True}
SEED = 0
GOAL_ROWS_A_MINUTE = 2000


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the machine, how many rows were estimated, and rows a minute with and without the replay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--cache", type=Path, help="where traced profiles are kept between two runs")
    parser.add_argument("--write", type=Path, help="keep the rows here")
    options = parser.parse_args(arguments)
    rows = drawn(options.rows)
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory(prefix="autofit-batch-") as folder:
        file = options.write or Path(folder) / "rows.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        environment = {**os.environ, "AUTOFIT_CACHE": str(options.cache or folder)}
        run(file, environment, "--no-replay")  # traces what is not stored, once
        print("| estimate --batch | rows | refused | s | rows a minute | goal |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        for name, flags in (("with the replay", ()), ("--no-replay", ("--no-replay",))):
            began = time.perf_counter()
            answers = run(file, environment, *flags)
            seconds = time.perf_counter() - began
            refused = sum("refused" in answer for answer in answers)
            a_minute = 60 * len(answers) / seconds
            print(f"| {name} | {len(answers)} | {refused} | {seconds:.1f} | {a_minute:.0f} | {GOAL_ROWS_A_MINUTE} |")
    return 0


def drawn(num_rows: int) -> list[dict[str, Any]]:
    """Draw rows: any model, method, size, optimizer, checkpointing, device and sharding."""
    chance = random.Random(SEED)  # noqa: S311 - the same rows every time
    return [_row(f"row-{n}", chance) for n in range(num_rows)]


def _row(row_id: str, chance: random.Random) -> dict[str, Any]:
    gpus, method = chance.choice(GPUS), chance.choice(("full", "lora", "qlora"))
    is_old, is_alone = "T4" in gpus, gpus.startswith("1x")
    sharding = "none" if is_alone else chance.choice(SHARDINGS[method])
    is_pure = method == "full" and is_alone and not is_old and chance.random() < 0.5
    return {
        "id": row_id,
        "model": chance.choice(MODELS),
        "gpus": gpus,
        "method": method,
        "seq_len": chance.choice((256, 512, 1024, 2048, 4096)),
        "micro_batch_size": chance.choice((1, 2, 3, 4, 8, 16)),
        "gradient_accumulation_steps": chance.choice((1, 1, 4)),
        "optimizer": chance.choice(OPTIMIZERS[sharding.startswith("fsdp")]),
        "gradient_checkpointing": chance.random() < 0.6,
        "attention": "eager" if is_old else "sdpa",
        "weights_dtype": "float32" if method == "full" and not is_pure else "float16" if is_old else "bfloat16",
        "autocast": "no" if is_pure else "fp16" if is_old else "bf16",
        "sharding": sharding,
        "lora_rank": None if method == "full" else 16,
        "quantization": NF4 if method == "qlora" else None,
    }


def run(file: Path, environment: dict[str, str], *flags: str) -> list[dict[str, Any]]:
    """Run autofit as a process of its own; return what it answered.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "autofit", "estimate", "--batch", str(file), *flags]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{child.stderr}")
    return [json.loads(line) for line in child.stdout.splitlines()]


if __name__ == "__main__":
    sys.exit(main())
