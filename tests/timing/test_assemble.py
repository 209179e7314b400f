"""The time of a step: worked by hand, bounded, and monotone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from autofit.spec.hardware import Cluster, Device
from autofit.spec.job import RunLength, Workload
from autofit.spec.profile import ON_HOST, StaticTensor
from autofit.timing import TimeModel, estimate_cost, estimate_time, run_cost
from autofit.timing.batches import estimate_epoch
from autofit.timing.binding import COMPUTE, MEMORY, NETWORK, binding_resource
from autofit.timing.collectives import groups
from autofit.timing.hooks import ADAPTER_UNIT_SECONDS, ZERO3_SECONDS
from autofit.timing.links import HOP_SECONDS, PCIE_FRACTION, SWITCHED_FRACTION, collective_seconds, fabric_of
from autofit.timing.rates import ACHIEVABLE_MEMORY_FRACTION, LAUNCH_SECONDS
from tests.plans import a_configuration, a_distribution
from tests.timing.hand_profiles import a_profile, a_regime, a_segment, an_adapted_profile, constant, per_token

DEVICE = Device(
    name="A100-SXM-80G",
    kind="cuda",
    memory_bytes=80 * 10**9,
    compute_capability=(8, 0),
    computes_bf16=True,
    bf16_flops_per_second=312e12,
    fp16_flops_per_second=312e12,
    fp32_flops_per_second=19.5e12,
    tf32_flops_per_second=156e12,
    memory_bytes_per_second=2e12,
    peer_bytes_per_second=300e9,
    host_bytes_per_second=32e9,
    dollars_per_hour=2.0,
)
PAIR = Cluster(device=DEVICE, num_devices_per_node=2)
ONE = Cluster(device=DEVICE, num_devices_per_node=1)
WORKLOAD = Workload(sequence_tokens=4096, global_batch_sequences=8)
SEGMENTS = (
    a_segment(
        kind="forward",
        matmul_flops=per_token(2e9),
        matmul_bytes=constant(2e9),
        other_bytes=per_token(1e5),
        num_kernels=100,
    ),
    a_segment(
        kind="backward",
        matmul_flops=per_token(4e9),
        matmul_bytes=constant(4e9),
        other_bytes=per_token(2e5),
        num_kernels=200,
    ),
)
PROFILE = a_profile(segments=SEGMENTS)
ALONE = {"sharding": "none", "num_processes": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


BYTES_PER_SECOND = 2e12 * ACHIEVABLE_MEMORY_FRACTION


def test_a_step_on_one_device_is_the_sum_of_its_kernels():
    """Worked by hand: 6e9 FLOPs a token at 265.5 TFLOPS; 6e9 bytes in 4 products' weights, 3e5 a token, 28 + 12 a
    parameter of a fused update and of clipping, and 12 a parameter to add each of three gradients to those before.
    """
    time = estimate_time(PROFILE, a_configuration(**ALONE), ONE, WORKLOAD)
    tokens = 8 * 4096
    matmul = tokens * 6e9 / 265.5e12 + 4 * 6e9 / BYTES_PER_SECOND
    memory, optimizer = (tokens * 3e5 + 3 * 1e9 * 12) / BYTES_PER_SECOND, 1e9 * 40 / BYTES_PER_SECOND
    assert time.step_seconds == pytest.approx(matmul + memory + optimizer)
    assert time.terms["launch"] == pytest.approx(4 * 300 * LAUNCH_SECONDS)
    assert time.tokens_per_second == pytest.approx(tokens / time.step_seconds)


def test_utilization_is_of_the_model_without_recomputation():
    """6e9 FLOPs a token over 312 TFLOPS; with checkpoints backward redoes forward's third, which does not count."""
    time = estimate_time(PROFILE, a_configuration(**ALONE), ONE, WORKLOAD)
    expected = 8 * 4096 * 6e9 / time.step_seconds / 312e12
    assert time.model_flops_utilization_fraction == pytest.approx(expected)
    forward, backward = SEGMENTS
    again = replace(backward, matmul_flops=per_token(6e9))
    recomputing = a_profile(segments=(forward, again), regime=a_regime(gradient_checkpointing=True))
    slower = estimate_time(recomputing, a_configuration(gradient_checkpointing=True, **ALONE), ONE, WORKLOAD)
    assert slower.step_seconds > time.step_seconds
    assert slower.model_flops_utilization_fraction == pytest.approx(8 * 4096 * 6e9 / slower.step_seconds / 312e12)


def test_small_work_waits_for_the_host():
    """A micro-step whose kernels take no time still takes as long as issuing them."""
    tiny = Workload(sequence_tokens=1, global_batch_sequences=8)
    profile = a_profile(num_params=1, segments=tuple(replace(s, matmul_bytes=constant(0.0)) for s in SEGMENTS))
    time = estimate_time(profile, a_configuration(**ALONE), ONE, tiny)
    assert time.step_seconds == pytest.approx(4 * 300 * LAUNCH_SECONDS, rel=0.01)


def test_repeated_layers_count_as_often_as_the_model_has_them():
    """Six traced layers of a model of 32: the third stands for 28, its twin for none."""
    layers = tuple(a_segment(layer=n, matmul_flops=constant(1e15)) for n in range(6))
    profile = replace(a_profile(segments=layers), num_layers=32, num_traced_layers=6)
    time = estimate_time(profile, a_configuration(**ALONE), ONE, WORKLOAD)
    assert time.terms["matmul"] == pytest.approx(4 * 32 * 1e15 / 265.5e12)


def test_ddp_hides_its_reduction_behind_backward_and_stage_2_does_not():
    """1e9 fp32 gradients take 17 ms over 240 GB/s and two hops for each of 153 buckets.

    Under DDP all but the last bucket hides behind backward, and costs it memory's bandwidth: three times 4 GB.
    Buckets are filled and emptied: twice as many bytes copied. Stage 2 waits for its reductions, after every
    micro-step, and for its weights.
    """
    configuration = a_configuration(per_device_train_batch_size=2, gradient_accumulation_steps=2, sharding="ddp")
    ddp = estimate_time(PROFILE, configuration, PAIR, WORKLOAD)
    alone = estimate_time(PROFILE, replace(configuration, sharding="none"), PAIR, WORKLOAD)
    buckets = 153
    hops = 8.4e-6 + 2 * HOP_SECONDS["switched"]["simple"]
    communication = 4e9 / (300e9 * SWITCHED_FRACTION) + buckets * hops
    assert ddp.terms["communication"] == pytest.approx(communication)
    hidden = communication * (1 - 1 / buckets)
    beside = communication - hidden + hidden / communication * 3 * 4e9 / BYTES_PER_SECOND
    copied = 2 * 2 * 4e9 / BYTES_PER_SECOND
    assert ddp.step_seconds == pytest.approx(alone.step_seconds + beside + copied)
    sharded = estimate_time(PROFILE, replace(configuration, sharding="zero2"), PAIR, WORKLOAD)
    kernels = sum(sharded.terms[name] for name in ("matmul", "memory", "optimizer"))
    assert sharded.step_seconds == pytest.approx(kernels + sharded.terms["communication"])


def test_fsdp_leaves_summing_to_the_last_micro_step():
    """Four micro-steps gather eight times and reduce once; stage 3 reduces four times."""
    configuration = a_configuration(gradient_accumulation_steps=4, sharding="fsdp1")
    fsdp, zero3 = (
        estimate_time(PROFILE, replace(configuration, sharding=sharding), PAIR, WORKLOAD).terms["communication"]
        for sharding in ("fsdp1", "zero3")
    )
    assert fsdp / zero3 == pytest.approx(9 / 12, rel=0.01)


def test_slow_links_do_not_hide_behind_short_sequences():
    """Under stage 3 a token's kernels hide next to nothing of gathering 4 GB; 64,000 times as many hide it all.

    What is left of it then is the memory's bandwidth that it takes: three times 240 GB/s, but for latencies.
    """
    weight = StaticTensor(
        name="w", num_elements=10**7, dtype="float32", trains=True, repeats=True, kind="parameter", rows=1000
    )
    segments = tuple(replace(s, matmul_bytes=constant(0.0)) for s in SEGMENTS)
    profile = replace(a_profile(segments=segments, tensors=(weight,), num_layers=100), hidden_size=4096)

    def exposed(tokens):
        workload = Workload(sequence_tokens=tokens, global_batch_sequences=2)
        sharded = a_configuration(sharding="zero3", per_device_train_batch_size=1, gradient_accumulation_steps=1)
        time = estimate_time(profile, sharded, PAIR, workload)
        alone = estimate_time(profile, replace(sharded, sharding="none"), PAIR, workload)
        update = alone.terms["optimizer"] - time.terms["optimizer"]
        copied = 2 * 4e9 / BYTES_PER_SECOND
        return (time.step_seconds - alone.step_seconds + update - copied) / time.terms["communication"]

    assert exposed(1) > 0.9
    assert exposed(64_000) == pytest.approx(3 * 240e9 / BYTES_PER_SECOND, rel=0.1)


@pytest.mark.parametrize("sharding", ["zero3", "fsdp1"])
def test_a_step_is_never_shorter_than_what_it_sends(sharding):
    """A link of 100 MB a second leaves kernels nothing to hide: four micro-steps take as long as their gathers do."""
    weight = StaticTensor(
        name="w", num_elements=10**7, dtype="float32", trains=True, repeats=True, kind="parameter", rows=1000
    )
    profile = replace(a_profile(segments=SEGMENTS, tensors=(weight,), num_layers=100), hidden_size=4096)
    slow = replace(PAIR, device=replace(DEVICE, peer_bytes_per_second=1e8))
    configuration = a_configuration(sharding=sharding, gradient_accumulation_steps=4, per_device_train_batch_size=1)
    time = estimate_time(profile, configuration, slow, WORKLOAD)
    assert time.step_seconds >= time.terms["communication"] > 4 * 2 * 4e9 / 2 / 1e8


def test_evicted_pages_lie_between_the_bounds():
    """Of 1e9 parameters 4 bytes of state go to the host and come back at 32 GB/s: the slowest step has it, no other."""
    paged = estimate_time(PROFILE, a_configuration(optim="paged_adamw_8bit", **ALONE), ONE, WORKLOAD)
    kept = estimate_time(PROFILE, a_configuration(optim="adamw_8bit", **ALONE), ONE, WORKLOAD)
    assert paged.terms["paging"] == pytest.approx(4 * 1e9 / 32e9)
    assert paged.step_seconds_upper - kept.step_seconds_upper == pytest.approx(4 * 1e9 / 32e9)
    assert paged.step_seconds_lower == kept.step_seconds_lower


def test_offload_pays_for_the_link_and_for_the_processors():
    """Stage 2, offloaded: 1 ns a parameter on the host's processors; gradients leave and weights come over the link."""
    configuration = a_configuration(sharding="zero2", offload="optimizer", gradient_accumulation_steps=1)
    profile = replace(PROFILE, hidden_size=4096)
    time = estimate_time(profile, configuration, PAIR, WORKLOAD)
    assert time.terms["optimizer"] == pytest.approx(1e9 * 1e-9)
    assert time.terms["offload"] == pytest.approx(2 * 0.5e9 * 4 / 32e9)
    on_device = estimate_time(profile, replace(configuration, offload="none"), PAIR, WORKLOAD)
    assert time.step_seconds > 3 * on_device.step_seconds


def test_offloaded_weights_come_for_every_gather():
    """Stage 3 with weights on the host: half of 4 GB comes twice, as much gradient leaves once."""
    configuration = a_configuration(sharding="zero3", offload="optimizer_and_parameters", gradient_accumulation_steps=1)
    time = estimate_time(replace(PROFILE, hidden_size=4096), configuration, PAIR, WORKLOAD)
    assert time.terms["offload"] == pytest.approx(3 * 0.5e9 * 4 / 32e9)


def test_the_engine_of_stage_3_keeps_the_host_busy():
    """Each weight's hooks take half a millisecond of the host in forward and backward, and again for recomputation.

    So with little work a micro-step takes as long as they do: 100 weights twice, or three times.
    """
    weight = StaticTensor(
        name="w", num_elements=10, dtype="float32", trains=True, repeats=True, kind="parameter", rows=2
    )
    profile = a_profile(segments=SEGMENTS, tensors=(weight,), num_layers=100)
    for recomputes, passes in ((False, 2), (True, 3)):
        configuration = a_configuration(sharding="zero3", gradient_checkpointing=recomputes)
        time = estimate_time(profile, configuration, PAIR, WORKLOAD)
        ddp = estimate_time(profile, replace(configuration, sharding="ddp"), PAIR, WORKLOAD)
        micro_steps = configuration.gradient_accumulation_steps
        hooks = (time.terms["launch"] - ddp.terms["launch"]) / micro_steps
        assert hooks == pytest.approx(100 * passes * ZERO3_SECONDS)


def test_fsdp1_makes_a_unit_of_each_adapters_weight_that_the_device_waits_for():
    """As many as peft's own policy wraps beside the layers, each in both passes, and not hidden behind kernels.

    FSDP2 knows layers only. Where the device has much to do, the two differ by what the adapters' units take,
    and by forward's gathers of 192 bytes, of which FSDP2 hides all but the first of four messages.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils.other import fsdp_auto_wrap_policy
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 8}
    config = LlamaConfig(**sizes, num_hidden_layers=3, num_attention_heads=1, num_key_value_heads=1)
    lora = LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = get_peft_model(LlamaForCausalLM(config), lora)
    policy = fsdp_auto_wrap_policy(model)
    wrapped = [module for module in model.modules() if policy(module, recurse=False, nonwrapped_numel=0)]
    num_adapters = sum(not isinstance(module, LlamaDecoderLayer) for module in wrapped)
    tensors = tuple(
        StaticTensor(name=str(n), num_elements=8, dtype="float32", trains=True, repeats=True, kind="adapter", rows=2)
        for n in range(4 * 2)
    )
    profile = a_profile(segments=SEGMENTS, tensors=tensors, num_layers=3)
    first, second = (
        estimate_time(profile, a_configuration(sharding=each), PAIR, WORKLOAD) for each in ("fsdp1", "fsdp2")
    )
    accumulation = a_configuration().gradient_accumulation_steps
    expected = accumulation * 2 * num_adapters * ADAPTER_UNIT_SECONDS
    assert num_adapters == 4 * 2 * 3
    assert first.terms["launch"] - second.terms["launch"] == pytest.approx(expected)
    fabric = fabric_of(PAIR)
    shards, _ = groups(a_configuration(sharding="fsdp2"), fabric)
    gathers = collective_seconds("all_gather", 192, shards, fabric, num_messages=4)
    hidden = accumulation * gathers * 3 / 4
    assert first.step_seconds - second.step_seconds == pytest.approx(expected + hidden, rel=1e-6)
    assert first.step_seconds_lower == second.step_seconds_lower


def test_a_gather_among_adapters_hides_behind_what_follows_the_last_adapted_product():
    """4e9 bytes of weights, gathered in two messages, over PCIe; forward takes a second.

    If the last of two products is not adapted and has half the weights, there is room for the second message; if it
    has a thousandth, for a thousandth of the pass. What hides still takes three accesses of memory for each byte.
    """
    on_pcie = replace(PAIR, device=replace(DEVICE, peer_bytes_per_second=32e9))
    segments = (a_segment(matmul_flops=constant(265.5e12)), a_segment(kind="backward", matmul_flops=constant(531e12)))
    weight = StaticTensor(
        name="w", num_elements=0, dtype="bfloat16", trains=False, repeats=True, kind="parameter", rows=2
    )
    adapter = replace(weight, name="lora", num_elements=10, trains=True, kind="adapter")

    def step_seconds(last):
        first, second = replace(weight, num_elements=2_000_000_000 - last), replace(weight, num_elements=last)
        tensors = (first, adapter, adapter, second)
        profile = a_profile(segments=segments, tensors=tensors, regime=a_regime(method="lora"))
        configuration = a_configuration(sharding="fsdp1", gradient_accumulation_steps=1)
        return estimate_time(profile, configuration, on_pcie, WORKLOAD).step_seconds

    second_message = 2e9 / (32e9 * PCIE_FRACTION) / 2
    kept_from_kernels = 3 * 1e9 / BYTES_PER_SECOND
    gained = step_seconds(2_000_000) - step_seconds(1_000_000_000)
    assert gained == pytest.approx(second_message - kept_from_kernels - 0.001, rel=0.01)


def test_offloaded_checkpoints_cross_the_link_twice():
    """What forward sends to the host comes back in backward: 1e9 bytes, there and back, in each of 4 micro-steps."""
    sent = replace(SEGMENTS[0], events=((0, ON_HOST),))
    profile = replace(a_profile(segments=(sent, SEGMENTS[1])), sizes=(constant(1e9),))
    configuration = a_configuration(checkpoint_offload=True, **ALONE)
    time = estimate_time(profile, configuration, ONE, WORKLOAD)
    assert time.terms["offload"] == pytest.approx(4 * 2 * 1e9 / 32e9)


def test_quantised_weights_are_written_and_read_again_in_forward():
    """A forward product unpacks its weight to bf16: 2 bytes out and 2 in, once more where forward is recomputed."""

    def dequantization_bytes(*, recomputes):
        profile = a_profile(
            segments=(
                a_segment(kind="forward", dequantized_elements=1e9, matmul_flops=constant(1.0)),
                a_segment(kind="backward", dequantized_elements=2e9 if recomputes else 1e9),
            ),
            regime=a_regime(method="qlora", gradient_checkpointing=recomputes),
        )
        configuration = a_configuration(method="qlora", gradient_checkpointing=recomputes, **ALONE)
        time = estimate_time(profile, configuration, ONE, WORKLOAD)
        return time.terms["dequantization"] * BYTES_PER_SECOND / 4

    assert dequantization_bytes(recomputes=False) == pytest.approx(4e9)
    assert dequantization_bytes(recomputes=True) == pytest.approx(8e9)


@pytest.mark.parametrize(
    ("dtype", "autocast", "tf32", "measured"),
    [
        ("float32", "bf16", False, 265.5e12),
        ("bfloat16", "no", False, 265.5e12),
        ("float16", "no", False, 262.4e12),
        ("float32", "no", False, 19.1e12),
        ("float32", "no", True, 156e12 * 0.7955),
    ],
)
def test_products_run_at_the_rate_of_their_dtype(dtype, autocast, tf32, measured):
    """Autocast's dtype where it is on, else the weights'; in fp32 without tensor cores, unless TF32 is allowed.

    Rates are those measured on an A100; of TF32 there, the median of other devices' shares.
    """
    regime = a_regime(weights_dtype=dtype, autocast=autocast)
    profile = a_profile(segments=(a_segment(matmul_flops=constant(1e15)),), regime=regime)
    time = estimate_time(profile, a_configuration(tf32=tf32, **ALONE), ONE, WORKLOAD)
    assert time.terms["matmul"] == pytest.approx(4 * 1e15 / measured, rel=0.02)


def test_adapters_in_fp32_are_slow():
    """Without autocast peft's fp32 adapters are multiplied in fp32: 2 FLOPs an element, once forward, twice back."""
    profile = an_adapted_profile(num_frozen=10**9, num_trained=10**7)
    profile = replace(profile, regime=replace(profile.regime, autocast="no"), segments=SEGMENTS)
    in_half = replace(profile, regime=replace(profile.regime, adapter_dtype="bfloat16"))
    configuration = a_configuration(method="lora", **ALONE)
    slow, fast = (estimate_time(each, configuration, ONE, WORKLOAD).terms["matmul"] for each in (profile, in_half))
    flops = 8 * 4096 * 2 * 10**7 * 3
    assert slow - fast == pytest.approx(flops * (1 / 19.1e12 - 1 / 265.5e12), rel=0.001)


def test_a_decomposition_nobody_timed_gives_no_time():
    """GaLore's projections have no published time: the estimate has none, says why, and still orders."""
    model = TimeModel(PROFILE, ONE, WORKLOAD)
    configuration = a_configuration(optim="galore_adamw", **ALONE)
    assert model.time(configuration).step_seconds is None
    assert "singular value" in model.missing(configuration)[0]
    assert model.relative_work(configuration) > 0


@pytest.mark.parametrize(
    ("missing", "changes", "said"),
    [
        ("bf16_flops_per_second", {}, "matrix products"),
        ("memory_bytes_per_second", {}, "memory bandwidth (bandwidth_gb_s)"),
        ("host_bytes_per_second", {"optim": "paged_adamw_8bit"}, "to the host"),
        ("host_bytes_per_second", {"sharding": "zero2", "offload": "optimizer"}, "to the host"),
    ],
)
def test_a_missing_figure_is_named_and_no_time_is_given(missing, changes, said):
    """What no source gives is not guessed: every figure is None, and the model says which one it lacks."""
    cluster = replace(PAIR, device=replace(DEVICE, **{missing: None}))
    configuration = a_configuration(**changes)
    time = estimate_time(PROFILE, configuration, cluster, WORKLOAD)
    assert (time.step_seconds, time.tokens_per_second, time.terms) == (None, None, {})
    assert said in TimeModel(PROFILE, cluster, WORKLOAD).missing(configuration)[0]
    cost = estimate_cost(time, cluster, WORKLOAD, configuration)
    assert (cost.dollars_per_million_tokens, cost.device_hours_per_million_tokens) == (None, None)


def test_devices_without_a_link_reach_each_other_through_the_host():
    """Without a peer link the ring runs at a share of the host's rate; without either there is no time."""
    slow = replace(DEVICE, peer_bytes_per_second=None)
    configuration = a_configuration()
    time = estimate_time(PROFILE, configuration, replace(PAIR, device=slow), WORKLOAD)
    sent = 4e9 / (32e9 * PCIE_FRACTION)
    assert time.terms["communication"] == pytest.approx(sent, rel=0.03)
    unknown = replace(slow, host_bytes_per_second=None)
    assert estimate_time(PROFILE, configuration, replace(PAIR, device=unknown), WORKLOAD).step_seconds is None


def test_nodes_are_joined_by_their_network():
    """Two nodes ring over the slower of link and network; a network that is not known gives no time."""
    cluster = Cluster(device=DEVICE, num_devices_per_node=8, num_nodes=2, inter_node_bytes_per_second=50e9)
    configuration = a_configuration(num_processes=16)
    time = estimate_time(PROFILE, configuration, cluster, WORKLOAD)
    assert time.terms["communication"] == pytest.approx(2 * 15 / 16 * 4e9 / (50e9 * 0.9), rel=0.15)
    unknown = replace(cluster, inter_node_bytes_per_second=None)
    assert TimeModel(PROFILE, unknown, WORKLOAD).missing(configuration) == (
        "bandwidth between nodes (inter_node_gb_s)",
    )


@pytest.mark.parametrize(
    ("bytes_per_token", "network", "bound"),
    [(1e5, 1.25e9, NETWORK), (1e5, 400e9, COMPUTE), (1e8, 400e9, MEMORY)],
    ids=["10 Gbit Ethernet", "eight adapters of 400 Gbit", "no fused kernels"],
)
def test_what_binds_is_what_makes_a_step_faster(bytes_per_token, network, bound):
    """Two nodes of eight under stage 3: of network, arithmetic and memory only what is named speeds a step up by 20 %.

    Over 10 Gbit Ethernet a step of 2,048 tokens a device is bound by the network: it takes what each rank sends of
    1e9 fp32 parameters, 15 / 16 of them three times, at 0.9 of the network.
    """
    workload = Workload(sequence_tokens=2048, global_batch_sequences=64)
    configuration = a_configuration(
        sharding="zero3", num_processes=16, per_device_train_batch_size=4, gradient_accumulation_steps=1
    )
    profile = a_profile(segments=tuple(replace(s, other_bytes=per_token(bytes_per_token)) for s in SEGMENTS))
    cluster = Cluster(device=DEVICE, num_devices_per_node=8, num_nodes=2, inter_node_bytes_per_second=network)
    time = estimate_time(profile, configuration, cluster, workload)
    assert binding_resource(time.terms, configuration, cluster) == bound
    faster = {
        NETWORK: replace(cluster, inter_node_bytes_per_second=10 * network),
        COMPUTE: replace(cluster, device=replace(DEVICE, bf16_flops_per_second=10 * 312e12)),
        MEMORY: replace(cluster, device=replace(DEVICE, memory_bytes_per_second=10 * 2e12)),
    }
    gained = {
        name: time.step_seconds / estimate_time(profile, configuration, other, workload).step_seconds
        for name, other in faster.items()
    }
    assert [name for name, gain in gained.items() if gain > 1.2] == [name for name in gained if name == bound]
    if bound == NETWORK:
        sent = 3 * 15 / 16 * 4e9 / (0.9 * network)
        assert time.step_seconds_lower <= sent <= time.step_seconds <= 1.1 * sent


def test_data_parallel_scaling_over_nodes_is_close_to_linear_on_fast_networks():
    """At 8,192 tokens a device, 64 nodes of 8 keep 90 % of one node's speed for each device; on 10 GB/s they do not."""

    def per_device(num_nodes, network):
        cluster = Cluster(
            device=DEVICE, num_devices_per_node=8, num_nodes=num_nodes, inter_node_bytes_per_second=network
        )
        ranks = 8 * num_nodes
        workload = Workload(sequence_tokens=4096, global_batch_sequences=2 * ranks)
        configuration = a_configuration(
            num_processes=ranks, per_device_train_batch_size=2, gradient_accumulation_steps=1, sharding="ddp"
        )
        return estimate_time(PROFILE, configuration, cluster, workload).tokens_per_second / ranks

    assert per_device(64, 200e9) > 0.9 * per_device(1, None)
    assert per_device(64, 10e9) < 0.6 * per_device(1, None)


def test_replicas_sum_what_they_hold_over_nodes():
    """Hybrid shards gather within a node, and only their shares of the gradients leave it: less than a full shard."""
    cluster = Cluster(device=DEVICE, num_devices_per_node=8, num_nodes=2, inter_node_bytes_per_second=25e9)
    full = a_configuration(num_processes=16, sharding="fsdp2", gradient_accumulation_steps=1)
    times = [
        estimate_time(PROFILE, replace(full, num_replicas=replicas), cluster, WORKLOAD).terms["communication"]
        for replicas in (1, 2)
    ]
    assert times[1] < times[0] / 2


def test_dollars_are_the_hours_of_all_devices():
    """Two devices at 2 dollars an hour for a step of an hour and a million tokens: 4 dollars, 2 device-hours."""
    time = replace(estimate_time(PROFILE, a_configuration(), PAIR, WORKLOAD), step_seconds=3600.0)
    million = Workload(sequence_tokens=1000, global_batch_sequences=1000)
    cost = estimate_cost(time, PAIR, million, a_configuration())
    assert cost.device_hours_per_million_tokens == pytest.approx(2)
    assert cost.dollars_per_million_tokens == pytest.approx(4)


def test_a_run_takes_its_tokens_over_the_speed():
    """3e6 tokens at a million an hour on two devices at 2 dollars: 3 hours, 6 device-hours, 12 dollars.

    Without a price hours are left, without a time nothing.
    """
    time = replace(
        estimate_time(PROFILE, a_configuration(), PAIR, WORKLOAD), step_seconds=3600.0, tokens_per_second=1e6 / 3600
    )

    def took(time, cluster):
        cost = estimate_cost(
            time, cluster, Workload(sequence_tokens=1000, global_batch_sequences=1000), a_configuration()
        )
        run = run_cost(RunLength(tokens=3e6), time, cost, None, 2)
        return run.hours, run.device_hours, run.dollars

    assert took(time, PAIR) == pytest.approx((3, 6, 12))
    assert took(time, replace(PAIR, device=replace(DEVICE, dollars_per_hour=None))) == (
        pytest.approx(3),
        pytest.approx(6),
        None,
    )
    assert took(replace(time, step_seconds=None, tokens_per_second=None), PAIR) == (None, None, None)


def test_epochs_are_so_many_times_one():
    """Two and a half epochs of a data set take its tokens, hours and dollars two and a half times."""
    workload = replace(WORKLOAD, lengths=a_distribution([1000] * 64))
    configuration = a_configuration(batching="padded")
    time = estimate_time(PROFILE, configuration, PAIR, workload)
    cost = estimate_cost(time, PAIR, workload, configuration)
    epoch = estimate_epoch(time, cost, workload, configuration)
    run = run_cost(RunLength(epochs=2.5), time, cost, epoch, 2)
    assert run.tokens == 2.5 * 64_000
    assert run.hours == pytest.approx(2.5 * 8 * time.step_seconds / 3600)
    assert run.dollars == pytest.approx(2.5 * epoch.dollars)


amounts = st.floats(0, 1e13)
segments = st.builds(
    lambda kind, flops, moved, other, kernels: a_segment(
        kind=kind,
        matmul_flops=per_token(flops),
        matmul_bytes=constant(moved),
        other_bytes=per_token(other),
        num_kernels=kernels,
    ),
    st.sampled_from(["forward", "backward"]),
    amounts,
    amounts,
    st.floats(0, 1e9),
    st.integers(1, 1000),
)
profiles = st.builds(
    lambda segs, params: a_profile(segments=tuple(segs), num_params=params),
    st.lists(segments, min_size=1, max_size=6),
    st.integers(1, 10**11),
)
configurations = st.builds(
    lambda sharding, optim, offloads, batch, steps, ranks: a_configuration(
        sharding=sharding,
        offload="optimizer" if offloads and sharding in {"zero2", "zero3"} else "none",
        optim=optim,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps,
        num_processes=ranks,
    ),
    st.sampled_from(["ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2"]),
    st.sampled_from(["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "adafactor"]),
    st.booleans(),
    st.integers(1, 64),
    st.integers(1, 64),
    st.integers(2, 64),
)


def timed(profile, configuration, device=DEVICE):
    """Time a configuration on as many devices as it has processes."""
    cluster = Cluster(device=device, num_devices_per_node=configuration.num_processes)
    workload = Workload(sequence_tokens=512, global_batch_sequences=configuration.global_batch_sequences)
    return estimate_time(profile, configuration, cluster, workload)


@given(profiles, configurations)
def test_bounds_are_in_order(profile, configuration):
    """Perfect overlap <= what is expected <= no overlap; the terms add up to no overlap at expected rates."""
    time = timed(profile, configuration)
    assert time.step_seconds_lower <= time.step_seconds * (1 + 1e-9)
    assert time.step_seconds <= sum(time.terms.values()) * (1 + 1e-9)
    assert sum(time.terms.values()) <= time.step_seconds_upper * (1 + 1e-9)
    assert time.tokens_per_second_lower <= time.tokens_per_second_upper * (1 + 1e-9)


@given(profiles, configurations)
def test_no_overlap_is_at_most_as_many_times_perfect_overlap_as_there_are_resources(profile, configuration):
    """Tensor cores, memory, host, network, the link and the host's processors: six times the busiest of them.

    Each at the worst of its published rates over the best, at most twice; an evicted page's way is in the upper bound
    alone.
    """
    time = timed(profile, configuration)
    upper = time.step_seconds_upper - time.terms.get("paging", 0.0)
    assert upper <= 2 * 6 * time.step_seconds_lower * (1 + 1e-9)


@given(
    profiles,
    configurations,
    st.sampled_from(["bf16_flops_per_second", "memory_bytes_per_second", "peer_bytes_per_second"]),
)
def test_faster_hardware_is_never_slower(profile, configuration, figure):
    """Doubling any rate of the device leaves the step as long or shortens it."""
    faster = replace(DEVICE, **{figure: 2 * getattr(DEVICE, figure)})
    assert timed(profile, configuration, faster).step_seconds <= timed(profile, configuration).step_seconds * (1 + 1e-9)


@given(profiles, configurations)
def test_a_bigger_micro_batch_never_costs_more_per_token(profile, configuration):
    """The same global batch in half as many micro-steps of twice the size is never slower."""
    small = replace(configuration, gradient_accumulation_steps=2 * configuration.gradient_accumulation_steps)
    large = replace(configuration, per_device_train_batch_size=2 * configuration.per_device_train_batch_size)
    assert timed(profile, large).step_seconds <= timed(profile, small).step_seconds * (1 + 1e-9)


@given(profiles, configurations)
def test_relative_work_orders_where_no_rate_is_known(profile, configuration):
    """A device without any figure still has a positive number to order by, larger for twice the micro-steps."""
    unknown = Device(name="CPU-8G", kind="cpu", memory_bytes=8 * 2**30)
    cluster = Cluster(device=unknown, num_devices_per_node=configuration.num_processes)
    model = TimeModel(profile, cluster, WORKLOAD)
    longer = replace(configuration, gradient_accumulation_steps=2 * configuration.gradient_accumulation_steps)
    assert 0 < model.relative_work(configuration) < model.relative_work(longer)
    assert model.time(configuration).step_seconds is None
