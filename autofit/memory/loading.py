"""The order in which a model comes onto the device: it decides which blocks are larger than their tensors, and stay so.

transformers puts a quantised model on the device tensor by tensor; one that is not quantised is built in host memory,
and Trainer moves it.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from autofit.memory.program import Program
from autofit.memory.tensors import in_model_order, num_bytes_of
from autofit.spec.profile import RegimeProfile, StaticTensor
from autofit.units import BYTES_PER_ELEMENT, GIB

KEPT_FREE_BYTES = int(1.2 * GIB)
"""transformers' warm-up leaves so much of the device alone.

Source: transformers/modeling_utils.py 5.23, caching_allocator_warmup."""
FIRST_TRANSFORMERS_THAT_WARMS_UP = (4, 50)
"""Before, weights came in the order in which safetensors lists a file's names: as text. Source: transformers 4.48
modeling_utils.py, _load_state_dict_into_meta_model; safetensors 0.5, `keys`."""
FIRST_PEFT_THAT_EMPTIES = (0, 20)
"""peft's `prepare_model_for_kbit_training` empties the cache from this release on. Source: peft/utils/other.py."""
NF4_BLOCK_ELEMENTS = 64
"""Weights that share a scale. Source: bitsandbytes 0.50 functional.py, quantize_4bit."""
LARGEST_KEPT_BYTES = 32 * 2**20
"""What is smaller, malloc may keep when it is freed. Two projections of an expert are merged into one tensor."""
BROADCAST_BUCKET_BYTES = 250 * 2**20
"""DDP copies parameters together into buffers of this size to send them. Source: torch/nn/parallel/distributed.py."""
NUM_BROADCASTS_IN_FLIGHT = 2
"""Source: torch v2.13 torch/csrc/distributed/c10d/comm.cpp, broadcast_coalesced, kMaxInFlight."""


class _Named(Struct, frozen=True):
    """One tensor of the real model."""

    tensor: StaticTensor
    layer: int | None

    @property
    def num_bytes(self) -> int:
        return num_bytes_of(self.tensor)

    @property
    def parent(self) -> str:
        """The module that holds it, as the checkpoint calls it."""
        return _plain(self.tensor.name).rpartition(".")[0]

    @property
    def load_order(self) -> tuple[tuple[int, str, int], ...]:
        """Where transformers loads it: by name, numbers as numbers.

        Source: transformers/core_model_loading.py 5.23, dot_natural_key.
        """
        return tuple(_natural(part, self.layer) for part in _plain(self.tensor.name).split("."))

    @property
    def name(self) -> str:
        """What the checkpoint calls it."""
        parts = _plain(self.tensor.name).split(".")
        return ".".join(part if self.layer is None or not part.isdigit() else str(self.layer) for part in parts)


def write_loading(program: Program, profile: RegimeProfile, device_bytes: int) -> None:
    """Write down how the model's weights, buffers and adapters come onto one device that holds all of them."""
    named = [_Named(tensor, layer) for tensor, layer in in_model_order(profile)]
    quantization = profile.regime.quantization
    if quantization is None or quantization.comes_packed:
        program.hold(each.num_bytes for each in named)
        return
    adapters = [each for each in named if each.tensor.kind == "adapter"]
    loaded = [each for each in named if each.tensor.kind != "adapter"]
    _load_quantized(program, profile, loaded, device_bytes)
    program.hold(each.num_bytes for each in adapters)


def read_bytes(profile: RegimeProfile, stored_bytes: int, loaded_bytes: int) -> int:
    """Return the most bytes that reading a checkpoint of a model that is not quantised takes on the host.

    A tensor that is stored in another dtype than it is loaded in is there in both, one at a time, in order of names.
    transformers reads up to four at a time in threads (`GLOBAL_WORKERS`); what they read from are pages of the file,
    which the kernel takes back when memory runs short, and the process itself holds what is loaded alone: one is more
    than enough. Experts that are stored one by one, and loaded as one tensor, are there twice while they are merged.
    Source: transformers/core_model_loading.py 5.23, `_materialize_copy`, `dot_natural_key`, `WeightConverter.convert`;
    safetensors 0.8 maps files (`UntypedStorage.from_file`).

    Args:
        profile: the model.
        stored_bytes: of an element in the checkpoint.
        loaded_bytes: of an element as it is loaded.
    """
    named = [_Named(tensor, layer) for tensor, layer in in_model_order(profile) if tensor.kind == "parameter"]
    highest = there = 0
    for each in sorted(named, key=lambda each: each.load_order):
        there += _loaded_bytes(each.tensor, profile, loaded_bytes)
        passing = each.tensor.num_elements * stored_bytes if stored_bytes != loaded_bytes else 0
        highest = max(highest, there + passing)
    not_returned = _freed_experts(named, loaded_bytes) if stored_bytes != loaded_bytes else 0
    return max(highest, there + merged_bytes(profile, loaded_bytes)) + not_returned


def merged_bytes(profile: RegimeProfile, loaded_bytes: int) -> int:
    """Return the bytes of the largest tensor that transformers merges from several: a layer's experts.

    Whether a checkpoint has them one by one is not known; most have.
    Source: transformers/core_model_loading.py 5.23, MergeModulelist, Concatenate.

    Args:
        profile: the model.
        loaded_bytes: of an element as it is loaded.
    """
    return max((tensor.num_elements * loaded_bytes for tensor in profile.tensors if _is_merged(tensor)), default=0)


def _is_merged(tensor: StaticTensor) -> bool:
    """Whether it has three dimensions, the first of which counts experts."""
    return tensor.kind == "parameter" and tensor.rows > 1 and tensor.num_elements > tensor.rows * tensor.columns > 0


def _freed_experts(named: list[_Named], loaded_bytes: int) -> int:
    """Return the bytes of experts that are freed when they have been merged, and may stay with the process.

    The C library returns what it mapped by itself; below a size, which grows with what is freed, it may not have.
    Source: glibc malloc/malloc.c, DEFAULT_MMAP_THRESHOLD_MAX on 64 bits.
    """
    merged = [each.tensor for each in named if _is_merged(each.tensor)]
    small = [t for t in merged if t.num_elements // t.rows * loaded_bytes < 2 * LARGEST_KEPT_BYTES]
    return sum(t.num_elements * loaded_bytes for t in small)


def _loaded_bytes(tensor: StaticTensor, profile: RegimeProfile, bytes_per_element: int) -> int:
    """Bytes of a parameter as it is loaded; those that stay in fp32 have been traced so, or are marked."""
    if tensor.loaded_in_fp32:
        return tensor.num_elements * BYTES_PER_ELEMENT["float32"]
    return num_bytes_of(tensor) if profile.regime.keeps_fp32 else tensor.num_elements * bytes_per_element


def broadcast_buckets(profile: RegimeProfile) -> list[int]:
    """List the copies in which DDP sends rank 0's parameters and buffers: together, those of one dtype.

    Source: torch v2.13 nn/parallel/distributed.py, `_sync_module_states`; c10d/comm.cpp, broadcast_coalesced.
    """
    quantization = profile.regime.quantization
    sends_packed = quantization is not None and quantization.comes_packed
    by_dtype: dict[str, list[int]] = {}
    for tensor, _ in in_model_order(profile):
        if tensor.kind != "quant_state" or sends_packed:  # bitsandbytes' is neither a parameter nor a buffer
            by_dtype.setdefault(tensor.dtype, []).append(num_bytes_of(tensor))
    return [bucket for sizes in by_dtype.values() for bucket in buckets(sizes, (BROADCAST_BUCKET_BYTES,))]


def broadcast_bytes(profile: RegimeProfile) -> int:
    """Return the most bytes of copies that are under way at one time."""
    sizes = broadcast_buckets(profile)
    return max((sum(sizes[n : n + NUM_BROADCASTS_IN_FLIGHT]) for n in range(len(sizes))), default=0)


def write_broadcast(program: Program, profile: RegimeProfile) -> None:
    """Write down how those copies come and go, two at a time."""
    flight: list[int] = []
    for bucket in broadcast_buckets(profile):
        if len(flight) == NUM_BROADCASTS_IN_FLIGHT:
            program.release(flight.pop(0))
        flight.append(program.allocate(bucket))
    program.drop(flight)


def buckets(sizes: Iterable[int], limits: tuple[int, ...]) -> list[int]:
    """Group tensors in order until each group reaches its limit; the last limit holds for all further groups.

    Source: torch v2.13 torch/csrc/distributed/c10d/reducer.cpp, compute_bucket_assignment_by_size.
    """
    found: list[int] = []
    filled = 0
    for size in sizes:
        filled += size
        if filled >= limits[min(len(found), len(limits) - 1)]:
            found.append(filled)
            filled = 0
    return [*found, filled] if filled else found


def _load_quantized(program: Program, profile: RegimeProfile, named: list[_Named], device_bytes: int) -> None:
    """transformers reserves the model's size at once, then loads each weight in half precision and packs it.

    Releases before 4.50 reserve nothing. What is not packed becomes fp32 afterwards where peft's
    `prepare_model_for_kbit_training` runs.
    Source: transformers 5.23 modeling_utils.py (caching_allocator_warmup), core_model_loading.py, and
    integrations/bitsandbytes.py (Bnb4bitQuantize, Bnb8bitQuantize); bitsandbytes 0.50 functional.py, quantize_4bit;
    peft/utils/other.py.
    """
    quantization = profile.regime.quantization
    assert quantization is not None, "only a quantised model is loaded so"
    states: dict[tuple[str, int | None], list[_Named]] = {}
    for each in named:
        if each.tensor.kind == "quant_state":
            states.setdefault((each.parent, each.layer), []).append(each)
    element = BYTES_PER_ELEMENT[profile.regime.weights_dtype]
    weights = [each for each in named if each.tensor.kind in {"parameter", "quantized"}]
    halves = {id(each): each.num_bytes for each in weights}
    for each in weights:
        if each.tensor.kind == "parameter":
            halves[id(each)] = _loaded_bytes(each.tensor, profile, element)
    warms_up = release_of(profile.versions.get("transformers", "")) >= FIRST_TRANSFORMERS_THAT_WARMS_UP
    if warms_up:
        program.drop(program.hold([min(sum(halves.values()), max(0, device_bytes - KEPT_FREE_BYTES))]))
    held: dict[int, int] = {}
    for each in sorted(weights, key=lambda each: each.load_order if warms_up else each.name):
        if each.tensor.kind == "parameter":
            held[id(each)] = program.allocate(halves[id(each)])
            continue
        packed_elements = each.num_bytes * (8 // quantization.bits)
        # In eight bits the weight goes to the host and back before it is packed, and both copies are there.
        source = program.hold([packed_elements * element] * (2 if quantization.is_int8 else 1))
        kept = states.get((each.parent, each.layer), [])
        is_nested = quantization.double_quant and not quantization.is_int8
        scales = program.hold([4 * packed_elements // NF4_BLOCK_ELEMENTS]) if is_nested else []
        program.hold([*(state.num_bytes for state in kept[:1]), each.num_bytes])
        program.hold(state.num_bytes for state in kept[1:])
        program.drop([*scales, *source])
    program.hold(each.num_bytes for each in named if each.tensor.kind == "buffer")
    if quantization.prepares_kbit:
        for each in weights:
            if each.tensor.kind == "parameter" and each.num_bytes != halves[id(each)]:
                program.allocate(each.num_bytes)
                program.release(held[id(each)])
        if release_of(profile.versions.get("peft", "")) >= FIRST_PEFT_THAT_EMPTIES:
            program.empty_cache()


def release_of(version: str) -> tuple[int, int]:
    """The first two numbers of a version; zeros where there are none."""
    numbers = [int(part) for part in version.split("+", maxsplit=1)[0].split(".")[:2] if part.isdigit()]
    return (numbers[0], numbers[1]) if len(numbers) > 1 else (0, 0)


def _plain(name: str) -> str:
    """A tensor's name without what peft puts around it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _natural(part: str, layer: int | None) -> tuple[int, str, int]:
    if part.isdigit():
        return (0, "", int(part) if layer is None else layer)
    text = part.rstrip("0123456789")
    return (1, text, int(part[len(text) :] or 0))
