"""Trains on this machine's CPU with the real Trainer, peft, bitsandbytes and DeepSpeed, and compares the peaks.

    python benchmarks/real_stack.py [--cells CELL,CELL | --all] [--json]

A cell is `METHOD-SHARDING-PRECISION-OPTIM-bB-sS-gaN[-ckpt]`: `lora-zero2-bf16-adamw_torch_fused-b2-s256-ga1-ckpt`.
Sharded cells run on two gloo ranks. Measured is the most bytes that tensor storages held at one time from the first
step to the last, on the rank that held most.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from autofit.spec.configuration import Configuration, Lora, Quantization
from autofit.spec.deepspeed import bucket_settings
from autofit.spec.estimate import MemoryEstimate
from autofit.spec.hardware import Cluster, Device
from autofit.spec.job import Workload
from autofit.spec.regimes import regime_of
from autofit.units import GIB, MIB
from autofit.writers.training_arguments import decided_arguments

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
NUM_STEPS = 3
"""The first makes the optimizer's state; later ones are alike."""
MOST_SECONDS = 300
METHODS = ("full", "lora", "qlora")
SHARDINGS = ("none", "ddp", "zero1", "zero2", "zero3")
OPTIMS = ("adamw_torch_fused", "adamw_torch", "adamw_8bit")
DEFAULT_CELLS = (
    # Activations dominate.
    "full-none-fp32-adamw_torch_fused-b2-s256-ga1",
    "full-ddp-fp32-adamw_torch_fused-b2-s256-ga1",
    "full-ddp-fp32-adamw_torch_fused-b2-s256-ga2-ckpt",
    "full-ddp-bf16-adamw_torch_fused-b2-s256-ga1",
    "full-zero1-bf16-adamw_torch_fused-b2-s256-ga2-ckpt",
    "full-zero2-bf16-adamw_torch_fused-b2-s256-ga1",
    "full-zero2-bf16-adamw_torch_fused-b2-s256-ga2-ckpt",
    "full-zero3-bf16-adamw_torch_fused-b2-s256-ga1",
    "full-zero3-bf16-adamw_torch_fused-b2-s256-ga2-ckpt",
    "lora-ddp-fp32-adamw_torch_fused-b2-s256-ga1-ckpt",
    "lora-ddp-bf16-adamw_torch_fused-b2-s256-ga1",
    "lora-zero2-bf16-adamw_torch_fused-b2-s256-ga1-ckpt",
    "lora-zero3-bf16-adamw_torch_fused-b2-s256-ga1-ckpt",
    "qlora-ddp-bf16-adamw_torch_fused-b2-s256-ga1-ckpt",
    "qlora-zero2-bf16-adamw_torch_fused-b2-s256-ga1-ckpt",
    "qlora-zero3-bf16-adamw_torch_fused-b2-s256-ga1-ckpt",
    # Weights, gradients and the optimizer's step dominate.
    "full-none-fp32-adamw_8bit-b1-s32-ga1",
    "full-ddp-fp32-adamw_torch-b1-s32-ga1",
    "full-zero1-bf16-adamw_torch-b1-s32-ga1",
    "full-zero2-bf16-adamw_torch_fused-b1-s32-ga1",
    "full-zero2-fp32-adamw_torch_fused-b1-s32-ga1",
    "full-zero2-bf16-adamw_8bit-b1-s32-ga1",
    "full-zero3-bf16-adamw_torch_fused-b1-s32-ga1",
    "full-zero3-bf16-adamw_torch-b1-s32-ga1",
)


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

    @property
    def error(self) -> float:
        """Relative error of the peak."""
        return self.predicted_bytes / self.measured_bytes - 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells and print a table; or, in a child, train one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", help="separated by commas")
    parser.add_argument("--all", action="store_true", help="every combination at b=2, s=256 (hours)")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.train:
        train(options.train)
        return 0
    cells = options.cells.split(",") if options.cells else list(every_cell()) if options.all else DEFAULT_CELLS
    if options.json:
        print(json.dumps([asdict(result) | {"error": result.error} for result in run(cells)], indent=1))
    else:
        print_table(run(cells))
    return 0


def every_cell() -> Iterator[str]:
    """Name the whole matrix."""
    knobs = itertools.product(METHODS, SHARDINGS, ("fp32", "bf16"), OPTIMS, (1, 2), ("", "-ckpt"))
    for method, sharding, precision, optim, accumulation, checkpointing in knobs:
        yield f"{method}-{sharding}-{precision}-{optim}-b2-s256-ga{accumulation}{checkpointing}"


def parse_cell(cell: str) -> tuple[Configuration, int]:
    """Read a cell's name as a configuration and a sequence length."""
    method, sharding, precision, optim, batch, tokens, accumulation, *rest = cell.split("-")
    loads_fp32 = precision == "fp32" or (method == "full" and not sharding.startswith("zero"))
    dtype = "float32" if loads_fp32 else "bfloat16"
    content = {
        "method": method,
        "quantization": Quantization(compute_dtype=dtype) if method == "qlora" else None,
        "lora": None if method == "full" else Lora(),
        "optim": optim,
        "per_device_train_batch_size": int(batch.removeprefix("b")),
        "gradient_accumulation_steps": int(accumulation.removeprefix("ga")),
        "num_processes": 1 if sharding == "none" else 2,
        "gradient_checkpointing": rest == ["ckpt"],
        "sharding": sharding,
        "weights_dtype": dtype,
        "mixed_precision": "no" if precision == "fp32" else "bf16",
        "attention": "sdpa",
    }
    return msgspec.convert(msgspec.to_builtins(content), Configuration), int(tokens.removeprefix("s"))


def run(cells: Sequence[str]) -> Iterator[Result]:
    """Predict and measure each cell."""
    profiles: dict[Any, Any] = {}
    with tempfile.TemporaryDirectory(prefix="autofit-real-stack-") as folder:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints while it is imported
            model_folder = save_model(Path(folder))
        for cell in cells:
            print(f"{cell} ...", file=sys.stderr, flush=True)
            with contextlib.redirect_stdout(sys.stderr):
                predicted = predict(cell, profiles)
            yield _result(cell, predicted, measure(cell, model_folder, Path(folder)))


def _result(cell: str, predicted: MemoryEstimate, ranks: list[dict[str, int]]) -> Result:
    return Result(
        cell=cell,
        predicted_bytes=predicted.peak_allocated_bytes,
        phase=max(predicted.phases, key=lambda phase: phase.bytes).name,
        measured_bytes=max(rank["peak_bytes"] for rank in ranks),
        predicted_after_step_bytes=predicted.after_step_allocated_bytes or 0,
        measured_after_step_bytes=max(rank["after_step_bytes"] for rank in ranks),
    )


def predict(cell: str, profiles: dict[Any, Any]) -> MemoryEstimate:
    """Estimate a cell, tracing its code path unless that was done."""
    from autofit.memory.assemble import estimate_memory
    from autofit.profile.trace import trace

    configuration, tokens = parse_cell(cell)
    device = Device(name="CPU-8G", kind="cpu", memory_bytes=8 * GIB)
    regime = regime_of(configuration, device)
    if regime not in profiles:
        profiles[regime] = trace("a small Llama", MODEL, regime)
    cluster = Cluster(device=device, num_devices_per_node=configuration.num_processes)
    workload = Workload(sequence_tokens=tokens, global_batch_sequences=configuration.global_batch_sequences)
    return estimate_memory(profiles[regime], configuration, cluster, workload)


def save_model(folder: Path) -> Path:
    """Save a small Llama with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in MODEL.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(MODEL["model_type"], **values))
    model.save_pretrained(folder / "model")
    return folder / "model"


def measure(cell: str, model_folder: Path, folder: Path) -> list[dict[str, int]]:
    """Train a cell in processes of its own; return what each rank measured.

    Raises:
        RuntimeError: the training failed.
    """
    configuration, tokens = parse_cell(cell)
    run_folder = Path(tempfile.mkdtemp(dir=folder))
    request = {"configuration": msgspec.to_builtins(configuration), "tokens": tokens, "model": str(model_folder)}
    (run_folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    distributed = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launcher = [sys.executable, *(distributed if configuration.num_processes > 1 else [])]
    child = subprocess.run(
        [*launcher, str(Path(__file__).resolve()), "--train", str(run_folder)],
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
    """DDP on a CPU needs accelerate to be told so; under DeepSpeed the same variable would switch DeepSpeed off."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return environment | ({"ACCELERATE_USE_CPU": "true"} if configuration.sharding == "ddp" else {})


def train(run_folder: Path) -> None:
    """Train the requested cell with the real Trainer, count live tensor bytes, and write them down."""
    from transformers import Trainer, TrainingArguments

    from autofit.runtime.live_bytes import LiveBytes
    from autofit.runtime.run import leave_process_group

    request = json.loads((run_folder / "request.json").read_text(encoding="utf-8"))
    configuration = msgspec.convert(request["configuration"], Configuration)
    with LiveBytes() as live:
        # Made before the model: under ZeRO-3 transformers then loads the weights partitioned.
        arguments = TrainingArguments(
            output_dir=str(run_folder / "out"),
            max_steps=NUM_STEPS,
            deepspeed=_deepspeed(configuration),
            report_to=[],
            save_strategy="no",
            **decided_arguments(configuration, on_cpu=True, checkpointing_name="gradient_checkpointing"),
        )
        trainer = Trainer(
            model=_model(request["model"], configuration),
            args=arguments,
            train_dataset=_dataset(request["tokens"]),
            callbacks=[_watcher(live)],
        )
        trainer.train()
        figures = {"peak_bytes": live.peak_bytes, "after_step_bytes": live.now_bytes}
    (run_folder / f"rank{arguments.process_index}.json").write_text(json.dumps(figures), encoding="utf-8")
    leave_process_group()


def _watcher(live: Any) -> Any:
    """Begin the peak anew at the first step: making the engine is not the step that is predicted."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step == 0:
                live.count_existing()
                live.reset_peak()

    return Watcher()


def _model(folder: str, configuration: Configuration) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, configuration.weights_dtype)
    quantization = {}
    if configuration.quantization is not None:
        quantization["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **quantization)
    if configuration.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    lora = configuration.lora
    return get_peft_model(model, LoraConfig(r=lora.r, target_modules="all-linear", task_type="CAUSAL_LM"))


def _dataset(tokens: int) -> list[dict[str, list[int]]]:
    ids = [(17 * n) % VOCAB_SIZE for n in range(tokens)]
    return [{"input_ids": ids, "labels": ids}] * 64


def _deepspeed(configuration: Configuration) -> dict[str, Any] | None:
    """Configure DeepSpeed with the buckets that autofit writes."""
    if not configuration.uses_deepspeed:
        return None
    settings = asdict(bucket_settings(configuration, HIDDEN_SIZE))
    if configuration.zero_stage < 3:
        settings = {name: value for name, value in settings.items() if not name.startswith("stage3_")}
    return {
        "train_micro_batch_size_per_gpu": configuration.per_device_train_batch_size,
        "gradient_accumulation_steps": configuration.gradient_accumulation_steps,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": configuration.mixed_precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": settings,
    }


def print_table(results: Iterator[Result]) -> None:
    """Print each cell when it is done, then the summary."""
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
    sizes = [abs(result.error) for result in done]
    worst = max(done, key=lambda result: abs(result.error))
    print(f"\n{len(done)} cells: median {statistics.median(sizes):.2%}, worst {worst.error:+.2%} ({worst.cell})")


if __name__ == "__main__":
    sys.exit(main())
