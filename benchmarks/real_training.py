"""One rank of a real training run, with every live tensor storage counted; `real_stack.py` starts it.

    python benchmarks/real_training.py RUN_FOLDER      (or under torch.distributed.run)

Reads RUN_FOLDER/request.json, writes RUN_FOLDER/rankN.json: the peak of each phase, in bytes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from host_memory import HostMemory, prepare_as_beside_a_gpu
from real_stack import down_projections_in_fp32

from autofit.runtime.live_bytes import LiveBytes
from autofit.runtime.run import leave_process_group
from autofit.spec.configuration import Configuration
from autofit.spec.hardware import DeviceKind
from autofit.writers.deepspeed_config import zero_block
from autofit.writers.training_arguments import decided_arguments

NUM_STEPS = 4
"""The first makes the optimizer's state, the second lets DeepSpeed record its order of layers; later ones are alike."""
NUM_UNLIKE_STEPS = 2
NUM_SEQUENCES = 64
SETTLING_SECONDS = 0.1
DROPPING_SECONDS = 0.002


class PhasePeaks:
    """The most bytes alive in each phase, in the order in which phases are entered.

    Args:
        live: the counter.
        host: what the host of a GPU would keep, where that is told apart, and its counter.
    """

    def __init__(self, live: LiveBytes, host: tuple[HostMemory, LiveBytes] | None = None) -> None:
        self.peaks: dict[str, int] = {}
        self.host_peaks: dict[str, int] = {}
        self.host, host_live = host or (None, None)
        self._counters = [(self.peaks, live)] + ([(self.host_peaks, host_live)] if host_live else [])
        self._name = ""

    def enter(self, name: str) -> None:
        """End the phase before and begin this one; a phase that is entered again keeps its highest peak."""
        self.leave()
        self._name = name

    def leave(self) -> None:
        """End the phase, and wait until gloo's threads have let go of what they sent: the next one has none of it."""
        for peaks, live in self._counters if self._name else []:
            peaks[self._name] = max(peaks.get(self._name, 0), live.peak_bytes)
        self._name = ""
        if torch.distributed.is_initialized():
            time.sleep(SETTLING_SECONDS)
        for _, live in self._counters:
            live.reset_peak()


class StepPhases:
    """Names the phases of training steps: the first by itself, then those that are not alike, then the steady ones."""

    def __init__(self, peaks: PhasePeaks) -> None:
        self.num_done = 0
        self._peaks = peaks

    def enter(self, phase: str) -> None:
        """Enter a phase of the step that is under way."""
        self._peaks.enter(f"{self._kind()} {phase}")

    def _kind(self) -> str:
        if self.num_done == 0:
            return "first"
        return "early" if self.num_done < NUM_UNLIKE_STEPS else "steady"

    def watch(self, optimizer: Any) -> None:
        """Enter the optimizer's step whenever it begins."""
        original: Callable[..., Any] = optimizer.step

        def step(*arguments: Any, **keywords: Any) -> Any:
            self.enter("optimizer_step")
            return original(*arguments, **keywords)

        optimizer.step = step


def let_go_after_waiting() -> None:
    """Let gloo's threads drop the tensors of a collective before `wait` returns, as they would soon after.

    A thread holds what it sent until it has the queue's lock again (torch 2.13 ProcessGroupGloo.cpp, `runLoop`), which
    on a busy machine is now and then later than the next allocation. NCCL's work has no such thread.
    """
    work = torch.distributed.Work
    wait = work.wait

    def wait_and_settle(self: Any, *arguments: Any, **keywords: Any) -> Any:
        done = wait(self, *arguments, **keywords)
        time.sleep(DROPPING_SECONDS)
        return done

    work.wait = wait_and_settle
    wait_tensor = torch.distributed._functional_collectives.wait_tensor  # noqa: SLF001 - what a DTensor waits with

    def wait_for_tensor_and_settle(tensor: torch.Tensor) -> torch.Tensor:
        done = wait_tensor(tensor)
        time.sleep(DROPPING_SECONDS)
        return done

    torch.distributed._functional_collectives.wait_tensor = wait_for_tensor_and_settle  # noqa: SLF001
    send = torch.distributed._broadcast_coalesced  # noqa: SLF001 - with which DDP sends parameters

    def send_and_settle(*arguments: Any) -> None:
        send(*arguments)
        time.sleep(DROPPING_SECONDS)

    torch.distributed._broadcast_coalesced = send_and_settle  # noqa: SLF001


def train(run_folder: Path) -> None:
    """Train what is requested and write down what was counted."""
    from transformers import TrainingArguments

    request = json.loads((run_folder / "request.json").read_text(encoding="utf-8"))
    configuration = msgspec.convert(request["configuration"], Configuration)
    let_go_after_waiting()
    with contextlib.ExitStack() as stack:
        host = HostMemory(offloads=configuration.offload != "none") if configuration.uses_fsdp else None
        if host is not None:
            prepare_as_beside_a_gpu(configuration.num_processes // configuration.num_replicas)
        live = stack.enter_context(LiveBytes(counts=host and host.is_elsewhere))
        peaks = PhasePeaks(live, host and (host, stack.enter_context(LiveBytes(counts=host.keeps))))
        # Made before the model: under ZeRO-3 transformers then loads the weights partitioned.
        arguments = TrainingArguments(
            output_dir=str(run_folder / "out"),
            max_steps=NUM_STEPS,
            deepspeed=deepspeed_config(configuration, request["hidden_size"]),
            report_to=[],
            save_strategy="no",
            optim_args=optimizer_options(configuration),
            parallelism_config=parallelism(configuration),
            train_sampling_strategy="sequential" if configuration.batching == "padded" else "random",
            **decided_arguments(configuration, on_cpu=True, checkpointing_name="gradient_checkpointing"),
        )
        if configuration.sequence_parallel_size > 1:
            import deepspeed

            deepspeed.init_distributed("gloo")  # as accelerate does beside a GPU
        peaks.enter("loading")
        on_host = host is not None and configuration.quantization is None
        with host.placing() if on_host and host else contextlib.nullcontext():
            keeps = request["keeps_fp32_modules"]
            with down_projections_in_fp32() if keeps else contextlib.nullcontext():
                model = load_model(request["model"], configuration)
        live.count_existing()
        dataset = make_dataset(request["tokens"], request["vocab_size"], configuration)
        loop = train_in_a_loop if configuration.keeps_outputs else train_with_trainer
        after_step = loop(model, arguments, dataset, configuration, live, peaks)
        peaks.leave()
        figures = {"peaks": peaks.peaks, "host_peaks": peaks.host_peaks, "after_step_bytes": after_step}
    (run_folder / f"rank{arguments.process_index}.json").write_text(json.dumps(figures), encoding="utf-8")
    leave_process_group()


def parallelism(configuration: Configuration) -> Any:
    """Let the ranks share sequences."""
    from accelerate.parallelism_config import DeepSpeedSequenceParallelConfig, ParallelismConfig

    if configuration.sequence_parallel_size == 1:
        return None
    return ParallelismConfig(
        sp_size=configuration.sequence_parallel_size,
        sp_backend="deepspeed",
        sp_handler=DeepSpeedSequenceParallelConfig(
            sp_seq_length_is_variable=True, sp_attn_implementation=configuration.attention
        ),
    )


def optimizer_options(configuration: Configuration) -> str | None:
    """Let low-rank optimizers project anew in every step, as they do in the first: by default in every 200th."""
    return "update_proj_gap=1" if configuration.optim.startswith(("apollo", "galore")) else None


def train_with_trainer(
    model: Any, arguments: Any, dataset: list[Any], configuration: Configuration, live: LiveBytes, peaks: PhasePeaks
) -> int:
    """Train, evaluate and save with transformers' Trainer; return the bytes between two steps."""
    from transformers import Trainer, TrainerCallback

    steps = StepPhases(peaks)

    class Watched(Trainer):
        def compute_loss(self, model: Any, *rest: Any, **keywords: Any) -> Any:
            if not model.training:
                return super().compute_loss(model, *rest, **keywords)
            steps.enter("forward")
            loss = super().compute_loss(model, *rest, **keywords)
            steps.enter("backward")
            return loss

    class Watcher(TrainerCallback):
        def on_step_begin(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step == 0:
                live.count_existing()
                optimizer = getattr(trainer.model_wrapped, "optimizer", None) or trainer.optimizer
                if peaks.host is not None and configuration.offload != "none":
                    optimizer.step = peaks.host.runs(optimizer.step)
                    trainer.accelerator.clip_grad_norm_ = peaks.host.runs(trainer.accelerator.clip_grad_norm_)
                steps.watch(optimizer)

        def on_step_end(self, _arguments: Any, state: Any, _control: Any, **_: Any) -> None:
            steps.num_done = state.global_step

    peaks.enter("preparing")
    trainer = Watched(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=dataset[: configuration.evaluation.num_sequences],
        compute_metrics=(lambda _predictions: {}) if configuration.evaluation.keeps_predictions else None,
        callbacks=[Watcher()],
        data_collator=padded_together if configuration.batching == "padded" else None,
    )
    trainer.train()
    peaks.leave()
    after_step = live.now_bytes
    # bitsandbytes evaluates and saves packed weights otherwise on a CPU.
    if configuration.quantization is None:
        evaluate_and_save(trainer, configuration, peaks)
    return after_step


def evaluate_and_save(trainer: Any, configuration: Configuration, peaks: PhasePeaks) -> None:
    """Evaluate and save; under stage 3 once more, before Python has looked for circles: else that is chance."""
    gc.disable()
    for again in ("", " again") if configuration.zero_stage == 3 else ("",):
        peaks.enter(f"evaluation{again}")
        trainer.evaluate()
        if can_be_saved(configuration):
            peaks.enter(f"saving{again}")
            trainer._save_checkpoint(trainer.model, None)  # noqa: SLF001 (what `save_strategy` calls)
    gc.enable()


def can_be_saved(configuration: Configuration) -> bool:
    """FSDP1 cannot gather an 8-bit optimizer's state: the search's rule `fsdp1-cannot-save-8bit-state`."""
    return configuration.sharding != "fsdp1" or "8bit" not in configuration.optim


def train_in_a_loop(
    model: Any, arguments: Any, dataset: list[Any], configuration: Configuration, live: LiveBytes, peaks: PhasePeaks
) -> int:
    """Train in a loop of one's own, as accelerate's examples do; return the bytes between two steps."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from torch.utils.data import DataLoader
    from transformers import Trainer, default_data_collator

    peaks.enter("preparing")
    accelerator = Accelerator(
        cpu=not configuration.uses_deepspeed,
        mixed_precision=configuration.mixed_precision,
        gradient_accumulation_steps=configuration.gradient_accumulation_steps,
        deepspeed_plugin=arguments.deepspeed_plugin,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
        if configuration.gradient_as_bucket_view
        else None,
    )
    if configuration.gradient_checkpointing:
        kwargs = {"use_reentrant": configuration.use_reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        if configuration.lora is not None:
            model.enable_input_require_grads()
    make, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = make([p for p in model.parameters() if p.requires_grad], **keywords)
    loader = DataLoader(dataset, batch_size=configuration.per_device_train_batch_size, collate_fn=default_data_collator)
    model.config.use_cache = False  # as the Trainer does; otherwise the kept output holds all keys and values too
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    live.count_existing()
    steps = StepPhases(peaks)
    steps.watch(model.optimizer if configuration.uses_deepspeed else optimizer)
    for batch in _some(loader, NUM_STEPS * configuration.gradient_accumulation_steps):
        with accelerator.accumulate(model):
            steps.enter("forward")
            outputs = model(**batch)
            steps.enter("backward")
            accelerator.backward(outputs.loss)
            optimizer.step()
            optimizer.zero_grad()
        steps.num_done += bool(accelerator.sync_gradients)
    peaks.leave()
    del outputs, batch
    return live.now_bytes


def _some(loader: Any, num_batches: int) -> Iterator[Any]:
    """Yield so many batches; a `zip` would keep the last one alive."""
    for number, batch in enumerate(loader):
        if number == num_batches:
            return
        yield batch


def load_model(folder: str, configuration: Configuration) -> Any:
    """Load the model as a training script does, quantised and with what trains."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, configuration.weights_dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **_quantization(configuration, dtype))
    if configuration.freeze is not None:
        model.requires_grad_(requires_grad=False)
        for layer in model.model.layers[-configuration.freeze.freeze_trainable_layers :]:
            layer.requires_grad_(requires_grad=True)
    if configuration.lora is None:
        return model
    from peft import LoraConfig, get_peft_model

    lora = configuration.lora
    return get_peft_model(model, LoraConfig(r=lora.r, target_modules="all-linear", task_type="CAUSAL_LM"))


def _quantization(configuration: Configuration, dtype: torch.dtype) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    if configuration.quantization is None:
        return {}
    if configuration.quantization.bits == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=getattr(torch, configuration.quantization.storage_dtype),
        )
    }


def make_dataset(tokens: int, vocab_size: int, configuration: Configuration) -> list[dict[str, list[int]]]:
    """Make sequences of one length; with positions, which most scripts leave to the model, where ranks share them.

    Where they are padded, every second is the longest, so that it comes in every phase, and the others are of all
    lengths from an eighth of it on.
    """
    ids = [(17 * n) % vocab_size for n in range(tokens)]
    row = {"input_ids": ids, "labels": ids}
    if configuration.sequence_parallel_size > 1:
        row["position_ids"] = list(range(tokens))
    if configuration.batching == "padded":
        shorter = [tokens * (n % 7 + 1) // 8 for n in range(NUM_SEQUENCES // 2)]
        cut = [{name: values[:length] for name, values in row.items()} for length in shorter]
        return [each for short in cut for each in (short, row)]
    return [row] * NUM_SEQUENCES


def padded_together(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad sequences to the longest of them, as transformers' collators do."""
    pad, ignored = 0, -100
    longest = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad, "labels": ignored, "attention_mask": 0}
    masked = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in masked])
        for name, value in fill.items()
    }


def deepspeed_config(configuration: Configuration, hidden_size: int) -> dict[str, Any] | None:
    """Configure DeepSpeed with the block that autofit writes."""
    if not configuration.uses_deepspeed:
        return None
    kind: DeviceKind = "cpu"
    return {
        "train_micro_batch_size_per_gpu": configuration.per_device_train_batch_size,
        "gradient_accumulation_steps": configuration.gradient_accumulation_steps,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": configuration.mixed_precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero_block(configuration, hidden_size, kind),
    }


if __name__ == "__main__":
    train(Path(sys.argv[1]))
