"""Reads a script that is not to be run: what its source says in plain words, and nothing that it would work out.

Everything it returns is a guess: a value may be changed before it is used, and a call may never be made.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from msgspec import Struct
from msgspec.structs import replace

from autofit.errors import InputError
from autofit.sources.attention import usual_attention
from autofit.sources.script import NotRunError
from autofit.spec.configuration import Batching, Loss
from autofit.spec.discovered import Discovered, FoundAdapter, FoundLengths, FoundLoop, FoundQuantization
from autofit.spec.job import Model

ARGUMENT_CLASSES = ("TrainingArguments", "Seq2SeqTrainingArguments", "SFTConfig", "DPOConfig")
TRAINERS = ("Trainer", "Seq2SeqTrainer", "SFTTrainer", "DPOTrainer")
LENGTH_NAMES = ("max_length", "max_seq_length", "block_size", "seq_length", "max_seq_len")
"""What scripts call the length that they cut at, the likeliest first."""
MODEL_NAMES = ("model_name_or_path", "model_name", "model_id", "model", "base_model")
BATCH, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"
DEFAULTS: dict[str, Any] = {BATCH: 8, ACCUMULATION: 1}
"""Source: transformers/training_args.py 5.23."""
LOOP_DEFAULTS: dict[str, Any] = {BATCH: 1, ACCUMULATION: 1}
"""Of a DataLoader and an Accelerator. Source: torch/utils/data/dataloader.py 2.13, accelerate/accelerator.py 1.15."""
LOOP_OPTIMIZERS = {"SGD": "sgd", "Adagrad": "adagrad", "RMSprop": "rmsprop", "Adafactor": "adafactor"}
"""Classes that a loop may make, by transformers' name for them; any other is taken for AdamW."""
CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


class Said(Struct, frozen=True):
    """A value, and where it stands."""

    value: Any
    origin: str


@dataclass(slots=True)
class _Reading:
    """What the source and its arguments say so far."""

    name: str
    """Of the script."""
    constants: dict[str, Said] = field(default_factory=dict)
    calls: dict[str, ast.Call] = field(default_factory=dict)
    passed: dict[str, Said] = field(default_factory=dict)

    @property
    def is_loop(self) -> bool:
        """Whether what trains is a loop of the script's own with accelerate."""
        return "Accelerator" in self.calls and not any(name in self.calls for name in TRAINERS)

    def line_of(self, call: str) -> str:
        """Name the line of a call."""
        return f"read in {self.name}:{self.calls[call].lineno}"


def read_instead(
    refusal: NotRunError,
    script: Path,
    arguments: Sequence[str] = (),
    *,
    find_model: Callable[[str], Model],
    model: Model | None = None,
) -> Discovered:
    """Return what the source of a script says that could not be run here.

    Args:
        refusal: why it could not.
        script: the user's training script.
        arguments: what the user passes to it.
        find_model: makes a model of the name that is read.
        model: the one that the user names instead.

    Raises:
        NotRunError: the refusal, where the source names nothing that trains either.
    """
    try:
        found = read_script(script, arguments, find_model=find_model, model=model)
    except InputError as error:
        raise refusal from error
    if "trainer" not in found.where:
        raise refusal
    return replace(found, not_run=refusal.message)


def read_script(
    script: Path, arguments: Sequence[str] = (), *, find_model: Callable[[str], Model], model: Model | None = None
) -> Discovered:
    """Return what a script's source and its arguments say that it trains.

    Args:
        script: the user's training script.
        arguments: what the user passes to it; of a YAML or JSON file among them the top level counts.
        find_model: makes a model of the name that is read.
        model: the one that the user names instead.

    Raises:
        InputError: the source is no Python, or says nothing of a model.
    """
    reading = _read(script)
    reading.passed = {**dict(_config_values(arguments)), **dict(_flags(arguments))}
    trainer = next((name for name in TRAINERS if name in reading.calls), "Trainer")
    said = _said_of_loop(reading) if reading.is_loop else _said(reading)
    named = None if model is not None else _model_name(reading, script)
    found = model or find_model(named.value if named else "")
    tokens = _length(reading)
    config = _config(found, reading)
    attention = _either(reading.passed.get("attn_implementation"), _keywords(reading, _LOAD).get("attn_implementation"))
    return Discovered(
        model_name=found.name,
        config=config,
        weights_dtype=None,
        attention=str(attention.value) if attention else usual_attention(config),
        adapter=_adapter(reading),
        quantization=_quantization(reading),
        trainer="a loop of its own with accelerate.Accelerator" if reading.is_loop else trainer,
        loss=_loss(trainer, said),
        lengths=None if tokens is None else _lengths(tokens.value, said),
        loop=_loop(reading),
        checkpoints="gradient_checkpointing_enable" in reading.calls if reading.is_loop else None,
        arguments={name: each.value for name, each in said.items()},
        where={
            **dict(_origins(reading, trainer, said)),
            "model": named.origin if named else "as you say",
            "sequence": tokens.origin if tokens else "as you say",
            "attention": attention.origin if attention else _BY_DEFAULT,
        },
        is_guess=True,
    )


KNOWN_ARGUMENTS = (
    *DEFAULTS, "bf16", "fp16", "optim", "gradient_checkpointing", "learning_rate", "max_steps", "num_train_epochs",
    "output_dir", "use_liger_kernel", "torch_compile", "packing", "max_length",
)  # fmt: skip
_LOAD = "model.from_pretrained"
_BY_DEFAULT = "by transformers' defaults"


def _read(script: Path) -> _Reading:
    try:
        tree = ast.parse(script.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{str(script)!r} cannot be read as Python: {error}", to_fix="correct the script") from error
    reading = _Reading(script.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            _note(reading, node.targets[0].id, node.value, node.lineno)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            _note(reading, node.target.id, node.value, node.lineno)
        if isinstance(node, ast.Call):
            _note_call(reading, node)
    return reading


def _note(reading: _Reading, name: str, value: ast.expr, line: int) -> None:
    """Note a constant; also the default of a dataclass field."""
    if isinstance(value, ast.Call) and _called(value) == "field":
        value = next((each.value for each in value.keywords if each.arg == "default"), value)
    if isinstance(value, ast.Constant):
        reading.constants.setdefault(name, Said(value.value, f"read in {reading.name}:{line}"))


def _note_call(reading: _Reading, call: ast.Call) -> None:
    name = _called(call)
    reading.calls.setdefault(name, call)
    if name == "add_argument" and call.args and isinstance(call.args[0], ast.Constant):
        default = next((each.value for each in call.keywords if each.arg == "default"), None)
        if isinstance(default, ast.Constant):
            option = str(call.args[0].value).lstrip("-").replace("-", "_")
            reading.constants.setdefault(option, Said(default.value, f"read in {reading.name}:{call.lineno}"))


def _called(call: ast.Call) -> str:
    """Name what is called; of a model's classmethod the class with it."""
    function = call.func
    if isinstance(function, ast.Attribute):
        owner = function.value.id if isinstance(function.value, ast.Name) else ""
        is_model = function.attr in {"from_pretrained", "from_config"} and re.search(r"Model|For[A-Z]", owner)
        return f"model.{function.attr}" if is_model else function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _value(reading: _Reading, node: ast.expr | None, line: int) -> Said | None:
    """Return a literal, or what a name was set to once or is passed as; None where it has to be worked out."""
    if isinstance(node, (ast.Name, ast.Attribute)):
        name = node.id if isinstance(node, ast.Name) else node.attr
        return reading.passed.get(name) or reading.constants.get(name)
    try:
        value = None if node is None else ast.literal_eval(node)
    except ValueError:
        return None
    return None if value is None else Said(value, f"read in {reading.name}:{line}")


def _keywords(reading: _Reading, name: str) -> dict[str, Said]:
    call = reading.calls.get(name)
    if call is None:
        return {}
    values = {each.arg: _value(reading, each.value, call.lineno) for each in call.keywords if each.arg}
    return {key: said for key, said in values.items() if said is not None and said.value is not None}


def _values(reading: _Reading, name: str) -> dict[str, Any]:
    return {key: said.value for key, said in _keywords(reading, name).items()}


def _either(*said: Said | None) -> Said | None:
    return next((each for each in said if each is not None), None)


def _arguments(reading: _Reading) -> dict[str, Said]:
    given = next((_keywords(reading, name) for name in ARGUMENT_CLASSES if name in reading.calls), {})
    return {name: value for name, value in given.items() if name in KNOWN_ARGUMENTS}


def _said(reading: _Reading) -> dict[str, Said]:
    """Join defaults, the source and what is passed. trl's arguments train in bf16 unless told otherwise.

    Source: trl/trainer/base_config.py 1.16, `__post_init__`.
    """
    passed = {name: said for name, said in reading.passed.items() if name in KNOWN_ARGUMENTS}
    said = {**_by_default(DEFAULTS), **_arguments(reading), **passed}
    is_trls = any(name in reading.calls for name in ("SFTConfig", "DPOConfig"))
    is_half = said.get("fp16", Said(value=False, origin="")).value
    return {"bf16": Said(not is_half, "by trl's defaults"), **said} if is_trls else said


def _said_of_loop(reading: _Reading) -> dict[str, Said]:
    """Read what a loop gives its DataLoader, its Accelerator and its optimizer."""
    accelerator, said = _keywords(reading, "Accelerator"), _by_default(LOOP_DEFAULTS)
    if (batch := _keywords(reading, "DataLoader").get("batch_size")) is not None:
        said[BATCH] = batch
    if (accumulation := accelerator.get(ACCUMULATION)) is not None:
        said[ACCUMULATION] = accumulation
    if (precision := accelerator.get("mixed_precision")) is not None:
        said |= {name: replace(precision, value=precision.value == name) for name in ("bf16", "fp16")}
        said["fixes_precision"] = replace(precision, value=True)
    made = next((name for name in LOOP_OPTIMIZERS if name in reading.calls), "AdamW")
    fused = "_fused" if _values(reading, made).get("fused") else ""
    origin = reading.line_of(made) if made in reading.calls else _BY_DEFAULT
    said["optim"] = Said(LOOP_OPTIMIZERS.get(made, f"adamw_torch{fused}"), origin)
    return said


def _loop(reading: _Reading) -> FoundLoop | None:
    return FoundLoop(accumulates_by_hand="accumulate" not in reading.calls) if reading.is_loop else None


def _by_default(values: Mapping[str, Any]) -> dict[str, Said]:
    return {name: Said(value, _BY_DEFAULT) for name, value in values.items()}


def _lengths(tokens: int, said: Mapping[str, Said]) -> FoundLengths:
    """Take batches for padded, which need more than others, unless the source packs them."""
    batching: Batching = "packed" if "packing" in said and said["packing"].value else "padded"
    return FoundLengths(sequence_tokens=tokens, num_samples_seen=0, num_samples=None, batching=batching)


def _config_values(arguments: Sequence[str]) -> Iterator[tuple[str, Said]]:
    for argument in arguments:
        path = Path(argument)
        if path.suffix in CONFIG_SUFFIXES and path.is_file():
            text = path.read_text(encoding="utf-8")
            loaded = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
            for name, value in loaded.items() if isinstance(loaded, Mapping) else ():
                yield name, Said(value, f"read in {path.name}")


def _flags(arguments: Sequence[str]) -> Iterator[tuple[str, Said]]:
    """Read `--name value`, `--name=value` and hydra's `name=value`; a flag alone is true."""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.lstrip("-").partition("=")
        key = name.rpartition(".")[2].replace("-", "_")
        origin = f"as {argument.partition('=')[0]} says"
        if equals:
            yield key, Said(yaml.safe_load(value), origin)
        elif argument.startswith("--"):
            after = arguments[place + 1] if place + 1 < len(arguments) else "--"
            yield key, Said(value=True if after.startswith("--") else yaml.safe_load(after), origin=origin)


def _model_name(reading: _Reading, script: Path) -> Said:
    named = [reading.passed[name] for name in MODEL_NAMES if name in reading.passed]
    if (call := reading.calls.get(_LOAD)) is not None:
        said = _value(reading, call.args[0] if call.args else None, call.lineno)
        named += [replace(said, origin=reading.line_of(_LOAD))] if said is not None else []
    found = next((said for said in named if isinstance(said.value, str)), None)
    if found is None:
        raise InputError(
            f"the source of {str(script)!r} does not say which model it trains.",
            to_fix="give --model, and --seq-len and --global-batch with it",
        )
    return found


def _config(model: Model, reading: _Reading) -> dict[str, Any]:
    """Name the head that the script's class puts on the model, where the class says it."""
    call = reading.calls.get(_LOAD)
    function = call.func if call else None
    owner = function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
    base = (model.config.get("architectures") or [""])[0]
    if "ForSequenceClassification" in owner and base:
        base = re.sub(r"(For[A-Z]\w*|Model)$", "", base) + "ForSequenceClassification"
    return {**model.config, "architectures": [base]}


def _length(reading: _Reading) -> Said | None:
    arguments = _arguments(reading)
    for name in LENGTH_NAMES:
        for said in (reading.passed.get(name), arguments.get(name), reading.constants.get(name)):
            if said is not None and isinstance(said.value, int) and not isinstance(said.value, bool):
                return said
    return next(
        (
            said
            for name, said in reading.constants.items()
            if name.casefold() in {*LENGTH_NAMES, "block_tokens", "max_tokens"} and isinstance(said.value, int)
        ),
        None,
    )


def _adapter(reading: _Reading) -> FoundAdapter | None:
    if "LoraConfig" not in reading.calls:
        return None
    said = _values(reading, "LoraConfig")
    targets = said.get("target_modules", "all-linear")
    return FoundAdapter(
        peft_type="LORA",
        r=said.get("r", 8),
        lora_alpha=said.get("lora_alpha", 8),
        lora_dropout=said.get("lora_dropout", 0.0),
        target_modules=(targets,) if isinstance(targets, str) else tuple(targets),
        use_rslora=bool(said.get("use_rslora")),
        use_dora=bool(said.get("use_dora")),
    )


def _quantization(reading: _Reading) -> FoundQuantization | None:
    said = _values(reading, "BitsAndBytesConfig")
    prepares_kbit = "prepare_model_for_kbit_training" in reading.calls
    if not said.get("load_in_4bit"):
        return (
            FoundQuantization(bits=8, quant_type="int8", prepares_kbit=prepares_kbit)
            if said.get("load_in_8bit")
            else None
        )
    return FoundQuantization(
        bits=4,
        quant_type=said.get("bnb_4bit_quant_type", "fp4"),
        double_quant=bool(said.get("bnb_4bit_use_double_quant")),
        prepares_kbit=prepares_kbit,
    )


def _loss(trainer: str, said: Mapping[str, Said]) -> Loss:
    if "use_liger_kernel" in said and said["use_liger_kernel"].value:
        return "liger"
    return "chunked" if trainer in {"SFTTrainer", "DPOTrainer"} else "stock"


def _origins(reading: _Reading, trainer: str, said: Mapping[str, Said]) -> Iterator[tuple[str, str]]:
    """Name for each fact where it is read, or that nothing is."""
    trains = "Accelerator" if reading.is_loop else trainer
    if trains in reading.calls:
        yield "trainer", reading.line_of(trains)
    batch, accumulation = said[BATCH].origin, said[ACCUMULATION].origin
    yield "arguments", batch if batch == accumulation else f"the batch {batch}, accumulation {accumulation}"
    names = {"precision": ("bf16", "fp16"), "batching": ("packing",), "loss": ("use_liger_kernel",)}
    for fact, keys in {**names, "optimizer": ("optim",)}.items():
        yield fact, next((said[key].origin for key in keys if key in said), _BY_DEFAULT)
    for fact, call in {"method": "LoraConfig", "quantization": "BitsAndBytesConfig"}.items():
        yield fact, reading.line_of(call) if call in reading.calls else f"as {reading.name} names no {call}"
    if "use_liger_kernel" not in said and trainer in {"SFTTrainer", "DPOTrainer"}:
        yield "loss", "by trl's defaults"
