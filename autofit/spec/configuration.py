"""One way to train: everything the planner decides, spelt as transformers and accelerate spell it."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct, field
from msgspec.structs import replace

Method = Literal["full", "freeze", "lora", "qlora"]
Optim = Literal[
    "adafactor",
    "adalomo",
    "adamw_8bit",
    "adamw_apex_fused",
    "adamw_torch",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "adamw_torch_fused",
    "ademamix",
    "ademamix_8bit",
    "adagrad",
    "apollo_adamw",
    "apollo_adamw_layerwise",
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_adamw_layerwise",
    "galore_adafactor",
    "grokadamw",
    "lion_32bit",
    "lion_8bit",
    "lomo",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "schedule_free_adamw",
    "schedule_free_radam",
    "schedule_free_sgd",
    "sgd",
    "stable_adamw",
]
"""transformers' `optim` names. Which of them are modelled is what `autofit.memory.optimizers.OPTIMIZERS` holds."""
Sharding = Literal["none", "ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2"]
Dtype = Literal["float32", "bfloat16", "float16"]
MixedPrecision = Literal["no", "bf16", "fp16"]
Attention = Literal["sdpa", "eager", "flash_attention_2", "flex_attention"]
SdpaKernel = Literal["auto", "efficient"]
Bits = Literal[2, 4, 8]
QuantType = Literal["nf4", "fp4", "gptq", "awq"]
PackedKernel = Literal["auto_gptq", "gptqmodel"]
Offload = Literal["none", "optimizer", "optimizer_and_parameters"]
Loss = Literal["stock", "liger", "chunked"]
Batching = Literal["equal", "padded", "padding_free", "packed"]
Task = Literal["auto", "causal-lm", "masked-lm", "seq2seq-lm", "sequence-classification", "image-text-to-text"]

ZERO_STAGES: dict[str, int] = {"zero1": 1, "zero2": 2, "zero3": 3}


class Lora(Struct, frozen=True, kw_only=True):
    """A peft `LoraConfig`, with its field names."""

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    """Module names, or the single word `all-linear`."""
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole beside the adapter, for instance `embed_tokens` and `lm_head`."""

    @property
    def kind(self) -> str:
        """What `--adapter` calls it; both at once joined by a plus sign."""
        return adapter_kind(use_rslora=self.use_rslora, use_dora=self.use_dora)


def adapter_kind(*, use_rslora: bool, use_dora: bool) -> str:
    """Name an adapter by peft's two switches."""
    return "+".join(name for name, is_on in (("rslora", use_rslora), ("dora", use_dora)) if is_on) or "lora"


class Freeze(Struct, frozen=True, kw_only=True):
    """What is left trainable where the rest is frozen, with LLaMA-Factory's field names."""

    freeze_trainable_layers: int = 2
    """That many of the last decoder layers."""
    freeze_extra_modules: tuple[str, ...] = ()
    """Names of modules outside the layers that train too, for instance `embed_tokens`, `norm` or `lm_head`."""


class Evaluation(Struct, frozen=True, kw_only=True):
    """What `Trainer.evaluate` needs to know, under transformers' names where it has them."""

    per_device_eval_batch_size: int | None = None
    """None: training's micro-batch."""
    num_sequences: int | None = None
    """In the evaluation set; None: not known."""
    keeps_predictions: bool = False
    """Whether logits are kept, for a `compute_metrics`; without one, `prediction_loss_only` is what happens."""
    eval_accumulation_steps: int | None = None
    """Batches after which what is kept moves to the host; None: after the last."""
    predict_with_generate: bool = False
    """Whether text is generated, up to the sequences' own length."""
    cache_elements_per_sequence: int | None = None
    """Keys and values of one generated sequence; None: not known, or nothing is generated."""

    @property
    def is_known(self) -> bool:
        """Whether what it holds can be worked out."""
        counted = self.num_sequences is not None or self.eval_accumulation_steps is not None
        cached = self.cache_elements_per_sequence is not None
        return (counted or not self.keeps_predictions) and (cached or not self.predict_with_generate)


class Quantization(Struct, frozen=True, kw_only=True):
    """A transformers `BitsAndBytesConfig`, or how the weights of a checkpoint were packed before (`comes_packed`)."""

    bits: Bits = 4
    """Of bitsandbytes 4 or 8; 8 is LLM.int8(), and then the fields about four bits have no meaning."""
    quant_type: QuantType = "nf4"
    double_quant: bool = True
    compute_dtype: Dtype = "bfloat16"
    """Dtype that weights are unpacked into."""
    storage_dtype: Literal["uint8", "int32", "bfloat16", "float16", "float32"] = "uint8"
    """Dtype the packed weights are stored as; FSDP shards only floating ones."""
    group_size: int = 128
    """Inputs of an output that share a scale and a zero, in a checkpoint that comes packed; -1: all of them."""
    kernel: PackedKernel = "gptqmodel"
    """Whose layers multiply what comes packed."""
    prepares_kbit: bool = False
    """Whether peft's `prepare_model_for_kbit_training` runs (it upcasts what is not quantised to fp32)."""
    recasts_tables: bool = False
    """Whether embeddings and head are cast to bf16 again after that and only norms stay fp32, as TRL's SFTTrainer did
    up to its release 0.13 where bf16 was asked for (`peft_module_casting_to_bf16`)."""
    skip_modules: tuple[str, ...] = ()
    """`llm_int8_skip_modules`: modules that are not quantised, at either width; none: those that transformers chooses
    (the head, and what is tied to it)."""

    @property
    def comes_packed(self) -> bool:
        """Whether the checkpoint is packed, and nothing is quantised when it is loaded."""
        return self.quant_type in {"gptq", "awq"}

    @property
    def is_int8(self) -> bool:
        """Whether it is bitsandbytes' LLM.int8()."""
        return self.bits == 8 and not self.comes_packed


class ZeroSettings(Struct, frozen=True, kw_only=True):
    """What somebody gave of DeepSpeed's `zero_optimization` block, with its names; None: see `spec.deepspeed`.

    Sizes are numbers of elements, as DeepSpeed counts.
    """

    overlap_comm: bool | None = None
    reduce_bucket_size: int | None = None
    allgather_bucket_size: int | None = None
    sub_group_size: int | None = None
    stage3_prefetch_bucket_size: int | None = None
    stage3_param_persistence_threshold: int | None = None
    stage3_max_live_parameters: int | None = None
    stage3_max_reuse_distance: int | None = None


class Configuration(Struct, frozen=True, kw_only=True):
    """A complete training setup. Field names are those a user would search for."""

    method: Method
    quantization: Quantization | None
    lora: Lora | None
    freeze: Freeze | None = None
    optim: Optim
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    num_processes: int
    gradient_checkpointing: bool
    sharding: Sharding
    offload: Offload = "none"
    """To host memory: DeepSpeed's `offload_optimizer` and `offload_param`, or FSDP's `offload_params` (both)."""
    num_replicas: int = 1
    """Groups of processes that each hold a whole sharded copy (FSDP's hybrid shard); 1: shards over all processes."""
    reshard_after_forward: bool = True
    """FSDP: whether a layer's gathered weights are freed between its forward and its backward (full shard)."""
    gradient_as_bucket_view: bool = False
    """DDP: whether gradients are views of its buckets, once they are reduced."""
    zero_settings: ZeroSettings = field(default_factory=ZeroSettings)
    """What the user fixes of DeepSpeed's buckets; nothing outside DeepSpeed."""
    sequence_parallel_size: int = 1
    """Processes that share each sequence (DeepSpeed's Ulysses, accelerate's `sp_size`)."""
    weights_dtype: Dtype
    """Dtype the weights are loaded in (of a quantised model: of what is not quantised)."""
    stored_dtype: Dtype | None = None
    """Dtype of the checkpoint's file; None: that which is loaded."""
    mixed_precision: MixedPrecision
    """`no`; or the autocast dtype, under DeepSpeed the dtype of its bf16/fp16 block."""
    attention: Attention
    sdpa_kernel: SdpaKernel = "auto"
    """Which of torch's kernels the script pins sdpa to (`torch.nn.attention.sdpa_kernel`); auto: torch chooses."""
    use_reentrant: bool = False
    """Which of torch's two checkpoint implementations; without meaning unless `gradient_checkpointing`."""
    checkpoint_every_n_layers: int = 1
    """transformers' `every_n_layers`: how many layers go between two that are computed again."""
    checkpoint_offload: bool = False
    """transformers' `offload`: what checkpoints keep goes to pinned host memory."""
    loss: Loss = "stock"
    """`liger`: transformers' `use_liger_kernel`, fused with the head; `chunked`: TRL's fused head."""
    batching: Batching = "equal"
    """How sequences share a micro-batch: all of one length; padded to the longest of them, with a mask; one after the
    other in one row (`DataCollatorWithFlattening`, trl's `padding_free`); or so, and each a row that was packed with
    several before (trl's `packing`): then a row is what a micro-batch counts."""
    task: Task = "auto"
    """Which head is trained; `auto`: the one that the config's `architectures` names."""
    image_tokens: int = 0
    """Tokens of each sequence that come from images; vision-language models only."""
    keeps_outputs: bool = False
    """Whether the training loop keeps the model's output, and so its logits, through backward; Trainer does not."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """What happens between training steps."""
    tf32: bool = False
    """Whether fp32 products may round their inputs to TF32: faster, same memory."""
    expandable_segments: bool = False
    """The caching allocator's `expandable_segments`, exported as PYTORCH_ALLOC_CONF."""
    max_split_size_mb: int | None = None
    """The caching allocator's `max_split_size_mb`: larger cached blocks are never split; None: no bound."""

    @property
    def global_batch_sequences(self) -> int:
        """Sequences in one optimizer step over all processes."""
        groups = self.num_processes // self.sequence_parallel_size
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * groups

    @property
    def per_device_eval_batch_size(self) -> int:
        """Sequences of one evaluation batch of a process."""
        return self.evaluation.per_device_eval_batch_size or self.per_device_train_batch_size

    @property
    def training_alone(self) -> Configuration:
        """The same training, with nothing said of evaluation: what two that differ in no step have in common."""
        return replace(self, evaluation=Evaluation())

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's stage, 0 where DeepSpeed does not take part."""
        return ZERO_STAGES.get(self.sharding, 0)

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed's engine wraps the model."""
        return self.sharding in ZERO_STAGES

    @property
    def uses_fsdp(self) -> bool:
        """Whether one of torch's FSDP implementations wraps the model."""
        return self.sharding in {"fsdp1", "fsdp2"}
