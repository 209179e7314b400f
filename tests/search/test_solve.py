"""The search against brute force, and what a plan promises."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from autofit.errors import InputError, NothingFitsError
from autofit.launch.ladder import rung_plans
from autofit.memory.optimizers import OPTIMIZERS
from autofit.memory.uncertainty import interval, run_kind
from autofit.plan import from_json, to_json
from autofit.search import candidates, estimate, required_regimes, solve
from autofit.search.evaluate import HEADROOM_FRACTION
from autofit.search.rank import approximations
from autofit.search.rules import Site, rules_for
from autofit.spec.configuration import Configuration, Evaluation, Lora
from autofit.spec.job import Objective, QuantizationWish, Restrictions
from autofit.spec.regimes import regime_of
from autofit.timing import TimeModel, estimate_time
from autofit.units import GIB
from tests.plans import a_configuration
from tests.search.worlds import (
    CPU,
    GPU,
    OLD_GPU,
    FragmentedMemory,
    PlausibleMemory,
    RandomMemory,
    a_cluster,
    a_job,
    an_estimate,
    made_up_profile,
    profiles_for,
)

jobs = st.builds(
    lambda batch, methods, optims: (batch, methods, optims),
    st.sampled_from([1, 2, 3, 4, 6, 8]),
    st.sampled_from([(), ("full",), ("lora", "qlora")]),
    st.sampled_from([(), ("adamw_torch_fused",), ("adamw_torch", "adamw_8bit")]),
)
devices = st.sampled_from([GPU, OLD_GPU, CPU])


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_modelled_optimizer_can_be_asked_for(optim):
    """A search restricted to any optimizer that is modelled ends in a plan with it, or in a refusal in words."""
    job, cluster = a_job(optims=(optim, "adamw_torch_fused")), a_cluster(1)
    made = solve(job, cluster, profiles_for(job, cluster), estimate_memory=PlausibleMemory(1_000_000_000))
    assert made.configuration.optim in {optim, "adamw_torch_fused"}


@dataclass
class Priced:
    """A configuration with what decides about it."""

    cost: float
    needed_bytes: int
    risky_bytes: float
    configuration: Configuration


def brute_force(job, cluster, memory):
    """Price every candidate that no rule breaks and that fits, one by one."""
    priced = []
    site, rules = Site(cluster=cluster, config=job.model.config), rules_for(cluster.software, job.restrictions)
    for configuration in candidates(job, cluster):
        if any(rule.breaks(configuration, site) for rule in rules):
            continue
        profile = made_up_profile(regime_of(configuration, cluster.device))
        needed = memory(profile, configuration, cluster, job.workload).needed_bytes
        if needed <= int(cluster.device.memory_bytes * (1 - HEADROOM_FRACTION)):
            seconds = estimate_time(profile, configuration, cluster, job.workload).step_seconds
            model = TimeModel(profile, cluster, job.workload)
            cost = seconds or model.relative_work(configuration)
            risk = interval(
                "process" if cluster.device.kind == "cuda" else "peak_allocated",
                run_kind(profile.regime, is_sharded=configuration.num_processes > 1),
            )
            priced.append(Priced(cost, needed, int(needed * risk.high), configuration))
    return priced


NOTHING_SAID = Restrictions()


def simplicity(each, named):
    """Return the order of what can go wrong, written down apart from the search's; `named` is what was allowed."""
    c = each.configuration
    codes = [(wish.bits, wish.quant_type, wish.double_quant) for wish in named.quantizations]
    return (
        ("full", "lora", "qlora").index(c.method),
        ("none", "ddp", "zero1", "zero2", "zero3").index(c.sharding),
        ("none", "optimizer", "optimizer_and_parameters").index(c.offload),
        codes.index((c.quantization.bits, c.quantization.quant_type, c.quantization.double_quant))
        if c.quantization
        else 0,
        named.loras.index(c.lora) if c.lora else 0,
        c.gradient_checkpointing,
        ("adamw_torch_fused", "adamw_torch", "adamw_8bit", "paged_adamw_8bit").index(c.optim),
        each.needed_bytes,
        c.gradient_accumulation_steps,
    )


def the_choice(priced, budget_bytes, named=NOTHING_SAID):
    """Return the cheapest, or what is safe for at most 5 % more, and of what is within 1 % of that the simplest."""
    least = min(each.cost for each in priced)
    safe = [each for each in priced if each.cost <= least * 1.05 and each.risky_bytes <= budget_bytes]
    among = safe or priced
    least = min(each.cost for each in among)
    return min((each for each in among if each.cost <= least * 1.01), key=lambda each: simplicity(each, named))


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(jobs, devices, st.integers(1, 4), st.integers(0, 10**6), st.floats(0.5, 20))
def test_the_search_finds_what_brute_force_finds(job, device, num_devices, seed, scarcity):
    """Whatever memory configurations need, what is chosen is what going through all of them one by one chooses."""
    batch, methods, optims = job
    job, cluster = a_job(batch * num_devices, methods=methods, optims=optims), a_cluster(num_devices, device)
    memory = RandomMemory(seed, int(device.memory_bytes * scarcity))
    priced = brute_force(job, cluster, memory)
    if not priced:
        with pytest.raises(NothingFitsError):
            solve(job, cluster, profiles_for(job, cluster), estimate_memory=memory)
        return
    plan = solve(job, cluster, profiles_for(job, cluster), estimate_memory=memory)
    chosen = the_choice(priced, device.memory_bytes)
    assert plan.configuration == chosen.configuration


def lists(*several):
    """Return one or more of some values, in any order, as what is asked for: one is no list."""
    chosen = st.lists(st.sampled_from(several), min_size=1, max_size=3, unique=True)
    return chosen.map(lambda values: values[0] if len(values) == 1 else tuple(values))


adapters = lists(
    Lora(), Lora(r=4), Lora(r=64, target_modules=("q_proj", "v_proj")), Lora(use_dora=True), Lora(use_rslora=True)
)
codes = lists(
    QuantizationWish(),
    QuantizationWish(double_quant=False),
    QuantizationWish(quant_type="fp4", double_quant=False),
    QuantizationWish(bits=8),
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(adapters, codes, st.sampled_from([("qlora",), ("lora", "qlora")]), st.integers(1, 2), st.integers(0, 10**6))
@pytest.mark.parametrize("objective", ["cost", "quality"])
def test_adapters_and_codes_are_those_that_brute_force_finds(objective, lora, quantization, methods, num_devices, seed):
    """Every adapter with every code of the weights; of equals what was named first; quality prefers more bits."""
    job = a_job(
        2 * num_devices,
        methods=methods,
        optims=("adamw_torch_fused",),
        lora=lora,
        quantization=quantization,
        objective=objective,
    )
    cluster, memory = a_cluster(num_devices, GPU), RandomMemory(seed, 4 * GPU.memory_bytes)
    priced = brute_force(job, cluster, memory)
    if not priced:
        return
    plan = solve(job, cluster, profiles_for(job, cluster), estimate_memory=memory)

    def order(each):
        return each.configuration.method, each.configuration.quantization and -each.configuration.quantization.bits

    kept = [each for each in priced if objective == "cost" or order(each) == min(map(order, priced))]
    assert plan.configuration == the_choice(kept, GPU.memory_bytes, job.restrictions).configuration


def test_each_adapter_and_each_code_has_its_price():
    """What another adapter and another code of the weights would need and take is said, as of every knob."""
    loras, wishes = (Lora(), Lora(r=64)), (QuantizationWish(), QuantizationWish(quant_type="fp4"))
    job, cluster = a_job(8, methods=("qlora",), lora=loras, quantization=wishes), a_cluster(2)
    made = solve(job, cluster, profiles_for(job, cluster), estimate_memory=PlausibleMemory(10**9))
    assert (made.configuration.lora.r, made.configuration.quantization.quant_type) == (16, "nf4")
    for start in (
        "adapter lora r=16, alpha=32 on all-linear: lora r=64, ",
        "quantization nf4-double: fp4-double would take",
    ):
        assert any(reason.startswith(start) for reason in made.reasons), made.reasons
    assert from_json(to_json(made)) == made


def test_fewer_devices_are_cheaper_and_more_are_faster():
    """Two devices are less than twice as fast: cost takes one, time takes both, and the other one's price is said."""
    cluster = a_cluster(2)
    plans = {}
    for objective in ("cost", "time"):
        job = a_job(256, methods=("full",), num_processes=(1, 2), objective=objective)
        plans[objective] = solve(job, cluster, profiles_for(job, cluster), estimate_memory=PlausibleMemory(10**8))
    assert {name: plan.configuration.num_processes for name, plan in plans.items()} == {"cost": 1, "time": 2}
    cheap, fast = plans["cost"], plans["time"]
    assert fast.time.step_seconds < cheap.time.step_seconds
    assert cheap.cost.dollars_per_million_tokens < fast.cost.dollars_per_million_tokens
    assert cheap.used.num_devices == 1
    assert any(
        re.match(r"num_processes 1: 2 would (need .*, )?cost \d+% more and take \d+% less long", r)
        for r in cheap.reasons
    )


QUALITY_ORDER = ("full", "lora", "qlora")


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(jobs, st.sampled_from(["time", "memory", "quality"]), st.integers(1, 4), st.integers(0, 10**6))
def test_each_objective_finds_what_brute_force_finds(job, objective, num_devices, seed):
    """The choice is made among all, among what needs the least within a tie, or among the least approximate."""
    batch, methods, optims = job
    evaluated = Evaluation(per_device_eval_batch_size=8)  # else the least memory evaluates less, by another lot
    job = a_job(batch * num_devices, methods=methods, optims=optims, objective=objective, evaluation=evaluated)
    cluster, memory = a_cluster(num_devices, GPU), RandomMemory(seed, 2 * GPU.memory_bytes)
    priced = brute_force(job, cluster, memory)
    if not priced:
        return
    plan = solve(job, cluster, profiles_for(job, cluster), estimate_memory=memory)

    def order(each):
        return QUALITY_ORDER.index(each.configuration.method), "8bit" in each.configuration.optim

    least_order, least_needed = min(map(order, priced)), min(each.needed_bytes for each in priced)
    kept = {
        "time": priced,
        "memory": [each for each in priced if each.needed_bytes <= least_needed * 1.01],
        "quality": [each for each in priced if order(each) == least_order],
    }[objective]
    assert plan.configuration == the_choice(kept, GPU.memory_bytes).configuration
    assert f"--objective {objective}" in plan.reasons[0]


def test_quality_is_an_order_of_what_is_left_out():
    """Full before an adapter before a packed base; then fp32 updates, then 32-bit state; engines keep fp32 weights."""
    ordered = [
        a_configuration(),
        a_configuration(optim="adamw_8bit"),
        a_configuration(weights_dtype="bfloat16", mixed_precision="no"),
        a_configuration(method="lora"),
        a_configuration(method="qlora"),
        a_configuration(method="qlora", optim="paged_adamw_8bit"),
    ]
    orders = [approximations(each) for each in ordered]
    assert orders == sorted(orders)
    assert len(set(orders)) == len(ordered)
    kept = a_configuration(weights_dtype="bfloat16", sharding="zero2")
    assert approximations(kept) == approximations(a_configuration())


def test_a_method_that_does_not_fit_is_shown_with_what_it_would_need():
    """Of 4e9 parameters on 16 GiB full fine-tuning does not fit: its least is beside the others, marked."""
    job, cluster = a_job(8), a_cluster(1, replace(GPU, memory_bytes=16 * GIB))
    plan = solve(job, cluster, profiles_for(job, cluster), estimate_memory=PlausibleMemory(4 * 10**9))
    shown = {rung.configuration.method: rung for rung in plan.alternatives}
    assert {plan.configuration.method, *shown} == {"full", "lora", "qlora"}
    assert not shown["full"].fits
    assert shown["full"].needed_bytes > plan.memory.budget_bytes
    assert all(rung.fits for rung in plan.fallbacks)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(jobs, devices, st.integers(1, 4), st.integers(0, 10**6))
def test_every_plan_keeps_its_promises(job, device, num_devices, seed):
    """The chosen one fits, rungs keep batch and method and descend strictly, and JSON holds it all."""
    batch, methods, optims = job
    job, cluster = a_job(batch * num_devices, methods=methods, optims=optims), a_cluster(num_devices, device)
    memory = RandomMemory(seed, device.memory_bytes)
    try:
        plan = solve(job, cluster, profiles_for(job, cluster), estimate_memory=memory)
    except NothingFitsError:
        return
    assert plan.memory.needed_bytes <= plan.memory.budget_bytes * (1 - HEADROOM_FRACTION)
    needed = [plan.memory.needed_bytes, *(rung.needed_bytes for rung in plan.fallbacks)]
    assert needed == sorted(set(needed), reverse=True)
    assert len(plan.fallbacks) <= 5
    everything = [plan.configuration, *(r.configuration for r in (*plan.fallbacks, *plan.alternatives))]
    assert {each.global_batch_sequences for each in everything} == {job.workload.global_batch_sequences}
    assert {rung.configuration.method for rung in plan.fallbacks} <= {plan.configuration.method}
    assert plan.configuration.method not in {rung.configuration.method for rung in plan.alternatives}
    assert from_json(to_json(plan)) == plan


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(jobs, st.sampled_from(get_args(Objective)), st.integers(1, 4), st.integers(0, 10**6))
def test_the_ladder_descends_as_its_rungs_are_laid_out(job, objective, num_devices, seed):
    """Peaks fall strictly, each rung has its price, trains the same batch by the same method, and is a plan of its own.

    What is shown of a rung, and of another method that fits, is what an estimate of it says.
    """
    batch, methods, optims = job
    job = a_job(batch * num_devices, methods=methods, optims=optims, objective=objective)
    cluster, memory = a_cluster(num_devices), FragmentedMemory(seed, GPU.memory_bytes)
    profiles = profiles_for(job, cluster)
    try:
        plan = solve(job, cluster, profiles, estimate_memory=memory)
    except NothingFitsError:
        return
    peaks = [plan.memory.peak_allocated_bytes, *(rung.peak_allocated_bytes for rung in plan.fallbacks)]
    needed = [plan.memory.needed_bytes, *(rung.needed_bytes for rung in plan.fallbacks)]
    for amounts in (peaks, needed):
        assert all(later < earlier for earlier, later in pairwise(amounts))
    for rung in plan.fallbacks:
        assert rung.step_seconds is not None
        assert rung.configuration.global_batch_sequences == job.workload.global_batch_sequences
        assert rung.configuration.method == plan.configuration.method
    for rung in (*plan.fallbacks, *(each for each in plan.alternatives if each.fits)):
        alone = estimate(job, cluster, profiles, rung.configuration, estimate_memory=memory)
        assert (alone.memory.needed_bytes, alone.time.step_seconds) == (rung.needed_bytes, rung.step_seconds)
    assert [each.configuration for each in rung_plans(plan)[1:]] == [rung.configuration for rung in plan.fallbacks]


def test_ties_go_to_the_simpler_setup():
    """Where memory is no object, of optimizers that take as long the plain one is chosen, and no checkpointing."""
    job, cluster = a_job(8, methods=("lora",)), a_cluster(2)
    plan = solve(job, cluster, profiles_for(job, cluster), estimate_memory=PlausibleMemory(10**9))
    assert (plan.configuration.optim, plan.configuration.gradient_checkpointing) == ("adamw_torch_fused", False)


def test_less_memory_never_makes_a_plan_cheaper():
    """Shrinking the device from 80 GiB downwards, the step time of the plan never falls by more than safety costs."""
    job, seconds = a_job(16, methods=("full",)), []
    for gib in range(80, 10, -4):
        cluster = a_cluster(4, replace(GPU, memory_bytes=gib * GIB))
        try:
            plan = solve(job, cluster, profiles_for(job, cluster), estimate_memory=PlausibleMemory(4 * 10**9))
        except NothingFitsError:
            break
        seconds.append(plan.time.step_seconds)
    assert len(seconds) > 5
    assert all(later >= earlier / 1.05 for earlier, later in pairwise(seconds))


def test_what_the_allocator_cannot_lay_out_is_passed_over():
    """A configuration that fits as a sum and not when replayed is not chosen, nor shown as an alternative that fits."""

    def memory(profile, configuration, cluster, workload, *, replays=False):
        spoilt = replays and not configuration.gradient_checkpointing
        needed = 90 * GIB if spoilt else 60 * GIB if not configuration.gradient_checkpointing else 30 * GIB
        return an_estimate(needed, cluster.device.memory_bytes)

    job, cluster = a_job(8), a_cluster(2)
    plan = solve(job, cluster, profiles_for(job, cluster), estimate_memory=memory)
    assert plan.configuration.gradient_checkpointing
    assert all(rung.configuration.gradient_checkpointing for rung in plan.alternatives)
    assert any("as torch's allocator lays it out" in reason for reason in plan.reasons)


def test_host_memory_is_a_second_budget():
    """State that is paged to a host without room for it does not fit; where the host is not known it is not checked."""

    def memory(profile, configuration, cluster, workload, *, replays=False):
        pages = configuration.optim.startswith("paged")
        estimated = an_estimate(10 * GIB if pages else 100 * GIB, cluster.device.memory_bytes)
        return replace(estimated, host_bytes=64 * GIB if pages else None)

    job = a_job(8)
    roomy = a_cluster(2, host_memory_bytes=128 * GIB)
    for cluster in (roomy, a_cluster(2)):
        plan = solve(job, cluster, profiles_for(job, cluster), estimate_memory=memory)
        assert plan.configuration.optim == "paged_adamw_8bit"
    small = replace(roomy, host_memory_bytes=32 * GIB)
    with pytest.raises(NothingFitsError, match="host memory"):
        solve(job, small, profiles_for(job, small), estimate_memory=memory)


@pytest.mark.parametrize(
    ("methods", "script_decides", "says"),
    [
        ((), (), " is the cheapest per trained token of full, lora and qlora"),
        (("full", "lora"), (), " is the cheapest per trained token of the methods you allowed (full, lora)"),
        (("full",), (), "this is the cheapest per trained token with full, as you asked"),
        (("full",), ("methods", "precision"), "with full, the script's own method; --method allows others"),
    ],
)
def test_reasons_say_whether_the_user_or_the_script_decided(methods, script_decides, says):
    """What a script fixes is never called what the user allowed or asked for."""
    job = a_job(4, methods=methods, precision="bf16")
    job, cluster = replace(job, script_decides=script_decides), a_cluster(1)
    made = solve(job, cluster, profiles_for(job, cluster), estimate_memory=PlausibleMemory(10**8))
    assert says in made.reasons[0]
    (precision,) = [reason for reason in made.reasons if reason.startswith("precision")]
    assert ("the script asks for bf16" in precision) is bool(script_decides)
    assert ("you asked for bf16" in precision) is not bool(script_decides)


def test_without_a_price_nothing_is_said_to_be_cheapest():
    """Of a device whose price is not known the least device time decides, and that is what the reason says."""
    for dollars, says in ((None, "the cheapest in device time per"), (2.0, "the cheapest per trained token")):
        job, cluster = a_job(), a_cluster(1, replace(GPU, dollars_per_hour=dollars))
        made = solve(job, cluster, profiles_for(job, cluster), estimate_memory=PlausibleMemory(10**8))
        assert says in made.reasons[0]


def test_reasons_account_for_every_candidate():
    """Fallen to rules, too large and fitting add up to all candidates; each knob with a choice has a sentence."""
    job, cluster = a_job(8), a_cluster(2, CPU)
    memory = PlausibleMemory(10**9)
    plan = solve(job, cluster, profiles_for(job, cluster), estimate_memory=memory)
    (counted,) = [reason for reason in plan.reasons if "configurations:" in reason]
    words = counted.split()
    total, fallen, too_large, fitting = (int(words[n]) for n in (0, 2, 6, words.index("fit.") - 1))
    assert total == len(candidates(job, cluster)) == fallen + too_large + fitting
    assert fitting == len(brute_force(job, cluster, memory))
    for knob in ("method", "sharding", "gradient_checkpointing", "per_device_train_batch_size", "precision"):
        assert any(reason.startswith(knob) for reason in plan.reasons)


def test_what_is_not_modelled_is_left_out_with_its_reason():
    """A loss, and an optimizer, under an engine do not end the search: they are counted beside their names."""
    job = a_job(8, loss=("stock", "chunked"), optims=("adamw_torch_fused", "apollo_adamw"), shardings=("zero3",))
    cluster = a_cluster(2)
    made = solve(job, cluster, profiles_for(job, cluster), estimate_memory=PlausibleMemory(10**9))
    assert made.configuration.loss == "stock"
    left_out = [reason for reason in made.reasons if "left out" in reason]
    every = candidates(job, cluster)
    num = sum(each.loss == "chunked" and each.optim == "adamw_torch_fused" for each in every)
    assert num
    assert any(re.match(r"\d+ left out: loss chunked under zero3", reason) for reason in left_out)
    assert sum(int(reason.split()[0]) for reason in left_out) >= num
    (counted,) = [reason for reason in made.reasons if "configurations:" in reason]
    assert "are not modelled" in counted
    with pytest.raises(InputError, match="loss chunked under zero3"):
        solve(a_job(8, loss="chunked", shardings=("zero3",)), cluster, {}, estimate_memory=PlausibleMemory(10**9))


@pytest.mark.parametrize(
    ("routes_evenly", "says"), [(False, "routing even or worst, memory"), (True, "routing even: ")]
)
def test_a_plan_says_which_routing_it_is_of(routes_evenly, says):
    """Of grouped experts every routing needs as much; of those in a loop an even one is planned. Dense models: none."""
    dense, cluster = a_job(8), a_cluster(2)
    experts = replace(dense.model, config={**dense.model.config, "num_local_experts": 4})
    for job, expected in ((dense, 0), (replace(dense, model=experts), 1)):
        profiles = {
            regime: replace(profile, routes_evenly=routes_evenly)
            for regime, profile in profiles_for(job, cluster).items()
        }
        made = solve(job, cluster, profiles, estimate_memory=PlausibleMemory(10**9))
        assert sum(reason.startswith(says) for reason in made.reasons) == expected
        assert sum(reason.startswith("routing") for reason in made.reasons) == expected


def test_each_of_several_precisions_has_its_price():
    """What another precision or attention would need and take is said, as of every knob with a choice."""
    job, cluster = a_job(8, precision=("bf16", "pure-bf16"), attention=("sdpa", "eager")), a_cluster(2)
    made = solve(job, cluster, profiles_for(job, cluster), estimate_memory=PlausibleMemory(10**9))
    for knob in ("precision", "attention"):
        assert any(re.match(rf"{knob} \S+: \S+ would (need|take)", reason) for reason in made.reasons)


def test_without_published_rates_there_is_an_order_and_no_time():
    """A CPU rank has no data sheet: the plan says so and leaves time and cost empty."""
    job, cluster = a_job(8), a_cluster(2, CPU)
    plan = solve(job, cluster, profiles_for(job, cluster), estimate_memory=PlausibleMemory(10**8))
    assert plan.time.step_seconds is None
    assert plan.cost.dollars_per_million_tokens is None
    assert "Not known of CPU-8G: rate of matrix products" in plan.reasons[0]
    assert not plan.configuration.gradient_checkpointing


def test_untraced_configurations_are_left_out_and_counted():
    """With the profile of one code path alone, its configurations are searched and the rest are said to be missing."""
    job, cluster = a_job(8), a_cluster(2)
    (regime, *_rest) = required_regimes(job, cluster)
    plan = solve(job, cluster, {regime: made_up_profile(regime)}, estimate_memory=PlausibleMemory(10**9))
    assert any("have no traced profile" in reason for reason in plan.reasons)
    with pytest.raises(InputError, match="no traced profile"):
        solve(job, cluster, {}, estimate_memory=PlausibleMemory(10**9))


def test_a_length_that_was_not_traced_is_refused():
    """A tape that holds up to 256 tokens says nothing of 512."""
    job, cluster = a_job(8), a_cluster(2)
    short = {regime: replace(p, max_sequence_tokens=256) for regime, p in profiles_for(job, cluster).items()}
    with pytest.raises(InputError, match="512 tokens"):
        solve(job, cluster, short, estimate_memory=PlausibleMemory(10**9))


def test_the_search_is_a_function():
    """The same input gives the same plan, and profiles may come in any order."""
    job, cluster = a_job(8), a_cluster(4)
    profiles = profiles_for(job, cluster)
    backwards = dict(reversed(profiles.items()))
    first, second = (solve(job, cluster, p, estimate_memory=PlausibleMemory(10**9)) for p in (profiles, backwards))
    assert first == second


@pytest.mark.parametrize("num_params", [10**9, 10**11])
def test_an_estimate_searches_nothing_and_fits_or_not(num_params):
    """The configuration given is the one in the plan, with its figures, whether there is room for it or not."""
    job, cluster, given = a_job(8), a_cluster(2), a_configuration(per_device_train_batch_size=2)
    plan = estimate(job, cluster, profiles_for(job, cluster), given, estimate_memory=PlausibleMemory(num_params))
    assert (plan.configuration, plan.fallbacks, plan.alternatives) == (given, (), ())
    assert plan.time.step_seconds is not None
    assert "nothing was searched" in plan.reasons[0]


@pytest.mark.parametrize(
    ("configuration", "said"),
    [
        (a_configuration(per_device_train_batch_size=1), "not 8"),
        (a_configuration(num_processes=4), "4 processes on 2 devices"),
        (a_configuration(sharding="zero1", optim="adagrad"), "adagrad-makes-its-state-at-once"),
        (a_configuration(attention="eager"), "no traced profile"),
    ],
)
def test_an_estimate_of_what_cannot_run_is_refused(configuration, said):
    """Another global batch, another number of devices, what a library refuses, and a code path without profile."""
    job, cluster = a_job(8), a_cluster(2)
    with pytest.raises(InputError, match=said):
        estimate(job, cluster, profiles_for(job, cluster), configuration, estimate_memory=PlausibleMemory(10**9))


def test_an_estimate_may_use_what_is_only_avoided():
    """A paged optimizer on a CPU rank is not chosen, but its figures can be asked for."""
    job, cluster = a_job(8), a_cluster(2, CPU)
    given = a_configuration(optim="adamw_8bit", mixed_precision="no", per_device_train_batch_size=2)
    plan = estimate(job, cluster, profiles_for(job, cluster), given, estimate_memory=PlausibleMemory(10**9))
    assert plan.configuration == given


class FragmentingMemory:
    """Needs little by its tensors and more as the allocator lays them out, unless its segments grow.

    Args:
        laid_out_fraction: of the device, what it then needs.
    """

    def __init__(self, laid_out_fraction: float) -> None:
        self._laid_out_fraction = laid_out_fraction

    def __call__(self, profile, configuration, cluster, workload, *, replays=False):
        """Estimate seven tenths of the device, or what is asked for when replayed."""
        budget = cluster.device.memory_bytes
        bursts = replays and not configuration.expandable_segments
        return an_estimate(int(budget * (self._laid_out_fraction if bursts else 0.7)), budget)


@pytest.mark.parametrize("laid_out_fraction", [1.1, 0.98])
def test_segments_grow_where_a_plan_fits_only_so(laid_out_fraction):
    """What fragmentation alone keeps from fitting, or from leaving 3 % free, is planned with expandable_segments, and
    the plan says why.
    """
    job, cluster = a_job(), a_cluster(1)
    plan = solve(job, cluster, profiles_for(job, cluster), estimate_memory=FragmentingMemory(laid_out_fraction))
    assert plan.configuration.expandable_segments
    assert any(reason.startswith("allocator expandable_segments") for reason in plan.reasons)


def test_segments_do_not_grow_unasked_where_a_plan_fits():
    """The default allocator is the choice wherever it is enough."""
    job, cluster = a_job(), a_cluster(1)
    plan = solve(job, cluster, profiles_for(job, cluster), estimate_memory=PlausibleMemory(10**8))
    assert not plan.configuration.expandable_segments
