"""What is to be trained: the model, how much of it at a time, and what the user has fixed."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct, field

from autofit.spec.configuration import (
    Attention,
    Batching,
    Bits,
    Dtype,
    Evaluation,
    Freeze,
    Lora,
    Loss,
    Method,
    Offload,
    Optim,
    PackedKernel,
    QuantType,
    SdpaKernel,
    Sharding,
    Task,
    ZeroSettings,
)
from autofit.spec.estimate import STAGES, StageName
from autofit.spec.fp32_modules import dtypes_with_fp32_modules
from autofit.spec.lengths import LengthDistribution

Precision = Literal["bf16", "fp16", "tf32", "fp32", "pure-bf16", "pure-fp16"]
"""`bf16`/`fp16`: mixed precision; `pure-...`: weights, gradients and optimizer state all in it, without autocast."""
StorageDtype = Literal["uint8", "bfloat16", "float16", "float32"]
Objective = Literal["cost", "time", "memory", "quality"]
"""`cost`: the least for a trained token; `time`: the fastest; `memory`: the least on each device; `quality`: the least
approximate, and of those the cheapest."""
Origin = Literal["catalogue", "folder", "config file", "hub", "script"]


class Model(Struct, frozen=True, kw_only=True):
    """An architecture, as its `config.json` describes it. No weights."""

    name: str
    """Hub id, or the path that was given."""
    config: dict[str, Any]
    """The content of config.json; `model_type` and `architectures` are always there."""
    origin: Origin
    num_params: int | None = None
    """Published number of parameters, where the catalogue has it."""
    source: str = ""
    """Where the config was taken from."""
    usual_attention: Attention = "sdpa"
    """What is planned where none is asked for: sdpa, or eager where the installed transformers has no sdpa for it."""
    stored_dtype: Dtype | None = None
    """Dtype of the checkpoint's weights: as its file says where it is on this machine, else as the config does."""

    @property
    def fp32_modules(self) -> frozenset[Dtype]:
        """Dtypes that it may be loaded in with some of its modules in fp32."""
        return dtypes_with_fp32_modules(self.config)

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that it has positions for; None where its config does not say."""
        for part in (self.config, self.config.get("text_config")):
            for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
                found = part.get(name) if isinstance(part, dict) else None
                if isinstance(found, int) and found > 0:
                    return found
        return None


class Workload(Struct, frozen=True, kw_only=True):
    """Tokens of one optimizer step. The planner never changes either number."""

    sequence_tokens: int
    """Tokens of the longest sequence that can occur, longer ones being cut; without `lengths`, of every sequence."""
    global_batch_sequences: int
    """Sequences in one optimizer step over all devices. Of packed data, what a trainer counts: rows."""
    lengths: LengthDistribution | None = None
    """Of the data set; None: all sequences are as long as the longest."""
    num_rows_per_sequence: int = 1
    """Rows of a batch that one sequence fills, its tokens shared evenly: 2 where it is a pair of answers (DPO)."""


class QuantizationWish(Struct, frozen=True, kw_only=True):
    """What the user fixes of a quantised model; what is None follows from the precision and the sharding."""

    bits: Bits = 4
    quant_type: QuantType = "nf4"
    double_quant: bool = True
    compute_dtype: Dtype | None = None
    storage_dtype: StorageDtype | None = None
    prepares_kbit: bool = False
    recasts_tables: bool = False
    skip_modules: tuple[str, ...] = ()
    group_size: int = 128
    kernel: PackedKernel = "gptqmodel"

    @property
    def comes_packed(self) -> bool:
        """Whether the checkpoint is packed, and nothing is quantised when it is loaded."""
        return self.quant_type in {"gptq", "awq"}

    @property
    def name(self) -> str:
        """The code of the weights, as `--quantization` takes it; of what comes packed, what it is."""
        if self.comes_packed:
            return f"{self.quant_type}-{self.bits}bit"
        return "int8" if self.bits == 8 else f"{self.quant_type}{'-double' if self.double_quant else ''}"


class Restrictions(Struct, frozen=True, kw_only=True):
    """What the user allows. An empty tuple leaves a dimension free; more than one value is a choice.

    Precision, attention, loss, replicas, adapter and quantisation are single values or several: unasked there is no
    choice of them.

    Fields hold for every configuration of their kind: `lora` for those with an adapter, `quantization` for those on
    quantised weights, `freeze` for those that freeze, what begins with `checkpoint_` for those that checkpoint. They
    mean what the fields of the same name mean in `Configuration`.
    """

    objective: Objective = "cost"
    """What is chosen by, among all that is allowed and fits."""
    held_stages: tuple[StageName, ...] = STAGES
    """What has to fit besides the steady steps, on the device and in the host's memory, where it is known."""
    methods: tuple[Method, ...] = ()
    precision: Literal["auto"] | Precision | tuple[Precision, ...] = "auto"
    weights_dtype: Dtype | None = None
    """None: what the precision and the method ask for."""
    optims: tuple[Optim, ...] = ()
    shardings: tuple[Sharding, ...] = ()
    offload: Offload | None = None
    """None: also to the host, where that takes no code path of its own."""
    num_processes: tuple[int, ...] = ()
    """Devices to use of those given; empty: all."""
    num_replicas: int | tuple[int, ...] = 1
    reshard_after_forward: bool = True
    gradient_as_bucket_view: bool = False
    zero_settings: ZeroSettings = field(default_factory=ZeroSettings)
    sequence_parallel_size: int = 1
    micro_batch_sequences: tuple[int, ...] = ()
    gradient_checkpointing: bool | None = None
    use_reentrant: bool | None = None
    """None: reentrant only where the other implementation fails."""
    checkpoint_every_n_layers: int = 1
    checkpoint_offload: bool = False
    attention: Literal["auto"] | Attention | tuple[Attention, ...] = "auto"
    """auto: the model's `usual_attention`."""
    sdpa_kernel: SdpaKernel = "auto"
    lora: Lora | tuple[Lora, ...] = field(default_factory=Lora)
    """The adapter to train where the method is lora or qlora, or several to choose from."""
    freeze: Freeze = field(default_factory=Freeze)
    quantization: QuantizationWish | tuple[QuantizationWish, ...] = field(default_factory=QuantizationWish)
    """Of the weights under the adapter of qlora."""
    loss: Loss | tuple[Loss, ...] = "stock"
    batchings: tuple[Batching, ...] = ()
    """Empty: `padded` where the lengths of the data are known, else `equal`."""
    task: Task = "auto"
    image_tokens: int = 0
    keeps_outputs: bool = False
    evaluation: Evaluation = field(default_factory=Evaluation)
    """Its batch is given or, None, free: it changes no result but the time of an evaluation."""
    expandable_segments: bool = False
    max_split_size_mb: int | None = None

    @property
    def loras(self) -> tuple[Lora, ...]:
        """The adapters that are allowed, each once."""
        return tuple(dict.fromkeys(self.lora)) if isinstance(self.lora, tuple) else (self.lora,)

    @property
    def quantizations(self) -> tuple[QuantizationWish, ...]:
        """The quantisations that are allowed, each once."""
        wished = self.quantization
        return tuple(dict.fromkeys(wished)) if isinstance(wished, tuple) else (wished,)


class RunLength(Struct, frozen=True, kw_only=True):
    """How much is trained: tokens, or the data so many times over."""

    tokens: float | None = None
    epochs: float | None = None


class ScriptLoop(Struct, frozen=True, kw_only=True):
    """What a loop of the script's own with accelerate says by itself."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    accumulates_by_hand: bool = False
    """Whether code of the script's own decides when the optimizer steps, which nothing outside can change."""
    max_grad_norm: float | None = None
    """To which it clips the norm of the gradients; None: it does not."""
    train_loader: int | None = None
    """Which of the DataLoaders that it prepares it trains on, counted from 0; None: none of them."""


class Job(Struct, frozen=True, kw_only=True):
    """One training job."""

    model: Model
    workload: Workload
    restrictions: Restrictions
    run: RunLength | None = None
    """How much is trained; None: nobody has said, and only rates are known."""
    script: str | None = None
    """Path of the training script; None when only planning."""
    script_arguments: tuple[str, ...] = ()
    script_method: Method | None = None
    """What the script trains by itself; None: there is no script, or nobody has looked."""
    script_decides: tuple[str, ...] = ()
    """Fields of `restrictions` whose value is the script's own, and not the user's."""
    script_settings: dict[str, str] = field(default_factory=dict)
    """What the script does by itself, in a plan's words: `weights_dtype`, `attention`, `method`; empty: not known."""
    script_loop: ScriptLoop | None = None
    """The script's own loop; None: a Trainer trains, or there is no script."""
    found: dict[str, str] = field(default_factory=dict)
    """What discovery read from the script, and where: for the user to check."""
