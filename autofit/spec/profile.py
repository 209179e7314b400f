"""What a traced training step leaves behind: plain numbers from which the memory and time of any size follow.

A step is cut into segments (embedding, each layer's forward, head and loss, their backward ...). A segment is the list
of tensors born and freed in it. Sizes are polynomials in b (sequences of a micro-batch) and s (tokens of a sequence),
and the middle layers repeat, so one tape stands for every batch, length and depth.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from autofit.spec.configuration import (
    Attention,
    Batching,
    Dtype,
    Freeze,
    Lora,
    Loss,
    Method,
    Quantization,
    SdpaKernel,
    Task,
)
from autofit.spec.hardware import DeviceKind

PROFILE_SCHEMA_VERSION = 3

MONOMIALS: tuple[tuple[int, int], ...] = ((0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2))
"""Exponents (of b, of s) of a polynomial's coefficients, in their order."""

Polynomial = tuple[float, ...]
"""One coefficient for each of `MONOMIALS`."""

ACTIVATION, GRADIENT, INSIDE, ON_HOST = 0, 1, 2, 3
"""Categories of a tensor: ordinary, a parameter's gradient, a temporary inside a kernel, an offloaded activation."""

Event = tuple[int, ...]
"""A birth (size index, category), or a death (size index, category, segment index, ordinal of the birth in it)."""

NUM_TRACED_LAYERS = 6
"""First two, last two, and two in the middle that must be alike: the third layer stands for all between."""
MIDDLE_LAYER = 2

SegmentKind = Literal["forward", "backward"]


class Regime(Struct, frozen=True, kw_only=True):
    """What changes the code path of a step. Configurations that share a regime share a tape."""

    method: Method
    quantization: Quantization | None
    lora: Lora | None
    freeze: Freeze | None = None
    weights_dtype: Dtype
    adapter_dtype: Dtype
    """Dtype of the LoRA weights; without meaning for full fine-tuning."""
    autocast: Literal["no", "bf16", "fp16"]
    gradient_checkpointing: bool
    use_reentrant: bool
    checkpoint_every_n_layers: int = 1
    checkpoint_offload: bool = False
    attention: Attention
    flash_kernel: bool = True
    """Whether torch's flash attention runs on the device; otherwise sdpa takes the memory-efficient kernel or none."""
    sdpa_kernel: SdpaKernel = "auto"
    loss: Loss = "stock"
    batching: Batching = "equal"
    task: Task = "auto"
    image_tokens: int = 0
    device: DeviceKind
    """Whose kernels and casts the trace imitates."""
    keeps_outputs: bool = False
    """Whether the loop keeps the model's output, and so its logits, alive through backward; Trainer does not."""
    zero3_linear: bool = False
    """Whether frozen linear layers keep their input for backward, as DeepSpeed's linear function of stage 3 does."""
    sequence_parallel_size: int = 1
    """Processes that share each sequence: the tape is of one of them."""

    keeps_fp32: bool = False
    """Whether modules that transformers loads in fp32 whatever dtype is asked for are in fp32 (`fp32_modules`)."""
    stores_fp32_beside: Dtype | None = None
    """The dtype beside which such modules are loaded, where an engine stores them in fp32 and computes in another."""
    evaluates: bool = False
    """Whether the tape is a forward pass without gradients, as Trainer evaluates, instead of a step of training."""
    generates: bool = False
    """Whether it is a prompt that `generate` reads; at its end the cache of keys and values is there."""

    @property
    def fp32_modules_beside(self) -> Dtype | None:
        """The dtype of weights beside which the model has modules in fp32; None: it has none."""
        return self.weights_dtype if self.keeps_fp32 else self.stores_fp32_beside

    @property
    def masks_one_row(self) -> bool:
        """Whether a micro-batch is one packed row with a mask over all of it: its size is in (b s)², no b matters."""
        return self.batching == "packed" and self.attention != "flash_attention_2"

    def rows(self, num_sequences: float, sequence_tokens: float) -> tuple[float, float]:
        """Return the b and s that the tape's polynomials mean by so many sequences of so many tokens."""
        if self.masks_one_row:
            return 1, num_sequences * sequence_tokens
        return num_sequences, sequence_tokens / self.sequence_parallel_size


class StaticTensor(Struct, frozen=True, kw_only=True):
    """A parameter or buffer, or the same one in every layer."""

    name: str
    num_elements: int
    dtype: str
    trains: bool
    repeats: bool
    """Whether every layer has one; then it is counted `num_layers` times."""
    kind: Literal["parameter", "adapter", "quantized", "quant_state", "buffer"]
    embeds: bool = False
    """Whether it is an nn.Embedding's table (bitsandbytes keeps 32-bit state for those)."""
    rows: int = 1
    """First dimension, 1 for a vector or scalar."""
    columns: int = 0
    """Last dimension; 0 where a profile does not say, and then the tensor has at most two."""
    outside_linear: bool = False
    """Whether it is a matrix of a module that is neither nn.Linear nor nn.Embedding: GPT-2's Conv1D, experts in one
    tensor. Low-rank optimizers project an nn.Linear's weight alone."""
    loaded_in_fp32: bool = False
    """Whether transformers loads it in fp32, and `dtype` is another that an engine gathers it in."""


class Segment(Struct, frozen=True, kw_only=True):
    """A stretch of the step between two boundaries."""

    name: str
    kind: SegmentKind
    layer: int | None
    """Index of the traced layer, None outside the layers."""
    events: tuple[Event, ...]
    matmul_flops: Polynomial
    """Floating point operations of matrix products and attention."""
    matmul_bytes: Polynomial
    """Bytes that those read and write."""
    other_bytes: Polynomial
    """Bytes read and written by everything else."""
    num_kernels: int
    dequantized_elements: float = 0.0
    """Weights unpacked from four bits, in elements; independent of b and s."""


class ProfileHead(Struct, frozen=True, kw_only=True):
    """What says whether a stored profile is the one that is looked for."""

    schema_version: int
    regime: Regime
    max_sequence_tokens: int | None = None
    min_sequence_tokens: int = 1
    multiple_tokens: int = 1


class RegimeProfile(Struct, frozen=True, kw_only=True):
    """One traced step of one architecture under one regime."""

    schema_version: int = PROFILE_SCHEMA_VERSION
    model: str
    regime: Regime
    num_layers: int
    """Layers of the real model."""
    num_traced_layers: int
    """Layers that were traced; equal to `num_layers` where layers differ."""
    hidden_size: int
    vocab_size: int
    tensors: tuple[StaticTensor, ...]
    sizes: tuple[Polynomial, ...]
    """Distinct tensor sizes in bytes, which events refer to."""
    segments: tuple[Segment, ...]
    """In the order of the step."""
    max_sequence_tokens: int | None = None
    """Longest sequence that the tape holds for (a sliding window changes the code path); None: any."""
    min_sequence_tokens: int = 1
    attends_causally: bool = True
    """Whether fused attention leaves out what lies ahead; a profile that does not say is of a causal model."""
    routes_evenly: bool = False
    """Whether experts are looped over, each with an even share of the tokens; otherwise no figure depends on shares."""
    input_bytes: Polynomial | None = None
    """Bytes of a micro-batch's inputs, all of which are in the tape; None: ids, labels, and a mask or positions."""
    multiple_tokens: int = 1
    """Only sequences of a multiple of so many tokens: a scan in chunks pads others to whole ones."""
    versions: dict[str, str]
    """Of the libraries that were traced."""

    def holds_for(self, sequence_tokens: int) -> bool:
        """Whether sequences of that length take the code path that was traced."""
        return holds_for(self, sequence_tokens)

    @property
    def only_length(self) -> int | None:
        """The one length that the tape holds for, where it holds for one (a loop over tokens), else None."""
        return self.max_sequence_tokens if self.max_sequence_tokens == self.min_sequence_tokens else None

    def repeats(self, segment: Segment) -> int:
        """How often a traced segment runs in one micro-step of the real model.

        Where layers repeat, the first two and the last two stand for themselves, and the third for all between; the
        fourth, its twin, was traced only to show that they are alike.
        """
        if segment.layer is None or self.num_layers == self.num_traced_layers:
            return 1
        if segment.layer == MIDDLE_LAYER:
            return self.num_layers - self.num_traced_layers + 2
        return 0 if segment.layer == MIDDLE_LAYER + 1 else 1

    def num_elements(self, *, trains: bool | None = None) -> int:
        """Elements of all parameters (not buffers), as stored; or of those that train, or do not."""
        return sum(
            tensor.num_elements * (self.num_layers if tensor.repeats else 1)
            for tensor in self.tensors
            if tensor.kind != "buffer" and (trains is None or tensor.trains == trains)
        )


def holds_for(profile: ProfileHead | RegimeProfile, sequence_tokens: int) -> bool:
    """Tell whether sequences of a length take the code path that was traced."""
    longest = profile.max_sequence_tokens
    in_range = profile.min_sequence_tokens <= sequence_tokens and (longest is None or sequence_tokens <= longest)
    return in_range and not sequence_tokens % profile.multiple_tokens


ProfileSet = dict[Regime, RegimeProfile]
"""The profiles that a search needs, by regime."""
