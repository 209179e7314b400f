"""What a plan would be otherwise: each answer is the search of the changed job, and what is refused says why."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from msgspec.structs import replace
from rich.console import Console

from autofit.errors import InputError
from autofit.options import with_option
from autofit.plan import to_json
from autofit.report.whatif import whatif_report
from autofit.search import solve
from autofit.search.nothing_fits import Change
from autofit.search.whatif import TERM_WORDS, answers, binding_reasons, counterfactuals
from autofit.sources.hardware import parse_cluster
from autofit.sources.market import other_sizes
from autofit.spec.configuration import Lora
from autofit.spec.job import Restrictions
from autofit.timing import TimeModel
from tests.search.worlds import PlausibleMemory, a_cluster, a_job, made_up_profile, profiles_for

MEMORY = PlausibleMemory(1_000_000_000)


def plan_of(job, cluster):
    """Search with made-up profiles."""
    return solve(job, cluster, profiles_for(job, cluster), estimate_memory=MEMORY)


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("zero_stage=3", {"shardings": ("zero3",)}),
        ("zero=0", {"shardings": ("none", "ddp")}),
        ("method=full", {"methods": ("full",)}),
        ("method=full,lora", {"methods": ("full", "lora")}),
        ("gradient_checkpointing=off", {"gradient_checkpointing": False}),
        ("gradient-checkpointing=True", {"gradient_checkpointing": True}),
        ("per_device_train_batch_size=4", {"micro_batch_sequences": (4,)}),
        ("--micro-batch=4", {"micro_batch_sequences": (4,)}),
        ("micro_batch=2, 4", {"micro_batch_sequences": (2, 4)}),
        ("precision=pure-bf16", {"precision": "pure-bf16"}),
        ("offload_param_device=cpu", {"offload": "optimizer_and_parameters"}),
    ],
)
def test_an_option_changes_what_it_names_and_nothing_else(text, changed):
    """NAME=VALUE means what the option of that name means to `autofit plan`, on top of what was there."""
    before = Restrictions(optims=("sgd",), attention="eager", lora=Lora(r=4, target_modules=("q_proj",)))
    assert with_option(before, text) == replace(before, **changed)


def test_an_option_of_a_group_leaves_the_rest_of_the_group():
    """Another rank keeps the script's target modules."""
    before = Restrictions(lora=Lora(r=4, target_modules=("q_proj",)))
    assert with_option(before, "lora_r=64").lora == Lora(r=64, target_modules=("q_proj",))


@pytest.mark.parametrize(
    "text", ["zero_stage", "=3", "zero_stage=", "colour=red", "zero=7", "zero=three", "method=magic", "optim=adam9",
             "micro_batch=0", "micro_batch=-1", "gradient_checkpointing=maybe", "lora_dropout=much",
             "micro_batch=2,x", "micro_batch=\u00b2", "zero=2,3"]
)  # fmt: skip
def test_what_is_no_option_is_refused_in_words(text):
    """A misspelt name, a value that the option does not take, and half an option are refused, never ignored."""
    with pytest.raises(InputError):
        with_option(Restrictions(), text)


@pytest.mark.parametrize("name", ["seq_len", "gpus", "global-batch", "model", "price", "tokens", "data"])
def test_an_option_of_the_job_is_not_denied(name):
    """`autofit plan` has these options, so they are not said to be none: what to do instead is said."""
    with pytest.raises(InputError, match="is of the job") as refusal:
        with_option(Restrictions(), f"{name}=1")
    assert "--what-if" in refusal.value.to_fix


def test_an_answer_is_the_search_of_the_changed_job():
    """Each answer is what `solve` finds for the changed job on the changed cluster; a refusal is kept as words."""
    job, cluster = a_job(global_batch=8), a_cluster(2)
    changes = [
        Change(words="lora", kind="", job=lambda j: replace(j, restrictions=Restrictions(methods=("lora",)))),
        Change(words="three", kind="", cluster=lambda on: replace(on, num_devices_per_node=3)),
    ]
    lora, three = answers(job, cluster, changes, plan_of)
    assert lora.plan == plan_of(a_job(global_batch=8, methods=("lora",)), cluster)
    assert three.plan is None
    assert "does not divide over 3 devices" in three.refused


@pytest.mark.parametrize(("batch", "num_devices", "others"), [(8, 2, [4, 1]), (8, 8, [4]), (7, 1, [7]), (1, 1, [])])
def test_other_numbers_of_devices_keep_the_global_batch(batch, num_devices, others):
    """The next larger and the next smaller number that the global batch divides over are asked about."""
    cluster = a_cluster(num_devices)
    changes = [c for c in counterfactuals(plan_of(a_job(global_batch=batch), cluster)) if c.kind == "devices"]
    assert [change.cluster(cluster).num_devices for change in changes] == others
    for change, other in zip(changes, others, strict=True):  # what is not one more or less says why
        assert ("to share" in change.words) is (abs(other - num_devices) > 1)


@pytest.mark.parametrize("num_processes", [(2,), (1, 2)])
def test_more_devices_are_used_whatever_the_plan_was_held_to(num_processes):
    """A plan that uses some of its devices is asked about more and fewer than it uses, and all of those are used."""
    job, cluster = a_job(global_batch=8, num_processes=num_processes, objective="time"), a_cluster(4)
    made = plan_of(job, cluster)
    changes = [change for change in counterfactuals(made) if change.kind == "devices"]
    found = answers(job, cluster, changes, plan_of)
    assert [answer.plan.configuration.num_processes for answer in found] == [4, 1]
    assert found[0].plan == plan_of(a_job(global_batch=8, objective="time"), cluster)


@pytest.mark.parametrize(
    ("num_devices", "words"), [(8, "16 devices of one node (to share 16 sequences)"), (4, "8 dev")]
)
def test_a_node_of_more_than_eight_is_said_to_be_one(num_devices, words):
    """Links of a node are taken for all its devices, of which most have eight: more are not passed over in silence."""
    changes = counterfactuals(plan_of(a_job(global_batch=16), a_cluster(num_devices)))
    first = next(change.words for change in changes if change.kind == "devices")
    assert first.startswith(words)
    assert ("of one node" in first) == (num_devices == 8)


def test_a_larger_rank_is_asked_about_where_there_is_an_adapter():
    """Only a plan with an adapter has a rank."""
    kinds = {
        method: {change.kind for change in counterfactuals(plan_of(a_job(methods=(method,)), a_cluster(1)))}
        for method in ("full", "lora")
    }
    assert "rank" in kinds["lora"]
    assert "rank" not in kinds["full"]


def test_other_sizes_are_the_same_gpu():
    """A 40 GB A100 is asked about for an 80 GB one; a GPU of one size has no other."""
    assert [device.name for device in other_sizes(parse_cluster("A100-80G").device)] == ["A100-SXM-40G"]
    assert other_sizes(parse_cluster("L4-24G").device) == ()
    assert other_sizes(parse_cluster("CPU-8G").device) == ()


def test_shares_of_time_are_those_of_the_step():
    """What takes the time is named by its share of the step's parts, and every part has words."""
    made = plan_of(a_job(methods=("full",)), a_cluster(2))
    time = next(reason for reason in binding_reasons(made) if reason.startswith("time"))
    total = sum(made.time.terms.values())
    largest = max(made.time.terms, key=made.time.terms.get)
    assert f"{made.time.terms[largest] / total:.0%} {TERM_WORDS[largest]}" in time
    job, cluster = a_job(methods=("qlora",), optims=("paged_adamw_8bit",)), a_cluster(2)
    profile = made_up_profile(next(iter(profiles_for(job, cluster))))
    terms = TimeModel(profile, cluster, job.workload).time(plan_of(job, cluster).configuration).terms
    assert set(terms) <= set(TERM_WORDS)


def test_a_plan_over_slow_ethernet_says_that_the_network_binds():
    """The best plan for 16 devices is bound by 10 Gbit Ethernet between their nodes, and not by 3,200 Gbit."""
    job = a_job(global_batch=64, methods=("full",), shardings=("zero3",))
    for network, is_bound in ((1.25e9, True), (400e9, False)):
        made = plan_of(job, a_cluster(8, num_nodes=2, inter_node_bytes_per_second=network))
        (time,) = (reason for reason in binding_reasons(made) if reason.startswith("time"))
        assert ("bound by the network between nodes" in time) == is_bound


@pytest.mark.parametrize("width", [60, 80, 110])
def test_a_person_reads_the_plan_and_each_answer(width):
    """The plan is the first row, each answer has one, a refusal its reason; no line is wider than the terminal."""
    job, cluster = a_job(global_batch=8), a_cluster(2)
    made = plan_of(job, cluster)
    found = answers(job, cluster, counterfactuals(made), plan_of)
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(whatif_report(made, found, width=width))
    text = console.file.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    assert "as planned" in text
    other_method = [each for each in found if each.plan and each.plan.configuration.method != made.configuration.method]
    assert all((f"{each.words}: " in " ".join(text.split())) is (width < 100) for each in other_method)
    assert "4 devices" in text


def test_the_command_answers_from_a_plan_file(tmp_path):
    """`autofit explain PLAN --why-not` prints one JSON object with the plan and an answer for each option."""
    autofit = [sys.executable, "-m", "autofit"]
    asked = ["--model", "meta-llama/Llama-3.1-8B", "--seq-len", "1024", "--global-batch", "8", "--gpus", "2xA100-80G"]
    path = tmp_path / "plan.json"
    plan = [*autofit, "plan", *asked, "--method", "lora", "--json"]
    path.write_bytes(subprocess.run(plan, capture_output=True, check=True).stdout)
    ask = [*autofit, "explain", str(path), "--why-not", "zero_stage=2", "--why-not", "micro_batch=3", "--json"]
    document = json.loads(subprocess.run(ask, capture_output=True, check=True).stdout)
    assert {*plan_of(a_job(), a_cluster()).__struct_fields__} <= set(document["plan"])
    two, three = document["answers"]
    assert two["plan"]["configuration"]["sharding"] == "zero2"
    assert "does not divide" in three["refused"]
    assert to_json(document)
