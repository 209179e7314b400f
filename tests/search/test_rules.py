"""The rules: each leaves out what it is about, and nothing that a search would otherwise need."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from autofit.errors import InputError
from autofit.search import required_regimes, solve
from autofit.search.rules import LIBRARIES, RULES, Site, broken_rule, rules_for, rules_for_given
from autofit.search.rules.fsdp import SHARE_ONE_TABLE
from autofit.search.rules.rule import is_in
from autofit.spec.configuration import Lora, Optim, Quantization
from autofit.spec.job import Restrictions
from autofit.spec.software import Software
from tests.plans import a_configuration
from tests.search.worlds import CPU, GPU, OLD_GPU, a_cluster, a_job

QLORA = {"method": "qlora", "sharding": "zero3"}
UINT8, INT8 = Quantization(storage_dtype="uint8"), Quantization(bits=8)
PACKED = Quantization(quant_type="gptq", storage_dtype="int32")
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8}
ERNIE = {"model_type": "ernie4_5_moe"}
OLD_RELEASES = {
    "accelerate": "1.5.2",
    "bitsandbytes": "0.49.1",
    "deepspeed": "0.18.0",
    "peft": "0.9.0",
    "transformers": "4.57.0",
}
BROKEN: dict[str, tuple[Any, ...]] = {
    "bf16-needs-hardware": (a_configuration(), OLD_GPU),
    "tf32-needs-ampere": (a_configuration(tf32=True, mixed_precision="no"), OLD_GPU),
    "fp16-is-not-for-cpus": (a_configuration(mixed_precision="fp16"), CPU),
    "fp16-weights-cannot-be-unscaled": (a_configuration(weights_dtype="float16", mixed_precision="fp16"), GPU),
    "flash-attention-needs-ampere": (
        a_configuration(attention="flash_attention_2", weights_dtype="float16", mixed_precision="no"),
        OLD_GPU,
    ),
    "flex-attention-needs-volta": (a_configuration(attention="flex_attention"), CPU),
    "flash-attention-needs-half": (a_configuration(attention="flash_attention_2", mixed_precision="no"), GPU),
    "flash-attention-needs-small-heads": (a_configuration(attention="flash_attention_2"), GPU, {"head_dim": 512}),
    "paged-optimizer-on-cpu": (a_configuration(optim="paged_adamw_32bit"), CPU),
    "8bit-optimizer-on-cpu": (a_configuration(optim="adamw_8bit"), CPU),
    "bitsandbytes-optimizers-were-for-gpus": (a_configuration(optim="ademamix"), CPU, {}, "bitsandbytes"),
    "adalomo-needs-cuda": (a_configuration(optim="adalomo", sharding="none", num_processes=1), CPU),
    "galore-8bit-needs-cuda": (a_configuration(optim="galore_adamw_8bit"), CPU),
    "checkpoints-are-offloaded-from-gpus": (
        a_configuration(gradient_checkpointing=True, checkpoint_offload=True),
        CPU,
    ),
    "liger-needs-triton": (a_configuration(loss="liger"), CPU),
    "several-processes-share-gradients": (a_configuration(sharding="none"), GPU),
    "quantised-needs-adapter": (a_configuration(quantization=Quantization()), GPU),
    "int8-checkpoints-with-reentry": (
        a_configuration(method="qlora", quantization=INT8, gradient_checkpointing=True),
        GPU,
    ),
    "pure-bf16-is-not-deepspeed": (
        a_configuration(weights_dtype="bfloat16", mixed_precision="no", sharding="zero2"),
        GPU,
    ),
    "packed-weights-would-be-cast": (a_configuration(**QLORA, quantization=Quantization(storage_dtype="float32")), GPU),
    "zero3-gathers-floating-weights": (a_configuration(**QLORA, quantization=UINT8), GPU, {}, "deepspeed"),
    "zero3-qlora-needs-peft-0.10": (a_configuration(**QLORA), GPU, {}, "peft"),
    "zero3-shards-no-int8": (a_configuration(**QLORA, quantization=INT8), GPU),
    "zero3-has-no-dora-of-packed-weights": (a_configuration(**QLORA, lora=Lora(use_dora=True)), GPU),
    "zero3-trains-one-dtype": (
        a_configuration(method="lora", sharding="zero3", lora=Lora(modules_to_save=("lm_head",))),
        GPU,
    ),
    "peft-zero3-needs-reentrant": (
        a_configuration(method="lora", sharding="zero3", gradient_checkpointing=True),
        GPU,
        {},
        "deepspeed",
    ),
    "zero3-waits-for-every-expert": (a_configuration(sharding="zero3"), GPU, MIXTRAL, "transformers"),
    "offload-replaces-the-optimizer": (a_configuration(sharding="zero2", offload="optimizer", optim="adamw_8bit"), GPU),
    "offloaded-weights-need-zero3": (a_configuration(sharding="zero2", offload="optimizer_and_parameters"), GPU),
    "fsdp-needs-gpus": (a_configuration(sharding="fsdp2"), CPU),
    "fsdp2-came-with-accelerate-1.6": (a_configuration(sharding="fsdp2"), GPU, {}, "accelerate"),
    "fsdp2-sharded-one-dtype": (a_configuration(method="lora", sharding="fsdp2"), GPU, {}, {"accelerate": "1.13.0"}),
    "fsdp2-crashed-on-uint8": (
        a_configuration(method="qlora", sharding="fsdp2", quantization=UINT8),
        GPU,
        {},
        {"accelerate": "1.13.0"},
    ),
    "fsdp2-shards-no-uint8": (a_configuration(method="qlora", sharding="fsdp2", quantization=UINT8), GPU),
    "fsdp2-steps-with-dtensors": (a_configuration(sharding="fsdp2", optim="adamw_8bit"), GPU),
    "fsdp2-has-no-adafactor": (a_configuration(sharding="fsdp2", optim="adafactor"), GPU),
    "fsdp-has-no-apollo": (a_configuration(sharding="fsdp2", optim="apollo_adamw"), GPU),
    "fsdp1-has-no-galore": (a_configuration(sharding="fsdp1", optim="galore_adamw"), GPU),
    "fsdp1-cannot-save-8bit-state": (a_configuration(sharding="fsdp1", optim="adamw_8bit"), GPU),
    "fsdp-cannot-shard-int8": (a_configuration(method="qlora", sharding="fsdp2", quantization=INT8), GPU),
    "fsdp1-flattens-one-floating-dtype": (a_configuration(method="qlora", sharding="fsdp1"), GPU),
    "fsdp1-flattens-no-fp32-modules": (a_configuration(sharding="fsdp1", weights_dtype="bfloat16"), GPU, ERNIE),
    "fsdp2-trains-no-fp32-modules": (
        a_configuration(sharding="fsdp2", weights_dtype="bfloat16", mixed_precision="no"),
        GPU,
        ERNIE,
    ),
    "fsdp2-puts-a-table-in-one-group": (a_configuration(sharding="fsdp2"), GPU, {"model_type": "t5"}),
    "fsdp-would-cast-packed-weights": (
        a_configuration(method="qlora", sharding="fsdp2", quantization=Quantization(storage_dtype="float32")),
        GPU,
    ),
    "fsdp1-has-no-dora": (a_configuration(method="lora", sharding="fsdp1", lora=Lora(use_dora=True)), GPU),
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
    "auto-gptq-needs-a-gpu": (a_configuration(method="qlora", quantization=replace(PACKED, kernel="auto_gptq")), CPU),
    "low-rank-optimizers-need-matrices": (a_configuration(sharding="zero1", optim="galore_adamw"), GPU),
    "adagrad-makes-its-state-at-once": (a_configuration(sharding="zero2", optim="adagrad"), GPU),
    "layerwise-optimizers-are-for-one-process": (
        a_configuration(optim="apollo_adamw_layerwise", gradient_accumulation_steps=1),
        GPU,
    ),
    "layerwise-optimizers-do-not-accumulate": (
        a_configuration(optim="apollo_adamw_layerwise", sharding="none", num_processes=1),
        GPU,
    ),
    "lomo-has-its-own-backward": (a_configuration(sharding="zero2", optim="lomo"), GPU),
    "lomo-reduces-no-gradients": (a_configuration(optim="lomo"), GPU),
    "apex-left-transformers": (a_configuration(optim="adamw_apex_fused"), GPU),
}
"""Of each rule a configuration and a device that break it; where it matters, the model's config and old releases."""
WITHOUT_PACKAGES = {
    "cpu-adam-needs-a-compiler": a_configuration(sharding="zero2", offload="optimizer"),
    "peft-is-not-installed": a_configuration(method="lora"),
    "bitsandbytes-is-not-installed": a_configuration(optim="adamw_8bit"),
    "gptqmodel-is-not-installed": a_configuration(method="qlora", quantization=PACKED),
    "optimum-is-not-installed": a_configuration(method="qlora", quantization=PACKED),
    "deepspeed-is-not-installed": a_configuration(sharding="zero2"),
    "flash-attn-is-not-installed": a_configuration(attention="flash_attention_2"),
    "liger-kernel-is-not-installed": a_configuration(loss="liger"),
    "trl-is-not-installed": a_configuration(loss="chunked"),
    "torchao-is-not-installed": a_configuration(optim="adamw_torch_8bit"),
    "lomo-optim-is-not-installed": a_configuration(optim="lomo", sharding="none", num_processes=1),
    "galore-torch-is-not-installed": a_configuration(optim="galore_adamw"),
    "apollo-torch-is-not-installed": a_configuration(optim="apollo_adamw"),
    "grokadamw-is-not-installed": a_configuration(optim="grokadamw"),
    "schedulefree-is-not-installed": a_configuration(optim="schedule_free_adamw"),
    "torch-optimi-is-not-installed": a_configuration(optim="stable_adamw"),
}
"""Of each rule about what is installed a configuration that needs it."""


def site_of(device: Any, config: Any = None, old: Any = None) -> Site:
    """Return two devices with current releases of all libraries, or old ones of some."""
    releases = {old: OLD_RELEASES[old]} if isinstance(old, str) else old or {}
    cluster = a_cluster(2, device, software=Software(versions=releases))
    return Site(cluster=cluster, config=config or {})


@pytest.mark.parametrize("name", BROKEN)
def test_every_rule_has_a_case_that_it_alone_leaves_out(name):
    """The case breaks this rule and no other that holds."""
    configuration, device, *rest = BROKEN[name]
    site = site_of(device, *rest)
    broken = [rule.name for rule in RULES if rule.holds_for(site.software) and rule.breaks(configuration, site)]
    assert broken == [name]


@pytest.mark.parametrize("name", WITHOUT_PACKAGES)
def test_what_is_not_installed_is_left_out_where_the_target_is_known(name):
    """On a machine that has everything but this, the configuration falls; on one that nobody looked at it does not."""
    package = name.removesuffix("-is-not-installed")
    present = Software(
        versions={library: "999" for library in LIBRARIES if library != package},
        is_complete=True,
        builds_extensions=name != "cpu-adam-needs-a-compiler",
    )
    for software, expected in ((present, [name]), (Software(), [])):
        site = Site(cluster=a_cluster(2, software=software))
        assert [rule.name for rule in RULES if rule.breaks(WITHOUT_PACKAGES[name], site)] == expected


def test_every_rule_has_a_case():
    """A rule without one fails here."""
    assert {rule.name for rule in RULES} == {*BROKEN, *WITHOUT_PACKAGES}


AXES: dict[str, dict[str, tuple[Any, ...]]] = {
    "path": {
        "method": ("full", "lora", "qlora"),
        "lora": (None, Lora(), Lora(use_dora=True), Lora(modules_to_save=("lm_head",))),
        "quantization": (None, Quantization(), INT8, Quantization(storage_dtype="bfloat16")),
        "weights_dtype": ("float32", "bfloat16", "float16"),
        "mixed_precision": ("no", "bf16", "fp16"),
        "attention": ("sdpa", "eager", "flash_attention_2"),
        "gradient_checkpointing": (False, True),
        "use_reentrant": (False, True),
        "checkpoint_every_n_layers": (1, 2),
        "checkpoint_offload": (False, True),
        "loss": ("stock", "liger", "chunked"),
        "tf32": (False, True),
    },
    "engine": {
        "sharding": ("none", "ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2"),
        "offload": ("none", "optimizer", "optimizer_and_parameters"),
        "num_processes": (1, 2, 4),
        "num_replicas": (1, 2),
        "reshard_after_forward": (False, True),
        "quantization": (None, Quantization(), INT8, Quantization(storage_dtype="bfloat16")),
        "weights_dtype": ("float32", "bfloat16", "float16"),
        "use_reentrant": (False, True),
    },
    "optim": {"optim": get_args(Optim)},
    "split": {"gradient_accumulation_steps": (1, 4)},
    "none": {"per_device_train_batch_size": (1, 4)},
}
"""The fields of each axis; what follows from path and engine together is a field of both."""


FIELDS = {name: values for axis in AXES.values() for name, values in axis.items()}
some_fields = st.fixed_dictionaries({name: st.sampled_from(values) for name, values in FIELDS.items()})


@settings(max_examples=200, deadline=None)
@given(some_fields, some_fields, st.sampled_from([GPU, OLD_GPU, CPU]))
def test_a_rule_looks_at_its_axes_alone(one, drawn, device):
    """Of two configurations that differ in other axes only, both break a rule or none."""
    lacking = Software(is_complete=True, builds_extensions=False)
    site = Site(cluster=a_cluster(2, device, software=lacking), config=MIXTRAL)
    for rule in RULES:
        looked_at = {name for axis in rule.axes for name in AXES[axis]}
        other = one | {name: value for name, value in drawn.items() if name not in looked_at}
        if other["gradient_accumulation_steps"] > 1:  # only whether there are several micro-steps counts
            other["gradient_accumulation_steps"] += 1
        broken = [rule.breaks(a_configuration(**fields), site) for fields in (one, other)]
        assert broken[0] == broken[1], rule.name


NAMES = {"DeepSpeed", "DeepSpeedCPUAdam", "Trainer", "DoRA", "FSDP", "APOLLO", "GaLore", "LOMO", "Liger"}
"""What a reason may begin with besides a word in small letters."""


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule_says_what_it_knows_and_from_where(rule):
    """A reason that ends a sentence, a library with releases that can be compared, and a source that can be opened."""
    assert rule.reason[0].islower() or rule.reason.split("'")[0].split()[0] in NAMES
    assert not rule.reason.endswith(".")
    assert " " not in rule.library
    assert all(re.fullmatch(r"(>=|<)[\d.]+", condition) for condition in rule.releases.split(","))
    assert "/" in rule.source
    assert rule.axes


@pytest.mark.parametrize(
    ("version", "releases", "expected"),
    [
        ("2.13.0+cpu", ">=2.0", True),
        ("0.19.8", "<0.19.8", False),
        ("0.19.7", "<0.19.8", True),
        ("1.6", ">=1.6.0", True),
        ("5.23.0.dev0", ">=4.30,<5", False),
        ("4.9", ">=4.30", False),
    ],
)
def test_releases_are_compared_number_by_number(version, releases, expected):
    """4.9 comes before 4.30, and what follows the numbers does not count."""
    assert is_in(version, releases) is expected


def test_a_library_that_nobody_looked_for_counts_as_current():
    """Rules about old releases do not hold, rules from a release on do."""
    by_name = {rule.name: rule.holds_for(Software()) for rule in RULES}
    assert not by_name["peft-zero3-needs-reentrant"]
    assert by_name["fsdp2-steps-with-dtensors"]


def test_names_are_unique():
    """A name means one rule."""
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_what_is_only_avoided_can_be_asked_for():
    """8-bit state works on a CPU, slowly: it is chosen if the user names the optimizer, and may be given."""
    configuration, site = a_configuration(optim="adamw_8bit"), site_of(CPU)
    searched = rules_for(site.software, Restrictions())
    assert broken_rule(configuration, site, searched).name == "8bit-optimizer-on-cpu"
    asked = rules_for(site.software, Restrictions(optims=("adamw_8bit",)))
    assert broken_rule(configuration, site, asked) is None
    assert broken_rule(configuration, site, rules_for_given(site.software)) is None


@pytest.mark.parametrize(
    ("changes", "asked", "rule"),
    [
        (
            {"gradient_checkpointing": True, "use_reentrant": True},
            {"use_reentrant": True},
            "fsdp-checkpoints-every-layer",
        ),
        ({"optim": "adamw_8bit"}, {"optims": ("adamw_8bit",)}, "fsdp1-cannot-save-8bit-state"),
    ],
)
def test_what_is_not_planned_may_have_been_run(changes, asked, rule):
    """Trainer re-enters under FSDP1 if told to, and 8-bit state trains there and is not saved: given, not planned."""
    configuration, site = a_configuration(sharding="fsdp1", **changes), site_of(GPU)
    for restrictions in (Restrictions(), Restrictions(**asked)):
        assert broken_rule(configuration, site, rules_for(site.software, restrictions)).name == rule
    assert broken_rule(configuration, site, rules_for_given(site.software)) is None


def test_a_job_that_falls_to_rules_altogether_is_refused_by_name():
    """bf16 asked for on a GPU without it: no search, the rule's own words."""
    job, cluster = a_job(precision="bf16"), a_cluster(2, OLD_GPU)
    for refuse in (lambda: required_regimes(job, cluster), lambda: solve(job, cluster, {})):
        with pytest.raises(InputError, match="bf16-needs-hardware"):
            refuse()


def test_stacks_that_share_a_table_are_those_of_transformers():
    """The types whose class for sequence-to-sequence ties its head to a table called `shared`, all stacks' own."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as CLASSES

    tied = {kind: getattr(transformers, name)._tied_weights_keys or {} for kind, name in CLASSES.items()}
    sharing = {kind for kind, keys in tied.items() if keys.get("lm_head.weight", "").split(".")[-2:-1] == ["shared"]}
    assert sharing == SHARE_ONE_TABLE
