"""Writes the time model's constants as Markdown: each with the words and the source that stand at it in the code."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

from autofit.timing.rates import MeasuredRate, ProductDtype, matmul_fraction, measured_rates

MODULES = ("rates", "kernels", "links", "collectives", "hooks", "copies", "optimizer")
ROOT = Path(__file__).parents[1]


def constants() -> Iterator[tuple[str, str, str]]:
    """Yield name, value and text of every number that a docstring follows."""
    for module in MODULES:
        source = (ROOT / "autofit" / "timing" / f"{module}.py").read_text(encoding="utf-8")
        values = vars(importlib.import_module(f"autofit.timing.{module}"))
        body = ast.parse(source).body
        waiting: list[str] = []
        for statement in body:
            if isinstance(statement, ast.Assign | ast.AnnAssign):
                target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
                assert isinstance(target, ast.Name), "a constant has one name"
                waiting.append(target.id)
            elif waiting and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                names = [name for name in waiting if not name.startswith("_") and _is_shown(values[name])]
                if names:
                    text = " ".join(str(statement.value.value).split())
                    yield ", ".join(f"`{name}`" for name in names), "; ".join(_shown(values[n]) for n in names), text
                waiting = []
            else:
                waiting = []


def _is_shown(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_shown, value.values()))
    if isinstance(value, tuple):
        return all(isinstance(each, float) for each in value)
    return isinstance(value, int | float)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_key(key)}: {_shown(each)}" for key, each in value.items())
    if isinstance(value, tuple):
        return " to ".join(map(_shown, value))
    assert isinstance(value, int | float), "nothing else is shown"
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}"


def _key(key: object) -> str:
    return ".".join(map(str, key)) if isinstance(key, tuple) else str(key)


def rates() -> str:
    """Write what matrix products were measured to reach, and what of it is taken for other devices."""
    dtypes: tuple[ProductDtype, ...] = ("bf16", "fp16", "tf32", "fp32")
    found = measured_rates()
    rows = [f"| {row.device} | {' | '.join(_measured(row, dtype) for dtype in dtypes)} |" for row in found.rates]
    usual = " | ".join(f"({matmul_fraction('', dtype):.0%})" for dtype in dtypes)
    head = f"| device | {' | '.join(dtypes)} |\n| --- | {' | '.join('---:' for _ in dtypes)} |"
    return "\n".join((head, *rows, f"| all others, the median | {usual} |", "", f"Source: {found.source}.", ""))


def _measured(row: MeasuredRate, dtype: ProductDtype) -> str:
    if dtype not in row.measured_tflops:
        return ""
    measured = row.measured_tflops[dtype]
    return f"{measured:g} ({measured / row.datasheet_tflops[dtype]:.0%})"


def markdown() -> str:
    """Write the table."""
    rows = [f"| {name} | {value} | {text} |" for name, value, text in constants()]
    return "\n".join(("| constant | value | what it is, and its source |", "| --- | --- | --- |", *rows, ""))
