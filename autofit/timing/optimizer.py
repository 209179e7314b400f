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
have it, but that is the update by itself, and what `CPU_ADAM_SECONDS_PER_PARAM` was read off are whole steps. Measured
on one core of an EPYC (torch 2.13): 4.8 ns in fp32 and 3.1 in bf16, 1.6 and 1.4 in shards of 131,072 that stay in its
cache; a node has more cores than one.
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
    """Time of the update of offloaded parameters, which the ranks of a node make on the same processors."""
    if configuration.offload == "none":
        return 0.0
    on_node = min(configuration.num_processes, num_devices_per_node) * num_updated(totals, configuration)
    by_torch = configuration.uses_fsdp and configuration.optim != "adamw_torch_fused"
    return on_node * (TORCH_CPU_ADAM_SECONDS_PER_PARAM if by_torch else CPU_ADAM_SECONDS_PER_PARAM)
