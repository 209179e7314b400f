"""The options that several commands share: declared once, read once.

`Wishes` are what plan, launch and estimate take, `SearchWish` adds what only a search needs, `EveryWish` what only
estimates can hold. A field is a keyword of
the Python interface and an option of the same name; what it may be is read from the types of `autofit.spec`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from msgspec import structs
from typer.core import TyperCommand, TyperGroup

from autofit.errors import InputError, nearest
from autofit.spec.configuration import (
    Attention,
    Batching,
    Dtype,
    Loss,
    Method,
    Optim,
    PackedKernel,
    SdpaKernel,
    Sharding,
    Task,
)
from autofit.spec.estimate import STAGES
from autofit.spec.job import Objective, Precision, StorageDtype

if TYPE_CHECKING:
    from autofit.spec.job import Restrictions

METHODS, OPTIMS, SHARDINGS = get_args(Method), get_args(Optim), get_args(Sharding)
BATCHINGS = get_args(Batching)
PRECISIONS = ("auto", *get_args(Precision))
ATTENTIONS = ("auto", *get_args(Attention))
LAUNCHED_METHODS = ("auto", "full", "lora", "qlora")
"""What a run can be started with: nothing freezes layers for a script."""
QUANT_TYPES = ("nf4", "fp4")
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4", "double_quant": False},
    "nf4-double": {"quant_type": "nf4", "double_quant": True},
    "fp4": {"quant_type": "fp4", "double_quant": False},
    "fp4-double": {"quant_type": "fp4", "double_quant": True},
    "int8": {"bits": 8},
}
"""What `--quantization` takes, as `QuantizationWish` says it."""
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"use_rslora": False, "use_dora": False},
    "rslora": {"use_rslora": True, "use_dora": False},
    "dora": {"use_rslora": False, "use_dora": True},
}
"""What `--adapter` takes, as `Lora` says it."""
PLACES = ("none", "cpu")
MOST = 10**9
"""Of anything that is counted one by one: more is a slip of the pen."""

MODEL = typer.Option(
    "--model",
    metavar="MODEL",
    help="Hub id from the offline catalogue, a local folder, or a config.json.",
    show_default=False,
)
GPUS = typer.Option(
    "--gpus",
    metavar="GPUS",
    help="2xA100-80G, 4x8xH100-80G:inter_node_gb_s=400 (nodes x devices), 2xCPU-8G, auto, or a .yaml file.",
    show_default=False,
)
SEQ_LEN = typer.Option(
    "--seq-len",
    min=1,
    metavar="TOKENS",
    help="Tokens in every sequence, padding included; of --data, where sequences are cut (default: the longest).",
    show_default=False,
)
GLOBAL_BATCH = typer.Option(
    "--global-batch", min=1, metavar="SEQUENCES", help="Sequences in one optimizer step.", show_default=False
)
ACCUMULATION = typer.Option("--gradient-accumulation-steps", min=1, metavar="N", help="Micro-batches in one step.")
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FOLDER", help="Run folder to write the files into.", show_default=False),
]
AllowHubOption = Annotated[
    bool, typer.Option("--allow-hub", help="Download a config.json, and what the script asks for, if it is not here.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


def _option(*names: str, section: str, metavar: str | None = None, help: str, **more: Any) -> Any:  # noqa: A002 - typer's word
    """Declare an option of a section of --help; without a default shown unless it is said."""
    return typer.Option(*names, rich_help_panel=section, metavar=metavar, help=help, **{"show_default": False, **more})


def _any_of(values: Iterable[str]) -> str:
    return "|".join(values)


_OBJECTIVE, _EVALUATION = "Objective", "Evaluation"
_METHOD, _QUANT, _PRECISION = "Method", "Quantisation", "Precision and optimizer"
_SHARDING, _BATCH, _ACTIVATIONS = "Sharding and offload", "Batch", "Activations"
_MODEL, _ALLOCATOR, _DATA, _COST = "Model and loss", "Allocator", "Data", "Time and price"
_CALIBRATION = "Calibration"


DATA = typer.Option(
    "--data",
    rich_help_panel=_DATA,
    metavar="PATH",
    help="Data set to measure sequences of: file or folder of JSON lines or Parquet, or saved by datasets.",
    show_default=False,
)
TokenizerOption = Annotated[
    str | None,
    _option(
        "--tokenizer",
        section=_DATA,
        metavar="NAME",
        help="Folder, tokenizer.json, GGUF file or Hub id (default: the model's own, where it is on this machine).",
    ),
]
TextColumnOption = Annotated[
    list[str] | None,
    _option(
        "--text-column",
        section=_DATA,
        metavar="NAME",
        help="Column of text, messages, token ids or lengths (default: what trainers read); several are joined.",
    ),
]
DataAllOption = Annotated[
    bool, _option("--data-all", section=_DATA, help="Tokenise a large data set whole, instead of a sample.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataWish:
    """The data set whose sequences are to be measured, and how they are read."""

    data: Annotated[str | None, DATA] = None
    tokenizer: TokenizerOption = None
    text_column: TextColumnOption = None
    data_all: DataAllOption = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunWish(DataWish):
    """How much is trained, on which data, what the hardware costs, and whether its runs correct the figures."""

    price: Annotated[
        str | None,
        _option(
            "--price",
            section=_COST,
            metavar="DOLLARS|FILE[:spot]",
            help="Dollars per device-hour, or a .yaml or .json file of them by GPU (default: the lowest published).",
        ),
    ] = None
    tokens: Annotated[
        float | None,
        _option("--tokens", section=_COST, metavar="N", min=1, help="Say hours and price of training so many tokens."),
    ] = None
    epochs: Annotated[
        float | None,
        _option("--epochs", section=_COST, metavar="N", min=0, help="The same of going over --data so often."),
    ] = None
    calibration: Annotated[
        bool,
        _option(
            "--calibration/--no-calibration",
            section=_CALIBRATION,
            help="Correct figures by what `autofit calibrate` fitted to runs on such devices (default: yes).",
        ),
    ] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes(RunWish):
    """The options that plan, launch and estimate share. Each restricts one dimension; left out, it is free."""

    method: Annotated[
        list[str] | None,
        _option("--method", section=_METHOD, metavar=_any_of(LAUNCHED_METHODS), help="Method to consider; repeatable."),
    ] = None
    lora_dropout: Annotated[
        float | None,
        _option(
            "--lora-dropout",
            section=_METHOD,
            metavar="SHARE",
            min=0,
            max=1,
            help="Dropout before the adapter (default: 0, or the script's).",
        ),
    ] = None
    load_in_4bit: Annotated[
        bool, _option("--load-in-4bit", section=_QUANT, help="Four-bit weights; the same as --method qlora.")
    ] = False
    bnb_4bit_quant_storage: Annotated[
        str | None,
        _option(
            "--bnb-4bit-quant-storage",
            section=_QUANT,
            metavar="DTYPE",
            help="Dtype that packed weights are stored as: uint8 or a floating one (default: as sharded).",
        ),
    ] = None
    bnb_4bit_compute_dtype: Annotated[
        str | None,
        _option(
            "--bnb-4bit-compute-dtype",
            section=_QUANT,
            metavar="DTYPE",
            help="Dtype that weights are unpacked to (default: the precision's).",
        ),
    ] = None
    prepare_kbit: Annotated[
        bool,
        _option(
            "--prepare-kbit",
            section=_QUANT,
            help="peft's prepare_model_for_kbit_training runs: what is not quantised becomes fp32.",
        ),
    ] = False
    weights_dtype: Annotated[
        str | None,
        _option(
            "--weights-dtype",
            section=_PRECISION,
            metavar="DTYPE",
            help="Dtype that weights are loaded in, against what the precision says.",
        ),
    ] = None
    optim: Annotated[
        list[str] | None,
        _option(
            "--optim",
            section=_PRECISION,
            metavar="NAME",
            help="transformers' optim, for instance adamw_torch_fused, adamw_8bit or sgd; repeatable.",
        ),
    ] = None
    sharding: Annotated[
        list[str] | None,
        _option("--sharding", section=_SHARDING, metavar=_any_of(SHARDINGS), help="Sharding to consider; repeatable."),
    ] = None
    zero: Annotated[
        int | None,
        _option("--zero", section=_SHARDING, metavar="STAGE", min=0, max=3, help="ZeRO stage; 0: no DeepSpeed."),
    ] = None
    deepspeed: Annotated[
        str | None,
        _option(
            "--deepspeed",
            section=_SHARDING,
            metavar="FILE",
            help="DeepSpeed configuration whose stage, offload, buckets and half precision hold.",
        ),
    ] = None
    offload_optimizer_device: Annotated[
        str | None,
        _option(
            "--offload-optimizer-device",
            section=_SHARDING,
            metavar=_any_of(PLACES),
            help="Where the optimizer's state lives and is updated (default: as a search finds best; estimate: none).",
        ),
    ] = None
    offload_param_device: Annotated[
        str | None,
        _option(
            "--offload-param-device",
            section=_SHARDING,
            metavar=_any_of(PLACES),
            help="Where parameters wait; cpu: the optimizer's state too (default: as above).",
        ),
    ] = None
    micro_batch: Annotated[
        list[int] | None,
        _option(
            "--micro-batch",
            "--per-device-train-batch-size",
            section=_BATCH,
            metavar="N",
            min=1,
            help="Sequences a device takes at a time; repeatable.",
        ),
    ] = None
    batching: Annotated[
        list[str] | None,
        _option(
            "--batching",
            section=_BATCH,
            metavar=_any_of(BATCHINGS),
            help="How sequences share a micro-batch (default: padded with --data, else equal); repeatable.",
        ),
    ] = None
    image_tokens: Annotated[
        int | None,
        _option(
            "--image-tokens",
            section=_BATCH,
            metavar="TOKENS",
            min=0,
            help="Tokens of each sequence that come from images (default: 0, or the script's).",
        ),
    ] = None
    gradient_checkpointing: Annotated[
        bool | None,
        _option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            section=_ACTIVATIONS,
            help="Compute activations again in backward.",
        ),
    ] = None
    use_reentrant: Annotated[
        bool | None,
        _option(
            "--use-reentrant/--no-use-reentrant",
            section=_ACTIVATIONS,
            help="Which of torch's two checkpoint implementations (default: no, but for adapters under ZeRO-3).",
        ),
    ] = None
    per_device_eval_batch_size: Annotated[
        int | None,
        _option(
            "--per-device-eval-batch-size",
            section=_EVALUATION,
            metavar="SEQUENCES",
            min=1,
            help="Batch of an evaluation (default: the script's, or 8 where that fits and else the micro-batch).",
        ),
    ] = None
    compute_metrics: Annotated[
        bool,
        _option(
            "--compute-metrics",
            section=_EVALUATION,
            help="There is a compute_metrics, so that evaluations keep their logits; --eval-sequences says how many.",
        ),
    ] = False
    eval_sequences: Annotated[
        int | None,
        _option("--eval-sequences", section=_EVALUATION, metavar="N", min=1, help="Sequences that are evaluated."),
    ] = None
    eval_accumulation_steps: Annotated[
        int | None,
        _option(
            "--eval-accumulation-steps",
            section=_EVALUATION,
            metavar="N",
            min=1,
            help="Batches after which what is kept moves to the host (default: after the last).",
        ),
    ] = None
    predict_with_generate: Annotated[
        bool, _option("--predict-with-generate", section=_EVALUATION, help="Evaluations generate text.")
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchWish(Wishes):
    """The options of commands that choose among configurations."""

    objective: Annotated[
        str,
        _option(
            "--objective",
            section=_OBJECTIVE,
            metavar=_any_of(get_args(Objective)),
            help="What decides among all that fits. cost: dollars per trained token; time: tokens a second; "
            "memory: the least on each device; quality: the least approximate method, dtypes and optimizer state, "
            "and of those the cheapest. Within 1 % the simpler setup is taken, within 5 % a safer one.",
            show_default=True,
        ),
    ] = "cost"
    hold: Annotated[
        list[str] | None,
        _option(
            "--hold",
            section=_OBJECTIVE,
            metavar=f"{_any_of(STAGES)}|none",
            help="What has to fit besides the steady steps (default: all of it); repeatable.",
        ),
    ] = None
    adapter: Annotated[
        list[str] | None,
        _option(
            "--adapter",
            section=_METHOD,
            metavar=_any_of(ADAPTERS),
            help="Kind of the adapter: plain, scaled by alpha / sqrt(r), or with a magnitude trained beside it "
            "(default: lora, or the script's); repeatable.",
        ),
    ] = None
    lora_r: Annotated[
        list[int] | None,
        _option(
            "--lora-r",
            section=_METHOD,
            metavar="R",
            min=1,
            help="Rank of the adapter (default: 16, or the script's); repeatable.",
        ),
    ] = None
    lora_alpha: Annotated[
        list[int] | None,
        _option(
            "--lora-alpha",
            section=_METHOD,
            metavar="ALPHA",
            min=1,
            help="Scale of the adapter (default: 32, or the script's); repeatable.",
        ),
    ] = None
    lora_target_modules: Annotated[
        list[str] | None,
        _option(
            "--lora-target-modules",
            section=_METHOD,
            metavar="NAMES",
            help="Module names with commas between, or all-linear (default: all-linear, or the script's); repeatable.",
        ),
    ] = None
    quantization: Annotated[
        list[str] | None,
        _option(
            "--quantization",
            section=_QUANT,
            metavar="NAME",
            help=f"Code of quantised weights: {', '.join(QUANTIZATIONS)} (default: nf4-double; -double: the scales are "
            "quantised too); repeatable.",
        ),
    ] = None
    bnb_4bit_quant_type: Annotated[
        str | None,
        _option(
            "--bnb-4bit-quant-type",
            section=_QUANT,
            metavar=_any_of(QUANT_TYPES),
            help="Code of the four-bit weights (default: nf4).",
        ),
    ] = None
    bnb_4bit_use_double_quant: Annotated[
        bool | None,
        _option(
            "--bnb-4bit-use-double-quant/--no-bnb-4bit-use-double-quant",
            section=_QUANT,
            help="Quantise the scales too (default: yes).",
        ),
    ] = None
    precision: Annotated[
        list[str] | None,
        _option(
            "--precision",
            section=_PRECISION,
            metavar="NAME",
            help=f"{', '.join(PRECISIONS[1:])} or auto (default). bf16, fp16: mixed precision; pure-...: no fp32 "
            "anywhere; repeatable.",
        ),
    ] = None
    attention: Annotated[
        list[str] | None,
        _option(
            "--attention",
            "--attn-implementation",
            section=_ACTIVATIONS,
            metavar="NAME",
            help=f"transformers' attn_implementation: {', '.join(ATTENTIONS[1:])} or auto (default: sdpa, or eager "
            "where the installed transformers has no sdpa for the model); repeatable.",
        ),
    ] = None
    loss: Annotated[
        list[str] | None,
        _option(
            "--loss",
            section=_MODEL,
            metavar=_any_of(get_args(Loss)),
            help="transformers' loss (default, or the script's), Liger's fused head, or TRL's chunked head, which is "
            "its trainers'; repeatable.",
        ),
    ] = None
    num_replicas: Annotated[
        list[int] | None,
        _option(
            "--num-replicas",
            section=_SHARDING,
            metavar="N",
            min=1,
            help="Of FSDP: groups of processes with a whole sharded copy each (default: 1); repeatable.",
        ),
    ] = None
    num_processes: Annotated[
        list[int] | None,
        _option(
            "--num-processes",
            section=_SHARDING,
            metavar="N",
            min=1,
            help="Devices to use of those given, and to pay for (default: all); repeatable.",
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EveryWish(Wishes):
    """Every knob that memory depends on, for commands that start nothing."""

    method: Annotated[
        list[str] | None,
        _option("--method", section=_METHOD, metavar=_any_of(METHODS), help="What trains (default: full)."),
    ] = None
    lora_r: Annotated[
        int | None,
        _option(
            "--lora-r",
            section=_METHOD,
            metavar="R",
            min=1,
            help="Rank of the adapter (default: 16, or the script's).",
        ),
    ] = None
    lora_alpha: Annotated[
        int | None,
        _option(
            "--lora-alpha",
            section=_METHOD,
            metavar="ALPHA",
            min=1,
            help="Scale of the adapter (default: 32, or the script's).",
        ),
    ] = None
    lora_target_modules: Annotated[
        str | None,
        _option(
            "--lora-target-modules",
            section=_METHOD,
            metavar="NAMES",
            help="Module names with commas between, or all-linear (default: all-linear, or the script's).",
        ),
    ] = None
    bnb_4bit_quant_type: Annotated[
        str | None,
        _option(
            "--bnb-4bit-quant-type",
            section=_QUANT,
            metavar=_any_of(QUANT_TYPES),
            help="Code of the four-bit weights (default: nf4).",
        ),
    ] = None
    bnb_4bit_use_double_quant: Annotated[
        bool | None,
        _option(
            "--bnb-4bit-use-double-quant/--no-bnb-4bit-use-double-quant",
            section=_QUANT,
            help="Quantise the scales too (default: yes).",
        ),
    ] = None
    freeze_trainable_layers: Annotated[
        int | None,
        _option(
            "--freeze-trainable-layers",
            section=_METHOD,
            metavar="N",
            min=0,
            help="Of freeze: how many of the last layers train (default: 2).",
        ),
    ] = None
    freeze_extra_modules: Annotated[
        str | None,
        _option(
            "--freeze-extra-modules",
            section=_METHOD,
            metavar="NAMES",
            help="Of freeze: modules outside the layers that train too, for instance embed_tokens,norm.",
        ),
    ] = None
    use_rslora: Annotated[
        bool, _option("--use-rslora", section=_METHOD, help="Scale the adapter by alpha / sqrt(r).")
    ] = False
    use_dora: Annotated[bool, _option("--use-dora", section=_METHOD, help="Train a magnitude beside it.")] = False
    modules_to_save: Annotated[
        str | None,
        _option(
            "--modules-to-save",
            section=_METHOD,
            metavar="NAMES",
            help="Modules trained whole beside the adapter, for instance embed_tokens,lm_head.",
        ),
    ] = None
    load_in_8bit: Annotated[
        bool, _option("--load-in-8bit", section=_QUANT, help="LLM.int8() weights under an adapter.")
    ] = False
    llm_int8_skip_modules: Annotated[
        str | None,
        _option(
            "--llm-int8-skip-modules",
            section=_QUANT,
            metavar="NAMES",
            help="Modules left unquantised, at either width (default: what transformers chooses).",
        ),
    ] = None
    recasts_tables: Annotated[
        bool,
        _option(
            "--recasts-tables",
            section=_QUANT,
            help="After --prepare-kbit, embeddings and head become bf16 again, as TRL did up to 0.13.",
        ),
    ] = False
    packed_kernel: Annotated[
        str | None,
        _option(
            "--packed-kernel",
            section=_QUANT,
            metavar=_any_of(get_args(PackedKernel)),
            help="Whose layers multiply a checkpoint that GPTQ packed (default: gptqmodel, as transformers loads it; "
            "auto_gptq: as fms-acceleration does).",
        ),
    ] = None
    precision: Annotated[
        str,
        _option(
            "--precision",
            section=_PRECISION,
            metavar="NAME",
            help=f"{', '.join(PRECISIONS[1:])} or auto. bf16, fp16: mixed precision; pure-...: no fp32 anywhere.",
            show_default=True,
        ),
    ] = "auto"
    num_replicas: Annotated[
        int | None,
        _option(
            "--num-replicas",
            section=_SHARDING,
            metavar="N",
            min=1,
            help="Of FSDP: groups of processes with a whole sharded copy each (default: 1).",
        ),
    ] = None
    reshard_after_forward: Annotated[
        bool | None,
        _option(
            "--reshard-after-forward/--no-reshard-after-forward",
            section=_SHARDING,
            help="Of FSDP: free a layer's weights between its forward and its backward (default: yes).",
        ),
    ] = None
    gradient_as_bucket_view: Annotated[
        bool,
        _option(
            "--gradient-as-bucket-view",
            section=_SHARDING,
            help="Of DDP: gradients are views of its buckets (accelerate's DistributedDataParallelKwargs).",
        ),
    ] = False
    sequence_parallel_size: Annotated[
        int | None,
        _option(
            "--sequence-parallel-size",
            section=_SHARDING,
            metavar="N",
            min=1,
            help="Processes that share each sequence, Ulysses (default: 1).",
        ),
    ] = None
    checkpoint_every_n_layers: Annotated[
        int | None,
        _option(
            "--checkpoint-every-n-layers",
            section=_ACTIVATIONS,
            metavar="N",
            min=1,
            help="Layers between two checkpoints (default: 1).",
        ),
    ] = None
    checkpoint_offload: Annotated[
        bool, _option("--checkpoint-offload", section=_ACTIVATIONS, help="Keep checkpoints in pinned host memory.")
    ] = False
    attention: Annotated[
        str,
        _option(
            "--attention",
            "--attn-implementation",
            section=_ACTIVATIONS,
            metavar="NAME",
            help=f"transformers' attn_implementation: {', '.join(ATTENTIONS)} (sdpa, or eager where the installed "
            "transformers has no sdpa for the model).",
            show_default=True,
        ),
    ] = "auto"
    sdpa_kernel: Annotated[
        str,
        _option(
            "--sdpa-kernel",
            section=_ACTIVATIONS,
            metavar=_any_of(get_args(SdpaKernel)),
            help="Kernel that the script pins sdpa to.",
            show_default=True,
        ),
    ] = "auto"
    task: Annotated[
        str,
        _option("--task", section=_MODEL, metavar="NAME", help=f"{', '.join(get_args(Task))}.", show_default=True),
    ] = "auto"
    loss: Annotated[
        str | None,
        _option(
            "--loss",
            section=_MODEL,
            metavar=_any_of(get_args(Loss)),
            help="transformers' loss, Liger's fused head, or TRL's chunked head.",
            show_default="stock",
        ),
    ] = None
    use_liger_kernel: Annotated[
        bool, _option("--use-liger-kernel", section=_MODEL, help="The same as --loss liger.")
    ] = False
    keeps_outputs: Annotated[
        bool,
        _option(
            "--keeps-outputs",
            section=_MODEL,
            help="A loop of one's own that keeps the output, and so the logits, through backward.",
        ),
    ] = False
    expandable_segments: Annotated[
        bool,
        _option("--expandable-segments", section=_ALLOCATOR, help="PYTORCH_ALLOC_CONF=expandable_segments:True."),
    ] = False
    max_split_size_mb: Annotated[
        int | None,
        _option(
            "--max-split-size-mb",
            section=_ALLOCATOR,
            metavar="MB",
            min=21,
            help="PYTORCH_ALLOC_CONF=max_split_size_mb:MB.",
        ),
    ] = None


AnyWishes = TypeVar("AnyWishes", bound=Wishes)


_UNREAD = object()
_PLAIN_NUMBER = re.compile("[0-9]{1,18}")


def _refuse_slip(value: Any, name: str, *, is_path: bool) -> None:
    """Refuse what is no value: the text of an unset variable, or the next option where a file is meant."""
    if not isinstance(value, str):
        return
    if not value.strip() or "\0" in value:
        raise InputError(f"{name} is empty, or holds a NUL.", to_fix="give a value, or leave the option out")
    if is_path and value.startswith("-"):
        raise InputError(
            f"{name} {value} names an option, where a file or a folder is meant.",
            to_fix=f"give one; ./{value} is a file of that name",
        )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads what needs no validation, and leaves all else to typer: that imports pydantic, which takes 50 ms."""

    annotation: Any
    info: Any
    usual: Callable[[], Any]

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return what an option holds; an empty one holds nothing, and is no way to leave it out."""
        if param.param_type_name == "option":
            for each in value if isinstance(value, list | tuple) else (value,):
                _refuse_slip(each, param.opts[0], is_path="Path" in str(self.annotation))
        read = self._read(value, is_multiple=param.multiple or param.nargs == -1)
        return self.usual().coerce(value, param=param, ctx=ctx) if read is _UNREAD else read

    def _read(self, value: Any, *, is_multiple: bool) -> Any:
        if value is None:
            return () if is_multiple else None
        if not is_multiple:
            return self._one(value, self.annotation)
        if get_origin(self.annotation) is not list or not isinstance(value, list | tuple):
            return _UNREAD
        each = [self._one(one, get_args(self.annotation)[0]) for one in value]
        return _UNREAD if _UNREAD in each else each

    def _one(self, value: Any, kind: Any) -> Any:
        if self.info.parser is not None or self.info.clamp:
            return _UNREAD
        if kind is int and isinstance(value, str) and _PLAIN_NUMBER.fullmatch(value):
            value = int(value)
        if kind not in {str, int, bool} or type(value) is not kind:
            return _UNREAD
        low, high = self.info.min, self.info.max
        outside = kind is int and ((low is not None and value < low) or (high is not None and value > high))
        return _UNREAD if outside else value


def _reading_plainly(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if "get_runtime_param" not in vars(parameter):
            kind = parameter.type_descriptor
            reader = _Reader(kind.annotation, kind.parameter_info, parameter.get_runtime_param)
            parameter.get_runtime_param = lambda reader=reader: reader
    return parameters


class CommandGroup(TyperGroup):
    """The commands together."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options of all; see `SectionedCommand`."""
        return _reading_plainly(super().get_params(ctx))


class SectionedCommand(TyperCommand):
    """A command whose --help lists options by section: the command's own first."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return options and arguments, each with validation only of what needs it."""
        return _reading_plainly(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Say which word has no option, most often meant for what is missing; else say all that is missing."""
        given, words, _ = self.make_parser(ctx).parse_args(list(args))
        parameters = self.get_params(ctx)
        takes_words = ctx.allow_extra_args or any(each.param_type_name == "argument" for each in parameters)
        if words and not takes_words and not given.get("help"):
            example = f", as --model {words[0]}" if any("--model" in each.opts for each in parameters) else ""
            ctx.fail(f"{words[0]!r} belongs to no option: everything here is given by name{example}.")
        missing = [
            f"{each.opts[0]} {each.metavar}: {each.help}"
            for each in parameters
            if each.param_type_name == "option" and each.required and each.name not in given
        ]
        if missing and not given.get("help"):
            ctx.fail("\n".join([f"{ctx.info_name} needs what was not given:", *(f"  {each}" for each in missing)]))
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then each section in the order in which its first option was declared."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            if record is not None:
                sections.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


@cache
def _hints(kind: type[Wishes]) -> dict[str, Any]:
    """Evaluate the annotations of options, which several commands share."""
    return get_type_hints(kind, include_extras=True)


def takes_wishes(kind: type[AnyWishes]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each field of `kind`, and pass them to it as its argument `wishes`.

    typer reads a function's signature; this writes the fields into it, so that no command repeats them.
    """
    hints = _hints(kind)  # type: ignore[arg-type]  # a class is hashable
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(kind)
    ]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        kept = (parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own)
        parameters = [*(parameter for parameter in kept if parameter.name != "wishes"), *shared]

        def with_wishes(**options: Any) -> None:
            wishes = kind(**{parameter.name: options.pop(parameter.name) for parameter in shared})
            command(**options, wishes=wishes)

        with_wishes.__doc__, with_wishes.__name__ = command.__doc__, command.__name__
        with_wishes.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        vars(with_wishes)["__signature__"] = inspect.Signature(parameters)
        return with_wishes

    return decorate


def wishes_of(kind: type[AnyWishes], given: Mapping[str, Any]) -> AnyWishes:
    """Read keyword arguments as a command line would be read: the same names, the same bounds.

    A single value does where several may stand, and a list of names where the command line takes commas.

    Raises:
        InputError: an argument is not known, or its value is of the wrong kind or out of bounds.
    """
    hints = _hints(kind)  # type: ignore[arg-type]  # a class is hashable
    if unknown := [name for name in given if name not in hints]:
        raise InputError(f"{unknown[0]!r} is no option.", to_fix=f"the nearest are {nearest(unknown[0], hints)}")
    return kind(**{name: _read(name, value, hints[name]) for name, value in given.items()})


def _read(name: str, value: Any, hint: Any) -> Any:
    wanted, option = get_args(hint)
    kinds = get_args(wanted) or (wanted,)
    if list[str] in kinds or list[int] in kinds:
        inner = str if list[str] in kinds else int
        many = value if isinstance(value, (list, tuple)) else [value]
        return None if value is None else [_in_bounds(name, each, (inner,), option) for each in many]
    if str in kinds and isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    if str in kinds and isinstance(value, Path):
        value = str(value)
    return _in_bounds(name, value, kinds, option)


def _in_bounds(name: str, value: Any, kinds: tuple[Any, ...], option: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (isinstance(value, kinds) and isinstance(value, bool) <= (bool in kinds)) and not (
        float in kinds and is_number
    ):
        raise InputError(f"{name}={value!r} is not of the kind {_any_of(kind.__name__ for kind in kinds)}.")
    if is_number and not (option.min is None or value >= option.min) & (option.max is None or value <= option.max):
        raise InputError(f"{name}={value!r} is out of bounds.", to_fix=f"at least {option.min}, at most {option.max}")
    return value


ALIASES = {
    "zero_stage": "zero",
    "per_device_train_batch_size": "micro_batch",
    "attn_implementation": "attention",
}
"""Other words for an option: a field of a plan, or a second spelling on the command line."""
JOB_OPTIONS = {"model", "global_batch", "gpus", "seq_len"}
"""Options of `autofit plan` that are no wish about how it is done."""
SWITCHES = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}


RESTRICTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "method": ("methods", ()),
    "load_in_4bit": ("methods", ()),
    "optim": ("optims", ()),
    "sharding": ("shardings", ()),
    "zero": ("shardings", ()),
    "offload_optimizer_device": ("offload", ()),
    "offload_param_device": ("offload", ()),
    "micro_batch": ("micro_batch_sequences", ()),
    "batching": ("batchings", ()),
    "hold": ("held_stages", ()),
    "adapter": ("lora", ("use_rslora", "use_dora")),
    "lora_r": ("lora", ("r",)),
    "lora_alpha": ("lora", ("lora_alpha",)),
    "lora_dropout": ("lora", ("lora_dropout",)),
    "lora_target_modules": ("lora", ("target_modules",)),
    "quantization": ("quantization", ("bits", "quant_type", "double_quant")),
    "bnb_4bit_quant_type": ("quantization", ("quant_type",)),
    "bnb_4bit_use_double_quant": ("quantization", ("double_quant",)),
    "bnb_4bit_quant_storage": ("quantization", ("storage_dtype",)),
    "bnb_4bit_compute_dtype": ("quantization", ("compute_dtype",)),
    "prepare_kbit": ("quantization", ("prepares_kbit",)),
    "per_device_eval_batch_size": ("evaluation", ("per_device_eval_batch_size",)),
    "compute_metrics": ("evaluation", ("keeps_predictions",)),
    "eval_sequences": ("evaluation", ("num_sequences",)),
    "eval_accumulation_steps": ("evaluation", ("eval_accumulation_steps",)),
    "predict_with_generate": ("evaluation", ("predict_with_generate",)),
}
"""The field of `Restrictions` that an option of a search sets, and which parts of it; otherwise that of its name."""


def with_option(restrictions_now: Restrictions, text: str) -> Restrictions:
    """Set one option of `autofit plan`, written NAME=VALUE, in restrictions that are there; all others stay.

    Raises:
        InputError: there is no such option, or it does not take the value.
    """
    name, equals, value = text.partition("=")
    name = name.strip().lstrip("-").replace("-", "_").casefold()
    name = ALIASES.get(name, name)
    if not equals or not value.strip():
        raise InputError(f"{text!r} is not NAME=VALUE.", to_fix="write for instance zero_stage=3 or method=full")
    of_run = {field.name for field in fields(RunWish)}
    every = _hints(SearchWish)
    hints = {known: hint for known, hint in every.items() if known not in of_run}
    if name == "deepspeed":
        raise InputError("what a whole file would change is a plan of its own.", to_fix="plan with --deepspeed")
    if name in of_run | JOB_OPTIONS:
        raise InputError(
            f"{name!r} is of the job, and --why-not sets what a plan may choose.",
            to_fix="plan anew with it; --what-if says what other lengths, devices and sizes of memory come to",
        )
    if name not in hints:
        raise InputError(f"{name!r} is no option of plan.", to_fix=f"the nearest are {nearest(name, hints)}")
    wanted = restrictions(wishes_of(SearchWish, {name: _from_text(value.strip(), hints[name])}))
    field, parts = RESTRICTS.get(name, (name, ()))
    now, new = getattr(restrictions_now, field), getattr(wanted, field)
    return structs.replace(restrictions_now, **{field: _with_parts(now, new, parts) if parts else new})


def _from_text(text: str, hint: Any) -> Any:
    """Read a value as the command line would; what it does not take is left as it is, to be refused with the rest."""
    wanted = get_args(hint)[0]
    kinds = get_args(wanted) or (wanted,)
    if list[str] in kinds:
        return text.split(",")
    if bool in kinds:
        return SWITCHES.get(text.casefold(), text)
    if {int, list[int]} & {*kinds}:
        numbers = [_whole(each.strip()) for each in text.split(",")]
        return numbers if list[int] in kinds else numbers[0] if len(numbers) == 1 else text
    if float in kinds:
        try:
            return float(text)
        except ValueError:
            return text
    return text


def _whole(text: str) -> int | str:
    return int(text) if text.removeprefix("-").isdecimal() else text


def refuse_absurd(name: str, given: Any) -> None:
    """Refuse a number that nothing has so much of, of an option that may be repeated.

    Raises:
        InputError: one is beyond all reason.
    """
    for number in given if isinstance(given, list | tuple) else (given,):
        if isinstance(number, int | float) and not number <= MOST:
            raise InputError(
                f"--{name.replace('_', '-')} {number:g} is beyond all reason.", to_fix=f"give at most {MOST:,}"
            )


def _with_parts(now: Any, wanted: Any, parts: Sequence[str]) -> Any:
    """Give each group of settings that there is the parts that were asked for; all others stay."""
    groups, wishes = ((each if isinstance(each, tuple) else (each,)) for each in (now, wanted))
    each = dict.fromkeys(
        structs.replace(group, **{part: getattr(wish, part) for part in parts}) for group in groups for wish in wishes
    )
    return tuple(each) if len(each) > 1 else next(iter(each))


def restrictions(wishes: Wishes) -> Restrictions:
    """Turn options into the planner's restrictions: what is left out leaves a dimension free.

    `--method auto` names every method that is tried unasked, so that it also frees a script from its own.

    Raises:
        InputError: an option has a value that it does not take, or two contradict each other.
    """
    import msgspec

    from autofit.spec.job import Restrictions

    of_run = {field.name for field in fields(RunWish)}
    for field in fields(wishes):
        if field.name not in of_run:
            refuse_absurd(field.name, getattr(wishes, field.name))
    wishes, zero_settings = _with_deepspeed_file(wishes)
    given = {
        "methods": _methods(wishes),
        "weights_dtype": _one_of("weights-dtype", wishes.weights_dtype, get_args(Dtype)),
        "optims": _optims(wishes.optim or ()),
        "shardings": _shardings(wishes),
        "offload": _offload(wishes),
        "zero_settings": zero_settings,
        "micro_batch_sequences": wishes.micro_batch or [],
        "batchings": [_one_of("batching", batching, BATCHINGS) for batching in wishes.batching or ()],
        "image_tokens": 0 if wishes.image_tokens is None else wishes.image_tokens,
        "gradient_checkpointing": wishes.gradient_checkpointing,
        "use_reentrant": wishes.use_reentrant,
        "lora": _lora(wishes),
        "quantization": _quantization(wishes),
        "evaluation": _evaluation(wishes),
        **(_further(wishes) if isinstance(wishes, EveryWish) else {}),
        **(_searched_by(wishes) if isinstance(wishes, SearchWish) else {}),
    }
    return msgspec.convert(given, Restrictions)


def one_of_each(wishes: EveryWish) -> EveryWish:
    """Fix every dimension that is left open, for a single configuration.

    Raises:
        InputError: a dimension is given more than one value, or an option would be without effect.
    """
    for name in ("method", "optim", "sharding", "micro_batch", "batching"):
        values = getattr(wishes, name) or ()
        if len(values) > 1 or "auto" in values:
            raise InputError(
                f"estimate takes one configuration, and --{name.replace('_', '-')} leaves several.",
                to_fix="give one value, or let `autofit plan` choose",
            )
    quantises = wishes.load_in_4bit or wishes.load_in_8bit
    chosen = replace(
        wishes,
        method=wishes.method or ["qlora" if quantises else "full"],
        optim=wishes.optim or ["adamw_torch_fused"],
        micro_batch=wishes.micro_batch or [1],
        gradient_checkpointing=bool(wishes.gradient_checkpointing),
        sharding=wishes.sharding or _usual_sharding(wishes),
    )
    _refuse_idle(chosen)
    return chosen


def for_inference(wishes: EveryWish) -> EveryWish:
    """Keep what generating depends on: batch, dtype of the weights, quantisation.

    Raises:
        InputError: another option is given.
    """
    kept = {"micro_batch", "weights_dtype", "load_in_4bit", "load_in_8bit", "llm_int8_skip_modules"}
    for field in fields(wishes):
        if field.name not in kept and not field.name.startswith("bnb_4bit") and _is_given(wishes, field):
            raise InputError(f"--{field.name.replace('_', '-')} has no effect on inference.", to_fix="leave it out")
    dtype = wishes.weights_dtype or "bfloat16"
    pure = {"float32": "fp32", "bfloat16": "pure-bf16", "float16": "pure-fp16"}
    _one_of("weights-dtype", dtype, tuple(pure))
    return replace(wishes, precision=pure[dtype])


def given_options(wishes: Wishes) -> list[str]:
    """Name the options that are not at their default."""
    return [field.name for field in fields(wishes) if _is_given(wishes, field)]


def _is_given(wishes: Wishes, field: Field[Any]) -> bool:
    given: bool = getattr(wishes, field.name) != field.default
    return given


def _usual_sharding(wishes: EveryWish) -> list[str] | None:
    """Leave it to what else is asked for; without that, what a plain launch does."""
    asks = wishes.zero is not None or wishes.deepspeed is not None
    offloads = "cpu" in {wishes.offload_optimizer_device, wishes.offload_param_device}
    return None if asks or offloads else ["none", "ddp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Options that mean something together with another one only."""

    needs: str
    applies: Callable[[EveryWish], bool]
    names: tuple[str, ...]


_GROUPS = (
    _Group(
        needs="--method lora or qlora",
        applies=lambda wishes: bool({"lora", "qlora"} & {*(wishes.method or ())}),
        names=(
            "lora_r",
            "lora_alpha",
            "lora_dropout",
            "lora_target_modules",
            "use_rslora",
            "use_dora",
            "modules_to_save",
        ),
    ),
    _Group(
        needs="--method freeze",
        applies=lambda wishes: wishes.method == ["freeze"],
        names=("freeze_trainable_layers", "freeze_extra_modules"),
    ),
    _Group(
        needs="--method qlora",
        applies=lambda wishes: wishes.method == ["qlora"],
        names=("load_in_4bit", "load_in_8bit", "prepare_kbit", "recasts_tables", "llm_int8_skip_modules"),
    ),
    _Group(
        needs="four-bit weights",
        applies=lambda wishes: wishes.method == ["qlora"] and not wishes.load_in_8bit,
        names=(
            "bnb_4bit_quant_type",
            "bnb_4bit_use_double_quant",
            "bnb_4bit_quant_storage",
            "bnb_4bit_compute_dtype",
        ),
    ),
    _Group(
        needs="--gradient-checkpointing",
        applies=lambda wishes: bool(wishes.gradient_checkpointing),
        names=("use_reentrant", "checkpoint_every_n_layers", "checkpoint_offload"),
    ),
)


def _refuse_idle(wishes: EveryWish) -> None:
    """Refuse an option that would be without effect, for it was meant to have one."""
    given = given_options(wishes)
    for group in _GROUPS:
        idle = [name for name in group.names if name in given]
        if idle and not group.applies(wishes):
            raise InputError(
                f"--{idle[0].replace('_', '-')} has no effect without {group.needs}.",
                to_fix=f"give {group.needs}, or leave it out",
            )


def _one_of(name: str, value: str | None, allowed: Sequence[str]) -> str | None:
    """Return a value that an option takes.

    Raises:
        InputError: it does not take it.
    """
    if value is None or value in allowed:
        return value
    raise InputError(f"--{name} {value!r} is not one of {', '.join(allowed)}.", to_fix="choose one of these")


def _one_or_several(name: str, wished: Sequence[str], allowed: Sequence[str]) -> str | list[str] | None:
    """Return values that an option takes, as one if it is one.

    Raises:
        InputError: it does not take one; or `auto` is given beside others.
    """
    found = [_one_of(name, each, allowed) or "" for each in wished]
    if "auto" in found and len(found) > 1:
        raise InputError(f"--{name} auto is given beside others.", to_fix="leave it out, or name each that may be used")
    return found[0] if len(found) == 1 else found


def _alone(values: list[int]) -> int | list[int]:
    return values[0] if len(values) == 1 else values


def _methods(wishes: Wishes) -> list[str]:
    """Name the methods that are allowed; quantised weights are qlora's."""
    from autofit.search.space import METHODS as TRIED

    allowed = METHODS if isinstance(wishes, EveryWish) else LAUNCHED_METHODS
    wished = [_one_of("method", method, allowed) or "" for method in wishes.method or ()]
    quantises = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(wishes, name, False)]
    if len(quantises) > 1:
        raise InputError("--load-in-4bit and --load-in-8bit are both given.", to_fix="leave one of them out")
    if quantises and set(wished) - {"qlora"}:
        raise InputError(
            f"--{quantises[0].replace('_', '-')} is given with --method {wished[0]}.",
            to_fix="an adapter on quantised weights is --method qlora; others have none",
        )
    if "auto" in wished:
        return [*TRIED]
    return ["qlora"] if quantises else wished


def _optims(wished: Sequence[str]) -> list[str]:
    from autofit.memory.optimizers import OPTIMIZERS

    for optim in wished:
        if optim not in OPTIMIZERS:
            words = "is not modelled" if optim in OPTIMS else "is none of transformers' optim names"
            raise InputError(
                f"--optim {optim!r} {words}.",
                to_fix=f"the nearest that are modelled: {nearest(optim, OPTIMIZERS)}; all: {', '.join(OPTIMIZERS)}",
            )
    return [*wished]


def _shardings(wishes: Wishes) -> list[str]:
    if wishes.zero is None:
        return [_one_of("sharding", sharding, SHARDINGS) or "" for sharding in wishes.sharding or ()]
    if wishes.sharding:
        raise InputError("--zero and --sharding are both given.", to_fix="leave one of them out")
    return ["none", "ddp"] if wishes.zero == 0 else [f"zero{wishes.zero}"]


def _with_deepspeed_file(wishes: AnyWishes) -> tuple[AnyWishes, dict[str, Any]]:
    """Say with options what a DeepSpeed configuration says; return beside them the settings that have no option.

    Raises:
        InputError: an option says something else, or see `read_deepspeed_file`.
    """
    if wishes.deepspeed is None:
        return wishes, {}
    from autofit.sources.deepspeed_file import read_deepspeed_file

    file = read_deepspeed_file(Path(wishes.deepspeed))
    places = [
        "cpu" if offloaded else "none" for offloaded in (file.offload != "none", file.offload.endswith("parameters"))
    ]
    said: dict[str, Any] = {
        "zero": file.stage,
        "offload_optimizer_device": places[0],
        "offload_param_device": places[1],
    }
    if file.precision is not None:
        said["precision"] = file.precision if isinstance(wishes, EveryWish) else [file.precision]
    if wishes.sharding:
        raise InputError("--deepspeed and --sharding are both given.", to_fix="leave one of them out")
    for name, value in said.items():
        given = getattr(wishes, name)
        if given not in (None, [], "auto", ["auto"], value):
            option = name.replace("_", "-")
            raise InputError(
                f"--{option} is given, and {wishes.deepspeed!r} says otherwise.",
                to_fix=f"leave out --{option}, or correct the file",
            )
    return replace(wishes, **said), _stated(structs.asdict(file.settings))


def _offload(wishes: Wishes) -> str | None:
    """Say what goes to the host; None where a search may choose."""
    optimizer = _one_of("offload-optimizer-device", wishes.offload_optimizer_device, PLACES)
    parameters = _one_of("offload-param-device", wishes.offload_param_device, PLACES)
    if parameters == "cpu" and optimizer == "none":
        raise InputError(
            "--offload-param-device cpu with --offload-optimizer-device none is not modelled.",
            to_fix="offload the optimizer's state too, or nothing",
        )
    if parameters is None and optimizer is None and not isinstance(wishes, EveryWish):
        return None
    return "optimizer_and_parameters" if parameters == "cpu" else "optimizer" if optimizer == "cpu" else "none"


def _lora(wishes: Wishes) -> dict[str, Any] | list[dict[str, Any]]:
    """Read the adapter, or each of several: every kind with every rank, every scale and every choice of modules."""
    dropout = {"lora_dropout": wishes.lora_dropout}
    if isinstance(wishes, EveryWish):
        return _stated(
            dropout
            | {
                "r": wishes.lora_r,
                "lora_alpha": wishes.lora_alpha,
                "target_modules": _names("lora-target-modules", wishes.lora_target_modules),
                "use_rslora": wishes.use_rslora,
                "use_dora": wishes.use_dora,
                "modules_to_save": _names("modules-to-save", wishes.modules_to_save),
            }
        )
    assert isinstance(wishes, SearchWish), "what is no single estimate is a search"
    targets = [_names("lora-target-modules", text) for text in wishes.lora_target_modules or (None,)]
    kinds = [ADAPTERS[_one_of("adapter", name, tuple(ADAPTERS)) or ""] for name in wishes.adapter or ()] or [{}]
    every = product(kinds, wishes.lora_r or (None,), wishes.lora_alpha or (None,), targets)
    return _one_if_alone(
        [
            _stated(dropout | kind | {"r": r, "lora_alpha": alpha, "target_modules": names})
            for kind, r, alpha, names in every
        ]
    )


def _quantization(wishes: Wishes) -> dict[str, Any] | list[dict[str, Any]]:
    given: dict[str, Any] = {
        "compute_dtype": _one_of("bnb-4bit-compute-dtype", wishes.bnb_4bit_compute_dtype, get_args(Dtype)),
        "storage_dtype": _one_of("bnb-4bit-quant-storage", wishes.bnb_4bit_quant_storage, get_args(StorageDtype)),
        "prepares_kbit": wishes.prepare_kbit,
    }
    if isinstance(wishes, EveryWish):
        given |= {
            "bits": 8 if wishes.load_in_8bit else None,
            "recasts_tables": wishes.recasts_tables,
            "kernel": _one_of("packed-kernel", wishes.packed_kernel, get_args(PackedKernel)),
            "skip_modules": _names("llm-int8-skip-modules", wishes.llm_int8_skip_modules),
        }
    assert isinstance(wishes, EveryWish | SearchWish), "every wish is one of a search or of an estimate"
    said = {
        "quant_type": _one_of("bnb-4bit-quant-type", wishes.bnb_4bit_quant_type, QUANT_TYPES),
        "double_quant": wishes.bnb_4bit_use_double_quant,
    }
    named = wishes.quantization or () if isinstance(wishes, SearchWish) else ()
    if named and (wishes.load_in_4bit or _stated(said)):
        raise InputError(
            "--quantization is given beside --load-in-4bit or --bnb-4bit-quant-type or its like.",
            to_fix="leave one of them out: nf4-double says all of it",
        )
    codes = [QUANTIZATIONS[_one_of("quantization", name, tuple(QUANTIZATIONS)) or ""] for name in named] or [said]
    return _one_if_alone([_stated(given | code) for code in codes])


def _one_if_alone(given: list[dict[str, Any]]) -> dict[str, Any] | list[dict[str, Any]]:
    return given[0] if len(given) == 1 else given


def _searched_by(wishes: SearchWish) -> dict[str, Any]:
    """Read what only a search takes."""
    return {
        "objective": _one_of("objective", wishes.objective, get_args(Objective)),
        "held_stages": _held_stages(wishes.hold),
        "num_processes": wishes.num_processes or [],
        "precision": _one_or_several("precision", wishes.precision or ["auto"], PRECISIONS),
        "attention": _one_or_several("attention", wishes.attention or ["auto"], ATTENTIONS),
        "loss": _one_or_several("loss", wishes.loss or ["stock"], get_args(Loss)),
        "num_replicas": _alone(wishes.num_replicas or [1]),
    }


def _evaluation(wishes: Wishes) -> dict[str, Any]:
    """Read how the model is evaluated."""
    return {
        "per_device_eval_batch_size": wishes.per_device_eval_batch_size,
        "keeps_predictions": wishes.compute_metrics,
        "num_sequences": wishes.eval_sequences,
        "eval_accumulation_steps": wishes.eval_accumulation_steps,
        "predict_with_generate": wishes.predict_with_generate,
    }


def _held_stages(given: Sequence[str] | None) -> list[str]:
    names = [_one_of("hold", each, (*STAGES, "none")) for each in given or STAGES]
    if "none" in names and len(names) > 1:
        raise InputError("--hold none is given with other stages.", to_fix="give one or the other")
    return [name for name in names if name not in {None, "none"}]


def _further(wishes: EveryWish) -> dict[str, Any]:
    """Read what only estimates take."""
    freeze = {
        "freeze_trainable_layers": wishes.freeze_trainable_layers,
        "freeze_extra_modules": _names("freeze-extra-modules", wishes.freeze_extra_modules),
    }
    return _stated(
        {
            "freeze": _stated(freeze),
            "precision": _one_of("precision", wishes.precision, PRECISIONS),
            "attention": _one_of("attention", wishes.attention, ATTENTIONS),
            "num_replicas": wishes.num_replicas,
            "reshard_after_forward": wishes.reshard_after_forward,
            "gradient_as_bucket_view": wishes.gradient_as_bucket_view,
            "sequence_parallel_size": wishes.sequence_parallel_size,
            "checkpoint_every_n_layers": wishes.checkpoint_every_n_layers,
            "checkpoint_offload": wishes.checkpoint_offload,
            "sdpa_kernel": _one_of("sdpa-kernel", wishes.sdpa_kernel, get_args(SdpaKernel)),
            "loss": _loss(wishes),
            "task": _one_of("task", wishes.task, get_args(Task)),
            "keeps_outputs": wishes.keeps_outputs,
            "expandable_segments": wishes.expandable_segments,
            "max_split_size_mb": wishes.max_split_size_mb,
        }
    )


def _loss(wishes: EveryWish) -> str | None:
    loss = _one_of("loss", wishes.loss, get_args(Loss))
    if wishes.use_liger_kernel and loss not in {None, "liger"}:
        raise InputError(f"--use-liger-kernel is given with --loss {loss}.", to_fix="leave one of them out")
    return "liger" if wishes.use_liger_kernel else loss


def _names(option: str, text: str | None) -> list[str] | None:
    names = None if text is None else [name.strip() for name in text.split(",") if name.strip()]
    if names == []:
        raise InputError(f"--{option} is empty.", to_fix="name modules, with commas between")
    return names


def _stated(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}
