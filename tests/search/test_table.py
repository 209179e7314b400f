"""The table against each configuration evaluated alone: shipped profiles, the real models of memory and time."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from autofit.errors import InputError
from autofit.memory.assemble import estimate_memory
from autofit.memory.limits import unmodelled
from autofit.search import candidates
from autofit.search.allowed import allowed
from autofit.search.evaluate import HEADROOM_FRACTION, Evaluator
from autofit.search.rules import Site, broken_rule, rules_for
from autofit.search.table import tabulate
from autofit.spec.regimes import regime_of
from autofit.timing import TimeModel, estimate_time
from tests.plans import a_configuration, a_distribution, shipped_profiles
from tests.search.worlds import CPU, GPU, a_cluster, a_job, made_up_profile


@lru_cache
def small_profiles():
    """Return the shipped profiles of a small model, by regime."""
    return {profile.regime: profile for profile in shipped_profiles("HuggingFaceTB/SmolLM2-135M-Instruct")}


def subsets(*values):
    """Return tuples of some of the values."""
    return st.lists(st.sampled_from(values), min_size=1, max_size=3, unique=True).map(tuple)


small_jobs = st.fixed_dictionaries(
    {
        "global_batch": st.sampled_from([8, 24]),
        "methods": subsets("full", "lora", "qlora"),
        "optims": subsets(
            "adamw_torch_fused", "adamw_torch", "paged_adamw_8bit", "sgd", "adafactor", "lomo", "galore_adamw_layerwise"
        ),
        "shardings": st.just(()) | subsets("none", "ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2"),
        "offload": st.sampled_from([None, "none", "optimizer", "optimizer_and_parameters"]),
        "gradient_checkpointing": st.sampled_from([None, False, True]),
        "use_reentrant": st.sampled_from([None, None, True]),
        "micro_batch_sequences": st.sampled_from([(), (1, 2)]),
    }
)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(small_jobs, st.sampled_from([(4, (1, 4)), (2, (2,)), (1, (1,))]), st.sampled_from([None, 2**28]))
def test_each_row_is_the_configuration_evaluated_alone(wishes, devices, host_memory_bytes):
    """Bytes and seconds are those of the public functions to the last bit, and every candidate is accounted for."""
    num_devices, counts = devices
    job = a_job(wishes.pop("global_batch"), num_processes=counts, **wishes)
    cluster = a_cluster(num_devices, GPU, host_memory_bytes=host_memory_bytes)
    profiles = small_profiles()
    try:
        left = allowed(job, cluster)
    except InputError:
        assume(False)
    sizes = {micro_batch for block in left.blocks for micro_batch, _ in block.splits}
    table = tabulate(left, Evaluator(cluster, job.workload, profiles, tuple(sizes)))
    rows = {table.configuration(row): row for row in range(len(table))}
    assert len(rows) == len(table)

    site, rules = Site(cluster=cluster, config=job.model.config), rules_for(cluster.software, job.restrictions)
    seen: Counter[str] = Counter()
    for configuration in candidates(job, cluster):
        profile = profiles.get(regime_of(configuration, cluster.device))
        if broken_rule(configuration, site, rules):
            seen["fallen"] += 1
        elif unmodelled(configuration):
            seen["unmodelled"] += 1
        elif profile is None:
            seen["untraced"] += 1
        else:
            check_row(table, rows.get(configuration), profile, configuration, cluster, job.workload, seen)
    assert seen["fallen"] == left.fallen.total()
    assert seen["unmodelled"] == left.unmodelled.total() + table.unmodelled.total()
    assert (seen["untraced"], seen["row"]) == (table.num_untraced, len(table))


def check_row(table, row, profile, configuration, cluster, workload, seen):
    """Compare one row with the configuration evaluated by itself; where that is refused there is none."""
    part = cluster.using(configuration.num_processes)
    try:
        memory = estimate_memory(profile, configuration, part, workload)
    except InputError:
        assert row is None
        seen["unmodelled"] += 1
        return
    seen["row"] += 1
    time = estimate_time(profile, configuration, part, workload)
    assert table.needed_bytes[row] == memory.needed_bytes
    if table.knows_time:
        assert table.seconds[row] == time.step_seconds
    too_large = memory.needed_bytes > int(part.device.memory_bytes * (1 - HEADROOM_FRACTION))
    too_large_for_host = (memory.host_bytes or 0) > (part.host_memory_bytes or np.inf)
    expected = "device memory" if too_large else "host memory" if too_large_for_host else "none"
    assert table.misfit_of(row) == expected


@pytest.mark.parametrize("num_cores", [1, 3])
def test_what_is_not_modelled_is_counted_by_its_name(num_cores, monkeypatch):
    """A block that is refused is left out of the table and counted, by whichever process it was refused."""
    job, cluster = a_job(8, methods=("full", "lora")), a_cluster(2, GPU)
    left = allowed(job, cluster)
    original = Evaluator.evaluate_block

    def refusing(evaluator, number, block, mask):
        if block.first.method == "lora":
            raise InputError("lora on Tuesdays is not modelled.", to_fix="wait")
        return original(evaluator, number, block, mask)

    monkeypatch.setattr(Evaluator, "evaluate_block", refusing)
    sizes = {micro_batch for block in left.blocks for micro_batch, _ in block.splits}
    evaluator = Evaluator(cluster, job.workload, small_profiles(), tuple(sizes))
    table = tabulate(left, evaluator, num_cores=num_cores)
    refused = [
        int(mask.sum())
        for block, mask in zip(left.blocks, left.masks, strict=True)
        if block.first.method == "lora" and evaluator.profile(block.first)
    ]
    assert table.unmodelled == {"lora on Tuesdays": sum(refused)}
    assert len(table) == sum(int(mask.sum()) for mask in left.masks) - sum(refused) - table.num_untraced > 0


@pytest.mark.parametrize("batching", ["equal", "padded", "padding_free"])
@pytest.mark.parametrize("device", [GPU, CPU])
@pytest.mark.parametrize("sharding", ["ddp", "zero2", "zero3", "fsdp2"])
def test_seconds_of_a_block_are_those_of_each_configuration(sharding, device, batching):
    """Of data with lengths too, where ranks wait for the slowest in every micro-step, or once in a step."""
    job, cluster = a_job(16), a_cluster(2, device)
    workload = replace(job.workload, lengths=a_distribution([60, 200, 512]))
    optims, splits = ("adamw_torch_fused", "paged_adamw_8bit"), ((1, 8), (2, 4), (8, 1))
    first = a_configuration(sharding=sharding, batching=batching, num_processes=2)
    model = TimeModel(made_up_profile(regime_of(first, device)), cluster, workload)
    model.seconds(replace(first, sharding="ddp"), optims, splits)  # what an engine may share with another, it finds
    seconds, work = model.seconds(first, optims, splits), model.relative_works(first, optims, splits)
    for row, optim in enumerate(optims):
        for column, (micro_batch, num_micro_steps) in enumerate(splits):
            alone = replace(
                first,
                optim=optim,
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=num_micro_steps,
            )
            expected = TimeModel(model.profile, cluster, workload)
            known = expected.time(alone).step_seconds
            assert np.isnan(seconds[row, column]) if known is None else seconds[row, column] == known
            assert work[row, column] == expected.relative_work(alone)
