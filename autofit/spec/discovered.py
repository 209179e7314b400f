"""What a training script turned out to train: the only thing that the run which finds it out hands back."""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field

from autofit.spec.configuration import Batching, Loss, adapter_kind

PROGRESS_FILE = "progress.json"
"""Beside the file that is handed back: how many samples were looked at, and of how many, while that goes on."""


class FoundAdapter(Struct, frozen=True, kw_only=True):
    """The peft adapter that the script puts on its model, with peft's own names."""

    peft_type: str
    r: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float | None = None
    target_modules: tuple[str, ...] = ()
    """Last part of the names of the modules that carry it."""
    use_rslora: bool = False
    use_dora: bool = False
    unplanned: tuple[str, ...] = ()
    """Settings of it that the planner cannot account for, in words; empty: none."""

    @property
    def kind(self) -> str:
        """See `Lora.kind`."""
        return adapter_kind(use_rslora=self.use_rslora, use_dora=self.use_dora)


class FoundQuantization(Struct, frozen=True, kw_only=True):
    """The quantisation that the script loads its model with."""

    bits: int
    quant_type: str = "nf4"
    double_quant: bool = False
    compute_dtype: str = "float32"
    storage_dtype: str = "uint8"
    prepares_kbit: bool = False
    """Whether the script calls peft's `prepare_model_for_kbit_training`."""


class FoundLengths(Struct, frozen=True, kw_only=True):
    """How long the sequences are that the model is given."""

    sequence_tokens: int
    """The widest batch that was collated: the longest samples that were seen, together."""
    num_samples_seen: int
    num_samples: int | None
    """None: the dataset does not say."""
    image_tokens: int = 0
    """The most tokens of a sequence that stand for images, where the batches hold images."""
    batching: Batching = "equal"
    """How the script's collator lets sequences share a batch."""
    num_rows_per_sequence: int = 1
    """Rows of a batch that one sequence fills: 2 where it is a pair of a chosen and a rejected answer."""


class FoundEvaluation(Struct, frozen=True, kw_only=True):
    """How the script's trainer evaluates."""

    batch_sequences: int | None
    """`per_device_eval_batch_size`; None: the script leaves it at its class's default."""
    num_sequences: int | None
    """In the evaluation set; None: it does not say."""
    keeps_predictions: bool = False
    """Whether logits are kept for a `compute_metrics`, as they are."""
    accumulation_steps: int | None = None
    generates: bool = False


class FoundLoop(Struct, frozen=True, kw_only=True):
    """What a loop of the script's own with accelerate does beside training, as far as it decides what can be planned.

    Lines are `train.py:40`; empty where nothing of the kind was seen.
    """

    accumulates_by_hand: bool
    """Whether code of the script's own decides when the optimizer steps, and not `Accelerator.accumulate`."""
    max_grad_norm: float | None = None
    """To which it clips the norm of the gradients through accelerate; None: it does not."""
    train_loader: int | None = None
    """Which of the DataLoaders that it prepares it trains on, counted from 0; None: none of them."""
    keeps_batch: str = ""
    """Why its DataLoader must keep its batch, in words."""
    prepares_apart: bool = False
    """Whether model and optimizer are prepared by different calls."""
    schedules_apart: bool = False
    """Whether its learning-rate schedule is prepared by another call than the model, or not at all."""
    clips_itself: str = ""
    """Where it clips gradients by other means than the norm through accelerate."""
    reads_gradients: str = ""
    """Where it looks at the gradients of parameters."""
    reads_norm: str = ""
    """Where it takes the norm that accelerate's clipping returns for a tensor."""
    saves_its_share: str = ""
    """Where it saves weights without gathering them from all ranks."""


class Discovered(Struct, frozen=True, kw_only=True):
    """A training script at the moment before its first step."""

    model_name: str
    """What the script loads, as it says it; of a model built from a config, its class."""
    config: dict[str, Any]
    """The content of the model's config, with the class in `architectures`."""
    weights_dtype: str | None
    """Dtype of the weights as loaded; None: it depends on the checkpoint."""
    attention: str
    adapter: FoundAdapter | None
    quantization: FoundQuantization | None
    trainer: str
    """Class of the trainer."""
    lengths: FoundLengths | None
    """None: the batches have no `input_ids` of two dimensions."""
    evaluation: FoundEvaluation | None = None
    """None: the trainer has no evaluation set, or there is no trainer."""
    task: str = ""
    """Class of the model's head and of the loop, for the user to read."""
    loss: Loss = "stock"
    """Which code computes the loss."""
    loop: FoundLoop | None = None
    """The loop of the script's own with `accelerate.Accelerator`, whose DataLoader and optimizer are its own as well;
    None: a Trainer trains."""
    reference_model: bool = False
    """Whether a second model of the same size is held beside the one that trains."""
    fixes_weights_dtype: bool = False
    """Whether the script names the dtype itself."""
    checkpoints: bool | None = None
    """Of a loop: whether the script has switched activation checkpointing on; None: a Trainer's arguments say it."""
    is_guess: bool = False
    """Whether the source was read instead of run: then nothing of it is certain."""
    not_run: str = ""
    """Of a guess that nobody asked for: why the script could not be run here."""
    device_map: str | None = None
    """Where the script puts the model, if it says so."""
    tokenizer: str | None = None
    """Name of the tokenizer or processor that was handed to the trainer."""
    collator: str | None = None
    sampled_tokens: tuple[int, ...] = ()
    """Lengths of the samples that were looked at, where each has one."""
    seconds: float | None = None
    """How long it took to find this out."""
    peak_process_bytes: int | None = None
    """The most memory that the process held meanwhile."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """The training arguments that matter to a plan, as the script set them."""
    where: dict[str, str] = field(default_factory=dict)
    """File and line of the script in which something was decided."""

    @property
    def is_loop(self) -> bool:
        """Whether the script trains in a loop of its own."""
        return self.loop is not None
