"""`--deepspeed`: what is taken from a DeepSpeed configuration of the user's own, and what is refused."""

from __future__ import annotations

import json

import pytest

import autofit
from autofit.api import make_plan
from autofit.errors import InputError
from autofit.sources.deepspeed_file import read_deepspeed_file
from autofit.sources.rows import read_case
from autofit.spec.configuration import ZeroSettings
from autofit.writers.deepspeed_config import zero_block

USERS = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "offload_param": {"device": "none", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e8,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": 1e6,
        "stage3_max_live_parameters": 2e8,
        "stage3_max_reuse_distance": 3e8,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
"""As people write them for transformers' Trainer."""
JOB = {"model": "meta-llama/Llama-3.1-8B", "seq_len": 1024, "gpus": "4xA100-80G"}


@pytest.fixture
def written(tmp_path):
    """Return a function that writes a configuration and returns its path."""

    def write(content):
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def test_a_file_says_stage_offload_and_buckets(written):
    """Numbers are whole, as DeepSpeed reads them; what is "auto" is left to the planner."""
    file = read_deepspeed_file(written(USERS))
    assert (file.stage, file.offload, file.precision) == (3, "none", None)
    assert file.settings == ZeroSettings(
        overlap_comm=True,
        sub_group_size=100_000_000,
        stage3_param_persistence_threshold=1_000_000,
        stage3_max_live_parameters=200_000_000,
        stage3_max_reuse_distance=300_000_000,
    )


def test_deepspeed_reads_from_a_plans_file_what_it_reads_from_the_users(written):
    """DeepSpeed's own loader finds in what a plan writes each number that the user's file has."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    made = make_plan(**JOB, global_batch=16, method="full", deepspeed=written(USERS))
    block = zero_block(made.configuration, hidden=4096, kind="cuda")
    numbers = {name: value for name, value in USERS["zero_optimization"].items() if value != "auto"}
    theirs = DeepSpeedZeroConfig(**{name: int(v) if isinstance(v, float) else v for name, v in numbers.items()})
    ours = DeepSpeedZeroConfig(**block)
    read = {name.removeprefix("stage3_") for name in numbers if not name.startswith("offload")}
    read = {name if hasattr(ours, name) else f"stage3_{name}" for name in read}
    assert len(read) == 8
    assert {name: getattr(ours, name) for name in read} == {name: getattr(theirs, name) for name in read}


def test_an_estimate_holds_the_users_buckets(written):
    """A reduce bucket of 5e8 elements holds twice as many bytes in bf16, from before the first step to the last."""
    block = {"stage": 3, "reduce_bucket_size": 5e8}
    usual = autofit.estimate(**JOB, zero=3)
    users = autofit.estimate(**JOB, deepspeed=written({"zero_optimization": block}))
    bucket, theirs = (made.memory.phases[0].terms["communication_buckets"] for made in (usual, users))
    assert (bucket, theirs) == (2 * 4096**2, 1_000_000_000)


def test_a_row_of_a_batch_names_a_file_too(written):
    """It comes to the configuration that the command line's option comes to, and a contradiction is refused."""
    path = str(written({"zero_optimization": {"stage": 3, "sub_group_size": 1e8}}))
    row = {**JOB, "method": "full", "autocast": "bf16", "deepspeed": path}
    made = autofit.estimate(**JOB, deepspeed=path)
    assert read_case(row).configuration.zero_settings == made.configuration.zero_settings
    assert read_case(row).configuration.sharding == made.configuration.sharding == "zero3"
    with pytest.raises(InputError, match="sharding or offload"):
        read_case({**row, "sharding": "zero2"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "not a JSON object"),
        ("{", "not JSON"),
        ('{"a":' * 600 + "1" + "}" * 600, "not JSON"),
        ({}, "the stage of zero_optimization is None"),
        ({"zero_optimization": {"stage": True}}, "the stage of zero_optimization is True"),
        ({"zero_optimization": 3}, "is no object"),
        ({"zero_optimization": {"stage": 2, "contiguous_gradients": False}}, "contiguous_gradients is false"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, "reduce_bucket_size is -1"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1.5}}, "reduce_bucket_size is 1.5"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": 1}}, "overlap_comm is 1"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "offload_optimizer"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "parameters alone are offloaded"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, "optimizer is"),
        ({"zero_optimization": {"stage": 2}, "train_batch_size": 8}, "train_batch_size is 8"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16"),
        ({"zero_optimization": {"stage": 2}, "bf16": 1}, "bf16 is 1"),
    ],
)
def test_what_cannot_be_held_to_is_refused_by_name(written, content, words):
    """Nothing that a file says is lost without a word."""
    with pytest.raises(InputError) as refusal:
        read_deepspeed_file(written(content))
    assert words in refusal.value.message
    assert refusal.value.to_fix


@pytest.mark.parametrize(
    "options", [{"zero": 2}, {"sharding": "ddp"}, {"offload_param_device": "cpu"}, {"precision": "fp16"}]
)
def test_an_option_that_says_otherwise_is_refused(written, options):
    """A file and an option do not overrule each other."""
    content = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    with pytest.raises(InputError, match="given"):
        autofit.estimate(**JOB, deepspeed=written(content), **options)


def test_no_file_is_refused_by_its_path(tmp_path):
    """A path with nothing at it is named."""
    with pytest.raises(InputError, match=r"none\.json"):
        read_deepspeed_file(tmp_path / "none.json")
