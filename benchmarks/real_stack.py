"""Trains on this machine's CPU with the real Trainer, peft, bitsandbytes and DeepSpeed, and compares the peaks.

    python benchmarks/real_stack.py [--cells CELL,CELL | --all] [--loop accelerate] [--json]

A cell is `METHOD-SHARDING-PRECISION-OPTIM-bB-sS-gaN[-ckpt][-accelerate]`, for instance
`lora-zero2-bf16-adamw_torch_fused-b2-s256-ga1-ckpt`. `zero2_offload` keeps the optimizer on the host,
`zero3_offload_all` the weights as well. `-accelerate` runs a bare Accelerate loop, which keeps the model's output alive
through backward, in place of the Trainer.

Sharded cells run on two gloo ranks. Measured is the most bytes that tensor storages held at one time, on the rank that
held most: from the first step to the last, and in each phase by itself. A CPU rank's device is the host, so what is
offloaded counts as what is not: predicted is the sum of both.
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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from autofit.memory.assemble import MemoryModel
from autofit.spec.configuration import Configuration, Freeze, Lora, Offload, Quantization
from autofit.spec.estimate import MemoryEstimate
from autofit.spec.hardware import Cluster, Device
from autofit.spec.regimes import regime_of
from autofit.units import GIB, MIB

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
MOST_SECONDS = 600
OFFLOADS: dict[str, Offload] = {"_offload": "optimizer", "_offload_all": "optimizer_and_parameters"}
METHODS = ("full", "lora", "qlora")
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
    ),
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
    ),
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One phase or stage of a run."""

    predicted_bytes: int
    measured_bytes: int

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted_bytes / self.measured_bytes - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
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
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    options = parser.parse_args(arguments)
    cells = options.cells.split(",") if options.cells else list(every_cell()) if options.all else DEFAULT_CELLS
    if options.loop == "accelerate":
        cells = [cell if cell.endswith("-accelerate") else f"{cell}-accelerate" for cell in cells]
    if options.json:
        print(json.dumps([as_json(result) for result in run(cells)], indent=1))
    else:
        print_tables(run(cells))
    return 0


def as_json(result: Result) -> dict[str, Any]:
    """Write a result as JSON, errors included."""
    content = asdict(result) | {"error": result.error}
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
    adapts = method in {"lora", "qlora", "int8"}
    loads_fp32 = precision == "fp32" or (not adapts and not sharding.startswith("zero"))
    dtype = "float32" if loads_fp32 else "bfloat16"
    content = {
        "method": "qlora" if method == "int8" else method,
        "quantization": _quantization(method, dtype),
        "lora": Lora() if adapts else None,
        "freeze": Freeze() if method == "freeze" else None,
        "optim": optim,
        "per_device_train_batch_size": int(batch.removeprefix("b")),
        "gradient_accumulation_steps": int(accumulation.removeprefix("ga")),
        "num_processes": 1 if sharding == "none" else 2,
        "gradient_checkpointing": "ckpt" in rest,
        "sharding": sharding,
        "offload": OFFLOADS.get(place.removeprefix(sharding), "none"),
        "weights_dtype": dtype,
        "mixed_precision": "no" if precision == "fp32" else "bf16",
        "attention": "sdpa",
    }
    return msgspec.convert(msgspec.to_builtins(content), Configuration), int(tokens.removeprefix("s"))


def _quantization(method: str, dtype: str) -> Quantization | None:
    if method not in {"qlora", "int8"}:
        return None
    return msgspec.convert({"bits": 8 if method == "int8" else 4, "compute_dtype": dtype}, Quantization)


def run(cells: Sequence[str]) -> Iterator[Result]:
    """Predict and measure each cell."""
    profiles: dict[Any, Any] = {}
    with tempfile.TemporaryDirectory(prefix="autofit-real-stack-") as folder:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints while it is imported
            model_folders = {dtype: save_model(Path(folder), dtype) for dtype in ("float32", "bfloat16")}
        for cell in cells:
            print(f"{cell} ...", file=sys.stderr, flush=True)
            with contextlib.redirect_stdout(sys.stderr):
                predicted = predict(cell, profiles)
            yield _result(cell, predicted, measure(cell, model_folders, Path(folder)))


def _result(cell: str, predicted: MemoryEstimate, ranks: list[dict[str, Any]]) -> Result:
    return Result(
        cell=cell,
        predicted_bytes=predicted.peak_allocated_bytes + _host_bytes(predicted),
        phase=max(predicted.phases, key=lambda phase: phase.bytes).name,
        measured_bytes=_measured(ranks, "first ", "early ", "steady "),
        predicted_after_step_bytes=(predicted.after_step_allocated_bytes or 0) + _host_bytes(predicted),
        measured_after_step_bytes=max(rank["after_step_bytes"] for rank in ranks),
        figures=dict(_figures(predicted, ranks)),
    )


def _host_bytes(predicted: MemoryEstimate) -> int:
    return predicted.host_bytes or 0


def _measured(ranks: list[dict[str, Any]], *starts: str) -> int:
    """Return the highest peak of all ranks in the phases whose names begin so; 0 where none was entered."""
    return max(
        (peak for rank in ranks for name, peak in rank["peaks"].items() if name.startswith(starts)),
        default=0,
    )


def _figures(predicted: MemoryEstimate, ranks: list[dict[str, Any]]) -> Iterator[tuple[str, Figure]]:
    for name, held in PHASES.items():
        highest = max(phase.bytes for phase in predicted.phases if phase.name in held) + _host_bytes(predicted)
        yield name, Figure(predicted_bytes=highest, measured_bytes=_measured(ranks, f"steady {name}"))
    for name, start in STAGES.items():
        stage = getattr(predicted.stages, name)
        if stage is not None and (measured := _measured(ranks, start)):
            yield name, Figure(predicted_bytes=stage.device_bytes, measured_bytes=measured)


def predict(cell: str, profiles: dict[Any, Any]) -> MemoryEstimate:
    """Estimate one rank of a cell, tracing its code path unless that was done."""
    from autofit.profile.trace import trace

    configuration, tokens = parse_cell(cell)
    device = Device(name="CPU-8G", kind="cpu", memory_bytes=8 * GIB)
    regime = replace(regime_of(configuration, device), keeps_outputs=cell.endswith("-accelerate"))
    if regime not in profiles:
        profiles[regime] = trace("a small Llama", MODEL, regime)
    # A rank is a node of its own, so that the host's bytes are those of one rank.
    cluster = Cluster(device=device, num_devices_per_node=1, num_nodes=configuration.num_processes)
    model = MemoryModel(profiles[regime], tokens, (configuration.per_device_train_batch_size,))
    return model.estimate(configuration, cluster, replays=True)


def save_model(folder: Path, dtype: str) -> Path:
    """Save a small Llama with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in MODEL.items() if key != "model_type"}
    config = AutoConfig.for_model(MODEL["model_type"], **values)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder / dtype)
    return folder / dtype


def measure(cell: str, model_folders: dict[str, Path], folder: Path) -> list[dict[str, Any]]:
    """Train a cell in processes of its own, from weights stored as they are loaded; return what each rank measured.

    Raises:
        RuntimeError: the training failed.
    """
    configuration, tokens = parse_cell(cell)
    run_folder = Path(tempfile.mkdtemp(dir=folder))
    request = {
        "configuration": msgspec.to_builtins(configuration),
        "tokens": tokens,
        "model": str(model_folders[configuration.weights_dtype]),
        "hidden_size": HIDDEN_SIZE,
        "vocab_size": VOCAB_SIZE,
        "loop": "accelerate" if cell.endswith("-accelerate") else "trainer",
    }
    (run_folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    distributed = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launcher = [sys.executable, *(distributed if configuration.num_processes > 1 else [])]
    child = subprocess.run(
        [*launcher, str(RANK_SCRIPT), str(run_folder)],
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


def _environment(configuration: Configuration) -> dict[str, str]:
    """DDP on a CPU needs accelerate to be told so; under DeepSpeed the same variable would switch DeepSpeed off.

    Weights are loaded by the main thread: the counter does not see what other threads make.
    """
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    return environment | ({"ACCELERATE_USE_CPU": "true"} if configuration.sharding == "ddp" else {})


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
    print(f"\n{len(done)} cells: {_summary({result.cell: result.error for result in done})}")


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
        errors = {result.cell: result.figures[name].error for result in done if name in result.figures}
        print(f"- {name}: {len(errors)} cells, {_summary(errors)}")


def _shown(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    return f"{figure.predicted_bytes / MIB:.2f} / {figure.measured_bytes / MIB:.2f} {figure.error:+.2%}"


def _summary(errors: dict[str, float]) -> str:
    worst = max(errors, key=lambda cell: abs(errors[cell]))
    return f"median {statistics.median(map(abs, errors.values())):.2%}, worst {errors[worst]:+.2%} ({worst})"


if __name__ == "__main__":
    sys.exit(main())
