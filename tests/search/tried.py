"""Runs combinations for real on gloo ranks, each with the Trainer for two steps, and says what became of it.

    torchrun --nproc_per_node 2 tests/search/tried.py fsdp|deepspeed MODEL_FOLDER RESULTS

Started by test_rules_hold.py, once for all combinations of an engine. RESULTS becomes a JSON file: for each case the
error that ended it, or what was found when it had trained.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autofit.runtime.run import leave_process_group

os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}

Case = Callable[[], Any]
ROWS, TOKENS = 8, 16
FSDP_ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_SYNC_MODULE_STATES": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_BACKWARD_PREFETCH": "BACKWARD_PRE",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
ZERO = {
    "reduce_bucket_size": 10_000,
    "allgather_bucket_size": 10_000,
    "stage3_prefetch_bucket_size": 1_000,
    "stage3_param_persistence_threshold": 10,
}


def load(folder: str, *, bits: int | None = None, storage: str = "bfloat16", dtype: str = "bfloat16") -> Any:
    """Load the tiny model, quantised or not."""
    import torch
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if bits == 4:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=getattr(torch, storage),
        )
    if bits == 8:
        settings["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    return LlamaForCausalLM.from_pretrained(folder, **settings)


def load_with_fp32_modules(folder: str) -> Any:
    """Load the tiny gpt-oss in fp16: its norms stay in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(Path(folder) / "gpt-oss", dtype="float16", attn_implementation="eager")


def load_of_two_stacks(folder: str) -> Any:
    """Load the tiny BART: its encoder and decoder read one table."""
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM.from_pretrained(Path(folder) / "bart", dtype="bfloat16")


def adapted(model: Any, **lora: Any) -> Any:
    """Put an adapter on a model."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **lora))


def train(model: Any, *, first_token: int = 0, **arguments: Any) -> Any:
    """Train two steps and return the trainer."""
    import torch
    from transformers import Trainer, TrainingArguments

    ids = torch.arange(first_token, first_token + TOKENS)
    rows = [{"input_ids": ids, "labels": ids}] * ROWS
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    chosen = {"max_steps": 2, "per_device_train_batch_size": 2, "optim_target_modules": "all-linear"}
    given = TrainingArguments(output_dir="unused", ddp_backend="gloo", **quiet, **chosen | arguments)
    trainer = Trainer(model=model, args=given, train_dataset=rows)
    trainer.train()
    return trainer


def fsdp(
    folder: str, version: int, *, adapter: Any = None, checkpoints: bool = False, mixed: str = "bf16", **rest: Any
) -> Any:
    """Train under FSDP, set up as `accelerate launch` does."""
    from accelerate.state import AcceleratorState, GradientState

    os.environ |= FSDP_ENVIRONMENT | {
        "FSDP_VERSION": str(version),
        "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD" if version == 1 else "true",
        "FSDP_ACTIVATION_CHECKPOINTING": str(checkpoints).lower(),
        "ACCELERATE_MIXED_PRECISION": mixed,
    }
    AcceleratorState._reset_state()
    GradientState._reset_state()
    if rest.pop("fp32_modules", False):
        model = load_with_fp32_modules(folder)
    elif rest.pop("of_two_stacks", False):
        model = load_of_two_stacks(folder)
    else:
        model = load(folder, **{name: rest.pop(name) for name in ("bits", "storage", "dtype") if name in rest})
    return train(model if adapter is None else adapted(model, **adapter), **rest)


def fsdp_cases(folder: str) -> dict[str, Case]:
    """Return what is tried under FSDP."""
    return {
        "replicas-share-the-processes": _three_replicas_of_two_processes,
        "fsdp2-steps-with-dtensors": lambda: fsdp(folder, 2, optim="adamw_8bit"),
        "fsdp2-has-no-adafactor": lambda: fsdp(folder, 2, optim="adafactor"),
        "fsdp-has-no-apollo": lambda: fsdp(folder, 2, optim="apollo_adamw"),
        "fsdp1-has-no-galore": lambda: fsdp(folder, 1, optim="galore_adamw"),
        "fsdp-cannot-shard-int8": lambda: fsdp(folder, 1, bits=8, adapter={}),
        "fsdp1-flattens-one-floating-dtype": lambda: fsdp(folder, 1, bits=4, storage="float32", adapter={}),
        "fsdp1-flattens-no-fp32-modules": lambda: fsdp(folder, 1, fp32_modules=True),
        "fsdp2-trains-no-fp32-modules": lambda: fsdp(folder, 2, fp32_modules=True, mixed="no"),
        "fsdp2-puts-a-table-in-one-group": lambda: fsdp(folder, 2, of_two_stacks=True),
        "fsdp-would-cast-packed-weights": lambda: fsdp(folder, 2, bits=4, storage="float32", adapter={}),
        "fsdp1-has-no-dora": lambda: fsdp(folder, 1, adapter={"use_dora": True}),
        "fsdp1-adapter-needs-no-checkpoint": lambda: fsdp(folder, 1, adapter={}, checkpoints=True),
        "fsdp2-shards-no-uint8": lambda: _num_sharded(fsdp(folder, 2, bits=4, storage="uint8", adapter={})),
        "fsdp2-sharded-one-dtype": lambda: _checkpointed(fsdp(folder, 2, adapter={}, checkpoints=True)),
        "fsdp1-cannot-save-8bit-state": lambda: _gathered_state(fsdp(folder, 1, optim="adamw_8bit")),
    }


def _three_replicas_of_two_processes() -> None:
    from accelerate import Accelerator, ParallelismConfig
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    Accelerator(parallelism_config=ParallelismConfig(dp_replicate_size=3, dp_shard_size=2))


def _num_sharded(trainer: Any) -> int:
    """Count the packed weights that are shards."""
    from torch.distributed.tensor import DTensor

    packed = [p for name, p in trainer.model.named_parameters() if "base_layer" in name]
    return sum(isinstance(parameter, DTensor) for parameter in packed)


def _checkpointed(trainer: Any) -> list[str]:
    """Name what was checkpointed and how."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

    wrapped = [module for module in trainer.model.modules() if isinstance(module, CheckpointWrapper)]
    return [f"{type(each._checkpoint_wrapped_module).__name__} {each.checkpoint_impl.name}" for each in wrapped]


def _gathered_state(trainer: Any) -> int:
    from torch.distributed.fsdp import FullyShardedDataParallel

    state = FullyShardedDataParallel.optim_state_dict(trainer.model_wrapped, trainer.optimizer.optimizer)
    return len(state["state"])


def zero(folder: str, stage: int, *, adapter: Any = None, bf16: bool = True, **rest: Any) -> Any:
    """Train under DeepSpeed."""
    from transformers import TrainingArguments
    from transformers.integrations import deepspeed as integration

    integration.unset_hf_deepspeed_config()
    engine = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **ZERO, **rest.pop("zero", {})},
    }
    arguments = {"use_cpu": True, "bf16": bf16, "deepspeed": engine}
    announced = TrainingArguments(output_dir="unused", ddp_backend="gloo", **arguments)
    model = load(folder, **{name: rest.pop(name) for name in ("bits", "storage", "dtype") if name in rest})
    del announced  # until here, or transformers forgets that stage 3 builds the model in shards
    return train(model if adapter is None else adapted(model, **adapter), **arguments, **rest)


def deepspeed_cases(folder: str) -> dict[str, Case]:
    """Return what is tried under DeepSpeed, or in several processes without any engine."""
    here = {"device": "cpu", "pin_memory": False}
    again = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return {
        "several-processes-share-gradients": lambda: type(train(load(folder), use_cpu=True).model_wrapped).__name__,
        "layerwise-optimizers-are-for-one-process": lambda: train(
            load(folder), use_cpu=True, optim="apollo_adamw_layerwise"
        ),
        "lomo-reduces-no-gradients": lambda: _num_different_models(folder),
        "pure-bf16-is-not-deepspeed": lambda: _master_dtype(zero(folder, 2, bf16=False)),
        "packed-weights-would-be-cast": lambda: zero(folder, 2, bits=4, storage="float32", adapter={}),
        "zero3-has-no-dora-of-packed-weights": lambda: zero(folder, 3, bits=4, adapter={"use_dora": True}),
        "zero3-trains-one-dtype": lambda: zero(folder, 3, adapter={"modules_to_save": ["lm_head"]}),
        "zero3-shards-no-int8": lambda: _int8_shapes(zero(folder, 3, bits=8, adapter={})),
        "zero3-gathers-floating-weights": lambda: _packed_shapes(zero(folder, 3, bits=4, storage="uint8", adapter={})),
        "peft-zero3-needs-reentrant": lambda: zero(folder, 3, adapter={}, **again).state.global_step,
        "adagrad-makes-its-state-at-once": lambda: zero(folder, 1, optim="adagrad"),
        "low-rank-optimizers-need-matrices": lambda: zero(folder, 1, optim="apollo_adamw"),
        "lomo-has-its-own-backward": lambda: zero(folder, 2, optim="lomo"),
        "offloaded-weights-need-zero3": lambda: _num_partitioned(zero(folder, 2, zero={"offload_param": here})),
    }


def _num_different_models(folder: str) -> int:
    """Train on other tokens in each rank and count the models that come out."""
    from torch import distributed

    trainer = train(load(folder, dtype="float32"), first_token=int(os.environ["RANK"]), use_cpu=True, optim="lomo")
    sums: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(sums, sum(p.double().sum().item() for p in trainer.model.parameters()))
    return len(set(sums))


def _master_dtype(trainer: Any) -> str:
    return str(trainer.model_wrapped.optimizer.single_partition_of_fp32_groups[0].dtype)


def _int8_shapes(trainer: Any) -> list[int]:
    """Elements of an int8 weight: whole, of this rank's shard, and of the copy that products read."""
    layer = next(module for module in trainer.model.modules() if hasattr(getattr(module, "state", None), "CB"))
    return [layer.weight.ds_numel, layer.weight.ds_tensor.numel(), layer.state.CB.numel()]


def _packed_shapes(trainer: Any) -> list[int]:
    """Elements of a packed weight: whole, and of this rank's shard."""
    weight = next(p for p in trainer.model.parameters() if type(p).__name__ == "Params4bit")
    return [weight.ds_numel, weight.ds_tensor.numel()]


def _num_partitioned(trainer: Any) -> int:
    return sum(hasattr(parameter, "ds_tensor") for parameter in trainer.model.parameters())


def outcome(case: Case) -> Any:
    """Return what a case found, or the error that ended it."""
    try:
        found = case()
        return found if isinstance(found, (int, str, list)) else "trained"
    except Exception as error:  # noqa: BLE001 - the error is the result
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"


def main(engine: str, folder: str, results: str) -> None:
    """Try every case of an engine; the first rank writes what it found."""
    warnings.filterwarnings("ignore")
    if engine == "deepspeed":
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    cases = fsdp_cases(folder) if engine == "fsdp" else deepspeed_cases(folder)
    found = {name: outcome(case) for name, case in cases.items()}
    if os.environ["RANK"] == "0":
        Path(results).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave_process_group()
