"""A command or an option is for ever: adding one is a decision, and this list is where it is made."""

from __future__ import annotations

import dataclasses
import resource
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest
import typer

from autofit import cli, options
from autofit.errors import InputError
from autofit.memory.optimizers import OPTIMIZERS
from autofit.report.tables import REQUIREMENTS
from autofit.search import candidates
from autofit.sources.hardware import parse_cluster
from autofit.spec import configuration, job

CHECKOUT = Path(__file__).resolve().parents[2]
SHARED = {
    "--method",
    "--lora-r",
    "--lora-alpha",
    "--lora-dropout",
    "--lora-target-modules",
    "--load-in-4bit",
    "--bnb-4bit-quant-type",
    "--bnb-4bit-use-double-quant",
    "--no-bnb-4bit-use-double-quant",
    "--bnb-4bit-quant-storage",
    "--bnb-4bit-compute-dtype",
    "--prepare-kbit",
    "--precision",
    "--weights-dtype",
    "--optim",
    "--sharding",
    "--zero",
    "--offload-optimizer-device",
    "--offload-param-device",
    "--micro-batch",
    "--per-device-train-batch-size",
    "--batching",
    "--data",
    "--tokenizer",
    "--text-column",
    "--data-all",
    "--price",
    "--tokens",
    "--epochs",
    "--calibration",
    "--no-calibration",
    "--image-tokens",
    "--gradient-checkpointing",
    "--no-gradient-checkpointing",
    "--deepspeed",
    "--use-reentrant",
    "--no-use-reentrant",
    "--attention",
    "--attn-implementation",
    "--per-device-eval-batch-size",
    "--compute-metrics",
    "--eval-sequences",
    "--eval-accumulation-steps",
    "--predict-with-generate",
}
ESTIMATED = SHARED | {
    "--freeze-trainable-layers",
    "--freeze-extra-modules",
    "--use-rslora",
    "--use-dora",
    "--modules-to-save",
    "--load-in-8bit",
    "--llm-int8-skip-modules",
    "--recasts-tables",
    "--packed-kernel",
    "--num-replicas",
    "--reshard-after-forward",
    "--no-reshard-after-forward",
    "--gradient-as-bucket-view",
    "--sequence-parallel-size",
    "--checkpoint-every-n-layers",
    "--checkpoint-offload",
    "--sdpa-kernel",
    "--task",
    "--loss",
    "--use-liger-kernel",
    "--keeps-outputs",
    "--expandable-segments",
    "--max-split-size-mb",
}
SEARCHED = SHARED | {
    "--objective",
    "--hold",
    "--num-processes",
    "--num-replicas",
    "--loss",
    "--quantization",
    "--adapter",
}
SURFACE = {
    "plan": SEARCHED | {"--model", "--seq-len", "--global-batch", "--gpus", "--allow-hub", "-o", "--output", "--json"},
    "launch": SEARCHED
    | {"--gpus", "--plan", "--model", "--seq-len", "--global-batch", "--allow-hub"}
    | {"-o", "--output", "--road", "--probe", "--strict", "--no-strict", "--dry-run", "--json"}
    | {"--override", "--discover", "--no-discover", "--discovery-limit"},
    "estimate": ESTIMATED
    | {"--model", "--seq-len", "--gpus", "--gradient-accumulation-steps", "--batch", "--replay", "--no-replay"}
    | {"--inference", "--prompt-tokens", "--allow-hub", "--json"},
    "explain": ESTIMATED
    | {"--model", "--seq-len", "--gpus", "--gradient-accumulation-steps", "--by-stage"}
    | {"--why-not", "--what-if", "--allow-hub", "--json"},
    "compare": SEARCHED
    | {"--model", "--seq-len", "--global-batch", "--gpus", "--max-dollars-per-hour", "--allow-hub", "--json"},
    "data": {"--model", "--tokenizer", "--text-column", "--data-all", "--allow-hub", "--json"},
    "runs": {"--export", "--import", "--json"},
    "calibrate": {"--dry-run", "--json"},
    "devices": {"--json"},
    "models": {"--json"},
    "rules": {"--json"},
    "templates": {"--json"},
    "doctor": {"--json"},
}


def options_of(command):
    """Return every spelling of every option of a command."""
    return {
        spelling
        for parameter in command.params
        if parameter.param_type_name == "option"
        for spelling in (*parameter.opts, *parameter.secondary_opts)
    }


def test_the_options_are_the_agreed_ones():
    """Each command has exactly the options of this list; a new one is added here on purpose."""
    commands = typer.main.get_command(cli.app).commands
    assert {name: options_of(command) for name, command in commands.items()} == SURFACE


def test_there_are_few_commands():
    """A newcomer can read the list of commands in one look: a screen of help holds fourteen."""
    assert len(SURFACE) <= 14


VALUES = {
    "method": typing.get_args(configuration.Method),
    "optim": tuple(OPTIMIZERS),
    "sharding": typing.get_args(configuration.Sharding),
    "precision": ("auto", *typing.get_args(job.Precision)),
    "attention": typing.get_args(configuration.Attention),
    "sdpa_kernel": typing.get_args(configuration.SdpaKernel),
    "loss": typing.get_args(configuration.Loss),
    "task": typing.get_args(configuration.Task),
    "batching": typing.get_args(configuration.Batching),
    "weights_dtype": typing.get_args(configuration.Dtype),
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_quant_storage": ("uint8", "bfloat16", "float16", "float32"),
    "bnb_4bit_compute_dtype": typing.get_args(configuration.Dtype),
}


@pytest.mark.parametrize(("name", "values"), VALUES.items(), ids=VALUES)
def test_an_option_takes_what_a_configuration_can_be(name, values):
    """Every value of the spec's type is taken, and what no configuration can be is refused with all that may be."""
    for value in values:
        options.restrictions(options.wishes_of(options.EveryWish, {name: value}))
    with pytest.raises(InputError) as refused:
        options.restrictions(options.wishes_of(options.EveryWish, {name: "nonsense"}))
    assert "'nonsense'" in refused.value.message
    assert all(value in f"{refused.value}" for value in values)


EVERY_KNOB = {
    "method": "qlora",
    "lora_r": 3,
    "lora_alpha": 5,
    "lora_dropout": 0.25,
    "lora_target_modules": "q_proj,v_proj",
    "use_rslora": True,
    "use_dora": True,
    "modules_to_save": "lm_head",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_quant_storage": "float16",
    "bnb_4bit_compute_dtype": "float32",
    "prepare_kbit": True,
    "recasts_tables": True,
    "llm_int8_skip_modules": "o_proj",
    "optim": "adamw_8bit",
    "precision": "tf32",
    "weights_dtype": "float16",
    "sharding": "fsdp1",
    "offload_param_device": "cpu",
    "num_replicas": 2,
    "reshard_after_forward": False,
    "micro_batch": 3,
    "gradient_checkpointing": True,
    "use_reentrant": True,
    "checkpoint_every_n_layers": 2,
    "checkpoint_offload": True,
    "attention": "eager",
    "sdpa_kernel": "efficient",
    "use_liger_kernel": True,
    "batching": "padding_free",
    "task": "causal-lm",
    "image_tokens": 7,
    "keeps_outputs": True,
    "per_device_eval_batch_size": 5,
    "compute_metrics": True,
    "eval_sequences": 100,
    "eval_accumulation_steps": 3,
    "predict_with_generate": True,
    "expandable_segments": True,
    "max_split_size_mb": 64,
}


def test_every_knob_of_a_configuration_can_be_set():
    """Options given other values than their defaults change every field of the configuration, its parts included."""
    plain, changed = only_configuration(method="qlora"), only_configuration(**EVERY_KNOB)
    same = {
        name
        for whole, other in (
            (plain, changed),
            *((getattr(plain, part), getattr(changed, part)) for part in ("lora", "quantization", "evaluation")),
        )
        for name in whole.__struct_fields__
        if getattr(whole, name) == getattr(other, name)
    }
    assert same == {
        *("method", "freeze", "bits", "num_processes", "sequence_parallel_size"),
        *("cache_elements_per_sequence", "stored_dtype"),  # follow from the model
        *("group_size", "kernel"),  # of a checkpoint that comes packed
        *("gradient_as_bucket_view", "zero_settings"),  # of DDP and of DeepSpeed (tests/sources/test_deepspeed_file.py)
    }


def test_the_rest_can_be_set_too():
    """Those that exclude the others: frozen layers, eight bits, sequence parallelism."""
    frozen = only_configuration(method="freeze", freeze_trainable_layers=3, freeze_extra_modules="norm, lm_head")
    assert frozen.freeze == configuration.Freeze(freeze_trainable_layers=3, freeze_extra_modules=("norm", "lm_head"))
    assert only_configuration(load_in_8bit=True).quantization.bits == 8
    assert only_configuration(sharding="ddp", gradient_as_bucket_view=True).gradient_as_bucket_view
    assert only_configuration(sharding="zero3", sequence_parallel_size=2).sequence_parallel_size == 2


def test_a_search_takes_several_adapters_and_codes():
    """Every rank goes with every choice of modules; a code is named as a whole or by its parts."""

    def read(**wishes):
        return options.restrictions(options.wishes_of(options.SearchWish, wishes))

    several = read(lora_r=[8, 64], lora_target_modules=["q_proj,v_proj", "all-linear"], lora_dropout=0.1)
    assert {(lora.r, lora.target_modules) for lora in several.loras} == {
        (r, names) for r in (8, 64) for names in (("q_proj", "v_proj"), ("all-linear",))
    }
    assert {(lora.lora_alpha, lora.lora_dropout) for lora in several.loras} == {(32, 0.1)}
    named = read(quantization=["nf4", "fp4-double", "int8"], bnb_4bit_quant_storage="bfloat16").quantizations
    assert [(wish.name, wish.storage_dtype) for wish in named] == [
        (name, "bfloat16") for name in ("nf4", "fp4-double", "int8")
    ]
    by_parts = read(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False).quantizations
    assert [wish.name for wish in by_parts] == ["fp4"]
    kinds = read(adapter=["lora", "dora", "rslora"]).loras
    assert [lora.kind for lora in kinds] == ["lora", "dora", "rslora"]
    with pytest.raises(InputError, match="rslora"):
        read(adapter=["adora"])
    assert read() == job.Restrictions()
    for wishes in ({"load_in_4bit": True}, {"bnb_4bit_quant_type": "nf4"}):
        with pytest.raises(InputError, match="--quantization is given beside"):
            read(quantization=["nf4"], **wishes)
    with pytest.raises(InputError, match="nf4-double"):
        read(quantization=["nf5"])


def test_one_option_of_several_adapters_changes_each():
    """`explain --why-not` changes what it names in every adapter that was allowed, and may name several."""
    both = options.restrictions(options.SearchWish(lora_r=[8, 64], lora_alpha=[5]))
    assert options.with_option(both, "lora_dropout=0.1").loras == tuple(
        configuration.Lora(r=r, lora_alpha=5, lora_dropout=0.1) for r in (8, 64)
    )
    assert options.with_option(both, "lora_r=4").loras == (configuration.Lora(r=4, lora_alpha=5),)
    codes = options.with_option(both, "quantization=nf4,int8").quantizations
    assert [wish.name for wish in codes] == ["nf4", "int8"]
    kinds = options.with_option(both, "adapter=lora,dora").loras
    assert [(lora.r, lora.use_dora) for lora in kinds] == [(8, False), (8, True), (64, False), (64, True)]
    dora = options.with_option(both, "adapter=dora")
    assert options.with_option(dora, "adapter=lora") == both  # what is the default can be gone back to
    assert options.with_option(both, "lora_r=16").loras == (configuration.Lora(r=16, lora_alpha=5),)


def test_every_option_of_a_search_restricts_a_field():
    """Each option that `explain --why-not` takes sets a field of the restrictions that there is, or parts of one."""
    of_run = {field.name for field in dataclasses.fields(options.RunWish)}
    plain = job.Restrictions()
    for field in dataclasses.fields(options.SearchWish):
        if field.name not in of_run:
            name, parts = options.RESTRICTS.get(field.name, (field.name, ()))
            assert all(hasattr(getattr(plain, name), part) for part in parts), field.name


def only_configuration(**wishes):
    """Return the configuration that options on four GPUs leave."""
    asked = options.one_of_each(options.wishes_of(options.EveryWish, wishes))
    work = job.Workload(sequence_tokens=8, global_batch_sequences=12)
    model = job.Model(name="any", config={}, origin="catalogue")
    (only,) = candidates(
        job.Job(model=model, workload=work, restrictions=options.restrictions(asked)), parse_cluster("4xA100-80G")
    )
    return only


def test_nothing_more_is_searched_unasked():
    """Without a wish a plan tries three methods, three optimizers, no FSDP, and offload where DeepSpeed can."""
    work = job.Workload(sequence_tokens=8, global_batch_sequences=2)
    model = job.Model(name="any", config={}, origin="catalogue")
    wished = options.restrictions(options.SearchWish(method=["auto"]))
    found = candidates(job.Job(model=model, workload=work, restrictions=wished), parse_cluster("2xA100-80G"))
    assert {each.method for each in found} == {"full", "lora", "qlora"}
    assert {each.sharding for each in found} == {"ddp", "zero1", "zero2", "zero3"}
    assert len(found) == 3 * (4 * 3 + 3) * 2


def test_doctor_asks_for_the_releases_that_the_package_declares():
    """What doctor calls too old is what the extras of pyproject.toml forbid."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = dict(line.split(">=") for name in ("trace", "data", "launch") for line in extras[name] if ">=" in line)
    assert {requirement.package: requirement.min_version for requirement in REQUIREMENTS} == declared


def test_help_comes_at_once():
    """`autofit --help` takes less than 0.15 s of processor time as a whole process, in the best of ten runs."""
    command = [sys.executable, "-m", "autofit", "--help"]
    assert min(processor_seconds(command) for _ in range(10)) < 0.15


def processor_seconds(command):
    """Return what a process takes of a processor, which does not depend on what else the machine does."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


TEXTS = ("7", "0", "-1", "12.5", "1_0", " 3", "1e3", "٣", "abc", "9" * 30, "yes")
"""But the empty text, which no option takes."""


@pytest.mark.parametrize("command", ["plan", "estimate", "launch"])
def test_what_is_read_without_pydantic_is_what_typer_reads(command):
    """Every option takes and refuses the texts that typer's own validation takes and refuses, to the same value."""
    group = typer.main.get_command(cli.app)
    context = group.make_context("autofit", [command], resilient_parsing=True)
    found = group.get_command(context, command)
    for parameter in found.get_params(context):
        reader = parameter.get_runtime_param()
        several = parameter.multiple or parameter.nargs == -1
        texts = [text for text in TEXTS if not (text.startswith("-") and "Path" in str(reader.annotation))]
        for value in [None, *((text, "8") if several else text for text in texts)]:
            taken = answer(reader, value, parameter, context)
            assert taken == answer(reader.usual(), value, parameter, context), (parameter.name, value)


def answer(reader, value, parameter, context):
    """Return what an option holds with its type, or the refusal."""
    try:
        found = reader.coerce(value, param=parameter, ctx=context)
    except typer.BadParameter as error:
        return error.message
    return type(found), found
