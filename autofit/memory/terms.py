"""What each term of a phase is, the formula it is made by, and where that is from: the one place that says so.

In formulas P is parameters, T those that train, w bytes of an element as stored, N processes, b sequences of a
micro-batch, s tokens of a sequence, h the hidden size.
"""

from __future__ import annotations

from msgspec import Struct

from autofit.spec.configuration import Sharding


class Term(Struct, frozen=True, kw_only=True):
    """A term's meaning and origin."""

    meaning: str
    formula: str
    """Where nothing is sharded, or what holds for every sharding."""
    under: dict[str, str]
    """The formula under a sharding that has another."""
    sources: tuple[str, ...]

    def formula_under(self, sharding: Sharding) -> str:
        """Return the formula that a configuration's sharding makes the term by."""
        return self.under.get(sharding, self.formula)

    def sources_under(self, sharding: Sharding) -> tuple[str, ...]:
        """Return the sources that have to do with a configuration's sharding."""
        family = next((name for name in ENGINES if sharding.startswith(name)), None)
        others = [words for name, words in ENGINES.items() if name != family]
        return tuple(source for source in self.sources if not any(word in source for words in others for word in words))


ENGINES = {"zero": ("deepspeed", "ZeRO"), "fsdp": ("fsdp",), "ddp": ("reducer.cpp",)}
"""What the sources of a kind of sharding are told by."""
TRACED = "trace of the installed transformers, peft and bitsandbytes (autofit/profile)"
ZERO12 = "deepspeed/runtime/zero/stage_1_and_2.py 0.19.8"
ZERO3 = "deepspeed/runtime/zero/stage3.py 0.19.8"
FSDP1 = "torch v2.13 torch/distributed/fsdp/_flat_param.py"
FSDP2 = "torch v2.13 torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py"
ZERO_PAPER = "Rajbhandari et al. 2020, ZeRO (arXiv:1910.02054), section 3"
REDUCER = "torch v2.13 torch/csrc/distributed/c10d/reducer.cpp"

TERM_SOURCES: dict[str, Term] = {
    "weights": Term(
        meaning="parameters that are not quantised, adapters included",
        formula="P x w",
        under={
            "zero3": "P/N x w, small ones whole (stage3_param_persistence_threshold)",
            "fsdp1": "P/N x w",
            "fsdp2": "P/N x w",
        },
        sources=(TRACED, ZERO3, FSDP1, FSDP2),
    ),
    "quantized_weights": Term(
        meaning="packed weights with their scales and code tables",
        formula="P/2 + scales: fp32 for every 64, quantised again to a byte and fp32 for every 256 of them; int8: P",
        under={"zero3": "the scales alone: they are never sharded, and packed weights are among the weights"},
        sources=(
            "bitsandbytes/functional.py 0.50, quantize_4bit",
            "Dettmers et al. 2023, QLoRA (arXiv:2305.14314), section 3",
        ),
    ),
    "buffers": Term(
        meaning="what the model holds that is no parameter, rotary tables for instance",
        formula="as traced",
        under={},
        sources=(TRACED,),
    ),
    "master_weights": Term(
        meaning="the engine's fp32 copy of what trains",
        formula="T/N x 4",
        under={},
        sources=(ZERO12, ZERO3, ZERO_PAPER),
    ),
    "optimizer_state": Term(
        meaning="what the optimizer keeps between steps",
        formula="of each tensor that trains, as autofit/memory/optimizers.py says; AdamW: 2 x T x w",
        under=dict.fromkeys(("zero1", "zero2", "zero3"), "of T/N elements in fp32; AdamW: 2 x T/N x 4")
        | dict.fromkeys(("fsdp1", "fsdp2"), "of the shard that each process holds; AdamW: 2 x T/N x w"),
        sources=("torch/optim", "bitsandbytes/optim/optimizer.py 0.50", ZERO_PAPER),
    ),
    "gradients": Term(
        meaning="gradients that wait for the optimizer",
        formula="T x w from the last backward to the step; while backward runs, those that were made so far",
        under={
            "zero1": "T x w, and a copy of the partition's; in the step its casts to fp32",
            "zero2": "T/N x w: the partition's; in the step its casts to fp32",
            "zero3": "T/N x w; in the step a copy of a sub-group's and its cast to fp32",
            "fsdp1": "T/N x w and those of the layer that is being reduced",
            "fsdp2": "T/N x w and those of the layer that is being reduced",
        },
        sources=(TRACED, ZERO12, ZERO3, FSDP1, FSDP2),
    ),
    "activations": Term(
        meaning="what forward keeps for backward, temporaries, and kernels' own memory, at the phase's highest moment",
        formula="a polynomial in 1, b, s, bs, s^2, bs^2 for each tensor; the tape is played layer by layer",
        under={},
        sources=(
            TRACED,
            "autofit/profile/kernels: each kernel with its line of torch, flash-attention or bitsandbytes",
        ),
    ),
    "communication_buckets": Term(
        meaning="flat copies of gradients that are sent",
        formula="none",
        under={
            "ddp": "T x w; with gradient_as_bucket_view the gradients themselves, unless they accumulate",
            "zero1": "reduce_bucket_size (h x h unless given) x w, twice with overlap_comm",
            "zero2": "reduce_bucket_size (h x h unless given) x w, twice with overlap_comm",
            "zero3": "reduce_bucket_size (h x h unless given) x w all the time, and a copy while a bucket is scattered",
        },
        sources=(
            REDUCER,
            "transformers/integrations/deepspeed.py, trainer_config_finalize",
            "deepspeed/runtime/comm/coalesced_collectives.py 0.19.8, reduce_scatter_coalesced",
        ),
    ),
    "gathered_weights": Term(
        meaning="sharded weights that are whole for the moment in which they are used",
        formula="of the layers in use and prefetched",
        under={
            "zero3": "at most stage3_max_live_parameters, or what is used again within stage3_max_reuse_distance, "
            "+ stage3_prefetch_bucket_size elements x w"
        },
        sources=("deepspeed/runtime/zero/partitioned_param_coordinator.py 0.19.8", FSDP1, FSDP2),
    ),
    "offload_buffers": Term(
        meaning="where offloaded state passes through on its way to and from the host",
        formula="one buffer of the largest parameter that trains, under ZeRO-2",
        under={},
        sources=(ZERO12, ZERO3),
    ),
    "optimizer_temporaries": Term(
        meaning="what the optimizer's update takes for a moment",
        formula="as autofit/memory/optimizers.py says; foreach AdamW: T x w",
        under={},
        sources=("torch/optim/adam.py, _multi_tensor_adam", "bitsandbytes/optim/optimizer.py 0.50"),
    ),
    "outputs": Term(
        meaning="what a loop of one's own keeps of a step's output until it has the next; the Trainer keeps nothing",
        formula="logits, in the dtype that the model returns",
        under={},
        sources=(TRACED,),
    ),
    "batch": Term(
        meaning="token ids, labels and images of every micro-step, besides those in the trace",
        formula="8 x b x s x (2 x accumulation - 1); with images all inputs of a micro-step x (accumulation - 1)",
        under={},
        sources=("transformers/trainer.py 5.23, get_batch_samples",),
    ),
    "workspaces": Term(
        meaning="cuBLAS workspaces, one for each thread that multiplies",
        formula="2 x 8.1 MiB; 2 x 32 MiB from compute capability 9.0 on",
        under={},
        sources=("torch v2.13 aten/src/ATen/cuda/CUDABlas.cpp, parseChosenWorkspaceSize",),
    ),
    "allocator_rounding": Term(
        meaning="what blocks are larger than their tensors, where the rest is too small to be split off",
        formula="by replaying every allocation of two steps",
        under={},
        sources=("torch v2.13 c10/cuda/CUDACachingAllocator.cpp, should_split",),
    ),
    "calibration": Term(
        meaning="what runs on such devices held more or less than was predicted",
        formula="between steps x (static factor - 1) + what grows with tokens x (per-token factor - 1)",
        under={},
        sources=("`autofit calibrate`, from the runs of `autofit runs`",),
    ),
}
