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

from autofit.errors import InputError
from autofit.spec.configuration import Batching, Loss
from autofit.spec.discovered import Discovered, FoundAdapter, FoundLengths, FoundQuantization
from autofit.spec.job import Model

ARGUMENT_CLASSES = ("TrainingArguments", "Seq2SeqTrainingArguments", "SFTConfig", "DPOConfig")
TRAINERS = ("Trainer", "Seq2SeqTrainer", "SFTTrainer", "DPOTrainer")
LENGTH_NAMES = ("max_length", "max_seq_length", "block_size", "seq_length", "max_seq_len")
"""What scripts call the length that they cut at, the likeliest first."""
MODEL_NAMES = ("model_name_or_path", "model_name", "model_id", "model", "base_model")
DEFAULTS: dict[str, Any] = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
"""Source: transformers/training_args.py 5.23."""
CONFIG_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(slots=True)
class _Reading:
    """What the source says so far, and in which line."""

    constants: dict[str, tuple[Any, int]] = field(default_factory=dict)
    calls: dict[str, tuple[ast.Call, int]] = field(default_factory=dict)


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
    passed = {**_config_values(arguments), **_flag_values(arguments)}
    trainer = next((name for name in TRAINERS if name in reading.calls), "Trainer")
    said = _said(reading, passed)
    found = model or find_model(_model_name(reading, passed, script))
    tokens = _length(reading, passed)
    where = {fact: f"read in {script.name}:{line}" for fact, line in _lines(reading, trainer).items()}
    return Discovered(
        model_name=found.name,
        config=_config(found, reading),
        weights_dtype=None,
        attention=str(passed.get("attn_implementation") or _keyword(reading, "attn_implementation") or "sdpa"),
        adapter=_adapter(reading),
        quantization=_quantization(reading),
        trainer=trainer,
        loss=_loss(trainer, said),
        lengths=None if tokens is None else _lengths(tokens, said),
        arguments=said,
        where=where,
        is_guess=True,
    )


KNOWN_ARGUMENTS = (
    *DEFAULTS, "bf16", "fp16", "optim", "gradient_checkpointing", "learning_rate", "max_steps", "num_train_epochs",
    "output_dir", "use_liger_kernel", "torch_compile", "packing", "max_length",
)  # fmt: skip


def _read(script: Path) -> _Reading:
    try:
        tree = ast.parse(script.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{str(script)!r} cannot be read as Python: {error}", to_fix="correct the script") from error
    reading = _Reading()
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
        reading.constants.setdefault(name, (value.value, line))


def _note_call(reading: _Reading, call: ast.Call) -> None:
    name = _called(call)
    reading.calls.setdefault(name, (call, call.lineno))
    if name == "add_argument" and call.args and isinstance(call.args[0], ast.Constant):
        default = next((each.value for each in call.keywords if each.arg == "default"), None)
        if isinstance(default, ast.Constant):
            option = str(call.args[0].value).lstrip("-").replace("-", "_")
            reading.constants.setdefault(option, (default.value, call.lineno))


def _called(call: ast.Call) -> str:
    """Name what is called; of a model's classmethod the class with it."""
    function = call.func
    if isinstance(function, ast.Attribute):
        owner = function.value.id if isinstance(function.value, ast.Name) else ""
        is_model = function.attr in {"from_pretrained", "from_config"} and re.search(r"Model|For[A-Z]", owner)
        return f"model.{function.attr}" if is_model else function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _value(reading: _Reading, node: ast.expr | None) -> Any:
    """Return a literal, or what a name was set to once; None where it has to be worked out."""
    if node is None:
        return None
    if isinstance(node, (ast.Name, ast.Attribute)):
        name = node.id if isinstance(node, ast.Name) else node.attr
        return reading.constants.get(name, (None, 0))[0]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _keywords(reading: _Reading, name: str) -> dict[str, Any]:
    call = reading.calls.get(name)
    values = {each.arg: _value(reading, each.value) for each in call[0].keywords if each.arg} if call else {}
    return {key: value for key, value in values.items() if value is not None}


def _keyword(reading: _Reading, keyword: str) -> Any:
    return _keywords(reading, "model.from_pretrained").get(keyword)


def _arguments(reading: _Reading) -> dict[str, Any]:
    given = next((_keywords(reading, name) for name in ARGUMENT_CLASSES if name in reading.calls), {})
    return {name: value for name, value in given.items() if name in KNOWN_ARGUMENTS}


def _said(reading: _Reading, passed: Mapping[str, Any]) -> dict[str, Any]:
    """Join defaults, the source and what is passed. trl's arguments train in bf16 unless told otherwise.

    Source: trl/trainer/base_config.py 1.16, `__post_init__`.
    """
    said = {**DEFAULTS, **_arguments(reading), **{name: passed[name] for name in passed if name in KNOWN_ARGUMENTS}}
    is_trls = any(name in reading.calls for name in ("SFTConfig", "DPOConfig"))
    return {"bf16": not said.get("fp16"), **said} if is_trls else said


def _lengths(tokens: int, said: Mapping[str, Any]) -> FoundLengths:
    """Take batches for padded, which need more than others, unless the source packs them."""
    batching: Batching = "packed" if said.get("packing") else "padded"
    return FoundLengths(sequence_tokens=tokens, num_samples_seen=0, num_samples=None, batching=batching)


def _config_values(arguments: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for argument in arguments:
        path = Path(argument)
        if path.suffix in CONFIG_SUFFIXES and path.is_file():
            text = path.read_text(encoding="utf-8")
            loaded = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
            values |= loaded if isinstance(loaded, Mapping) else {}
    return values


def _flag_values(arguments: Sequence[str]) -> dict[str, Any]:
    """Read `--name value`, `--name=value` and hydra's `name=value`; a flag alone is true."""
    return dict(_flags(arguments))


def _flags(arguments: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for place, argument in enumerate(arguments):
        name, equals, value = argument.lstrip("-").partition("=")
        key = name.rpartition(".")[2].replace("-", "_")
        if equals:
            yield key, yaml.safe_load(value)
        elif argument.startswith("--"):
            after = arguments[place + 1] if place + 1 < len(arguments) else "--"
            yield key, True if after.startswith("--") else yaml.safe_load(after)


def _model_name(reading: _Reading, passed: Mapping[str, Any], script: Path) -> str:
    call = reading.calls.get("model.from_pretrained")
    named = [passed[name] for name in MODEL_NAMES if isinstance(passed.get(name), str)]
    if call and not named:
        first = call[0].args[0] if call[0].args else None
        named = [name for name in [_value(reading, first)] if isinstance(name, str)]
    if not named:
        raise InputError(
            f"the source of {str(script)!r} does not say which model it trains.",
            to_fix="give --model, and --seq-len and --global-batch with it",
        )
    return str(named[0])


def _config(model: Model, reading: _Reading) -> dict[str, Any]:
    """Name the head that the script's class puts on the model, where the class says it."""
    call = reading.calls.get("model.from_pretrained")
    function = call[0].func if call else None
    owner = function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
    base = (model.config.get("architectures") or [""])[0]
    if "ForSequenceClassification" in owner and base:
        base = re.sub(r"(For[A-Z]\w*|Model)$", "", base) + "ForSequenceClassification"
    return {**model.config, "architectures": [base]}


def _length(reading: _Reading, passed: Mapping[str, Any]) -> int | None:
    for name in LENGTH_NAMES:
        for value in (passed.get(name), _arguments(reading).get(name), reading.constants.get(name, (None, 0))[0]):
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return next(
        (
            value
            for name, (value, _) in reading.constants.items()
            if name.casefold() in {*LENGTH_NAMES, "block_tokens", "max_tokens"} and isinstance(value, int)
        ),
        None,
    )


def _adapter(reading: _Reading) -> FoundAdapter | None:
    if "LoraConfig" not in reading.calls:
        return None
    said = _keywords(reading, "LoraConfig")
    targets = said.get("target_modules", "all-linear")
    return FoundAdapter(
        peft_type="LORA",
        r=said.get("r", 8),
        lora_alpha=said.get("lora_alpha", 8),
        lora_dropout=said.get("lora_dropout", 0.0),
        target_modules=(targets,) if isinstance(targets, str) else tuple(targets),
    )


def _quantization(reading: _Reading) -> FoundQuantization | None:
    said = _keywords(reading, "BitsAndBytesConfig")
    if not said.get("load_in_4bit"):
        return FoundQuantization(bits=8, quant_type="int8") if said.get("load_in_8bit") else None
    return FoundQuantization(
        bits=4,
        quant_type=said.get("bnb_4bit_quant_type", "fp4"),
        double_quant=bool(said.get("bnb_4bit_use_double_quant")),
        prepares_kbit="prepare_model_for_kbit_training" in reading.calls,
    )


def _loss(trainer: str, said: Mapping[str, Any]) -> Loss:
    if said.get("use_liger_kernel"):
        return "liger"
    return "chunked" if trainer in {"SFTTrainer", "DPOTrainer"} else "stock"


def _lines(reading: _Reading, trainer: str) -> dict[str, int]:
    arguments = next((name for name in ARGUMENT_CLASSES if name in reading.calls), "")
    facts = {"model": "model.from_pretrained", "arguments": arguments, "trainer": trainer}
    return {fact: reading.calls[name][1] for fact, name in facts.items() if name in reading.calls}
