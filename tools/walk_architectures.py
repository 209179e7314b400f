"""Walks the model types that the installed transformers registers, and writes which of them are traced.

    python tools/walk_architectures.py                    every type of every task, to docs/architectures.md
    python tools/walk_architectures.py --only llama,bert  a few, printed
    python tools/walk_architectures.py --rows FILE        goes on where an earlier walk with that file stopped

Configs are each config class's defaults with a few layers: fake tensors have no memory, so that widths, vocabularies
and experts stay what they are. A type is traced where a training step (full fine-tuning in bf16 on a GPU, two lengths)
runs and has the same operators at both; attention is sdpa, or eager where the class has no sdpa.
"""  # noqa: INP001 - a script, not a module

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import transformers
from transformers.models.auto import modeling_auto

from autofit.errors import AutofitError
from autofit.profile.kernel_packages import kernel_packages
from autofit.profile.models import build, load_config, text_config
from autofit.profile.tasks import MAPPINGS, Head
from autofit.profile.trace import trace_model
from autofit.profile.windows import lengths_to_trace
from autofit.spec.profile import Regime

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
BEGIN, END = "<!-- walk: begin -->", "<!-- walk: end -->"
NUM_LAYERS = 2
NUM_SEQUENCES = 2
SHORT_POINTS = ((2, 8), (2, 16))
MISSING: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 8, "moe_intermediate_size": 1408},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 8, "moe_topk": 2},
}
"""What the defaults of a config class leave out or cannot be run with, and published configs give."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What became of one model type."""

    head: Head
    model_type: str
    attention: str
    reason: str
    """Why it is not traced; empty where it is."""

    @property
    def traced(self) -> bool:
        """Whether a step was traced."""
        return not self.reason


def registered(head: Head) -> list[str]:
    """Return the model types that transformers maps to a class with this head."""
    return sorted(getattr(modeling_auto, MAPPINGS[head]))


def walk(head: Head, model_types: Iterable[str]) -> Iterator[Row]:
    """Trace one step of each type."""
    for model_type in model_types:
        yield _attempt(head, model_type)


def _attempt(head: Head, model_type: str) -> Row:
    for attention in ("sdpa", "eager"):
        reason = _reason(head, model_type, attention)
        if "--attention eager" not in reason:
            break
    return Row(head=head, model_type=model_type, attention=attention, reason=reason.split(" To fix:")[0])


def _reason(head: Head, model_type: str, attention: str) -> str:
    """Why a type is not traced, in one line; empty where it is."""
    regime = Regime(
        method="full",
        quantization=None,
        lora=None,
        weights_dtype="bfloat16",
        adapter_dtype="float32",
        autocast="no",
        gradient_checkpointing=False,
        use_reentrant=False,
        attention=attention,  # type: ignore[arg-type]
        task=head,
        device="cuda",
    )
    try:
        config = {"model_type": model_type, **_needed(head), **MISSING.get(model_type, {})}
        try:
            small = load_config(config, NUM_LAYERS, regime)
            model = build(small, regime)
        except Exception as error:
            if "--attention eager" in str(error):
                raise
            small = load_config(config, None, regime)
            model = build(small, regime)
        if kernel_packages(model):  # a loop over tokens shows in a few of them, and takes minutes for many
            trace_model(build(small, regime), regime, SHORT_POINTS, lambda _done, _total: None)
        lengths = lengths_to_trace(text_config(small), None).traced[:2]
        trace_model(model, regime, [(NUM_SEQUENCES, length) for length in lengths], lambda _done, _total: None)
    except AutofitError as error:
        return " ".join(str(error).split())
    except Exception as error:  # noqa: BLE001 - what a library raises is the answer
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return ""


def _needed(head: Head) -> dict[str, Any]:
    """What published configs of a task have and defaults may not."""
    return {"decoder_start_token_id": 0} if head == "seq2seq-lm" else {}


def page(rows: Sequence[Row]) -> str:
    """Write the generated part of the page: shares, then each head's types."""
    heads = [head for head in get_args(Head) if any(row.head == head for row in rows)]
    lines = [
        f"transformers {transformers.__version__}.",
        "",
        "| head | types registered | tried | traced | share of those tried |",
        "| --- | --- | --- | --- | --- |",
    ]
    for head in heads:
        mine = [row for row in rows if row.head == head]
        traced = sum(row.traced for row in mine)
        lines.append(f"| {head} | {len(registered(head))} | {len(mine)} | {traced} | {traced / len(mine):.0%} |")
    for head in heads:
        mine = [row for row in rows if row.head == head]
        lines += ["", f"### {head}", ""]
        for attention in ("sdpa", "eager"):
            names = [f"`{row.model_type}`" for row in mine if row.traced and row.attention == attention]
            lines += [f"Traced with {attention} attention: {', '.join(names)}.", ""] if names else []
        untried = [f"`{name}`" for name in registered(head) if name not in {row.model_type for row in mine}]
        lines += [f"Not tried: {', '.join(untried)}.", ""] if untried else []
        refused = [row for row in mine if not row.traced]
        if refused:
            lines += ["| refused | why |", "| --- | --- |"]
            lines += [f"| `{row.model_type}` | {_cell(row.reason)} |" for row in refused]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _cell(text: str) -> str:
    short = text if len(text) <= 220 else text[:217] + "..."
    return short.replace("|", "\\|").replace("<", "&lt;")


def write_page(rows: Sequence[Row], path: Path = PAGE) -> None:
    """Put the generated part between the page's marks."""
    text = path.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n\n{page(rows)}\n{END}{after}", encoding="utf-8")


def main() -> int:
    """Walk, print each row, and write the page where everything was walked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="model types, separated by commas: print them, and write no page")
    parser.add_argument("--heads", help="heads, separated by commas; by default all")
    parser.add_argument("--rows", type=Path, help="file of rows: those in it are not walked again")
    parser.add_argument("--page-only", action="store_true", help="write the page from the file of rows; walk nothing")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    known = [Row(**json.loads(line)) for line in given.rows.read_text().splitlines()] if _exists(given.rows) else []
    rows = list(known)
    if given.page_only:
        write_page(sorted(rows, key=lambda row: row.model_type))
        return 0
    done = {(row.head, row.model_type) for row in known}
    for head in given.heads.split(",") if given.heads else get_args(Head):
        types = given.only.split(",") if given.only else registered(head)
        for row in walk(head, [name for name in types if (head, name) not in done]):
            rows.append(row)
            sys.stdout.write(f"{row.head:24} {row.model_type:28} {row.attention:6} {row.reason or 'traced'}\n")
            sys.stdout.flush()
            if given.rows:
                with given.rows.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
    if not given.only:
        write_page(sorted(rows, key=lambda row: row.model_type))
    return 0


def _exists(path: Path | None) -> bool:
    return path is not None and path.exists()


if __name__ == "__main__":
    sys.exit(main())
