"""What the optimizer step reads and writes: in a device's memory, over the link to the host, in the host's memory."""

from __future__ import annotations

from msgspec import Struct

from autofit.spec.configuration import Configuration, Optim
from autofit.timing.parameters import ParameterTotals

FP32_BYTES = 4


class Update(Struct, frozen=True, kw_only=True):
    """What one optimizer's step moves for each parameter."""

    weight_accesses: float
    """Reads and writes of arrays as large as the weights, in their dtype: weight, gradient, moments, temporaries."""
    state_bytes: float = 0.0
    """Read and written of a state whose dtype does not depend on the weights'."""
    host_accesses: float = 0.0
    """Arrays as large as the weights that cross the link to the host, and back."""


_IN_PLACE = 3.0
"""One kernel reads the weight and the gradient, and writes the weight."""

UPDATES: dict[Optim, Update] = {
    "adamw_torch": Update(weight_accesses=18),
    "adamw_torch_fused": Update(weight_accesses=7),
    "adamw_8bit": Update(weight_accesses=_IN_PLACE, state_bytes=4),
    "paged_adamw_8bit": Update(weight_accesses=_IN_PLACE, state_bytes=4),
    "paged_adamw_32bit": Update(weight_accesses=_IN_PLACE, state_bytes=16),
    "lion_8bit": Update(weight_accesses=_IN_PLACE, state_bytes=2),
    "lion_32bit": Update(weight_accesses=_IN_PLACE, state_bytes=8),
    "paged_lion_8bit": Update(weight_accesses=_IN_PLACE, state_bytes=2),
    "paged_lion_32bit": Update(weight_accesses=_IN_PLACE, state_bytes=8),
    "ademamix": Update(weight_accesses=_IN_PLACE, state_bytes=24),
    "ademamix_8bit": Update(weight_accesses=_IN_PLACE, state_bytes=6),
    "paged_ademamix_32bit": Update(weight_accesses=_IN_PLACE, state_bytes=24),
    "paged_ademamix_8bit": Update(weight_accesses=_IN_PLACE, state_bytes=6),
    "rmsprop_bnb": Update(weight_accesses=_IN_PLACE, state_bytes=8),
    "rmsprop_bnb_32bit": Update(weight_accesses=_IN_PLACE, state_bytes=8),
    "rmsprop_bnb_8bit": Update(weight_accesses=_IN_PLACE, state_bytes=2),
    "sgd": Update(weight_accesses=3),
    "adagrad": Update(weight_accesses=13),
    "rmsprop": Update(weight_accesses=13),
    "adafactor": Update(weight_accesses=0, state_bytes=21 * FP32_BYTES),
    "adamw_torch_8bit": Update(weight_accesses=_IN_PLACE, state_bytes=4),
    "adamw_torch_4bit": Update(weight_accesses=_IN_PLACE, state_bytes=2),
    "schedule_free_adamw": Update(weight_accesses=23),
    "schedule_free_radam": Update(weight_accesses=23),
    "schedule_free_sgd": Update(weight_accesses=9),
    "stable_adamw": Update(weight_accesses=11),
    "grokadamw": Update(weight_accesses=24, host_accesses=6),
    "apollo_adamw": Update(weight_accesses=9),
    "apollo_adamw_layerwise": Update(weight_accesses=9),
    "galore_adamw": Update(weight_accesses=9),
    "galore_adamw_layerwise": Update(weight_accesses=9),
    "galore_adamw_8bit": Update(weight_accesses=9),
    "galore_adafactor": Update(weight_accesses=9),
    "lomo": Update(weight_accesses=8),
    "adalomo": Update(weight_accesses=0, state_bytes=21 * FP32_BYTES),
}
"""By transformers' `optim` name.

Source: counted where the optimizer is installed (tests/timing/test_optimizer.py runs it): torch/optim 2.13 (`foreach`
goes over its lists once for every operation), transformers 5.23 optimization.py. bitsandbytes 0.50 and torchao 0.18
update in one kernel: weight and gradient in, weight out, and the state in and out, at its bytes. The others were read
off their sources, where one loop over all parameters does what is named: schedulefree 1.4, torch-optimi 0.3, grokadamw
0.1.2 (its three states live on the host), apollo-torch 1.0.3 (its projections are of low rank, and not counted),
lomo-optim 0.1.1 (AdaLomo's update is Adafactor's).
"""
NOT_TIMED: dict[Optim, str] = dict.fromkeys(
    ("galore_adamw", "galore_adamw_layerwise", "galore_adamw_8bit", "galore_adafactor"),
    "what GaLore's singular value decompositions take",
)
"""Optimizers whose steps have a part that nobody has published the time of; the rest orders them only."""
CLIPPING_ACCESSES = 3
"""Gradients are read for their norm, then read and written to scale them.

Source: torch/nn/utils/clip_grad.py; transformers clips by default (`max_grad_norm` = 1.0).
"""
CPU_ADAM_SECONDS_PER_PARAM = 1.0e-9
"""What one node's processors take to update one parameter that is offloaded, all ranks of the node together.

Source: deepspeedai/DeepSpeed blogs/deepspeed-zenflow: a step of Llama-2-7B on 4 A100 takes over 7 s with the optimizer
offloaded, 0.5 without (0.97 ns a parameter); docs/_tutorials/zero-offload.md (2.4 to 3.1 s a step for Qwen2.5-3B, with
and without binding cores: 0.8 to 1.0 ns). A host whose memory is faster is faster.
"""
TORCH_CPU_ADAM_SECONDS_PER_PARAM = 1.45e-9
"""The same of torch's own Adam, which FSDP runs where it offloads.

Source: arXiv 2101.06840 (ZeRO-Offload), table of Adam latencies, quoted from memory: PyTorch's on a DGX-2's processors
takes 1.39 s for 1 billion parameters and 14.76 for 10. Its own takes 0.22 and 2.57 there, a fifth as DeepSpeed's pages
have it, but that is the update by itself, and what `CPU_ADAM_SECONDS_PER_PARAM` was read off are whole steps.
"""
TORCH_CORE_ADAM_SECONDS_PER_PARAM = 1.5e-9
"""The same of tensors so small that they stay in the cache of the core that updates them, for each rank by itself.

A node's ranks have cores of their own, and share its memory's bandwidth, which this does not need.
Source: measured, a step of `torch.optim.AdamW` on one core of an EPYC (torch 2.13), over 33 million parameters in
tensors of so many: 1.5 ns in fp32 and 1.4 in bf16 (131,072), 1.6 and 1.4 (352,256), 1.7 and 1.4 (1,048,576), but 4.0 of
4,194,304 in fp32. More cores than one a rank are faster.
"""
ADAM_ARRAYS = 4
"""Weight, gradient and two moments."""
CORE_CACHE_BYTES = 4 * 2**20
"""What a core has of its processor's caches.

Source: AMD's data sheets of EPYC, 32 MB for eight cores from the third generation on; Intel's of Xeon Scalable, fourth
generation: 1.875 MB, and 2 MB of each core's own.
"""


def update_bytes(totals: ParameterTotals, configuration: Configuration) -> float:
    """Bytes of device memory that one optimizer step reads and writes on one rank.

    DeepSpeed moreover makes fp32 gradients of half-precision ones, and half-precision weights of its fp32 ones.
    Source: deepspeed/runtime/zero/stage_1_and_2.py (`step`), stage3.py (`step`).
    """
    if configuration.offload != "none":
        return 0.0
    update, stored = UPDATES[configuration.optim], totals.trained_bytes_per_param
    weight = master_bytes_per_param(totals, configuration)
    copies = 2 * stored + weight if configuration.uses_deepspeed and weight != stored else 0.0
    moved = (update.weight_accesses + CLIPPING_ACCESSES) * weight + update.state_bytes
    return (moved + copies) * num_updated(totals, configuration)


def paged_bytes(totals: ParameterTotals, configuration: Configuration) -> float:
    """Bytes that cross the link to the host if all of a paged state was evicted: each page comes and goes.

    Or of a state that its optimizer keeps there.
    Source: bitsandbytes/functional.py (`get_paged`): CUDA managed memory, evicted only under pressure.
    """
    update = UPDATES[configuration.optim]
    state_bytes = update.state_bytes if configuration.optim.startswith("paged") else 0.0
    kept_bytes = update.host_accesses * master_bytes_per_param(totals, configuration)
    return (state_bytes + kept_bytes) * num_updated(totals, configuration)


def num_updated(totals: ParameterTotals, configuration: Configuration) -> float:
    """Parameters that one rank updates: under ZeRO and FSDP its shard."""
    shares = configuration.num_processes if configuration.uses_deepspeed else 1
    if configuration.uses_fsdp:
        shares = configuration.num_processes // configuration.num_replicas
    return totals.num_trained / shares


def master_bytes_per_param(totals: ParameterTotals, configuration: Configuration) -> float:
    """Bytes of the weight that the optimizer updates: DeepSpeed, and FSDP under mixed precision, keep it in fp32.

    Source: deepspeed/runtime/zero/stage_1_and_2.py (`single_partition_of_fp32_groups`); accelerate/accelerator.py 1.15
    (prepare_model, "upcasting").
    """
    mixed_fsdp = configuration.uses_fsdp and configuration.mixed_precision != "no"
    return float(FP32_BYTES) if configuration.uses_deepspeed or mixed_fsdp else totals.trained_bytes_per_param


def host_update_seconds(totals: ParameterTotals, configuration: Configuration, num_devices_per_node: int) -> float:
    """Time of the update of offloaded parameters, which the ranks of a node make on the same processors.

    torch updates one tensor after the other, and FSDP keeps each adapter's weight as a tensor of its own.
    Source: torch/optim/adam.py 2.13 (`_single_tensor_adam`: `foreach` is taken on devices alone); peft/utils/other.py
    (`fsdp_auto_wrap_policy`); torch/distributed/fsdp/_fully_shard/_fsdp_param.py.
    """
    if configuration.offload == "none":
        return 0.0
    updated = num_updated(totals, configuration)
    num_ranks = min(configuration.num_processes, num_devices_per_node)
    if not configuration.uses_fsdp or configuration.optim == "adamw_torch_fused":
        return num_ranks * updated * CPU_ADAM_SECONDS_PER_PARAM
    small = updated * _small_fraction(totals, configuration)
    shared = num_ranks * (updated - small)
    return small * TORCH_CORE_ADAM_SECONDS_PER_PARAM + shared * TORCH_CPU_ADAM_SECONDS_PER_PARAM


def _small_fraction(totals: ParameterTotals, configuration: Configuration) -> float:
    """Return what of a rank's trained parameters is in tensors that a core's cache holds, with gradient and moments."""
    if not totals.num_adapters:
        return 0.0
    each = totals.num_adapter_params / totals.num_adapters * num_updated(totals, configuration) / totals.num_trained
    if each * ADAM_ARRAYS * master_bytes_per_param(totals, configuration) > CORE_CACHE_BYTES:
        return 0.0
    return totals.num_adapter_params / totals.num_trained
