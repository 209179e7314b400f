"""What ranks send each other, against published volumes and what the libraries' sources say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from torch.distributed.fsdp._limiter_utils import _FreeEventQueue

from autofit.spec.configuration import Quantization
from autofit.spec.deepspeed import bucket_settings
from autofit.spec.profile import StaticTensor
from autofit.timing.collectives import step_traffic
from autofit.timing.links import sent_bytes
from autofit.timing.parameters import parameter_totals
from tests.plans import a_configuration
from tests.timing.hand_profiles import a_profile, a_regime, an_adapted_profile

PSI = 7_500_000_000
HALF = a_profile(num_params=PSI, regime=a_regime(weights_dtype="bfloat16", autocast="no"))


def traffic(profile, **changes):
    """Return what each rank sends in a step of a configuration with the given changes."""
    configuration = a_configuration(**changes)
    settings = bucket_settings(configuration, profile.hidden_size)
    ranks = configuration.num_processes
    found = step_traffic(parameter_totals(profile), configuration, settings)
    return sum(
        times * sent_bytes(each.kind, each.num_bytes, ranks)
        for times, each in found.all(configuration.gradient_accumulation_steps)
    )


@pytest.mark.parametrize(
    ("sharding", "times_psi"), [("ddp", 2), ("zero1", 3), ("zero2", 3), ("zero3", 3), ("fsdp1", 3), ("fsdp2", 3)]
)
def test_volume_of_a_step_is_the_papers(sharding, times_psi):
    """ZeRO, section 7: 2 Psi elements a step for data parallelism, 3 Psi for stage 3 and a full shard.

    For stages 1 and 2 the paper has 2 Psi; DeepSpeed sums everywhere (2 Psi) and gathers (1 Psi).
    """
    sent = traffic(HALF, sharding=sharding, num_processes=1024, gradient_accumulation_steps=1)
    assert sent == pytest.approx(times_psi * PSI * 2 * 1023 / 1024)


def test_accumulation_multiplies_only_what_runs_in_every_micro_step():
    """With 8 micro-steps DDP and stage 1 send as much as with one, stage 2 sums 8 times, stage 3 repeats all.

    A full shard gathers 16 times and sums once: 17 for 3.
    """
    ratio = {
        sharding: traffic(HALF, sharding=sharding, gradient_accumulation_steps=8)
        / traffic(HALF, sharding=sharding, gradient_accumulation_steps=1)
        for sharding in ("ddp", "zero1", "zero2", "zero3", "fsdp1")
    }
    expected = {"ddp": 1, "zero1": 1, "zero2": 17 / 3, "zero3": 8, "fsdp1": 17 / 3}
    assert ratio == pytest.approx(expected)


def waited_for(num_adapters):
    """Ask torch's own queue what the gather of the last of some layers waits for."""
    queue, waited = _FreeEventQueue(), None
    for layer in range(4):
        waited = queue.dequeue_if_needed()
        for adapter in range(num_adapters):
            queue.dequeue_if_needed()
            queue.enqueue((layer, adapter))
        queue.enqueue((layer, "layer"))
    return waited


@pytest.mark.parametrize("num_adapters", [4, 8])
def test_among_adapters_fsdp1_gathers_a_layer_when_the_last_adapted_product_of_the_one_before_is_done(num_adapters):
    """torch's own queue: a layer's gather waits for the last adapter but one of the layer before, which is an A.

    Without adapters it is the layer before that, so that the gather runs beside the kernels of a layer.
    """
    assert waited_for(num_adapters) == (2, num_adapters - 2)
    assert waited_for(0) == (1, "layer")


def test_only_fsdp1_with_adapters_has_less_than_forward_to_hide_gathers_behind():
    """FSDP2 knows layers alone, and what is not freed in forward is not waited for."""
    adapted = parameter_totals(an_adapted_profile(num_frozen=1000, num_trained=100))
    assert adapted.num_adapters
    rooms = {
        (sharding, reshards, totals is adapted): step_traffic(
            totals, configuration, bucket_settings(configuration, 8)
        ).forward_room_fraction
        for sharding in ("fsdp1", "fsdp2")
        for reshards in (True, False)
        for totals in (adapted, parameter_totals(HALF))
        for configuration in (a_configuration(sharding=sharding, reshard_after_forward=reshards),)
    }
    assert {each: room for each, room in rooms.items() if room < 1} == {("fsdp1", True, True): 0}


@pytest.mark.parametrize(
    ("modules", "following"),
    [
        (["q_proj", "k_proj", "v_proj", "o_proj"], ["mlp"]),
        (["q_proj", "v_proj"], ["o_proj", "mlp"]),
        (["q_proj", "down_proj"], []),
    ],
)
def test_what_follows_the_last_adapted_product_is_read_off_the_model(modules, following):
    """Of a Llama that peft adapted, the weights of the products that its own `forward` runs after the adapted one."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 8, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=modules))
    layer = model.base_model.model.model.layers[0]
    tensors = tuple(
        StaticTensor(
            name=name,
            num_elements=weight.numel(),
            dtype="float32",
            trains="lora_" in name,
            repeats=True,
            kind="adapter" if "lora_" in name else "parameter",
            rows=weight.shape[0] if weight.dim() > 1 else 1,
        )
        for name, weight in layer.named_parameters()
    )
    products = {
        name: weight.numel() for name, weight in layer.named_parameters() if "proj" in name and "lora" not in name
    }

    after = sum(size for name, size in products.items() if any(part in name for part in following))
    totals = parameter_totals(a_profile(tensors=tensors, num_layers=2))
    assert totals.after_adapters_fraction == pytest.approx(after / sum(products.values()))
    waiting = a_configuration(sharding="fsdp1", reshard_after_forward=True)
    traffic = step_traffic(totals, waiting, bucket_settings(waiting, 32))
    assert traffic.forward_room_fraction == totals.after_adapters_fraction


def test_what_is_kept_from_forward_is_not_gathered_again():
    """Without resharding after forward a step gathers once: 2 Psi instead of 3."""
    kept, gathered = (
        traffic(HALF, sharding="fsdp1", gradient_accumulation_steps=1, reshard_after_forward=reshards)
        for reshards in (False, True)
    )
    assert kept / gathered == pytest.approx(2 / 3)


def test_ddp_sends_packed_weights_before_every_forward():
    """Buffers go from the first rank to all, once for each micro-step; under ZeRO, and of bitsandbytes, they do not."""
    packed = Quantization(quant_type="gptq", storage_dtype="int32")
    words = StaticTensor(
        name="quant_qweight", num_elements=PSI // 8, dtype="int32", trains=False, repeats=False, kind="quant_state"
    )

    def sent(quantization: Quantization, sharding: str) -> float:
        adapted = an_adapted_profile(num_frozen=PSI, num_trained=PSI // 1000)
        regime = replace(adapted.regime, quantization=quantization)
        profile = replace(adapted, regime=regime, tensors=(*adapted.tensors, words))
        return traffic(profile, method="qlora", sharding=sharding, num_processes=4, gradient_accumulation_steps=8)

    more = sent(packed, "ddp") - sent(Quantization(), "ddp")
    assert more == pytest.approx(8 * PSI / 2)
    assert sent(packed, "zero2") == sent(Quantization(), "zero2")


def test_stage_3_gathers_the_frozen_weights_of_lora():
    """An adapter of 1 in 1000 leaves stage 3 with two gathers of the whole model, and DDP with next to nothing."""
    adapted = an_adapted_profile(num_frozen=PSI, num_trained=PSI // 1000)
    stage_3 = traffic(adapted, method="lora", sharding="zero3", num_processes=2, gradient_accumulation_steps=1)
    ddp = traffic(adapted, method="lora", sharding="ddp", num_processes=2, gradient_accumulation_steps=1)
    assert stage_3 == pytest.approx(2 * PSI * 2 / 2, rel=0.005)
    assert ddp < stage_3 / 100


@given(num_ranks=st.integers(2, 4096), num_micro_steps=st.integers(1, 64))
def test_more_sharding_never_sends_less(num_ranks, num_micro_steps):
    """Stage 1 sends no more than stage 2, and stage 2 no more than stage 3."""
    sent = [
        traffic(HALF, sharding=s, num_processes=num_ranks, gradient_accumulation_steps=num_micro_steps)
        for s in ("zero1", "zero2", "zero3")
    ]
    assert sent == sorted(sent)


def test_replicas_sum_a_shard_among_themselves():
    """Hybrid shard: what ranks of a copy have summed into shards is then summed over copies."""
    totals = parameter_totals(HALF)
    configuration = a_configuration(sharding="fsdp2", num_processes=16, num_replicas=2)
    summed = step_traffic(totals, configuration, bucket_settings(configuration, HALF.hidden_size)).last_backward
    found = [(each.kind, each.over_replicas, each.num_bytes) for each in summed]
    assert found == [("reduce_scatter", False, 2 * PSI), ("all_reduce", True, 2 * PSI / 8)]
