"""What a person reads of a plan is what the plan holds, at any width."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from msgspec.structs import replace
from rich.console import Console

from autofit.errors import InputError, NothingFitsError
from autofit.report.errors import error_json, error_text
from autofit.report.plan import bar, files_report, nearest_to_peak, plan_report, unknowns
from autofit.report.words import further_words
from autofit.spec.estimate import CostEstimate, Phase
from autofit.units import GIB, format_three_digits


def rendered(renderable, width=110):
    """Return what a terminal without colour would show."""
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(renderable)
    return console.file.getvalue()


def test_the_decision_comes_first(plan):
    """The first line names the method, the model and the devices."""
    assert rendered(plan_report(plan, width=110)).splitlines()[0].strip() == (
        "LoRA (r=16) of tiny-llama on 2 x A100-SXM-80G"
    )


@pytest.mark.parametrize(
    ("own", "allowed", "words"),
    [
        ("lora", ("lora",), None),
        (None, ("lora",), None),
        ("full", ("lora",), "trains all weights. This plan trains a LoRA adapter instead: you asked for --method lora"),
        ("full", ("full", "lora"), "nothing that trains as the script does fits, and --method allows lora"),
    ],
)
def test_another_method_than_the_scripts_is_the_first_thing_that_is_said(plan, own, allowed, words):
    """Before anything else a reader learns that the script would train something else, and who wanted it changed."""
    job = plan.inputs.job
    job = replace(job, script_method=own, restrictions=replace(job.restrictions, methods=allowed))
    text = rendered(plan_report(replace(plan, inputs=replace(plan.inputs, job=job)), width=200))
    assert text.startswith("The script by itself") == (words is not None)
    assert words is None or words in " ".join(text.split())


def test_the_batch_is_a_product_that_adds_up(plan):
    """The line of the batch shows micro-batch, accumulation and processes, and their product."""
    assert "micro-batch 4 x accumulation 8 x 2 processes = global batch 64" in rendered(plan_report(plan, width=110))


def test_memory_is_shown_in_gib_against_the_budget(plan):
    """The widest figure computed stands against what the device has, in GiB as PyTorch counts."""
    text = rendered(plan_report(plan, width=110))
    assert "41.00 of 79.25 GiB (52%)" in text
    assert "allocated 37.50, reserved 40.00, whole process 41.00 GiB" in text


def test_speed_is_said_with_the_share_of_the_devices_arithmetic(plan):
    """MFU stands beside tokens a second, and is left out where the data sheet gives no peak."""
    said = "13,107 tokens/s (10,486 to 17,476), 20.00 s a step, MFU 42%, bound by the devices' arithmetic"
    assert said in rendered(plan_report(plan, width=110))
    unknown = replace(plan, time=replace(plan.time, model_flops_utilization_fraction=None))
    assert "MFU" not in rendered(plan_report(unknown, width=110))


def test_speed_is_said_with_what_binds_it(plan):
    """The links between devices, where most of a step's seconds are spent on collectives."""
    slow = replace(plan, time=replace(plan.time, terms={"matmul": 2.0, "communication": 18.0}))
    assert "bound by the links between devices" in " ".join(rendered(plan_report(slow, width=110)).split())


def test_every_knob_that_is_not_usual_is_named(plan):
    """What a figure depends on stands beside it; what is at its default is not said."""
    unusual = {
        "offload": ("optimizer_and_parameters", "optimizer and parameters on the host"),
        "num_replicas": (2, "2 replicas"),
        "reshard_after_forward": (False, "no resharding after forward"),
        "sequence_parallel_size": (2, "sequences shared by 2"),
        "checkpoint_every_n_layers": (3, "checkpoints every 3 layers"),
        "checkpoint_offload": (True, "checkpoints on the host"),
        "attention": ("eager", "eager attention"),
        "sdpa_kernel": ("efficient", "sdpa pinned to efficient"),
        "loss": ("liger", "liger loss"),
        "batching": ("packed", "packed batches"),
        "task": ("masked-lm", "masked-lm"),
        "image_tokens": (7, "7 image tokens"),
        "keeps_outputs": (True, "outputs kept"),
        "tf32": (True, "tf32"),
        "expandable_segments": (True, "expandable segments"),
        "max_split_size_mb": (64, "max_split_size_mb 64"),
    }
    usual = " ".join(further_words(plan.configuration))
    for knob, (value, words) in unusual.items():
        assert words not in usual
        assert words in " ".join(further_words(replace(plan.configuration, **{knob: value})))


@pytest.mark.parametrize("width", [40, 60, 80, 110, 200])
def test_no_line_is_wider_than_the_terminal(plan, width):
    """Narrow terminals lose columns, not characters at the right edge."""
    lines = rendered(plan_report(plan, width=width), width=width).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width


@pytest.mark.parametrize("width", [40, 60, 110])
def test_what_decides_is_shown_at_every_width(plan, width):
    """However narrow the terminal, every rung shows what it needs and the peak phase its sum."""
    words = rendered(plan_report(plan, width=width), width=width).split()
    for figure in ("41.00", "75.00", "33.00", "37.50"):
        assert figure in words


def test_a_pipe_gets_no_escape_sequences(plan):
    """Text that is not for a terminal has no colour codes in it."""
    assert "\x1b" not in rendered(plan_report(plan, width=110))


def test_prices_scale_with_the_time_of_a_step(plan):
    """An alternative that takes half as long again costs half as much again: the tokens are the same."""
    text = rendered(plan_report(plan, width=110))
    row = next(line for line in text.splitlines() if line.startswith("full"))
    chosen = next(line for line in text.splitlines() if line.startswith("lora"))
    assert float(row.split()[-1]) / float(chosen.split()[-1]) == pytest.approx(1.5, rel=0.01)


def test_without_a_price_every_row_has_its_device_hours(plan):
    """Of a device without a price both tables say device-hours a million tokens, by the seconds and devices of each."""
    cluster = replace(plan.inputs.cluster, device=replace(plan.inputs.cluster.device, dollars_per_hour=None))
    hours = 7.0
    cost = replace(plan.cost, dollars_per_million_tokens=None, device_hours_per_million_tokens=hours)
    unpriced = replace(plan, inputs=replace(plan.inputs, cluster=cluster), cost=cost)
    rows = [line.split() for line in rendered(plan_report(unpriced, width=140)).splitlines()]
    cells = [float(row[-2]) for row in rows if row[-1:] == ["device-h"]]
    tokens = plan.inputs.job.workload.global_batch_sequences * plan.inputs.job.workload.sequence_tokens
    seconds = [plan.time.step_seconds, *(rung.step_seconds for rung in (*plan.alternatives, *plan.fallbacks))]
    assert cells == pytest.approx([each / 3600 * 2 / tokens * 1e6 for each in seconds], rel=0.005)


def test_where_devices_are_chosen_every_row_says_on_how_many(plan):
    """A table that compares numbers of devices names them; one whose rows all run on the same does not."""
    restrictions = replace(plan.inputs.job.restrictions, num_processes=(1, 2))
    several = replace(plan, inputs=replace(plan.inputs, job=replace(plan.inputs.job, restrictions=restrictions)))
    num_rows = 1 + len(plan.alternatives) + len(plan.fallbacks)
    assert rendered(plan_report(several, width=140)).count(" on 2 ") == 1 + num_rows
    assert rendered(plan_report(plan, width=140)).count(" on 2 ") == 1


@pytest.mark.parametrize("digits", [1.0, 2.1, 4.56789, 9.994, 9.996])
@pytest.mark.parametrize("exponent", range(-6, 7))
def test_three_digits_are_those_of_scientific_notation(digits, exponent):
    """What is written reads as the number rounded to three digits, and shows three; a larger one is a whole number."""
    value = digits * 10**exponent
    written = format_three_digits(value)
    if value < 100:
        assert float(written) == float(f"{value:.2e}")
        assert len(written.replace(".", "").lstrip("0")) == 3
    else:
        assert written == f"{round(value):,}"


def test_nothing_costs_nothing():
    """Zero has no digits that count, and is written like what is less than ten."""
    assert format_three_digits(0) == "0.00"


def test_a_figure_not_known_is_named_and_never_zero(plan):
    """Where a plan has no price, speed or reserved figure, each is listed as not known."""
    memory = replace(plan.memory, peak_reserved_bytes=None, process_bytes=None)
    cost = CostEstimate(
        dollars_per_million_tokens=None, device_hours_per_million_tokens=None, dollars_per_device_hour=None
    )
    bare = replace(plan, memory=memory, cost=cost)
    assert len(unknowns(bare)) == 3
    galore = replace(bare, configuration=replace(bare.configuration, optim="galore_adamw"))
    assert any("cuSOLVER" in words for words in unknowns(galore))
    assert "$" not in rendered(plan_report(bare, width=110)).replace("$/M tokens", "")


def test_too_much_memory_is_said(plan):
    """A configuration above its budget says that it does not fit."""
    memory = replace(plan.memory, budget_bytes=40 * GIB)
    assert "does not fit" in rendered(plan_report(replace(plan, memory=memory), width=110))


@pytest.mark.parametrize(("fraction", "filled"), [(-1, 0), (0, 0), (0.5, 20), (1, 40), (7, 40)])
def test_the_bar_has_one_length(fraction, filled):
    """Whatever the share, the bar is as long, and full at the budget."""
    assert bar(fraction) == "[" + "#" * filled + "." * (40 - filled) + "]"


def test_the_largest_phases_keep_their_order():
    """Of the phases that fit on the screen the largest are chosen, shown as the step goes."""
    phases = [Phase(name=name, bytes=num_bytes, terms={}) for name, num_bytes in zip("abcd", (1, 4, 2, 3), strict=True)]
    assert [phase.name for phase in nearest_to_peak(phases, num_phases=2)] == ["b", "d"]


def test_every_file_is_listed():
    """Each folder that was written into is named with all its files."""
    text = rendered(files_report([Path("run/plan.json"), Path("run/accelerate.yaml")]))
    assert "run: accelerate.yaml, plan.json" in text


def test_a_refusal_says_what_to_do():
    """An error shows its message, how to fix it and a command, in this order."""
    error = InputError("no such GPU.", to_fix="name one", hint="autofit devices")
    assert rendered(error_text(error)).splitlines() == [
        "error: no such GPU.",
        "To fix: name one",
        "Hint: autofit devices",
    ]


def test_a_refusal_as_json_has_its_exit_code():
    """A program finds the kind of refusal and the exit code beside the message."""
    refusal = error_json(NothingFitsError("too big", to_fix="less"))["error"]
    assert refusal == {
        "kind": "NothingFitsError",
        "exit_code": 3,
        "message": "too big",
        "to_fix": "less",
        "hint": None,
    }
