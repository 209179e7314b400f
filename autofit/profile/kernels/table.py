"""Writes the table of what CUDA does otherwise, from the functions that imitate it and name their source."""

from __future__ import annotations

import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from autofit.profile.kernels import attention, autocast, flex, inside, operators, results

Entry = tuple[str, Callable[..., Any]]

REPLACED: tuple[Entry, ...] = (
    ("softmax, log_softmax", operators._fused_softmax),
    ("dropout", operators._dropout),
    ("rms_norm", operators._fused_rms_norm),
    ("scaled_dot_product_attention: which kernel", attention.choose_kernel),
    ("scaled_dot_product_attention: flash", attention._flash),
    ("scaled_dot_product_attention: memory-efficient", attention._efficient),
    ("scaled_dot_product_attention: flash-attn 2", attention.attention_as_on_cuda),
    ("attention of transformers with flash-attn 2", attention.flash_attn_in_transformers),
    ("flex_attention", flex._CompiledFlexAttention),
    ("create_block_mask", flex.block_mask),
    ("native_layer_norm", results.layer_norm),
    ("_grouped_mm", results.grouped_product),
)
"""Operators that are taken apart in another way on CUDA, or whose results differ."""

POLICY_WORDS: dict[autocast.Policy, str] = {
    "lower_precision": "inputs cast to the autocast dtype",
    "fp32": "inputs cast to fp32",
    "fp32_set_opt_dtype": "result in fp32 unless the caller chose its dtype; reads halves",
    "fp32_append_dtype": "result in fp32",
    "promote": "inputs cast to the widest among them",
    "banned": "refused",
}


def markdown() -> str:
    """Write the tables as markdown."""
    allocating: dict[Callable[..., Any], list[str]] = defaultdict(list)
    for name, entry in inside.INSIDE_CUDA.items():
        allocating[entry].append(name.removesuffix(".default"))
    backward = "aten._scaled_dot_product_efficient_attention_backward"
    entries = [(", ".join(names), entry) for entry, names in allocating.items()]
    parts = [
        "## Operators that differ\n",
        _table(REPLACED),
        "\n## Temporaries inside kernels\n",
        _table([*entries, (backward, attention.efficient_backward)]),
        "\n## Autocast\n",
        _policies(),
    ]
    return "\n".join(parts)


def _table(entries: Iterable[Entry]) -> str:
    rows = (f"| {name.replace('aten.', '')} | {' | '.join(_described(entry))} |" for name, entry in entries)
    return "\n".join(["| operator | on CUDA | source |", "| --- | --- | --- |", *rows])


def _described(entry: Callable[..., Any]) -> tuple[str, str]:
    """Split a docstring into what is done and where that is read.

    Raises:
        ValueError: the entry names no source.
    """
    said, found, source = " ".join((inspect.getdoc(entry) or "").split()).partition(" Source: ")
    if not found:
        raise ValueError(f"{entry.__qualname__} names no source")
    return said, source


def _policies() -> str:
    by_policy: dict[autocast.Policy, list[str]] = defaultdict(list)
    for name, policy in sorted(autocast.cuda_policy().items()):
        by_policy[policy].append(name)
    rows = [f"| {POLICY_WORDS[policy]} | {', '.join(by_policy[policy])} |" for policy in POLICY_WORDS]
    return "\n".join(["| policy | operators |", "| --- | --- |", *rows])


if __name__ == "__main__":
    sys.stdout.write(markdown())
