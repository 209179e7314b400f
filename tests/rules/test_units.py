"""The house rule on names: a number says its unit."""

from __future__ import annotations

import importlib
import pkgutil
import typing

import msgspec
import pytest

import autofit.plan
import autofit.spec

UNITS = (
    "_bytes",
    "_seconds",
    "_tokens",
    "_flops",
    "_elements",
    "_fraction",
    "_dollars",
    "_params",
    "_sequences",
    "_steps",
    "_epochs",
    "_hours",
    "_per_sequence",
    "_per_second",
    "_per_hour",
    "_per_device_hour",
    "_per_million_tokens",
    "_lower",
    "_upper",
)
AS_THE_FIELD_SPELLS_IT = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "hidden_size",
    "vocab_size",
    "bits",
    "group_size",
    "freeze_trainable_layers",
    "sequence_parallel_size",
    "checkpoint_every_n_layers",
    "compute_capability",
}
WITHOUT_A_UNIT = {"schema_version", "rank", "layer", "columns", "rows", "zero_stage", "train_loader", "max_grad_norm"}
CONTAINERS_WITH_THEIR_OWN_KEYS = {"terms", "sizes", "events"}
SPELT_AS_DEEPSPEED_DOES = {"DeepSpeedSettings", "ZeroSettings"}


def spec_classes():
    """Yield every record of the nouns and of the plan."""
    modules = [autofit.plan] + [
        importlib.import_module(f"autofit.spec.{module.name}") for module in pkgutil.iter_modules(autofit.spec.__path__)
    ]
    for module in modules:
        for value in vars(module).values():
            ours = isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__module__ == module.__name__
            if ours and value.__name__ not in SPELT_AS_DEEPSPEED_DOES:
                yield value


def holds_numbers(hint):
    """Tell whether a field's type is int, float, or a union or container of them."""
    if hint in (int, float):
        return True
    return typing.get_origin(hint) is not typing.Literal and any(holds_numbers(part) for part in typing.get_args(hint))


def number_fields():
    """Yield each field that holds a number, as Class.field."""
    for cls in spec_classes():
        hints = typing.get_type_hints(cls)
        for name in cls.__struct_fields__:
            if holds_numbers(hints[name]):
                yield cls, name


def says_its_unit(name):
    """Tell whether a name is a count, ends in a unit, or is one that the field itself uses."""
    return (
        name.startswith(("num_", "min_", "max_"))
        or f"_{name}".endswith(UNITS)
        or name in AS_THE_FIELD_SPELLS_IT
        or name in WITHOUT_A_UNIT | CONTAINERS_WITH_THEIR_OWN_KEYS
    )


@pytest.mark.parametrize(("cls", "name"), list(number_fields()), ids=lambda value: getattr(value, "__name__", value))
def test_a_number_says_its_unit(cls, name):
    """Every number in a spec or a plan is a count, has its unit in its name, or is spelt as transformers spells it."""
    assert says_its_unit(name), f"{cls.__name__}.{name}"


@pytest.mark.parametrize("name", ["mem", "size_gb", "latency", "throughput", "batch_size", "cost"])
def test_a_bare_number_would_be_found(name):
    """The rule refuses the names that the style forbids."""
    assert not says_its_unit(name)
