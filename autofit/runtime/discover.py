"""`python -m autofit.runtime.discover OUT.json script.py arguments`: runs a script up to its first training step.

Weights cost nothing (every parameter is one stored zero, expanded), nothing is trained, no output folder is made, and
no GPU is seen. What was found is written to OUT.json as `autofit.spec.discovered.Discovered`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import msgspec

from autofit.runtime.import_hooks import patch_after_import
from autofit.runtime.run import run_script
from autofit.spec.discovered import Discovered, FoundAdapter, FoundLengths, FoundQuantization

RECORDED_ARGUMENTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "fp16",
    "optim",
    "gradient_checkpointing",
    "activation_checkpointing",
    "learning_rate",
    "max_steps",
    "num_train_epochs",
    "output_dir",
    "deepspeed",
    "use_liger_kernel",
    "torch_compile",
)
LEFT_OUT = ("bf16", "fp16", "tf32", "bf16_full_eval", "fp16_full_eval", "torch_compile")
"""Arguments that need the GPU which is hidden: left out while TrainingArguments and Trainer check them."""
SWITCHED_OFF = ("report_to", "push_to_hub", "deepspeed", "fsdp", "fsdp_config")
"""Arguments that reach outside the process or belong to the plan: left at their defaults."""
LOADING_ARGUMENTS = (
    "state_dict", "device_map", "max_memory", "offload_folder", "offload_buffers", "offload_state_dict",
    "low_cpu_mem_usage", "variant", "use_safetensors", "weights_only", "ignore_mismatched_sizes", "output_loading_info",
    "adapter_kwargs", "adapter_name", "generation_config", "key_mapping", "tp_plan", "tp_size", "device_mesh",
    "distributed_config", "mirror", "from_tf", "from_flax", "use_flash_attention_2", "load_in_4bit", "load_in_8bit",
    "_fast_init", "_from_auto", "_from_pipeline", "_commit_hash", "use_kernels", "kernel_config", "disable_mmap",
)  # fmt: skip
"""What `from_pretrained` takes for reading weights, which are not read here. Source: transformers/modeling_utils.py."""
HUB_ARGUMENTS = (
    "cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies", "trust_remote_code",
)  # fmt: skip
MAX_SAMPLES = 4096
"""Samples whose length is looked at; more are left to the user's --seq-len."""
MAX_SCAN_SECONDS = 15.0
NUM_FIRST_BATCHES = 3


class TrainingReached(SystemExit):
    """Ends the script where training would begin; not an Exception, so that the script's own handlers let it pass."""


class NotATrainerScript(SystemExit):
    """Ends a script that begins to train without transformers' Trainer."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"autofit: the script {what}; only scripts that train with transformers.Trainer are understood"
        )


@dataclasses.dataclass
class Observed:
    """What the hooks have seen so far."""

    script: Path
    out: Path
    where: dict[str, str] = dataclasses.field(default_factory=dict)
    loaded: list[tuple[Any, dict[str, Any]]] = dataclasses.field(default_factory=list)
    """Each model that was built without weights, and what it was asked for."""
    given: list[tuple[Any, dict[str, Any]]] = dataclasses.field(default_factory=list)
    """Each TrainingArguments object, and the values the script gave it."""
    prepares_kbit: bool = False
    inside_trainer: bool = False

    def mark(self, fact: str) -> None:
        """Remember the line of the script that is running now."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and Path(frame.f_code.co_filename) != self.script:
            frame = frame.f_back
        if frame is not None:
            self.where[fact] = f"{self.script.name}:{frame.f_lineno}"


def main() -> None:
    """Run the script under the hooks."""
    out, script, *arguments = sys.argv[1:]
    observed = Observed(script=Path(script).resolve(), out=Path(out))
    hide_gpus()
    make_modules_thrifty()
    install_hooks(observed)
    run_script(str(observed.script), arguments)


def hide_gpus() -> None:
    """Make the process one without a GPU, whatever the script does to CUDA_VISIBLE_DEVICES."""
    import torch

    torch.cuda.is_available = lambda: False
    torch.cuda.device_count = lambda: 0


def make_modules_thrifty() -> None:
    """Let modules stay where they are, and change dtype without giving expanded parameters memory."""
    import torch
    from torch import nn

    convert, move = nn.Module._apply, nn.Module.to

    def _apply(self: Any, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return convert(self, lambda tensor: _converted(fn, tensor), *args, **kwargs)

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
        return self if dtype is None else move(self, dtype)

    nn.Module._apply, nn.Module.to, nn.Module.cuda = _apply, to, lambda self, *_args, **_kwargs: self


def _converted(fn: Callable[..., Any], tensor: Any) -> Any:
    if tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size():
        return fn(tensor)
    return fn(tensor.detach().as_strided((1,), (1,))).reshape(()).expand(tensor.shape)


def install_hooks(observed: Observed) -> None:
    """Arrange for every seam to be hooked when the script imports it."""
    hooks: dict[str, Callable[[Observed, ModuleType], None]] = {
        "transformers.modeling_utils": _hook_models,
        "transformers.training_args": _hook_training_arguments,
        "transformers.trainer": _hook_trainer,
        "transformers.tokenization_utils_base": _hook_tokenizers,
        "accelerate.accelerator": _hook_accelerator,
        "peft.utils.other": _hook_kbit,
        "torch._tensor": _hook_backward,
    }
    patch_after_import({name: functools.partial(hook, observed) for name, hook in hooks.items()})


def _hook_models(observed: Observed, module: ModuleType) -> None:
    def from_pretrained(cls: Any, path: Any = None, *args: Any, **kwargs: Any) -> Any:
        return build_without_weights(observed, cls, path, args, kwargs)

    def _from_config(cls: Any, config: Any, /, **kwargs: Any) -> Any:
        return build_without_weights(observed, cls, None, (), {"config": config, **kwargs})

    module.PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    module.PreTrainedModel._from_config = classmethod(_from_config)
    module.PreTrainedModel.save_pretrained = _nothing


def _hook_tokenizers(observed: Observed, module: ModuleType) -> None:
    module.PreTrainedTokenizerBase.save_pretrained = _nothing


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Stand in for what would write files."""


def build_without_weights(
    observed: Observed, cls: Any, path: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Build the model `from_pretrained` would return, from its config alone."""
    observed.mark("model")
    asked = {
        "name": _loaded_name(path, kwargs.get("gguf_file")),
        "dtype": kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None),
        "quantization": _quantization(kwargs),
        "attention": kwargs.pop("attn_implementation", None),
    }
    kwargs.pop("torch_dtype", None)
    for name in LOADING_ARGUMENTS:
        kwargs.pop(name, None)
    config, rest = _config(cls, path, kwargs)
    dtype = _dtype(asked["dtype"], config)
    model = _on_meta(cls, config, dtype, args, rest)
    give_weights(model)
    model.config.name_or_path = "" if path is None else str(path)
    observed.loaded.append((model, {**asked, "dtype": dtype}))
    return model.eval()


def _loaded_name(path: Any, gguf_file: str | None) -> str | None:
    """Return what was loaded, as the script calls it: of a folder with a GGUF file, the file."""
    if path is None:
        return None
    return str(Path(path) / gguf_file) if gguf_file else str(path)


def _quantization(kwargs: dict[str, Any]) -> Any:
    """Return the quantisation asked for, in either of transformers' spellings; a GGUF file's is not one."""
    config = kwargs.pop("quantization_config", None)
    if config is None and kwargs.get("load_in_4bit"):
        return {"load_in_4bit": True}
    if config is None and kwargs.get("load_in_8bit"):
        return {"load_in_8bit": True}
    return config.to_dict() if hasattr(config, "to_dict") else config


def _config(cls: Any, path: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the model's config, and what of the arguments goes to its constructor."""
    config, gguf_file = kwargs.pop("config", None), kwargs.pop("gguf_file", None)
    if hasattr(config, "to_dict"):
        return config, {name: value for name, value in kwargs.items() if name not in HUB_ARGUMENTS}
    kwargs = {name: value for name, value in kwargs.items() if name != "trust_remote_code"}
    if gguf_file is not None:
        kwargs["gguf_file"] = gguf_file
    config, rest = cls.config_class.from_pretrained(config or path, return_unused_kwargs=True, **kwargs)
    return config, {name: value for name, value in rest.items() if name not in (*HUB_ARGUMENTS, "gguf_file")}


def _dtype(asked: Any, config: Any) -> Any:
    """Return the dtype the weights would have, None where only the checkpoint knows.

    Source: transformers/modeling_utils.py `_get_dtype`; leaving it out means `auto` since release 5, fp32 before.
    """
    import torch
    import transformers

    if asked is None and int(transformers.__version__.split(".")[0]) < 5:
        return torch.float32
    if asked is None or asked == "auto":
        asked = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    return getattr(torch, asked) if isinstance(asked, str) else asked


def _on_meta(cls: Any, config: Any, dtype: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the model's constructor on the meta device; with sdpa, as other attention may need the GPU to be built."""
    import torch

    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        with torch.device("meta"):
            return cls(config, *args, **kwargs)
    finally:
        torch.set_default_dtype(usual)


def give_weights(model: Any) -> None:
    """Replace meta parameters by zeros that look real, one stored element each; those that are tied stay tied."""
    import torch
    from torch import nn

    replaced: dict[int, Any] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and old.is_meta:
                zero = torch.zeros((), dtype=old.dtype).expand(old.shape)
                module._parameters[name] = replaced.setdefault(id(old), nn.Parameter(zero, old.requires_grad))
        for name, old in module._buffers.items():
            if old is not None and old.is_meta:
                module._buffers[name] = torch.zeros(old.shape, dtype=old.dtype)


def _hook_kbit(observed: Observed, module: ModuleType) -> None:
    def prepare_model_for_kbit_training(model: Any, *_args: Any, **_kwargs: Any) -> Any:
        observed.mark("prepare_model_for_kbit_training")
        observed.prepares_kbit = True
        return model.requires_grad_(False)

    vars(module)["prepare_model_for_kbit_training"] = prepare_model_for_kbit_training


def _hook_training_arguments(observed: Observed, module: ModuleType) -> None:
    original = module.TrainingArguments.__post_init__

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:  # noqa: N807 - dataclasses call it by this name
        observed.mark("arguments")
        given = {name: getattr(self, name) for name in RECORDED_ARGUMENTS if hasattr(self, name)}
        observed.given.append((self, given))
        self.use_cpu = True
        for name in SWITCHED_OFF:
            set_default(self, name)
        self.report_to = "none"
        with left_out(self):
            original(self)

    module.TrainingArguments.__post_init__ = __post_init__


@contextlib.contextmanager
def left_out(arguments: Any) -> Iterator[None]:
    """Let the arguments that need a GPU be at their defaults for a while."""
    values = {name: getattr(arguments, name) for name in LEFT_OUT if hasattr(arguments, name)}
    for name in values:
        set_default(arguments, name)
    try:
        yield
    finally:
        for name, value in values.items():
            setattr(arguments, name, value)


def set_default(arguments: Any, name: str) -> None:
    """Set a field of a dataclass to its default, if there is such a field."""
    for field in dataclasses.fields(arguments):
        if field.name == name:
            factory = field.default_factory
            setattr(arguments, name, field.default if factory is dataclasses.MISSING else factory())


def _hook_trainer(observed: Observed, module: ModuleType) -> None:
    original = module.Trainer.__init__

    @functools.wraps(original)
    def __init__(self: Any, model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:  # noqa: N807
        observed.mark("trainer")
        args = args or module.TrainingArguments("tmp_trainer")
        with tempfile.TemporaryDirectory() as nowhere, left_out(args), inside_trainer(observed):
            output_dir, args.output_dir = args.output_dir, nowhere
            original(self, model, args, *rest, **kwargs)
            args.output_dir = output_dir

    def train(self: Any, *_args: Any, **_kwargs: Any) -> None:
        observed.mark("train")
        with inside_trainer(observed):
            found = describe(observed, self)
        write_whole(observed.out, msgspec.json.encode(found))
        raise TrainingReached(0)

    def evaluate(*_args: Any, **_kwargs: Any) -> dict[str, float]:
        return defaultdict(lambda: math.nan)

    module.Trainer.__init__, module.Trainer.train, module.Trainer.evaluate = __init__, train, evaluate
    module.Trainer.save_model = module.Trainer.save_state = module.Trainer.push_to_hub = _nothing


@contextlib.contextmanager
def inside_trainer(observed: Observed) -> Iterator[None]:
    """Tell Trainer's own use of accelerate from the script's."""
    observed.inside_trainer = True
    try:
        yield
    finally:
        observed.inside_trainer = False


def _hook_accelerator(observed: Observed, module: ModuleType) -> None:
    original = module.Accelerator.prepare

    @functools.wraps(original)
    def prepare(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not observed.inside_trainer:
            raise NotATrainerScript("prepares its own training loop with accelerate")
        return original(self, *args, **kwargs)

    module.Accelerator.prepare = prepare


def _hook_backward(observed: Observed, module: ModuleType) -> None:
    def backward(*_args: Any, **_kwargs: Any) -> None:
        raise NotATrainerScript("runs its own training loop")

    module.Tensor.backward = backward


def describe(observed: Observed, trainer: Any) -> Discovered:
    """Return everything that a plan needs to know of a trainer that is about to train."""
    given = next((given for arguments, given in observed.given if arguments is trainer.args), {})
    base = trainer.model.get_base_model() if hasattr(trainer.model, "peft_config") else trainer.model
    asked = next((asked for model, asked in observed.loaded if model is base), {})
    return Discovered(
        model_name=asked.get("name") or type(base).__name__,
        config={**_plain(base.config.to_dict()), "architectures": [type(base).__name__]},
        weights_dtype=_name(asked["dtype"] if asked else base.dtype),
        attention=asked.get("attention") or getattr(base.config, "_attn_implementation", None) or "eager",
        adapter=adapter_of(trainer.model),
        quantization=quantization_of(asked.get("quantization"), prepares_kbit=observed.prepares_kbit),
        trainer=type(trainer).__name__,
        lengths=lengths_of(trainer),
        arguments=_plain({**_now(trainer.args), **given}),
        where=observed.where,
    )


def _now(arguments: Any) -> dict[str, Any]:
    """Return the recorded arguments as they stand, for those a script set after they were made."""
    values = {name: getattr(arguments, name, None) for name in RECORDED_ARGUMENTS}
    return {name: value for name, value in values.items() if name not in (*LEFT_OUT, *SWITCHED_OFF, "output_dir")}


def adapter_of(model: Any) -> FoundAdapter | None:
    """Return the adapter a model carries, with what of it cannot be planned for."""
    if not hasattr(model, "peft_config"):
        return None
    config = model.peft_config[model.active_adapter]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return FoundAdapter(peft_type=kind, unplanned=(f"peft_type {kind}",))
    carrying = {name for name, module in model.named_modules() if hasattr(module, "lora_A") and len(module.lora_A)}
    targets = sorted({name.rsplit(".", 1)[-1] for name in carrying})
    return FoundAdapter(
        peft_type=kind,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=tuple(targets),
        unplanned=tuple(_unplanned(config, model, carrying, targets)),
    )


def _unplanned(config: Any, model: Any, carrying: set[str], targets: Sequence[str]) -> Iterator[str]:
    for name in ("use_dora", "modules_to_save", "rank_pattern", "trainable_token_indices", "layer_replication"):
        if getattr(config, name, None):
            yield f"{name}={getattr(config, name)}"
    if getattr(config, "bias", "none") != "none":
        yield f"bias={config.bias}"
    inside = tuple(f"{name}." for name in carrying)
    bare = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in targets and name not in carrying]
    if missed := [name for name in bare if not name.startswith(inside)]:
        yield f"an adapter on some modules only, for instance not on {missed[0]}"


def quantization_of(asked: Mapping[str, Any] | None, *, prepares_kbit: bool) -> FoundQuantization | None:
    """Return the quantisation in the planner's words. Source: transformers' `BitsAndBytesConfig` and its defaults."""
    if not asked or asked.get("dequantize"):  # GgufConfig, Mxfp4Config: a quantised file, loaded as ordinary weights
        return None
    if not asked.get("load_in_4bit"):
        bits = 8 if asked.get("load_in_8bit") else 0
        return FoundQuantization(bits=bits, quant_type=str(asked.get("quant_method") or "int8"))
    return FoundQuantization(
        bits=4,
        quant_type=asked.get("bnb_4bit_quant_type", "fp4"),
        double_quant=bool(asked.get("bnb_4bit_use_double_quant")),
        compute_dtype=_name(asked.get("bnb_4bit_compute_dtype")) or "float32",
        storage_dtype=_name(asked.get("bnb_4bit_quant_storage")) or "uint8",
        prepares_kbit=prepares_kbit,
    )


def lengths_of(trainer: Any) -> FoundLengths | None:
    """Collate the first batches and the longest of many samples, and return the widest batch."""
    trainer.args.dataloader_num_workers, trainer.args.dataloader_prefetch_factor = 0, None
    trainer.args.dataloader_persistent_workers = False
    loader = trainer.get_train_dataloader()
    longest, num_seen = longest_samples(loader.dataset, trainer.args.per_device_train_batch_size)
    batches = [*itertools.islice(loader, NUM_FIRST_BATCHES), *([loader.collate_fn(longest)] if longest else [])]
    widths = [width for batch in batches if (width := _width(batch)) is not None]
    if not widths:
        return None
    first = NUM_FIRST_BATCHES * trainer.args.per_device_train_batch_size
    return FoundLengths(
        sequence_tokens=max(widths),
        num_samples_seen=num_seen or first,
        num_samples=_length(loader.dataset),
        image_tokens=max(_image_tokens(batch, trainer.model.config) for batch in batches),
    )


def longest_samples(dataset: Any, num_samples: int) -> tuple[list[Any], int]:
    """Return the longest samples of a dataset that can be indexed, and how many were looked at."""
    size = _length(dataset)
    if size is None or not hasattr(dataset, "__getitem__"):
        return [], 0
    deadline, lengths = time.monotonic() + MAX_SCAN_SECONDS, {}
    for index in range(0, size, max(1, math.ceil(size / MAX_SAMPLES))):
        sample = dataset[index]
        if not isinstance(sample, Mapping) or "input_ids" not in sample:
            return [], 0
        lengths[index] = len(sample["input_ids"])
        if time.monotonic() > deadline:
            break
    longest = sorted(lengths, key=lambda index: lengths[index], reverse=True)[:num_samples]
    return [dataset[index] for index in longest], len(lengths)


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None


def _width(batch: Any) -> int | None:
    ids = batch.get("input_ids") if hasattr(batch, "get") else None
    return int(ids.shape[1]) if ids is not None and ids.ndim == 2 else None


def _image_tokens(batch: Any, config: Any) -> int:
    """Return the most tokens of a sequence that stand for images, 0 where the batch holds none."""
    names = ("image_token_id", "image_token_index")
    number = next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
    if number is None or _width(batch) is None or batch.get("pixel_values") is None:
        return 0
    return int((batch["input_ids"] == number).sum(1).max())


def _name(dtype: Any) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values that JSON can hold: enum members by their value, dtypes and the like by their name."""
    return msgspec.json.decode(msgspec.json.encode(values, enc_hook=lambda value: str(getattr(value, "value", value))))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is either there in whole or not at all."""
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(content)
    beside.replace(path)


if __name__ == "__main__":
    main()
