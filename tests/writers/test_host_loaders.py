"""What is written loads in the loader of the tool that will read it, for every combination the planner can choose."""

from __future__ import annotations

import functools
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from autofit.plan import Plan
from autofit.spec.configuration import Quantization
from autofit.writers import render_files, write_files
from autofit.writers.scripts import launch_options
from tests.plans import A100, CPU_RANK, a_configuration, a_plan

METHODS = ("full", "lora", "qlora")
SHARDINGS = ("none", "ddp", "zero1", "zero2", "zero3")
PRECISIONS = ("no", "bf16", "fp16")
OPTIMS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
OFFLOADS = ("none", "optimizer", "optimizer_and_parameters")


def every_plan() -> list[Plan]:
    """Return every combination that the writers distinguish, on a GPU and on CPU ranks."""
    plans = []
    choices = itertools.product(METHODS, SHARDINGS, PRECISIONS, OPTIMS, (False, True), (CPU_RANK, A100))
    for method, sharding, precision, optim, checkpoints, device in choices:
        configuration = a_configuration(
            method=method,
            sharding=sharding,
            mixed_precision=precision,
            optim=optim,
            gradient_checkpointing=checkpoints,
            use_reentrant=checkpoints and sharding == "zero3",
            num_processes=1 if sharding == "none" else 2,
            quantization=Quantization(storage_dtype="bfloat16") if method == "qlora" else None,
        )
        plans.append(a_plan(configuration, device=device))
    return plans


def offloading_plans() -> list[Plan]:
    """Return the plans with state in host memory."""
    choices = itertools.product(("zero2", "zero3"), OFFLOADS, (CPU_RANK, A100))
    return [
        a_plan(a_configuration(sharding=sharding, offload=offload, optim="adamw_torch"), device=device)
        for sharding, offload, device in choices
        if sharding == "zero3" or offload != "optimizer_and_parameters"
    ]


@pytest.fixture(scope="module")
def all_plans() -> list[Plan]:
    """Return every plan that the tests below write."""
    fused = a_plan(a_configuration(sharding="ddp", loss="liger"), device=A100)
    return [*every_plan(), *offloading_plans(), fused]


def written(plan: Plan, folder: Path) -> Path:
    """Write a plan's files and return their folder."""
    write_files(render_files(plan, folder), folder)
    return folder


@functools.cache
def launch_parser() -> Any:
    """Return accelerate's parser, which takes long to build."""
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def launch_environment(plan: Plan, folder: Path) -> dict[str, str]:
    """Let accelerate turn a config file into the environment of its ranks, starting nothing."""
    from accelerate.commands.launch import _validate_launch_command
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    argv = ["--config_file", str(folder / "accelerate.yaml"), *launch_options(plan), "train.py"]
    arguments, _, precision_is_from_file = _validate_launch_command(launch_parser().parse_args(argv))
    if arguments.use_deepspeed:
        # What launch_command itself does before it calls the DeepSpeed launcher.
        arguments.deepspeed_fields_from_accelerate_config = "mixed_precision" if precision_is_from_file else ""
        return prepare_deepspeed_cmd_env(arguments)[1]
    if arguments.multi_gpu:
        return prepare_multi_gpu_env(arguments)
    return prepare_simple_launcher_cmd_env(arguments)[1]


def training_arguments(folder: Path) -> Any:
    """Load the written file as a script with HfArgumentParser would; no key may be unknown.

    On this machine a bf16 GPU plan only validates with `use_cpu`, which says nothing of the names and values.
    """
    from transformers import HfArgumentParser, TrainingArguments

    values = json.loads((folder / "training_arguments.json").read_text())
    values |= {"output_dir": str(folder / "out"), "use_cpu": True}
    values |= {"ddp_backend": None} if "ddp_backend" in values else {}  # there are no ranks to join here
    return HfArgumentParser(TrainingArguments).parse_dict(values, allow_extra_keys=False)[0]


def distinct(plans: list[Plan], file: str, *names: str) -> list[Plan]:
    """Keep one plan for each text of a file and each combination of the settings that the file must carry."""
    seen: dict[tuple[Any, ...], Plan] = {}
    for plan in plans:
        settings = tuple(getattr(plan.configuration, name) for name in names)
        seen.setdefault((settings, render_files(plan, Path("/run"))[file]), plan)
    return list(seen.values())


def test_accelerate_reads_every_config_as_planned(all_plans: list[Plan], tmp_path: Path) -> None:
    """accelerate's own preparation yields the planned number of processes, mode, precision and DeepSpeed file."""
    from accelerate.commands.config.config_args import load_config_from_file

    for plan in distinct(all_plans, "accelerate.yaml", "num_processes", "sharding", "mixed_precision"):
        folder = written(plan, tmp_path)
        loaded = load_config_from_file(str(folder / "accelerate.yaml"))
        environment = launch_environment(plan, folder)
        configuration = plan.configuration
        assert loaded.num_processes == configuration.num_processes
        assert loaded.use_cpu == (plan.inputs.cluster.device.kind == "cpu")
        assert environment["ACCELERATE_MIXED_PRECISION"] == configuration.mixed_precision
        assert ("ACCELERATE_USE_DEEPSPEED" in environment) == configuration.uses_deepspeed
        if configuration.uses_deepspeed:
            assert environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == str(folder / "deepspeed.json")
            assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == str(configuration.zero_stage == 3).lower()
        assert not (environment.keys() - os.environ.keys()) & {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"}


@pytest.mark.slow
def test_transformers_reads_every_training_arguments_file(all_plans: list[Plan], tmp_path: Path) -> None:
    """TrainingArguments, made from the file alone, hold the planned values, with no unknown key and no old name."""
    told_apart = ("optim", "mixed_precision", "gradient_checkpointing", "loss")
    for plan in distinct(all_plans, "training_arguments.json", *told_apart):
        arguments = training_arguments(written(plan, tmp_path))
        configuration = plan.configuration
        assert arguments.per_device_train_batch_size == configuration.per_device_train_batch_size
        assert arguments.gradient_accumulation_steps == configuration.gradient_accumulation_steps
        assert arguments.mixed_precision == configuration.mixed_precision
        assert arguments.optim.value == configuration.optim
        assert arguments.use_liger_kernel == (configuration.loss == "liger")
        assert arguments.activation_checkpointing == configuration.gradient_checkpointing
        reentrant = (arguments.activation_checkpointing_kwargs or {}).get("use_reentrant", False)
        assert reentrant == configuration.use_reentrant


def test_deepspeed_and_transformers_agree_on_every_file(all_plans: list[Plan], tmp_path: Path) -> None:
    """transformers finds no mismatch between deepspeed.json and the training arguments, and DeepSpeed reads the plan.

    Micro-batch, accumulation, global batch and precision are compared by transformers' own check, which raises. It
    asks for the number of ranks, of which this test has one.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    alone = [
        replace(plan, configuration=replace(plan.configuration, num_processes=1))
        for plan in all_plans
        if plan.configuration.uses_deepspeed
    ]
    for plan in distinct(alone, "deepspeed.json", "sharding", "mixed_precision", "offload"):
        folder = written(plan, tmp_path)
        config = HfTrainerDeepSpeedConfig(str(folder / "deepspeed.json"))
        config.trainer_config_process(training_arguments(folder))
        config.trainer_config_finalize(training_arguments(folder), model=None, num_training_steps=10)
        read = DeepSpeedConfig(config.config)
        assert read.train_batch_size == plan.configuration.global_batch_sequences
        assert read.zero_optimization_stage == plan.configuration.zero_stage
        assert read.bfloat16_config.enabled == (plan.configuration.mixed_precision == "bf16")
        assert read.float16_config.enabled == (plan.configuration.mixed_precision == "fp16")
        assert (read.zero_config.offload_optimizer is not None) == (plan.configuration.offload != "none")
        offloads_parameters = plan.configuration.offload == "optimizer_and_parameters"
        assert (read.zero_config.offload_param is not None) == offloads_parameters


def test_accelerate_refuses_the_precision_beside_a_deepspeed_file(tmp_path: Path) -> None:
    """What the writer avoids is real: with mixed_precision in the YAML accelerate would not start."""
    from accelerate.utils import DeepSpeedPlugin

    folder = written(a_plan(a_configuration(sharding="zero2")), tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "deepspeed_config_file,mixed_precision")
        with pytest.raises(ValueError, match="mixed_precision"):
            DeepSpeedPlugin(hf_ds_config=str(folder / "deepspeed.json"))


def test_every_bucket_is_explicit_and_read_back(tmp_path: Path) -> None:
    """DeepSpeed reads the written bucket sizes, and no size that decides memory is left to its defaults."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for stage, names in {
        "zero2": ("reduce_bucket_size", "allgather_bucket_size", "overlap_comm", "contiguous_gradients"),
        "zero3": ("prefetch_bucket_size", "param_persistence_threshold", "max_live_parameters", "sub_group_size"),
    }.items():
        folder = written(a_plan(a_configuration(sharding=stage)), tmp_path)
        block = json.loads((folder / "deepspeed.json").read_text())["zero_optimization"]
        read = DeepSpeedZeroConfig(**block)
        assert set(names) <= read.model_fields_set
