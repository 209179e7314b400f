"""State kept in host memory: what stays on the device, and what a node must hold."""

from __future__ import annotations

import pytest

from autofit.errors import InputError
from autofit.memory.engines import Layout, layout
from autofit.memory.host import HostBuffers, fsdp_buffers, zero2_buffers, zero3_buffers, zero3_weight_buffers
from autofit.memory.limits import refuse_unmodelled
from autofit.memory.static import static_bytes
from autofit.memory.tensors import Tensor
from autofit.search.space import engines
from autofit.spec.hardware import Cluster
from autofit.spec.job import Restrictions
from autofit.units import MIB
from tests.memory.test_gradients import BUCKET, peak_of
from tests.plans import A100, a_configuration

HIDDEN = 64
TABLE, MATRIX, NORM = 1000 * HIDDEN, HIDDEN * HIDDEN, HIDDEN
NUM_LAYERS = 40


def a_model() -> tuple[Tensor, ...]:
    """A bf16 model: an embedding, matrices and norms, a head."""

    def tensor(num_elements: int, *, embeds: bool = False) -> Tensor:
        return Tensor(num_elements, 2, trains=True, embeds=embeds, kind="parameter")

    layers = [tensor(n) for _ in range(NUM_LAYERS) for n in (MATRIX, MATRIX, NORM)]
    return (tensor(TABLE, embeds=True), *layers, tensor(TABLE))


NUM_PARAMS = sum(tensor.num_elements for tensor in a_model())


def laid_out(sharding: str, offload: str, *, num_processes: int = 2, accumulation: int = 1) -> Layout:
    """Lay the model out over some processes."""
    configuration = a_configuration(
        sharding=sharding,
        offload=offload,
        optim="adamw_torch",
        num_processes=num_processes,
        gradient_accumulation_steps=accumulation,
    )
    return layout(configuration, a_model(), static_bytes(a_model(), "cpu"), HIDDEN, "cpu")


@pytest.mark.parametrize("num_processes", [2, 8])
def test_the_host_holds_18_bytes_for_each_parameter_of_a_partition(num_processes):
    """Measured with DeepSpeed on CPU ranks: 4 + 8 + 4 + 2 bytes of P/N, and buffers of the largest parameter."""
    partition = NUM_PARAMS / num_processes
    second = laid_out("zero2", "optimizer", num_processes=num_processes).host
    third = laid_out("zero3", "optimizer", num_processes=num_processes).host
    assert second == pytest.approx(18 * partition + 2 * TABLE, rel=1e-3)
    assert third == pytest.approx(18 * partition, rel=1e-3)
    with_weights = laid_out("zero3", "optimizer_and_parameters", num_processes=num_processes).host
    assert with_weights == pytest.approx(20 * partition, rel=1e-3)


def test_accumulated_gradients_wait_on_the_host():
    """Stage 2 keeps each 16-bit gradient of earlier micro-steps there, those on a partition's edge whole."""
    once, twice = (laid_out("zero2", "optimizer", accumulation=steps).host for steps in (1, 2))
    edge = 2 * MATRIX
    assert NUM_PARAMS <= twice - once <= NUM_PARAMS + edge


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_the_device_keeps_neither_masters_nor_moments(sharding):
    """What leaves the device is what the host gains: master weights and moments are on neither side twice."""
    kept, moved = laid_out(sharding, "none"), laid_out(sharding, "optimizer")
    gone = sum(kept.resident.values()) - sum(moved.resident.values())
    assert gone >= 12 * NUM_PARAMS / 2 - 2 * TABLE
    assert "master_weights" not in moved.resident
    assert moved.step == ({},)


def test_offloaded_weights_leave_only_what_is_never_sharded():
    """Under stage 3 the device keeps the small parameters and the bucket."""
    resident = laid_out("zero3", "optimizer_and_parameters").resident
    assert resident["weights"] == NUM_LAYERS * NORM * 2


def test_a_large_gradient_is_cloned_before_it_leaves_the_device():
    """Stage 2 clones what does not fit the bucket: twice its bytes at its birth."""
    large = BUCKET + 2
    assert peak_of(50, large, way="cloning") == 100 + 2 * large
    assert peak_of(50, 60, way="cloning") == 0


def test_a_gradient_is_reduced_when_the_next_is_made():
    """What reduces it finds the next gradient and the activations; it is not counted among them."""
    large = BUCKET + 2
    assert peak_of(large, 50, 60, way="reducing") == 100 + 50
    assert peak_of(large, 50, 60, way="reduced") == large
    assert peak_of(50, 60, way="reducing") == 0


def test_large_gradients_stay_until_a_micro_step_before_the_last_ends():
    """There the clones of all are alive at once, beside the newest gradient; the small ones are in the bucket."""
    large = BUCKET + 2
    assert peak_of(large, 50, large, 10, way="large_kept") == 100 + large + 2 * large
    assert peak_of(large, 50, 60, way="large_kept") == 100 + 2 * large


def test_pinned_memory_is_rounded_up_to_a_power_of_two():
    """On a GPU's host every pinned buffer is; ordinary memory is not, and a CPU rank pins nothing."""
    buffers = HostBuffers(pinned=(3 * MIB, 4 * MIB, 4 * MIB + 1), ordinary=(5,), left_pinned=(3,))
    assert buffers.num_bytes("cuda") == (4 + 4 + 8) * MIB + 5 + 4
    assert buffers.num_bytes("cpu") == 11 * MIB + 1 + 5


def test_each_sub_group_is_pinned_by_itself():
    """Stage 3 closes a sub-group with the parameter that fills it, and pins its gradients alone."""
    buffers = zero3_buffers([600, 600, 600], 2, 1000)
    assert buffers.pinned == (1200 * 4, 600 * 4, 1800 * 2)
    assert zero2_buffers(900, [600, 600, 600], 2, accumulates=True).pinned[4:] == (1200, 1200)


def test_what_a_shard_leaves_behind_stays_pinned():
    """Shards that train move into one buffer; torch keeps the memory that each had by itself."""
    shards = [Tensor(100, 2, trains=trains, embeds=False, kind="parameter") for trains in (True, False)]
    buffers = zero3_weight_buffers(shards)
    assert (buffers.pinned, buffers.left_pinned) == ((200, 200), (200,))
    assert buffers.num_bytes("cpu") == 400


def test_fsdp_pins_each_shard_and_each_gradient():
    """By themselves, each rounded up to a power of two; the optimizer's state is ordinary memory."""
    buffers = fsdp_buffers([3 * MIB, MIB], [3 * MIB], 5)
    assert buffers.num_bytes("cuda") == (4 + 1 + 4) * MIB + 5
    assert buffers.num_bytes("cpu") == 7 * MIB + 5


def test_offload_is_planned_for_the_stages_that_are_modelled():
    """Stage 1 is refused by name, and a search for offload leaves it out."""
    with pytest.raises(InputError, match="offload optimizer under zero1"):
        refuse_unmodelled(a_configuration(sharding="zero1", offload="optimizer", optim="adamw_torch"))
    cluster = Cluster(device=A100, num_devices_per_node=4)
    found = engines(Restrictions(offload="optimizer", shardings=("zero1", "zero2", "zero3")), cluster)
    assert [engine.sharding for engine in found] == ["zero2", "zero3"]
