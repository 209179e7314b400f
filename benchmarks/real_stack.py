"""Trains on this machine's CPU with the real Trainer, peft, bitsandbytes and DeepSpeed, and compares the peaks.

    python benchmarks/real_stack.py [--cells CELL,CELL | --all] [--loop accelerate] [--measured FILE [--again]] [--json]

A cell is `METHOD-SHARDING-PRECISION-OPTIM-bB-sS-gaN`, and then any of `-ckpt[-reentrant]`, `-sp2`, `-accelerate`,
`-views`, `-half`, `-fp32file`, `-keeps`, `-ragged`, `-hybrid`, `-fp32down` and `-NAME=VALUE`:
`lora-zero2-bf16-adamw_torch_fused-b2-s256-ga1-ckpt`. `zero2_offload` keeps the optimizer on the host,
`zero3_offload_all` the weights as well; `qlora_bf16` stores packed weights in bf16, which FSDP shards. `-accelerate`
runs a bare Accelerate loop, which keeps the model's output alive through backward, in place of the Trainer, and with
`-views` DDP's gradients are views of its buckets; in `-sp2` the two ranks share each sequence. In `-half` weights that
train are loaded in 16 bits, where they would be in fp32; in `-fp32file` the checkpoint is stored in fp32, whatever it
is loaded in, where it would be as it is loaded. In `-keeps` evaluation keeps its predictions, for a `compute_metrics`.
In `-ragged` sequences are of many lengths, up to `-s`, and each batch is padded to its longest. In `-hybrid` four ranks
hold two copies of the model, each sharded over two of them. In `-fp32down` the model's class names its `down_proj`
among the modules that transformers loads in fp32 beside 16-bit weights. NAME is a setting of DeepSpeed's
`zero_optimization` block.

Sharded cells run on two gloo ranks; under FSDP, `cpu_fsdp/` makes accelerate take them for GPUs. Measured is the most
bytes that tensor storages held at one time, on the rank that held most: from the first step to the last, and in each
phase by itself. A CPU rank's device is the host, so what DeepSpeed offloads counts as what it does not: predicted is
the sum of both. Under FSDP the host is counted apart, and the copies between it and a GPU are made (`host_memory.py`).

FILE keeps what was measured, one line a run, and cells that it has are not run again: an interrupted benchmark goes on,
and predictions, which are always made anew, can be compared without training again. Two runs of a cell are two rows.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from autofit.memory.assemble import MemoryModel
from autofit.spec.configuration import Configuration, Evaluation, Freeze, Lora, Offload, Quantization
from autofit.spec.estimate import MemoryEstimate
from autofit.spec.hardware import Cluster, Device
from autofit.spec.regimes import regime_of
from autofit.units import GIB, MIB
from autofit.writers.accelerate_config import launcher_keys

Ranks = list[dict[str, Any]]
"""What each rank of a run wrote down."""
HIDDEN_SIZE, VOCAB_SIZE = 256, 8000
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
RANK_SCRIPT = Path(__file__).with_name("real_training.py")
PRETENDING_GPUS = Path(__file__).with_name("cpu_fsdp")
CPU_RANK = Device(name="CPU-8G", kind="cpu", memory_bytes=8 * GIB)
MOST_SECONDS = 600
LEAST_BYTES = 32 * 1024
"""Less than this is compared in bytes, not in per cent.

What a loop names of its own is not predicted: losses and norms of the step before, counters, and one micro-step's ids
and labels that a variable still has, some 4 kB each for 256 tokens. Beside what a device holds it is nothing; but where
weights, gradients and state are the host's, a device holds little else between two steps.
"""
NUM_EVALUATED = 8
"""Sequences of the evaluation set: several batches, whose predictions are concatenated."""
OFFLOADS: dict[str, Offload] = {"_offload": "optimizer", "_offload_all": "optimizer_and_parameters"}
METHODS = ("full", "lora", "qlora")
QUANTIZED: dict[str, dict[str, Any]] = {
    "qlora": {"bits": 4},
    "qlora_bf16": {"bits": 4, "storage_dtype": "bfloat16"},
    "int8": {"bits": 8},
}
SHARDINGS = ("none", "ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_offload_all")
OPTIMS = ("adamw_torch_fused", "adamw_torch", "adamw_8bit")
PHASES: dict[str, tuple[str, ...]] = {
    "forward": ("embedding", "layer_forward", "head_and_loss"),
    "backward": (
        "loss_backward",
        "head_backward",
        "layer_backward",
        "embedding_backward",
        "end",
        "gradient_reduction",
    ),
    "optimizer_step": ("optimizer_step",),
}
"""Phases that a run can tell apart, and the predicted ones that each holds."""
STAGES = {
    "loading": "loading",
    "preparing": "preparing",
    "first_step": "first ",
    "evaluation": "evaluation",
    "saving": "saving",
}
"""Predicted stages, and how the names of the measured phases that each holds begin."""


def _cells(sizes: str, *starts: str) -> tuple[str, ...]:
    return tuple(f"{start}-{sizes}" for start in starts)


DEFAULT_CELLS = (
    # Activations dominate.
    *_cells(
        "b2-s256-ga1",
        "full-none-fp32-adamw_torch_fused",
        "full-none-bf16-adamw_torch_fused",
        "full-ddp-fp32-adamw_torch_fused",
        "full-ddp-bf16-adamw_torch_fused",
        "full-zero1-bf16-adamw_torch_fused",
        "full-zero2-bf16-adamw_torch_fused",
        "full-zero3-bf16-adamw_torch_fused",
        "full-zero2_offload-bf16-adamw_torch",
        "full-zero3_offload-bf16-adamw_torch",
        "full-zero3_offload_all-bf16-adamw_torch",
        "lora-none-bf16-adamw_torch_fused",
        "lora-ddp-bf16-adamw_torch_fused",
        "lora-zero1-bf16-adamw_torch_fused",
        "lora-zero2-bf16-adamw_torch_fused",
        "lora-zero3-bf16-adamw_torch_fused",
        "qlora-ddp-bf16-adamw_torch_fused",
        "qlora-zero2-bf16-adamw_torch_fused",
        "freeze-none-fp32-adamw_torch_fused",
        "freeze-ddp-bf16-adamw_torch_fused",
        "freeze-zero2-bf16-adamw_torch_fused",
        "freeze-zero3-bf16-adamw_torch_fused",
        "freeze-fsdp2-bf16-adamw_torch_fused",
        "full-fsdp1-bf16-adamw_torch_fused",
        "full-fsdp2-bf16-adamw_torch_fused",
        "full-fsdp2-fp32-adamw_torch_fused",
        "lora-fsdp1-bf16-adamw_torch_fused",
        "lora-fsdp2-bf16-adamw_torch_fused",
        "qlora_bf16-fsdp2-bf16-adamw_torch_fused",
        "full-fsdp1_offload_all-bf16-adamw_torch_fused",
        "full-fsdp2_offload_all-bf16-adamw_torch_fused",
        "lora-fsdp1_offload_all-bf16-adamw_torch_fused",
        "lora-fsdp2_offload_all-bf16-adamw_torch_fused",
    ),
    *_cells(
        "b2-s256-ga1-ckpt-reentrant",
        "int8-none-bf16-adamw_torch_fused",
        "int8-ddp-bf16-adamw_torch_fused",
        "int8-zero3-bf16-adamw_torch_fused",
        "qlora-zero3-bf16-adamw_torch_fused",
    ),
    *_cells(
        "b2-s256-ga1-ckpt",
        "full-zero2_offload-bf16-adamw_torch",
        "full-zero3_offload_all-bf16-adamw_torch",
        "lora-ddp-fp32-adamw_torch_fused",
        "lora-zero2-bf16-adamw_torch_fused",
        "lora-zero3-bf16-adamw_torch_fused",
        "lora-zero2_offload-bf16-adamw_torch",
        "lora-zero3_offload_all-bf16-adamw_torch",
        "qlora-ddp-bf16-adamw_torch_fused",
        "qlora-zero2-bf16-adamw_torch_fused",
        "qlora-zero3-bf16-adamw_torch_fused",
        "qlora-zero3_offload-bf16-adamw_torch",
        "freeze-zero2-bf16-adamw_torch_fused",
        "full-fsdp1-bf16-adamw_torch_fused",
        "lora-fsdp2-bf16-adamw_torch_fused",
        "qlora_bf16-fsdp2-bf16-adamw_torch_fused",
        "qlora_bf16-fsdp2_offload_all-bf16-adamw_torch_fused",
    ),
    *_cells("b2-s256-ga2", "full-ddp-bf16-adamw_torch_fused"),
    *_cells(
        "b2-s256-ga2-ckpt",
        "full-none-fp32-adamw_torch_fused",
        "full-ddp-fp32-adamw_torch_fused",
        "full-zero1-bf16-adamw_torch_fused",
        "full-zero2-bf16-adamw_torch_fused",
        "full-zero3-bf16-adamw_torch_fused",
        "full-zero2_offload-bf16-adamw_torch",
        "full-zero3_offload-bf16-adamw_torch",
        "lora-zero2-bf16-adamw_torch_fused",
        "lora-zero3-bf16-adamw_torch_fused",
        "qlora-ddp-bf16-adamw_torch_fused",
        "freeze-ddp-fp32-adamw_torch_fused",
        "full-fsdp1-bf16-adamw_torch_fused",
        "full-fsdp2-bf16-adamw_torch_fused",
    ),
    # Weights, gradients and the optimizer's step dominate.
    *_cells(
        "b1-s32-ga1",
        "full-none-fp32-adamw_8bit",
        "full-none-fp32-adamw_torch",
        "full-ddp-fp32-adamw_torch",
        "full-ddp-fp32-adamw_8bit",
        "full-zero1-bf16-adamw_torch",
        "full-zero1-fp32-adamw_torch_fused",
        "full-zero2-bf16-adamw_torch_fused",
        "full-zero2-fp32-adamw_torch_fused",
        "full-zero2-bf16-adamw_8bit",
        "full-zero2_offload-bf16-adamw_torch",
        "full-zero2_offload-fp32-adamw_torch",
        "full-zero3-bf16-adamw_torch_fused",
        "full-zero3-bf16-adamw_torch",
        "full-zero3-fp32-adamw_torch_fused",
        "full-zero3_offload-bf16-adamw_torch",
        "full-zero3_offload_all-bf16-adamw_torch",
        "qlora-zero3-bf16-adamw_torch_fused",
        "full-none-fp32-sgd",
        "full-none-fp32-adafactor",
        "full-none-fp32-lion_8bit",
        "full-none-fp32-paged_adamw_8bit",
        "full-none-fp32-apollo_adamw",
        "full-none-fp32-galore_adamw",
        "full-none-bf16-galore_adamw_layerwise",
        "full-ddp-fp32-adafactor",
        "full-ddp-fp32-paged_adamw_8bit",
        "full-zero1-bf16-adafactor",
        "full-zero2-bf16-lion_8bit",
        "full-zero2-bf16-sgd",
        "full-zero3-bf16-adamw_8bit",
        "full-fsdp1-bf16-adamw_torch_fused",
        "full-fsdp1-bf16-adamw_8bit",
        "full-fsdp1_offload_all-bf16-sgd",
        "full-fsdp2_offload_all-fp32-adamw_torch",
        "full-fsdp2-bf16-adamw_torch",
        "full-fsdp2-bf16-sgd",
    ),
    # Weights that train are loaded in 16 bits.
    *_cells("b1-s32-ga1-half", "full-fsdp1-bf16-adamw_torch_fused", "full-fsdp2-bf16-adamw_torch_fused"),
    # The checkpoint is stored in fp32, and loaded in bf16.
    *_cells("b1-s32-ga1-fp32file", "full-zero3-bf16-adamw_torch_fused", "lora-none-bf16-adamw_torch_fused"),
    *_cells("b1-s32-ga1-half-fp32file", "full-fsdp2-bf16-adamw_torch_fused"),
    # Evaluation keeps its predictions.
    *_cells(
        "b2-s256-ga1-keeps",
        "full-none-bf16-adamw_torch_fused",
        "lora-ddp-bf16-adamw_torch_fused",
        "full-zero2-bf16-adamw_torch_fused",
        "full-zero3-bf16-adamw_torch_fused",
        "full-fsdp1-bf16-adamw_torch_fused",
        "full-fsdp2-bf16-adamw_torch_fused",
    ),
    # Sequences of many lengths: the longest batch is what counts.
    *_cells(
        "b2-s256-ga1-ragged",
        "full-none-bf16-adamw_torch_fused",
        "lora-ddp-bf16-adamw_torch_fused",
        "full-zero2-bf16-adamw_torch_fused",
        "full-fsdp2-bf16-adamw_torch_fused",
    ),
    *_cells("b2-s256-ga2-ckpt-ragged", "lora-none-bf16-adamw_torch_fused"),
    # Two copies of the model, each on two ranks.
    *_cells("b2-s256-ga1-hybrid", "full-fsdp1-bf16-adamw_torch_fused", "full-fsdp2-bf16-adamw_torch_fused"),
    *_cells("b1-s32-ga1-hybrid", "full-fsdp1-bf16-adamw_torch_fused", "lora-fsdp2-bf16-adamw_torch_fused"),
    # Two ranks share each sequence.
    *_cells(
        "b2-s512-ga1-sp2",
        "full-zero1-bf16-adamw_torch_fused",
        "full-zero2-bf16-adamw_torch_fused",
        "full-zero3-bf16-adamw_torch_fused",
    ),
    *_cells("b2-s512-ga1-ckpt-sp2", "lora-zero3-bf16-adamw_torch_fused"),
    *_cells("b1-s1024-ga2-sp2", "full-zero2-bf16-adamw_torch_fused"),
    *_cells("b1-s1024-ga2-ckpt-sp2", "full-zero3-bf16-adamw_torch_fused"),
    # A bare loop keeps the model's output.
    *_cells(
        "b2-s256-ga1-accelerate",
        "full-none-fp32-adamw_torch_fused",
        "full-ddp-fp32-adamw_torch_fused",
        "full-ddp-bf16-adamw_torch_fused",
        "full-zero2-bf16-adamw_torch_fused",
        "full-zero3-bf16-adamw_torch_fused",
        "lora-ddp-bf16-adamw_torch_fused",
        "lora-zero2_offload-bf16-adamw_torch",
        "qlora-ddp-bf16-adamw_torch_fused",
    ),
)


class Figure(Struct, frozen=True, kw_only=True):
    """One phase or stage of a run."""

    predicted_bytes: int
    measured_bytes: int

    @property
    def error(self) -> float | None:
        """Relative error of the prediction; None where what was measured is too little for one."""
        if self.measured_bytes < LEAST_BYTES:
            return None
        return self.predicted_bytes / self.measured_bytes - 1


class Result(Struct, frozen=True, kw_only=True):
    """One cell: what was predicted, what was measured."""

    cell: str
    predicted_bytes: int
    phase: str
    """Where the prediction has its peak."""
    measured_bytes: int
    predicted_after_step_bytes: int
    measured_after_step_bytes: int
    figures: dict[str, Figure]
    """Each phase of a steady step, and each stage of the run that is not a step."""

    @property
    def error(self) -> float:
        """Relative error of the peak."""
        return self.predicted_bytes / self.measured_bytes - 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", help="separated by commas")
    parser.add_argument("--all", action="store_true", help="every combination at b=2, s=256 (hours)")
    parser.add_argument("--loop", choices=("trainer", "accelerate"), default="trainer", help="what runs the cells")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="where measurements are kept, and read from")
    parser.add_argument("--again", action="store_true", help="measure once more what FILE has")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    options = parser.parse_args(arguments)
    cells = options.cells.split(",") if options.cells else list(every_cell()) if options.all else DEFAULT_CELLS
    if options.loop == "accelerate":
        cells = [cell if cell.endswith("-accelerate") else f"{cell}-accelerate" for cell in cells]
    measurements = Measurements(options.measured, again=options.again)
    if options.json:
        print(json.dumps([as_json(result) for result in run(cells, measurements)], indent=1))
    else:
        print_tables(run(cells, measurements))
    return 0


class Measurements:
    """What ranks measured, for each run of each cell; kept in a file of JSON lines if one is named.

    Args:
        file: where to keep them.
        again: whether a cell that the file has is to be measured once more.
    """

    def __init__(self, file: Path | None = None, *, again: bool = False) -> None:
        self._file = file
        self._again = again
        self._kept: dict[str, list[Ranks]] = {}
        if file is not None and file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                kept = json.loads(line)
                self._kept.setdefault(kept["cell"], []).append(kept["ranks"])

    def of(self, cell: str, train: Callable[[], Ranks]) -> list[Ranks]:
        """Return every measurement of a cell; train it if there is none, or if another is wanted."""
        if self._again or cell not in self._kept:
            ranks = train()
            self._kept.setdefault(cell, []).append(ranks)
            if self._file is not None:
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"cell": cell, "ranks": ranks}) + "\n")
        return self._kept[cell]


def as_json(result: Result) -> dict[str, Any]:
    """Write a result as JSON, errors included."""
    content = msgspec.to_builtins(result) | {"error": result.error}
    for name, figure in result.figures.items():
        content["figures"][name]["error"] = figure.error
    return content


def every_cell() -> Iterator[str]:
    """Name the whole matrix."""
    knobs = itertools.product(METHODS, SHARDINGS, ("fp32", "bf16"), OPTIMS, (1, 2), ("", "-ckpt"))
    for method, sharding, precision, optim, accumulation, checkpointing in knobs:
        if "offload" not in sharding or optim == "adamw_torch":
            yield f"{method}-{sharding}-{precision}-{optim}-b2-s256-ga{accumulation}{checkpointing}"


def parse_cell(cell: str) -> tuple[Configuration, int]:
    """Read a cell's name as a configuration and a sequence length."""
    method, place, precision, optim, batch, tokens, accumulation, *rest = cell.split("-")
    sharding = place.partition("_")[0]
    adapts = method not in {"full", "freeze"}
    loads_fp32 = precision == "fp32" or not (adapts or sharding.startswith("zero") or "half" in rest)
    dtype = "float32" if loads_fp32 else "bfloat16"
    content = {
        "method": "qlora" if method in QUANTIZED else method,
        "quantization": _quantization(method, dtype),
        "lora": Lora() if adapts else None,
        "freeze": Freeze() if method == "freeze" else None,
        "optim": optim,
        "per_device_train_batch_size": int(batch.removeprefix("b")),
        "gradient_accumulation_steps": int(accumulation.removeprefix("ga")),
        "num_processes": 1 if sharding == "none" else 4 if "hybrid" in rest else 2,
        "num_replicas": 2 if "hybrid" in rest else 1,
        "sequence_parallel_size": 2 if "sp2" in rest else 1,
        "keeps_outputs": "accelerate" in rest,
        "gradient_as_bucket_view": "views" in rest,
        "evaluation": Evaluation(num_sequences=NUM_EVALUATED, keeps_predictions="keeps" in rest),
        "gradient_checkpointing": "ckpt" in rest,
        "use_reentrant": "reentrant" in rest,
        "sharding": sharding,
        "zero_settings": {name: json.loads(value) for name, _, value in map(_halves, rest) if value},
        "offload": OFFLOADS.get(place.removeprefix(sharding), "none"),
        "weights_dtype": dtype,
        "stored_dtype": "float32" if "fp32file" in rest else None,
        "mixed_precision": "no" if precision == "fp32" else "bf16",
        "attention": "sdpa",
        "batching": "padded" if "ragged" in rest else "equal",
    }
    return msgspec.convert(msgspec.to_builtins(content), Configuration), int(tokens.removeprefix("s"))


def _halves(text: str) -> tuple[str, str, str]:
    return text.partition("=")


def _quantization(method: str, dtype: str) -> Quantization | None:
    if method not in QUANTIZED:
        return None
    return msgspec.convert({"compute_dtype": dtype, **QUANTIZED[method]}, Quantization)


def run(cells: Sequence[str], measurements: Measurements) -> Iterator[Result]:
    """Predict and measure each cell."""
    profiles: dict[Any, Any] = {}
    with tempfile.TemporaryDirectory(prefix="autofit-real-stack-") as folder:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints while it is imported
            model_folders = {dtype: save_model(Path(folder), dtype) for dtype in ("float32", "bfloat16")}
        for cell in cells:
            print(f"{cell} ...", file=sys.stderr, flush=True)
            with contextlib.redirect_stdout(sys.stderr):
                predicted = predict(cell, profiles)
            for ranks in measurements.of(cell, partial(measure, cell, model_folders, Path(folder))):
                yield _result(cell, predicted, ranks)


def _result(cell: str, predicted: MemoryEstimate, ranks: Ranks) -> Result:
    host = _host_bytes(predicted, ranks)
    return Result(
        cell=cell,
        predicted_bytes=predicted.peak_allocated_bytes + host,
        phase=max(predicted.phases, key=lambda phase: phase.bytes).name,
        measured_bytes=_measured(ranks, "first ", "early ", "steady "),
        predicted_after_step_bytes=(predicted.after_step_allocated_bytes or 0) + host,
        measured_after_step_bytes=max(rank["after_step_bytes"] for rank in ranks),
        figures=dict(_figures(predicted, ranks)),
    )


def _host_bytes(predicted: MemoryEstimate, ranks: Ranks) -> int:
    """Of the host what was counted with the device."""
    return 0 if any(rank.get("host_peaks") for rank in ranks) else predicted.host_bytes or 0


def _measured(ranks: Ranks, *starts: str, peaks: str = "peaks") -> int:
    """Return the highest peak of all ranks in the phases whose names begin so; 0 where none was entered."""
    return max(
        (peak for rank in ranks for name, peak in rank.get(peaks, {}).items() if name.startswith(starts)),
        default=0,
    )


def _figures(predicted: MemoryEstimate, ranks: Ranks) -> Iterator[tuple[str, Figure]]:
    for name, held in PHASES.items():
        highest = max(phase.bytes for phase in predicted.phases if phase.name in held) + _host_bytes(predicted, ranks)
        yield name, Figure(predicted_bytes=highest, measured_bytes=_measured(ranks, f"steady {name}"))
    if kept := _measured(ranks, "early ", "steady ", peaks="host_peaks"):
        yield "host", Figure(predicted_bytes=predicted.host_bytes or 0, measured_bytes=kept)
    for name, start in STAGES.items():
        stage = getattr(predicted.stages, name)
        if stage is not None and (measured := _measured(ranks, start)):
            yield name, Figure(predicted_bytes=stage.device_bytes, measured_bytes=measured)
        if stage is not None and stage.host_bytes and (kept := _measured(ranks, start, peaks="host_peaks")):
            yield f"{name} host", Figure(predicted_bytes=stage.host_bytes, measured_bytes=kept)


def predict(cell: str, profiles: dict[Any, Any]) -> MemoryEstimate:
    """Estimate one rank of a cell, tracing its code path unless that was done."""
    from autofit.profile.trace import trace

    configuration, tokens = parse_cell(cell)
    keeps = keeps_fp32_modules(cell)
    regime = regime_of(configuration, CPU_RANK, frozenset({"bfloat16"}) if keeps else frozenset())
    if regime not in profiles:
        with down_projections_in_fp32() if keeps else contextlib.nullcontext():
            profiles[regime] = trace("a small Llama", MODEL, regime)
    # A rank is a node of its own, so that the host's bytes are those of one rank.
    cluster = Cluster(device=CPU_RANK, num_devices_per_node=1, num_nodes=configuration.num_processes)
    model = MemoryModel(profiles[regime], tokens, (configuration.per_device_train_batch_size,))
    return model.estimate(configuration, cluster, replays=True)


def keeps_fp32_modules(cell: str) -> bool:
    """Tell a cell whose model has modules in fp32."""
    return "fp32down" in cell.split("-")


@contextlib.contextmanager
def down_projections_in_fp32() -> Iterator[None]:
    """Let Llama's class name a third of its weights among those that are loaded in fp32, as T5's names its `wo`."""
    from transformers import LlamaForCausalLM

    before = LlamaForCausalLM._keep_in_fp32_modules_strict  # noqa: SLF001 - the name that transformers asks for
    LlamaForCausalLM._keep_in_fp32_modules_strict = ["down_proj"]  # noqa: SLF001
    try:
        yield
    finally:
        LlamaForCausalLM._keep_in_fp32_modules_strict = before  # noqa: SLF001


def save_model(folder: Path, dtype: str) -> Path:
    """Save a small Llama with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in MODEL.items() if key != "model_type"}
    config = AutoConfig.for_model(MODEL["model_type"], **values)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder / dtype)
    return folder / dtype


def measure(cell: str, model_folders: dict[str, Path], folder: Path) -> Ranks:
    """Train a cell in processes of its own; return what each rank measured.

    Raises:
        RuntimeError: the training failed.
    """
    configuration, tokens = parse_cell(cell)
    run_folder = Path(tempfile.mkdtemp(dir=folder))
    request = {
        "configuration": msgspec.to_builtins(configuration),
        "tokens": tokens,
        "model": str(model_folders[configuration.stored_dtype or configuration.weights_dtype]),
        "hidden_size": HIDDEN_SIZE,
        "vocab_size": VOCAB_SIZE,
        "keeps_fp32_modules": keeps_fp32_modules(cell),
    }
    (run_folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    child = subprocess.run(
        [sys.executable, *_launcher(configuration, run_folder), str(RANK_SCRIPT), str(run_folder)],
        env=_environment(configuration),
        capture_output=True,
        text=True,
        timeout=MOST_SECONDS,
        check=False,
    )
    results = sorted(run_folder.glob("rank*.json"))
    if child.returncode or len(results) != configuration.num_processes:
        raise RuntimeError(f"{cell} failed:\n{child.stderr[-3000:]}")
    return [json.loads(path.read_text(encoding="utf-8")) for path in results]


def _launcher(configuration: Configuration, run_folder: Path) -> list[str]:
    """Start the ranks; FSDP is accelerate's, whose launcher reads the file that autofit writes."""
    if configuration.num_processes == 1:
        return []
    if not configuration.uses_fsdp:
        return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(configuration.num_processes)]
    cluster = Cluster(device=CPU_RANK, num_devices_per_node=configuration.num_processes, num_nodes=1)
    keys = launcher_keys(configuration, cluster, run_folder)
    keys["fsdp_config"] |= {"fsdp_cpu_ram_efficient_loading": True, "fsdp_sync_module_states": True}
    (run_folder / "accelerate.json").write_text(json.dumps({**keys, "main_process_port": 0}), encoding="utf-8")
    return ["-m", "accelerate.commands.launch", "--config_file", str(run_folder / "accelerate.json")]


def _environment(configuration: Configuration) -> dict[str, str]:
    """DDP on a CPU needs accelerate to be told so; under DeepSpeed the same variable would switch DeepSpeed off.

    Weights are loaded by the main thread: the counter does not see what other threads make. DeepSpeed compiles its
    operators again for every other `ninja` that it finds.
    """
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    environment["PATH"] = _with_first(Path(sys.executable).parent, "PATH")
    if configuration.uses_fsdp:
        return environment | {
            "ACCELERATE_TORCH_DEVICE": "cpu",
            "PYTHONPATH": _with_first(PRETENDING_GPUS, "PYTHONPATH"),
        }
    return environment | ({"ACCELERATE_USE_CPU": "true"} if configuration.sharding == "ddp" else {})


def _with_first(folder: Path, variable: str) -> str:
    """Put a folder before those that a variable of the environment lists."""
    return os.pathsep.join(filter(None, [str(folder), os.environ.get(variable)]))


def print_tables(results: Iterator[Result]) -> None:
    """Print each cell when it is done, then its phases, then the summary."""
    print("| cell | predicted peak, MiB | measured, MiB | error | peak in | after the step, MiB | measured, MiB |")
    print("| --- | ---: | ---: | ---: | --- | ---: | ---: |")
    done = []
    for result in results:
        done.append(result)
        print(
            f"| {result.cell} | {result.predicted_bytes / MIB:.2f} | {result.measured_bytes / MIB:.2f} | "
            f"{result.error:+.2%} | {result.phase} | {result.predicted_after_step_bytes / MIB:.2f} | "
            f"{result.measured_after_step_bytes / MIB:.2f} |",
            flush=True,
        )
    _print_figures(done)
    print(f"\n{_summary([(result.cell, result.error) for result in done])}")


def _print_figures(done: list[Result]) -> None:
    names = list(dict.fromkeys(name for result in done for name in result.figures))
    print("\nPredicted / measured, MiB, and error, of each phase:\n")
    print(f"| cell | {' | '.join(names)} |")
    print(f"| --- |{' ---: |' * len(names)}")
    for result in done:
        shown = [_shown(result.figures.get(name)) for name in names]
        print(f"| {result.cell} | {' | '.join(shown)} |")
    print()
    for name in names:
        errors = [(r.cell, r.figures[name].error) for r in done if name in r.figures]
        if known := [(cell, error) for cell, error in errors if error is not None]:
            print(f"- {name}: {_summary(known)}")
    differences = [
        (abs(figure.predicted_bytes - figure.measured_bytes), result.cell, name)
        for result in done
        for name, figure in result.figures.items()
        if figure.error is None
    ]
    if differences:
        num_bytes, cell, name = max(differences)
        print(
            f"- of {len(differences)} figures below {LEAST_BYTES:,} bytes, "
            f"the most off: {num_bytes} bytes, {name} ({cell})"
        )


def _shown(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    if figure.error is None:
        return f"{figure.predicted_bytes:,} / {figure.measured_bytes:,} bytes"
    return f"{figure.predicted_bytes / MIB:.2f} / {figure.measured_bytes / MIB:.2f} {figure.error:+.2%}"


def _summary(errors: list[tuple[str, float]]) -> str:
    cell, worst = max(errors, key=lambda each: abs(each[1]))
    median = statistics.median(abs(error) for _, error in errors)
    runs = f" in {len(errors)} runs" if len(errors) > len(dict(errors)) else ""
    return f"{len(dict(errors))} cells{runs}: median {median:.2%}, worst {worst:+.2%} ({cell})"


if __name__ == "__main__":
    sys.exit(main())
