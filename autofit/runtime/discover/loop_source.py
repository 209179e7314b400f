"""Reads in the source of a loop what running it up to its first step does not show: how it saves, what it looks at."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

SAVES = ("save_pretrained", "state_dict")
"""Methods by which weights are saved; a scheduler's and an optimizer's `state_dict` are taken for a model's."""


class LoopSource(Struct, frozen=True, kw_only=True):
    """Lines of the script, `train.py:40`, where it does something; empty: nowhere."""

    reads_gradients: str = ""
    reads_norm: str = ""
    saves_its_share: str = ""
    skips_batches: str = ""


def read_loop(script: Path) -> LoopSource:
    """Read a script."""
    nodes = list(ast.walk(ast.parse(script.read_bytes())))
    gathers = any(isinstance(node, ast.Attribute) and node.attr == "get_state_dict" for node in nodes)

    def first(lines: Iterator[int]) -> str:
        line = min(lines, default=None)
        return "" if line is None else f"{script.name}:{line}"

    return LoopSource(
        reads_gradients=first(_attributes(nodes, "grad")),
        reads_norm=first(_uses_of_norm(nodes)),
        saves_its_share="" if gathers else first(_saves(nodes)),
        skips_batches=first(_attributes(nodes, "skip_first_batches")),
    )


def _attributes(nodes: list[ast.AST], name: str) -> Iterator[int]:
    return (node.lineno for node in nodes if isinstance(node, ast.Attribute) and node.attr == name)


def _saves(nodes: list[ast.AST]) -> Iterator[int]:
    """Yield where weights are saved: tokenizers, processors and configs have `save_pretrained` too, by their names."""
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SAVES:
            owner = ast.unparse(node.func.value)
            if not any(word in owner for word in ("tokenizer", "processor", "config", "optimizer", "scheduler")):
                yield node.lineno


def _uses_of_norm(nodes: list[ast.AST]) -> Iterator[int]:
    """Yield where what `clip_grad_norm_` returned is asked for something that only a tensor has."""
    names = {
        target.id
        for node in nodes
        if isinstance(node, ast.Assign) and _clips(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in nodes:
        if isinstance(node, ast.Attribute) and (
            _clips(node.value) or (isinstance(node.value, ast.Name) and node.value.id in names)
        ):
            yield node.lineno


def _clips(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "clip_grad_norm_"
