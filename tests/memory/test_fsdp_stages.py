"""Stages under FSDP, worked out by hand on a model whose bytes are known; real ranks are in `test_real_stack.py`."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from autofit.memory.fsdp_stages import FsdpStages
from autofit.spec.configuration import Configuration, Lora, Quantization
from autofit.spec.profile import StaticTensor
from tests.memory.test_fsdp import traced
from tests.plans import a_configuration
from tests.timing.hand_profiles import a_profile, a_regime

TABLE, MATRIX, NUM_LAYERS, NUM_RANKS = 4096, 1024, 8, 8
NUM_PARAMS = 2 * TABLE + NUM_LAYERS * MATRIX
HALF, FULL = 2, 4


def a_tensor(name: str, num_elements: int, dtype: str = "bfloat16", **changes: object) -> StaticTensor:
    """A tensor of one or every layer, which trains."""
    given = {"trains": True, "repeats": name == "matrix", "kind": "parameter", "embeds": name == "embed", **changes}
    return StaticTensor(name=name, num_elements=num_elements, dtype=dtype, rows=64, **given)  # type: ignore[arg-type]


def the_stages(configuration: Configuration, matrix: StaticTensor | None = None) -> FsdpStages:
    """Stages of an embedding, eight matrices and a head, on CPU ranks, where no allocator rounds."""
    tensors = (a_tensor("embed", TABLE), matrix or a_tensor("matrix", MATRIX), a_tensor("head", TABLE))
    profile = replace(
        a_profile(regime=a_regime(device="cpu", weights_dtype="bfloat16"), num_layers=NUM_LAYERS, tensors=tensors),
        hidden_size=64,
    )
    return FsdpStages(configuration, profile)


def a_choice(sharding: str, **changes: object) -> Configuration:
    """Eight processes that load bf16 and train under autocast."""
    values = {"optim": "adamw_torch", "method": "full", "lora": None, **changes}
    return a_configuration(
        sharding=sharding, num_processes=NUM_RANKS, weights_dtype="bfloat16", mixed_precision="bf16", **values
    )


def test_fsdp2_is_sent_one_parameter_at_a_time():
    """The last one whole beside all shards; on the host all that trains is fp32, the last in 16 bits as well."""
    held = the_stages(a_choice("fsdp2")).preparing()
    assert held.device == FULL * (NUM_PARAMS // NUM_RANKS + TABLE)
    assert held.host == FULL * NUM_PARAMS + HALF * TABLE


def test_fsdp1_flattens_a_unit_beside_itself():
    """The root comes last, in the dtype that was loaded: twice, and its shard, beside the layers' shards."""
    held = the_stages(a_choice("fsdp1")).preparing()
    layers, root = NUM_LAYERS * MATRIX, 2 * TABLE
    assert held.device == HALF * (layers // NUM_RANKS + 2 * root + root // NUM_RANKS)
    assert held.host == HALF * NUM_PARAMS


def test_fsdp1_keeps_the_shards_that_it_converts():
    """Of many small units the shards are the most: in 16 bits and in fp32 at once."""
    stages = the_stages(a_choice("fsdp1"), a_tensor("matrix", 64 * MATRIX))
    num_params = 2 * TABLE + 64 * NUM_LAYERS * MATRIX
    assert stages.preparing().device == (HALF + FULL) * num_params // NUM_RANKS


def test_a_model_in_four_bits_stays_whole_beside_its_shards_under_fsdp2():
    """A state dict names every packed weight until accelerate is done; they were on the device from the start."""
    quantization = Quantization(storage_dtype="bfloat16")
    choice = a_choice("fsdp2", method="qlora", quantization=quantization, lora=Lora())
    packed = a_tensor("matrix", MATRIX, trains=False, kind="quantized")
    held = the_stages(choice, packed).preparing()
    assert held.device == (HALF * NUM_LAYERS * MATRIX + FULL * 2 * TABLE) * (NUM_RANKS + 1) // NUM_RANKS
    assert held.host == 0


@pytest.mark.parametrize(("sharding", "root_copies"), [("fsdp2", 0), ("fsdp1", 1)])
def test_the_first_process_collects_whole_state_dicts(sharding, root_copies):
    """Adam's two moments are more than the weights; SGD has none, and FSDP1's root is then there twice."""
    moments = the_stages(a_choice(sharding)).saving()
    assert moments.first_process == 2 * FULL * NUM_PARAMS
    weights = the_stages(a_choice(sharding, optim="sgd")).saving()
    assert weights.first_process == FULL * (NUM_PARAMS + root_copies * 2 * TABLE)


def test_what_is_gathered_to_save_is_in_the_dtype_that_is_stored():
    """FSDP2: the largest parameter. FSDP1: the root, of its moments with the shards of two of them."""
    assert the_stages(a_choice("fsdp2")).saving().device == FULL * TABLE
    root = FULL * 2 * TABLE
    assert the_stages(a_choice("fsdp1", optim="sgd")).saving().device == root
    assert the_stages(a_choice("fsdp1")).saving().device == root + 2 * root // NUM_RANKS


def test_fsdp2_steps_before_it_saves_an_optimizer_without_state():
    """torch makes zeros of gradients, so that a step would make the state that it then finds missing."""
    held = the_stages(a_choice("fsdp2", optim="sgd"), a_tensor("matrix", 64 * MATRIX)).saving()
    assert held.device == FULL * (2 * TABLE + 64 * NUM_LAYERS * MATRIX) // NUM_RANKS


def test_what_an_evaluation_gathered_last_stays():
    """FSDP1's root, and FSDP2's norm and head: nothing frees them before the next forward pass begins."""
    for sharding, kept in (("fsdp1", ("root",)), ("fsdp2", ("root", "tail"))):
        configuration = a_configuration(sharding=sharding, mixed_precision="no")
        stages = FsdpStages(configuration, traced(configuration))
        units, forward = dict(stages.units.named()), stages.forward()
        assert forward.left == sum(units[name].total("whole") for name in kept) > 0
        assert max(during for _, during in forward.moments.values()) > forward.left


@pytest.mark.parametrize(
    ("sharding", "precision", "halves"), [("fsdp2", "bf16", True), ("fsdp2", "no", False), ("fsdp1", "bf16", False)]
)
def test_fsdp2_hands_predictions_on_in_the_dtype_that_computes(sharding, precision, halves):
    """accelerate asks FSDP2 for outputs in 16 bits, FSDP1 for none: there they stay as accelerate converts them."""
    configuration = replace(a_choice(sharding), mixed_precision=precision)
    assert the_stages(configuration).forward().halves_outputs is halves
