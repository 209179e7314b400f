"""Hardware side by side: each offer is that hardware's own plan, and the front is what brute force says."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.console import Console

from autofit.errors import InputError
from autofit.report.compare import comparison_report, words, worth_listing
from autofit.search import solve
from autofit.search.compare import Offer, offers, regimes_of_all, unbeaten
from autofit.sources.market import NUM_DEVICES_OFFERED, hardware
from autofit.spec.estimate import CostEstimate, TimeEstimate
from tests.plans import a_plan
from tests.search.worlds import GPU, OLD_GPU, PlausibleMemory, a_cluster, a_job, made_up_profile

MEMORY = PlausibleMemory(1_000_000_000)
DEAR = replace(GPU, name="dear", dollars_per_hour=9.0)
UNPRICED = replace(GPU, name="unpriced", dollars_per_hour=None)
SMALL = replace(GPU, name="small", memory_bytes=2**20)


def an_offer(dollars, tokens_per_second, device=GPU, num_devices=1):
    """Return an offer of a price and a speed; None: not known."""
    seconds = None if tokens_per_second is None else 1.0
    time = TimeEstimate(
        step_seconds=seconds,
        step_seconds_lower=seconds,
        step_seconds_upper=seconds,
        tokens_per_second=tokens_per_second,
        tokens_per_second_lower=tokens_per_second,
        tokens_per_second_upper=tokens_per_second,
        terms={},
    )
    cost = CostEstimate(
        dollars_per_million_tokens=dollars,
        device_hours_per_million_tokens=seconds,
        dollars_per_device_hour=None if dollars is None else 1.0,
    )
    cluster = a_cluster(num_devices, device)
    return Offer(cluster=cluster, plan=replace(a_plan(), time=time, cost=cost), refused=None)


def everything_on(clusters, job):
    """Compare with made-up profiles."""
    profiles = {regime: made_up_profile(regime) for regime in regimes_of_all(job, clusters)}
    return offers(job, clusters, profiles, estimate_memory=MEMORY)


def test_an_offer_is_the_plan_of_its_hardware_alone():
    """Comparing changes no plan: each is what a search on that hardware finds, and the cheapest comes first."""
    job, clusters = a_job(), [a_cluster(2, DEAR), a_cluster(2, GPU), a_cluster(4, OLD_GPU)]
    found = everything_on(clusters, job)
    profiles = {regime: made_up_profile(regime) for regime in regimes_of_all(job, clusters)}
    assert {offer.cluster for offer in found} == set(clusters)
    for offer in found:
        assert offer.plan == solve(job, offer.cluster, profiles, estimate_memory=MEMORY)
    prices = [offer.dollars_per_million_tokens for offer in found]
    assert prices == sorted(prices)


def test_what_has_no_price_and_what_does_not_fit_come_last_with_the_reason():
    """Unknown is not zero: without a price hardware is behind all that have one, and a refusal says why."""
    clusters = [a_cluster(3, GPU), a_cluster(1, SMALL), a_cluster(2, UNPRICED), a_cluster(2, DEAR)]
    found = everything_on(clusters, a_job())
    assert [offer.cluster.device.name for offer in found[:2]] == ["dear", "unpriced"]
    assert found[1].dollars_per_hour is None
    refused = {offer.cluster.device.name: offer.refused for offer in found[2:]}
    assert "does not divide over 3 devices" in refused[GPU.name]
    assert "does not fit" in refused["small"]


figures = st.one_of(st.none(), st.sampled_from([1.0, 2.0, 3.0, 4.0]))


@given(st.lists(st.tuples(figures, figures), max_size=7))
def test_the_front_is_what_nothing_beats(points):
    """An offer is in the front unless another is at least as fast and as cheap and better in one; equals count once."""
    found = [an_offer(*point) for point in points]
    known = {(dollars, speed) for dollars, speed in points if dollars is not None and speed is not None}
    best = {
        (dollars, speed)
        for dollars, speed in known
        if not any(d <= dollars and s >= speed and (d, s) != (dollars, speed) for d, s in known)
    }
    front = [(offer.dollars_per_million_tokens, offer.tokens_per_second) for offer in unbeaten(found)]
    assert front == sorted(best)


def test_any_is_every_priced_gpu_within_the_budget():
    """`any` offers 1, 2, 4 and 8 of each; nothing dearer than the budget, and the budget itself is allowed."""
    found = hardware(["any"], 5.0)
    assert found
    assert all(each.device.dollars_per_hour * each.num_devices <= 5.0 for each in found)
    assert {each.num_devices for each in found} == set(NUM_DEVICES_OFFERED)
    cheapest = min(each.device.dollars_per_hour for each in found)
    assert {each.device.dollars_per_hour for each in hardware(["any"], cheapest)} == {cheapest}


@pytest.mark.parametrize(
    ("named", "budget", "words_of_it"),
    [
        (["any"], None, "--max-dollars-per-hour"),
        (["8xH100-80G"], 0.01, "the cheapest costs"),
        (["2xA100"], None, "different memory"),
        (["nonsense"], 5.0, "not a known GPU"),
    ],
)
def test_hardware_that_cannot_be_had_is_refused(named, budget, words_of_it):
    """A budget that buys nothing, no budget where one is needed, and an unknown name are said with the way out."""
    with pytest.raises(InputError) as refusal:
        hardware(named, budget)
    assert words_of_it in str(refusal.value)


def test_hardware_is_compared_once():
    """Naming the same twice makes one offer."""
    assert len(hardware(["2xA100-80G", "any", "2xA100-80G"], 1e6)) == len(hardware(["any"], 1e6))


def rendered(found, width=110):
    """Return what a terminal shows of a comparison."""
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(comparison_report(found, unbeaten(found), width=width))
    return console.file.getvalue()


def test_a_person_reads_the_cheapest_and_the_fastest_first():
    """The first line names both; every offer has a row, and a capital in the picture where nothing beats it."""
    found = [an_offer(1.0, 100.0), an_offer(3.0, 50.0, DEAR), an_offer(2.0, 400.0, OLD_GPU, 4)]
    text = rendered(found)
    assert text.splitlines()[0].strip() == (
        "Cheapest: 1xby-hand-80G, $1.00 per million tokens. Fastest: 4xby-hand-old, 400 tokens/s."
    )
    picture = text[text.index("Dollars per million tokens (up)") :]
    assert all(letter in picture for letter in ("A", "b", "C"))


def test_what_is_fastest_needs_no_price():
    """Hardware without a price may be the fastest, and is said to be; its row has its device-hours."""
    text = rendered([an_offer(1.0, 100.0), an_offer(None, 400.0, UNPRICED)])
    assert text.splitlines()[0].strip() == (
        "Cheapest: 1xby-hand-80G, $1.00 per million tokens. Fastest: 1xunpriced, 400 tokens/s."
    )
    assert next(line for line in text.splitlines() if line.startswith("b")).split()[-2:] == ["1.00", "device-h"]
    alone = " ".join(rendered([an_offer(None, 400.0, UNPRICED)]).split())
    assert alone.startswith("No price is known of any of this hardware")
    assert "Fastest: 1xunpriced, 400 tokens/s." in alone


@pytest.mark.parametrize(("fits", "says"), [(False, "fits none"), (None, "cannot be planned on any")])
def test_what_cannot_be_planned_is_not_said_to_be_too_large(fits, says):
    """Memory is blamed only where it is what is wanting."""
    found = [Offer(cluster=a_cluster(1), plan=None, refused="no", fits=fits)]
    assert rendered(found).splitlines()[0].strip() == f"The job {says} of this hardware."


def test_an_hour_costs_what_is_used_in_it():
    """Where a plan uses half of the devices, dollars an hour over tokens an hour are the price of a token."""
    (offer,) = everything_on([a_cluster(4, DEAR)], a_job(num_processes=(2,)))
    assert offer.dollars_per_hour == 2 * DEAR.dollars_per_hour
    hourly_tokens = offer.tokens_per_second * 3600
    assert offer.dollars_per_hour / hourly_tokens * 1e6 == pytest.approx(offer.dollars_per_million_tokens)


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(width):
    """On a narrow terminal columns go, and the picture shrinks."""
    found = [an_offer(1.0, 100.0), an_offer(2.0, 400.0, OLD_GPU, 4)]
    assert all(len(line) <= width for line in rendered(found, width).splitlines())


def test_a_long_list_keeps_what_matters():
    """Of many offers the front stays, and every device with its cheapest; the rest is counted."""
    devices = [replace(GPU, name=f"gpu-{number}") for number in range(10)]
    found = sorted(
        (
            an_offer(number + count, 100.0 * count, device, count)
            for number, device in enumerate(devices)
            for count in (1, 2, 3)
        ),
        key=lambda offer: offer.dollars_per_million_tokens,
    )
    listed = worth_listing(found, unbeaten(found))
    assert {offer.cluster.device.name for offer in listed} == {device.name for device in devices}
    assert all(any(kept is offer for kept in listed) for offer in unbeaten(found))
    assert len(listed) < len(found)
    assert f"{len(found) - len(listed)} more" in rendered(found)


def test_hardware_is_named_as_gpus_takes_it():
    """What a table calls hardware can be given to --gpus again."""
    (cluster,) = hardware(["4x8xH100-80G"], None)
    assert hardware([words(cluster)], None) == (cluster,)


def test_the_command_prints_one_json_object():
    """`autofit compare --json` has every offer, a refused one with its reason, and the places of the front."""
    command = [sys.executable, "-m", "autofit", "compare", "--model", "meta-llama/Llama-3.1-8B", "--seq-len", "1024"]
    command += ["--global-batch", "16", "--gpus", "2xA100-80G", "--gpus", "1xH100-80G", "--gpus", "3xA100-80G"]
    command += ["--method", "lora", "--json"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    document = json.loads(printed)
    assert len(document["offers"]) == 3
    assert "does not divide" in document["offers"][2]["refused"]
    assert all(document["offers"][place]["plan"] for place in document["unbeaten"])
