"""FSDP's units against torch's own sharding of the same model, and its schedule worked out by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from autofit.errors import InputError
from autofit.memory.adapter_casts import without_adapter_casts
from autofit.memory.assemble import estimate_memory
from autofit.memory.fsdp import FsdpModel
from autofit.memory.fsdp_script import Give, Take
from autofit.memory.fsdp_units import make_units
from autofit.memory.tape import left_by_forward_bytes
from autofit.profile.trace import trace
from autofit.spec.configuration import Configuration
from autofit.spec.estimate import MemoryEstimate
from autofit.spec.hardware import Cluster
from autofit.spec.job import Workload
from autofit.spec.profile import ACTIVATION, GRADIENT, RegimeProfile, StaticTensor
from autofit.spec.regimes import regime_of
from tests.plans import A100, CPU_RANK, TINY_LLAMA, a_configuration
from tests.timing.hand_profiles import a_profile, a_regime, a_segment, constant

NUM_RANKS = 3
"""Divides none of the model's dimensions, so that every shard is padded."""
PROFILES: dict[Any, RegimeProfile] = {}


def traced(configuration: Configuration) -> RegimeProfile:
    """Trace a configuration's code path, once."""
    regime = regime_of(configuration, CPU_RANK)
    if regime not in PROFILES:
        PROFILES[regime] = trace("tiny", TINY_LLAMA, regime)
    return PROFILES[regime]


def estimate(configuration: Configuration, tokens: int = 32) -> MemoryEstimate:
    """Estimate a configuration of the tiny Llama on CPU ranks."""
    cluster = Cluster(device=CPU_RANK, num_devices_per_node=configuration.num_processes)
    workload = Workload(sequence_tokens=tokens, global_batch_sequences=configuration.global_batch_sequences)
    return estimate_memory(traced(configuration), configuration, cluster, workload)


@pytest.fixture
def a_rank_of_three() -> Iterator[None]:
    """Let this process believe that it is the first of three ranks."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=NUM_RANKS)
    yield
    torch.distributed.destroy_process_group()


def sharded_llama() -> Any:
    """Shard a real Llama as accelerate does: layers, the embedding, the norm with the head, and the root."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**copy.deepcopy(TINY_LLAMA)))
    for module in (*model.model.layers, model.model.embed_tokens):
        fully_shard(module)
    fully_shard([model.model.norm, model.lm_head])
    return fully_shard(model)


@pytest.mark.usefixtures("a_rank_of_three")
def test_a_rank_holds_the_padded_shards_that_torch_makes() -> None:
    """Bytes of all shards, and of each unit gathered, are those of torch's own fully_shard."""
    configuration = a_configuration(sharding="fsdp2", num_processes=NUM_RANKS, mixed_precision="no")
    units = make_units(configuration, traced(configuration))
    model = sharded_llama()
    groups = [m._get_fsdp_state()._fsdp_param_groups for m in model.modules() if isinstance(m, FSDPModule)]
    params = {id(p): p for group in groups for each in group for p in each.fsdp_params}.values()
    shards = sum(param._sharded_param_data.nbytes for param in params)
    assert units.total("shard") == shards
    assert units.total("whole") == NUM_RANKS * shards
    assert units.embedding is not None
    pairs = ((units.layers[0], model.model.layers[0]), (units.embedding, model.model.embed_tokens))
    for unit, module in pairs:
        of_torch = module._get_fsdp_state()._fsdp_param_groups[0].fsdp_params
        assert unit.total("shard") == sum(param._sharded_param_data.nbytes for param in of_torch)


def hand_made(**changes: Any) -> tuple[Configuration, RegimeProfile]:
    """Return two layers of 1,000 fp32 weights each around an embedding and a head of 2,000, tokens that cost nothing.

    A layer's backward makes 300 bytes of activations, then its gradient, and frees them.
    """
    regime = a_regime(device="cpu", weights_dtype="float32", autocast="no", gradient_checkpointing=False)
    weights = (("embed", 2000, True), ("layers.0.w", 1000, False), ("layers.1.w", 1000, False), ("head", 2000, False))
    tensors = tuple(
        StaticTensor(
            name=name,
            num_elements=elements,
            dtype="float32",
            trains=True,
            repeats=False,
            kind="parameter",
            embeds=embeds,
            rows=elements,
        )
        for name, elements, embeds in weights
    )
    sizes = (constant(300), constant(4000), constant(8000))
    forward = [("embedding", None), ("layer", 0), ("layer", 1), ("head", None)]
    backward = [("loss_backward", None, 2), ("layer_backward", 1, 1), ("layer_backward", 0, 1)]
    backward.append(("embedding_backward", None, 2))
    segments = [a_segment(name=name, kind="forward", layer=layer, events=()) for name, layer in forward]
    for name, layer, size in backward:
        position = len(segments)
        events = ((0, ACTIVATION), (size, GRADIENT), (0, ACTIVATION, position, 0))
        segments.append(a_segment(name=name, kind="backward", layer=layer, events=events))
    segments.append(a_segment(name="end", kind="backward", layer=None, events=()))
    profile = replace(
        a_profile(regime=regime, segments=tuple(segments), tensors=tensors),
        sizes=sizes,
        num_layers=2,
        num_traced_layers=2,
    )
    values = {"mixed_precision": "no", "num_processes": 2, "gradient_accumulation_steps": 1}
    return a_configuration(**values | changes), profile


def highest(configuration: Configuration, profile: RegimeProfile) -> dict[str, int]:
    """Return each phase's highest sum of what the script itself holds."""
    model = FsdpModel(profile, (1,), 1)
    return {
        name: sum(terms.values())
        for name, terms in model.peaks(replace(configuration, per_device_train_batch_size=1), 0).items()
    }


def test_forward_holds_a_layer_twice_and_the_buffer_before_it() -> None:
    """FSDP2 copies a layer out of the buffer that it was gathered into while the last unit's buffer is still there.

    By hand: embedding's buffer 8,000, the layer's 4,000, and the layer 4,000.
    """
    configuration, profile = hand_made(sharding="fsdp2")
    assert highest(configuration, profile)["layer"] == 8_000 + 4_000 + 4_000


def test_backward_holds_what_is_sent_the_next_buffer_and_all_shares() -> None:
    """At its highest a layer's backward is over, and its gradient sent; the head's and the other layer's shares stay.

    By hand, for layer 0: the embedding's buffer 8,000, what is sent 4,000, the gradient that the loop over gradients
    still names 4,000, what is received 2,000, gloo's copy of what is sent 4,000, and shares 4,000 and 2,000. Before,
    while gradients were made: the layer 4,000, the buffer 8,000, 300 of activations, the gradient 4,000, what layer 1
    sent 4,000, and the same shares.
    """
    configuration, profile = hand_made(sharding="fsdp2")
    over = 8_000 + 4_000 + 4_000 + 2_000 + 4_000 + 6_000
    within = 4_000 + 8_000 + 300 + 4_000 + 4_000 + 6_000
    assert highest(configuration, profile)["layer_backward"] == max(over, within)


def test_the_first_version_gathers_into_the_flat_weights_themselves() -> None:
    """FSDP1's root (embedding and head) stays, and a layer is there once, and the next one in backward."""
    configuration, profile = hand_made(sharding="fsdp1")
    found = highest(configuration, profile)
    assert found["layer"] == 16_000 + 4_000
    # Root, both layers, the head's gradient, activations and a gradient that is then concatenated: twice.
    assert found["layer_backward"] == 16_000 + 2 * 4_000 + 8_000 + max(300 + 4_000, 2 * 4_000)


def test_the_first_version_keeps_gradients_between_steps() -> None:
    """zero_grad frees FSDP2's gradients; FSDP1's stay in the flat parameters until the next forward."""
    first, second = (estimate(a_configuration(sharding=sharding)) for sharding in ("fsdp1", "fsdp2"))
    assert first.after_step_allocated_bytes is not None
    assert second.after_step_allocated_bytes is not None
    num_weights = sum(parameter.numel() for parameter in _tiny_parameters())
    extra = first.after_step_allocated_bytes - second.after_step_allocated_bytes
    assert extra == pytest.approx(4 * num_weights / 2, rel=0.01)


def _tiny_parameters() -> list[torch.nn.Parameter]:
    from transformers import LlamaConfig, LlamaForCausalLM

    return list(LlamaForCausalLM(LlamaConfig(**copy.deepcopy(TINY_LLAMA))).parameters())


@pytest.mark.parametrize("sharding", ["fsdp1", "fsdp2"])
def test_more_ranks_never_hold_more_and_replicas_never_less(sharding: str) -> None:
    """Twice the ranks: no more on any; the same ranks in two replicas: no less."""
    few, many, split = (
        estimate(a_configuration(sharding=sharding, num_processes=ranks, num_replicas=replicas))
        for ranks, replicas in ((4, 1), (8, 1), (8, 2))
    )
    assert many.peak_allocated_bytes <= few.peak_allocated_bytes <= split.peak_allocated_bytes
    assert split.after_step_allocated_bytes == few.after_step_allocated_bytes


def test_gradients_wait_whole_for_the_last_micro_step() -> None:
    """Accumulation defers the reduction: a forward after the first finds every gradient whole, not its share."""
    configuration, profile = hand_made(sharding="fsdp2", gradient_accumulation_steps=3)
    assert highest(configuration, profile)["layer"] == 8_000 + 4_000 + 4_000 + 24_000


@pytest.mark.parametrize("sharding", ["fsdp1", "fsdp2"])
def test_layers_that_stay_gathered_cost_their_bytes(sharding: str) -> None:
    """Without resharding after forward a rank holds all layers in the dtype that computes when backward begins."""
    frees, keeps = (
        estimate(a_configuration(sharding=sharding, reshard_after_forward=each, gradient_accumulation_steps=1))
        for each in (True, False)
    )
    assert keeps.peak_allocated_bytes > frees.peak_allocated_bytes
    assert keeps.after_step_allocated_bytes == frees.after_step_allocated_bytes


@pytest.mark.parametrize(("sharding", "highest_bytes"), [("fsdp1", 2 * (1_000 + 1_000 + 4_000)), ("fsdp2", 2 * 2_000)])
def test_an_offloaded_share_of_a_gradient_leaves_at_once_or_at_the_end(sharding: str, highest_bytes: int) -> None:
    """FSDP2 copies a unit's share to the host and forgets it; FSDP1 keeps all on the device until backward ends."""
    configuration, profile = hand_made(sharding=sharding, offload="optimizer_and_parameters")
    held: dict[Any, int] = {}
    highest_held = 0
    for operation in FsdpModel(profile, (1,), 1).operations(configuration):
        if isinstance(operation, Take) and operation.key[0] == "kept":  # type: ignore[index]
            held[operation.key] = operation.num_bytes
            highest_held = max(highest_held, sum(held.values()))
        elif isinstance(operation, Give):
            held.pop(operation.key, None)
    assert highest_held == highest_bytes
    assert not held


@pytest.mark.parametrize(("precision", "left"), [("no", 4), ("bf16", 2)])
def test_an_offloaded_shard_is_fetched_as_it_is_stored(precision: str, left: int) -> None:
    """A layer of 1,000 fp32 weights, halved: 2,000 bytes come to the device, and 1,000 stay where 16 bits compute."""
    configuration, profile = hand_made(
        sharding="fsdp2", offload="optimizer_and_parameters", mixed_precision=precision, weights_dtype="float32"
    )
    if precision == "bf16":
        computing = tuple(replace(tensor, dtype="bfloat16") for tensor in profile.tensors)
        profile = replace(profile, tensors=computing)
    held: dict[Any, int] = {}
    for operation in FsdpModel(profile, (1,), 1).operations(configuration):
        if isinstance(operation, Take) and operation.key == ("gathered", "layer 0"):
            break
        if isinstance(operation, Take):
            held[operation.key] = operation.num_bytes
            assert operation.key != ("fetched", "layer 0", 0) or operation.num_bytes == 2_000
        elif isinstance(operation, Give):
            held.pop(operation.key, None)
    assert sum(size for key, size in held.items() if key[1:] == ("layer 0", 0)) == left * 500


def test_only_what_steps_on_the_host_is_offloaded() -> None:
    """bitsandbytes' kernels and transformers' Adafactor are refused by name, and state alone cannot leave."""
    with pytest.raises(InputError, match="optim adamw_8bit on the host"):
        estimate(a_configuration(sharding="fsdp1", offload="optimizer_and_parameters", optim="adamw_8bit"))
    with pytest.raises(InputError, match="offload of the optimizer alone"):
        estimate(a_configuration(sharding="fsdp2", offload="optimizer"))


def test_what_was_not_looked_into_is_refused() -> None:
    """Reentrant checkpoints, where they lie inside the unit, and a shard of one process."""
    with pytest.raises(InputError, match="reentrant checkpointing under FSDP2"):
        estimate(a_configuration(sharding="fsdp2", gradient_checkpointing=True, use_reentrant=True))
    with pytest.raises(InputError, match="under FSDP with transformers"):
        estimate(a_configuration(sharding="fsdp1", gradient_checkpointing=True, use_reentrant=True))
    with pytest.raises(InputError, match="each held by one process"):
        estimate(a_configuration(sharding="fsdp2", num_replicas=2))


def test_a_regime_computes_in_the_gathered_dtype_under_autocast() -> None:
    """Weights loaded in fp32 are gathered in bf16; accelerate leaves autocast around the forward as well."""
    regime = regime_of(a_configuration(sharding="fsdp2", weights_dtype="float32"), A100)
    assert (regime.weights_dtype, regime.autocast) == ("bfloat16", "bf16")
    plain = regime_of(a_configuration(sharding="fsdp2", weights_dtype="float32", mixed_precision="no"), A100)
    assert (plain.weights_dtype, plain.autocast) == ("float32", "no")


def test_the_first_version_copies_no_adapter_in_16_bits():
    """Its adapters are gathered in bf16: what a tape of fp32 ones keeps of their copies, two bytes each, is gone.

    Not kept at all are those of the first layer's q, k and v that its input meets, which asks for no gradient.
    """
    configuration = a_configuration(method="lora", sharding="fsdp1", gradient_accumulation_steps=1)
    profile = traced(configuration)
    meets_input = [f"layers.0.self_attn.{name}_proj.lora_A.default.weight" for name in "qkv"]
    kept = [t for t in profile.tensors if t.kind == "adapter" and not t.name.endswith(tuple(meets_input))]
    before, after = (left_by_forward_bytes(each, 1, 32)[1] for each in (profile, without_adapter_casts(profile)))
    assert before - after == 2 * sum(t.num_elements for t in kept)
    second = traced(replace(configuration, sharding="fsdp2"))
    assert without_adapter_casts(second) is second


def test_the_first_rank_of_the_first_version_has_the_embedding():
    """FSDP1 cuts the flat root in order: of two ranks the first holds the whole embedding and none of the head."""
    configuration = a_configuration(sharding="fsdp1", num_processes=2, gradient_accumulation_steps=1)
    profile = traced(configuration)
    table = next(t for t in profile.tensors if t.embeds)
    outside = [t for t in make_units(configuration, profile).state if t.num_elements >= table.num_elements // 2]
    assert [(t.embeds, t.num_elements) for t in outside] == [(True, table.num_elements)]
