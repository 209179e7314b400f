"""The rules: each leaves out what it is about, and nothing that a search would otherwise need."""

from __future__ import annotations

import pytest

from autofit.errors import InputError
from autofit.search import required_regimes, solve
from autofit.search.rules import RULES, broken_rule
from autofit.spec.configuration import Quantization
from autofit.spec.job import Restrictions
from tests.plans import a_configuration
from tests.search.worlds import CPU, GPU, OLD_GPU, a_cluster, a_job

BROKEN = {
    "bf16-needs-hardware": (a_configuration(), OLD_GPU),
    "fp16-needs-gpu": (a_configuration(mixed_precision="fp16"), CPU),
    "fp16-weights-cannot-be-unscaled": (a_configuration(weights_dtype="float16", mixed_precision="fp16"), GPU),
    "pure-bf16-is-not-deepspeed": (
        a_configuration(weights_dtype="bfloat16", mixed_precision="no", sharding="zero2"),
        GPU,
    ),
    "several-processes-share-gradients": (a_configuration(sharding="none"), GPU),
    "quantised-needs-adapter": (a_configuration(quantization=Quantization()), GPU),
    "packed-weights-would-be-cast": (
        a_configuration(method="qlora", sharding="zero3", quantization=Quantization(storage_dtype="float32")),
        GPU,
    ),
    "peft-zero3-needs-reentrant": (
        a_configuration(method="lora", sharding="zero3", gradient_checkpointing=True),
        GPU,
    ),
    "fsdp-needs-gpus": (a_configuration(sharding="fsdp2"), CPU),
    "fsdp2-steps-with-dtensors": (a_configuration(sharding="fsdp2", optim="adamw_8bit"), GPU),
    "fsdp-cannot-shard-int8": (
        a_configuration(method="qlora", sharding="fsdp2", quantization=Quantization(bits=8)),
        GPU,
    ),
    "fsdp1-flattens-one-floating-dtype": (a_configuration(method="qlora", sharding="fsdp1"), GPU),
    "fsdp-would-cast-packed-weights": (
        a_configuration(method="qlora", sharding="fsdp2", quantization=Quantization(storage_dtype="float32")),
        GPU,
    ),
    "fsdp1-adapter-needs-no-checkpoint": (
        a_configuration(method="lora", sharding="fsdp1", gradient_checkpointing=True),
        GPU,
    ),
    "fsdp-checkpoints-every-layer": (
        a_configuration(sharding="fsdp2", gradient_checkpointing=True, checkpoint_every_n_layers=2),
        GPU,
    ),
    "fsdp1-offloads-no-checkpoints": (
        a_configuration(sharding="fsdp1", gradient_checkpointing=True, checkpoint_offload=True),
        GPU,
    ),
    "fsdp-offloads-everything": (a_configuration(sharding="fsdp2", offload="optimizer"), GPU),
    "replicas-share-the-processes": (a_configuration(sharding="fsdp2", num_replicas=2), GPU),
    "fsdp1-replicates-over-nodes": (a_configuration(sharding="fsdp1", num_processes=4, num_replicas=2), GPU),
    "offload-replaces-the-optimizer": (a_configuration(sharding="zero2", offload="optimizer", optim="adamw_8bit"), GPU),
    "offloaded-weights-need-zero3": (a_configuration(sharding="zero2", offload="optimizer_and_parameters"), GPU),
    "flash-attention-needs-ampere": (
        a_configuration(attention="flash_attention_2", weights_dtype="float16", mixed_precision="no"),
        OLD_GPU,
    ),
    "flash-attention-needs-half": (a_configuration(attention="flash_attention_2", mixed_precision="no"), GPU),
    "optimizer-needs-gpu": (a_configuration(optim="adalomo"), CPU),
    "paged-optimizer-on-cpu": (a_configuration(optim="paged_adamw_32bit"), CPU),
    "8bit-optimizer-on-cpu": (a_configuration(optim="adamw_8bit"), CPU),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule_has_a_case_that_it_alone_leaves_out(rule):
    """The case breaks this rule and no other; a rule without a case fails here."""
    configuration, device = BROKEN[rule.name]
    broken = [each.name for each in RULES if each.breaks(configuration, a_cluster(2, device))]
    assert broken == [rule.name]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule_says_what_it_knows_and_from_where(rule):
    """A reason that ends a sentence, a library with releases, and a source that can be opened."""
    assert rule.reason[0].islower() or rule.reason.startswith(("DeepSpeed", "Trainer"))
    assert not rule.reason.endswith(".")
    assert rule.library
    assert rule.releases[0] in "<>="
    assert "/" in rule.source


def test_names_are_unique():
    """A name means one rule."""
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_what_is_only_avoided_can_be_asked_for():
    """8-bit state works on a CPU, slowly: it is chosen if the user names the optimizer."""
    configuration, cluster = a_configuration(optim="adamw_8bit"), a_cluster(2, CPU)
    assert broken_rule(configuration, cluster, Restrictions()).name == "8bit-optimizer-on-cpu"
    assert broken_rule(configuration, cluster, Restrictions(optims=("adamw_8bit",))) is None


def test_a_job_that_falls_to_rules_altogether_is_refused_by_name():
    """bf16 asked for on a GPU without it: no search, the rule's own words."""
    job, cluster = a_job(precision="bf16"), a_cluster(2, OLD_GPU)
    for refuse in (lambda: required_regimes(job, cluster), lambda: solve(job, cluster, {})):
        with pytest.raises(InputError, match="bf16-needs-hardware"):
            refuse()
