"""The space: exactly what the job leaves free, and the global batch in every point of it."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from autofit.errors import InputError
from autofit.search import candidates, required_regimes
from autofit.spec.configuration import Lora
from autofit.spec.job import QuantizationWish
from tests.plans import shipped_profiles
from tests.search.worlds import CPU, GPU, OLD_GPU, a_cluster, a_job
from tools.make_profiles import POPULAR


@given(st.integers(1, 512), st.integers(1, 16), st.sampled_from([GPU, CPU]))
def test_every_candidate_trains_the_global_batch_on_every_device(per_device, num_devices, device):
    """Micro-batch x accumulation x processes is the global batch, and processes are all devices."""
    found = candidates(a_job(per_device * num_devices), a_cluster(num_devices, device))
    assert {each.global_batch_sequences for each in found} == {per_device * num_devices}
    assert {each.num_processes for each in found} == {num_devices}


def test_the_space_is_the_whole_product_and_nothing_twice():
    """Three methods, four shardings with three optimizers, three offloads with one, and every divisor of four."""
    found = {
        (c.method, c.sharding, c.offload, c.gradient_checkpointing, c.optim, c.per_device_train_batch_size)
        for c in candidates(a_job(8), a_cluster(2))
    }
    on_the_host = {("zero2", "optimizer"), ("zero3", "optimizer"), ("zero3", "optimizer_and_parameters")}
    everywhere = product(("ddp", "zero1", "zero2", "zero3"), ("none",))
    optims = ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit")
    engines = {*product(everywhere, optims), *product(on_the_host, optims[:1])}
    expected = {
        (method, *engine, checkpoints, optim, size)
        for method, (engine, optim), checkpoints, size in product(
            ("full", "lora", "qlora"), engines, (False, True), (1, 2, 4)
        )
    }
    assert found == expected
    assert len(candidates(a_job(8), a_cluster(2))) == len(expected)


def test_offload_is_tried_unasked_where_it_takes_no_other_code_path():
    """On several devices under DeepSpeed; on one, where it would bring DeepSpeed in, only where it is asked for."""
    for num_devices in (1, 4):
        job, cluster = a_job(8), a_cluster(num_devices)
        plain = required_regimes(replace(job, restrictions=replace(job.restrictions, offload="none")), cluster)
        assert set(required_regimes(job, cluster)) == set(plain)
    for cluster in (a_cluster(1), a_cluster(4, CPU)):
        assert {c.offload for c in candidates(a_job(8), cluster)} == {"none"}
    asked = candidates(a_job(8, offload="optimizer", optims=("adamw_torch_fused",)), a_cluster(1))
    assert {(c.sharding, c.offload) for c in asked} == {("zero2", "optimizer"), ("zero3", "optimizer")}


def test_fewer_devices_than_given_are_used_where_that_is_allowed():
    """Each number keeps the global batch, one device has nothing to shard, and what is no part is refused."""
    found = candidates(a_job(8, num_processes=(1, 2, 4)), a_cluster(4))
    assert {c.num_processes for c in found} == {1, 2, 4}
    assert {c.global_batch_sequences for c in found} == {8}
    assert {c.sharding for c in found if c.num_processes == 1} == {"none"}
    assert "none" not in {c.sharding for c in found if c.num_processes > 1}
    with pytest.raises(InputError, match="3 processes") as refused:
        candidates(a_job(12, num_processes=(3,)), a_cluster(4))
    assert "1, 2, 4" in refused.value.to_fix


@pytest.mark.parametrize(
    ("num_nodes", "per_node", "parts"), [(1, 8, (1, 2, 4, 8)), (4, 8, (1, 2, 4, 8, 16, 32)), (3, 2, (1, 2, 6))]
)
def test_a_part_of_a_cluster_is_within_a_node_or_whole_nodes(num_nodes, per_node, parts):
    """Every part has as many devices as it was asked for, and no node more than it has."""
    cluster = a_cluster(per_node, num_nodes=num_nodes)
    assert cluster.parts == parts
    for num in parts:
        part = cluster.using(num)
        assert part.num_devices == num
        assert part.num_devices_per_node == min(num, per_node)
    with pytest.raises(ValueError, match="devices"):
        cluster.using(num_nodes * per_node + 1)


def test_one_device_has_nothing_to_shard():
    """On one device there is neither DDP nor DeepSpeed; asking for it is refused with what there is."""
    assert {c.sharding for c in candidates(a_job(), a_cluster(1))} == {"none"}
    with pytest.raises(InputError, match="zero3 cannot be used on 1 device") as refused:
        candidates(a_job(shardings=("zero3",)), a_cluster(1))
    assert "none" in refused.value.to_fix


def test_restrictions_are_kept():
    """What the user fixes has no other value in any candidate."""
    job = a_job(
        methods=("lora",),
        optims=("adamw_torch",),
        shardings=("zero2",),
        micro_batch_sequences=(2,),
        gradient_checkpointing=True,
        offload="none",
    )
    (only,) = candidates(job, a_cluster(2))
    assert (only.method, only.optim, only.sharding, only.per_device_train_batch_size) == (
        "lora",
        "adamw_torch",
        "zero2",
        2,
    )
    assert (only.gradient_accumulation_steps, only.gradient_checkpointing) == (2, True)


@pytest.mark.parametrize(("batch", "devices", "nearest"), [(7, 2, "6 or 8"), (2, 4, "of 4,"), (0, 2, "of 2,")])
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest(batch, devices, nearest):
    """The global batch is never changed to fit the devices."""
    with pytest.raises(InputError, match="does not divide") as refused:
        candidates(a_job(batch), a_cluster(devices))
    assert nearest in refused.value.to_fix


def test_a_micro_batch_that_does_not_divide_is_refused():
    """A micro-batch of 3 cannot make 4 sequences; those that can are named."""
    with pytest.raises(InputError, match="micro-batch of 3") as refused:
        candidates(a_job(8, micro_batch_sequences=(1, 3)), a_cluster(2))
    assert "1, 2, 4" in refused.value.to_fix


@pytest.mark.parametrize(
    ("precision", "device", "sharding", "method", "expected"),
    [
        ("auto", GPU, "ddp", "full", ("float32", "bf16")),
        ("auto", GPU, "zero2", "full", ("bfloat16", "bf16")),
        ("auto", GPU, "ddp", "lora", ("bfloat16", "bf16")),
        ("auto", OLD_GPU, "ddp", "full", ("float32", "fp16")),
        ("auto", OLD_GPU, "zero3", "lora", ("float16", "fp16")),
        ("auto", CPU, "ddp", "qlora", ("float32", "no")),
        ("bf16", CPU, "zero2", "full", ("bfloat16", "bf16")),
        ("pure-bf16", GPU, "ddp", "full", ("bfloat16", "no")),
        ("fp32", GPU, "zero3", "full", ("float32", "no")),
    ],
)
def test_dtypes_follow_from_precision_method_and_sharding(precision, device, sharding, method, expected):
    """Weights are fp32 only where nothing else keeps an fp32 copy of what trains."""
    job = a_job(precision=precision, shardings=(sharding,), methods=(method,))
    found = {(c.weights_dtype, c.mixed_precision) for c in candidates(job, a_cluster(2, device))}
    assert found == {expected}


@pytest.mark.parametrize(
    ("precision", "sharding", "expected"),
    [
        ("bf16", "ddp", ("bfloat16", "uint8")),
        ("bf16", "zero3", ("bfloat16", "bfloat16")),
        ("fp16", "zero3", ("float16", "float16")),
        ("fp32", "zero3", ("float32", "uint8")),
    ],
)
def test_quantised_weights_are_packed_in_what_deepspeed_casts_to(precision, sharding, expected):
    """Stage 3 casts floating parameters to its half dtype: packed in that dtype, the cast changes nothing."""
    job = a_job(precision=precision, shardings=(sharding,), methods=("qlora",))
    packed = {c.quantization for c in candidates(job, a_cluster(2))}
    assert {(q.compute_dtype, q.storage_dtype) for q in packed} == {expected}


def test_reentrant_checkpointing_is_for_adapters_under_stage_3_alone():
    """Everywhere else the implementation that torch recommends is used."""
    reentrant = {
        (c.method != "full", c.sharding, c.gradient_checkpointing)
        for c in candidates(a_job(), a_cluster())
        if c.use_reentrant
    }
    assert reentrant == {(True, "zero3", True)}


def test_several_precisions_attentions_and_replicas_are_searched_where_they_are_allowed():
    """Each value is tried with all others, but for replicas, which only FSDP has."""
    job = a_job(
        8,
        methods=("full",),
        precision=("bf16", "pure-bf16"),
        attention=("sdpa", "eager"),
        shardings=("ddp", "fsdp2"),
        num_replicas=(1, 2),
        offload="none",
    )
    found = candidates(job, a_cluster(4))
    assert {(c.weights_dtype, c.mixed_precision) for c in found} == {("float32", "bf16"), ("bfloat16", "no")}
    assert {c.attention for c in found} == {"sdpa", "eager"}
    assert {(c.sharding, c.num_replicas) for c in found} == {("ddp", 1), ("fsdp2", 1), ("fsdp2", 2)}
    assert len(found) == len(set(found)) == 2 * 2 * 3 * 2 * 3 * 2


def test_losses_are_searched_where_they_are_allowed():
    """Each is tried with all others, and is one of the knobs that a plan gives its reasons for."""
    both = candidates(a_job(8, loss=("stock", "liger")), a_cluster(2))
    alone = candidates(a_job(8), a_cluster(2))
    assert len(both) == 2 * len(alone)
    assert {c.loss for c in both} == {"stock", "liger"}


def test_adapters_and_codes_are_searched_where_they_are_allowed():
    """Each adapter of lora, each adapter with each code of qlora, and neither of full."""
    wishes = (QuantizationWish(), QuantizationWish(bits=8), QuantizationWish())
    job = a_job(2, lora=(Lora(r=8), Lora(r=64)), quantization=wishes, optims=("sgd",), gradient_checkpointing=False)
    found = candidates(job, a_cluster(1))
    each = Counter((c.method, c.lora and c.lora.r, c.quantization and c.quantization.bits) for c in found)
    expected = [("full", None, None), *product(("lora",), (8, 64), (None,)), *product(("qlora",), (8, 64), (4, 8))]
    assert each == Counter(2 * expected)
    unasked = candidates(a_job(8), a_cluster(4))
    assert {c.lora for c in unasked} == {None, Lora()}
    assert {c.quantization and (c.quantization.quant_type, c.quantization.double_quant) for c in unasked} == {
        None,
        ("nf4", True),
    }


def test_unasked_there_is_one_precision_one_attention_and_one_replica():
    """What is stored for the shipped models is enough for a search that nobody has restricted."""
    found = candidates(a_job(8), a_cluster(4))
    assert {(c.mixed_precision, c.attention, c.num_replicas, c.loss) for c in found} == {("bf16", "sdpa", 1, "stock")}


@pytest.mark.parametrize("num_devices", [1, 2, 8])
@pytest.mark.parametrize("device", [GPU, CPU], ids=lambda device: device.name)
def test_an_unrestricted_search_needs_only_what_is_shipped(device, num_devices):
    """Every code path of the ten most asked for that it takes on GPUs from Ampere on, and on CPUs, is stored."""
    packs = [shipped_profiles(name) for name in POPULAR]
    assert len(packs) == 10
    needed = set(required_regimes(a_job(8), a_cluster(num_devices, device)))
    for pack in packs:
        assert needed <= {profile.regime for profile in pack}
