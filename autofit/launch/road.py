"""By which road a plan reaches the script: hooks that set it, flags that are appended, or the script's own calls.

What each can and cannot set is written down in docs/apply.md.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from autofit.errors import InputError
from autofit.plan import Plan
from autofit.spec.configuration import Configuration
from autofit.writers.training_arguments import training_arguments

Road = Literal["hooks", "flags", "api"]
"""`hooks`: the script as it is, under `autofit.runtime`; `flags`: the script alone, with arguments appended; `api`: a
script that calls `autofit.current_plan()`, verified and measured under `autofit.runtime`, which sets nothing."""
PARSERS = ("HfArgumentParser", "TrlParser")
TRL_MODEL_FLAGS = (
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "use_rslora",
    "use_dora",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
    "bnb_4bit_quant_storage",
    "dtype",
    "attn_implementation",
)
"""Fields of TRL's ModelConfig that a plan can set. Source: trl/trainer/model_config.py 1.16."""


def choose_road(asked: str | None, source: str) -> Road:
    """Decide how a plan is put into effect: as asked, else by the script's own calls if it has them, else by hooks.

    Raises:
        InputError: there is no such road, or the script has not what it takes.
    """
    names = _names_in(source)
    asks_itself = "current_plan" in names
    if asked is None:
        return "api" if asks_itself else "hooks"
    if asked not in get_args(Road):
        raise InputError(f"--road {asked!r} is not one of {', '.join(get_args(Road))}.", to_fix="choose one of these")
    if asked == "api" and not asks_itself:
        raise InputError(
            "--road api is for scripts that call autofit.current_plan(), and this one does not.",
            to_fix="call it, or leave --road out",
        )
    if asked != "api" and asks_itself:
        raise InputError(
            f"--road {asked} is given, and the script calls autofit.current_plan() itself.", to_fix="leave --road out"
        )
    if asked == "flags" and not names & {*PARSERS}:
        raise InputError(
            "--road flags is for scripts that read transformers' TrainingArguments from the command line, with "
            f"{' or '.join(PARSERS)}; this one does not.",
            to_fix="leave --road out: hooks need no flags",
        )
    return asked  # type: ignore[return-value]


def flags_of(plan: Plan, source: str, arguments: Sequence[str]) -> list[str]:
    """Return the arguments that put a plan into effect when appended to a script's own.

    Args:
        plan: what is to be in effect.
        source: the script.
        arguments: its own arguments.

    Raises:
        InputError: a planned value has no flag, or the script reads its settings from a file alone.
    """
    if len(arguments) == 1 and arguments[0].endswith((".json", ".yaml", ".yml")):
        raise InputError(
            f"the script reads all its settings from {arguments[0]}: with a flag beside it, it would not read it.",
            to_fix="give its settings as flags, or leave --road out: hooks need no flags",
        )
    known = _flags_in(source)
    decided = training_arguments(plan)
    beside = dict(_beside(plan.configuration, plan.inputs.job.script_settings, known))
    return [part for name, value in (decided | beside).items() for part in (f"--{name}", *_texts(value))]


def _beside(
    configuration: Configuration, of_script: Mapping[str, str], known: frozenset[str]
) -> Iterator[tuple[str, Any]]:
    """Yield flags for what is no field of TrainingArguments; what the script does by itself needs none."""
    if configuration.weights_dtype != of_script.get("weights_dtype"):
        yield _flag("dtype of the weights", configuration.weights_dtype, ("dtype", "torch_dtype"), known)
    if configuration.attention != of_script.get("attention"):
        yield _flag("attention", configuration.attention, ("attn_implementation",), known)
    if method_words(configuration) == of_script.get("method"):
        return
    lora, quantization = configuration.lora, configuration.quantization
    if lora is None:
        raise InputError(
            f"the plan is full fine-tuning and the script does {of_script.get('method', 'what is not known')}: no flag "
            "takes its adapter away.",
            to_fix="plan with the script's own method, or leave --road out: hooks can",
        )
    yield _flag("adapter", True, ("use_peft",), known)
    for name in ("lora_r", "lora_alpha", "lora_dropout"):
        yield _flag("adapter", getattr(lora, name.replace("lora_r", "r")), (name,), known)
    yield _flag("adapter", list(lora.target_modules), ("lora_target_modules",), known)
    for name in ("use_rslora", "use_dora"):
        if getattr(lora, name):
            yield _flag("adapter", True, (name,), known)
    if quantization is not None and quantization.bits == 8:
        yield _flag("quantisation", True, ("load_in_8bit",), known)
    elif quantization is not None:
        yield _flag("quantisation", True, ("load_in_4bit",), known)
        yield _flag("quantisation", quantization.quant_type, ("bnb_4bit_quant_type",), known)
        yield _flag("quantisation", quantization.double_quant, ("use_bnb_nested_quant",), known)
        yield _flag("quantisation", quantization.storage_dtype, ("bnb_4bit_quant_storage",), known)


def method_words(configuration: Configuration) -> str:
    """Write a method so that two that train the same are equal."""
    lora, quantization = configuration.lora, configuration.quantization
    return adapter_words(
        None if lora is None else (lora.kind, lora.r, lora.lora_alpha, lora.lora_dropout),
        None if quantization is None else "int8" if quantization.bits == 8 else quantization.quant_type,
    )


def adapter_words(adapter: tuple[str, int | None, int | None, float | None] | None, quant_type: str | None) -> str:
    """Write an adapter's kind, rank, scale and dropout, and how the weights under it are quantised."""
    if adapter is None:
        return "full fine-tuning"
    kind, r, alpha, dropout = adapter
    words = f"an adapter of kind {kind}, r={r}, alpha={alpha}, dropout={dropout or 0.0:g}"
    return words if quant_type is None else f"{words} on {quant_type}"


def _flag(what: str, value: Any, names: Iterable[str], known: frozenset[str]) -> tuple[str, Any]:
    found = next((name for name in names if name in known), None)
    if found is None:
        raise InputError(
            f"the plan's {what}, {value}, has no flag in this script.",
            to_fix="leave --road out: hooks need no flags; or plan with what the script does by itself",
        )
    return found, value


def _texts(value: Any) -> list[str]:
    """Write a value as HfArgumentParser reads it: switches and dictionaries as one word, lists as several."""
    if isinstance(value, dict):
        return [json.dumps(value)]
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


def _names_in(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.alias):
            names.add(node.name)
    return names


def _flags_in(source: str) -> frozenset[str]:
    """Return the flags beside TrainingArguments' own: fields of the script's dataclasses, and of TRL's ModelConfig."""
    fields = {
        each.target.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and node.decorator_list
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
    return frozenset(fields | ({*TRL_MODEL_FLAGS} if "ModelConfig" in _names_in(source) else set()))
