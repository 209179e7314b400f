"""Walks the model types that the installed transformers registers, and writes which of them are traced.

    python tools/walk_architectures.py                    every type of every task, to docs/architectures.md
    python tools/walk_architectures.py --only llama,bert  a few, printed
    python tools/walk_architectures.py --rows FILE        goes on where an earlier walk with that file stopped

Configs are each config class's defaults with a few layers: fake tensors have no memory, so that widths, vocabularies
and experts stay what they are. A type is traced where a training step (full fine-tuning in bf16 on a GPU) runs and has
the same operators at two lengths, or, where it has not, for two batches of one length. Attention is sdpa, or eager
where the class has no sdpa; weights are bf16, or fp32 under autocast where transformers' own step fails otherwise.
Vision-language types are tried with an image in each sequence, and with text alone where that is not traced.
"""  # noqa: INP001 - a script, not a module

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from msgspec import Struct
from msgspec.structs import asdict, replace

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

from autofit.errors import InputError
from autofit.profile.fakes import fill_with_fakes
from autofit.profile.fit import StructureDiffersError
from autofit.profile.image_rows import images_attended_at_once
from autofit.profile.images import usual_image_tokens
from autofit.profile.known import KnownValues
from autofit.profile.loops import MAX_OPERATORS_OF_SEVERAL, SHORT_LENGTHS, Growth, TooManyOperatorsError
from autofit.profile.models import build, choose_depth, load_config, set_depth, text_config, width
from autofit.profile.refusals import ValuesNeededError
from autofit.profile.tasks import MAPPINGS, Head
from autofit.profile.trace import environment, trace_model, trace_points
from autofit.profile.windows import lengths_to_trace
from autofit.spec.profile import Regime

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
BEGIN, END = "<!-- walk: begin -->", "<!-- walk: end -->"
VISION: Head = "image-text-to-text"
NUM_LAYERS = 2
MANY_TOKENS = 100_000
MISSING: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 8, "moe_intermediate_size": 1408},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 8, "moe_topk": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000}, "d_model": 6144, "n_heads": 48},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "gemma3": {"vision_config": {"image_size": 896}},
    "t5": {"decoder_start_token_id": 0},
    "udop": {"decoder_start_token_id": 0},
    "qwen2_vl": {"vision_config": {"hidden_size": 8192}},
}
"""What the defaults of a config class leave out or cannot be run with, and published configs or scripts give."""
UNKNOWN_IMAGES = "it is not known how their images are made"
ONLY_LENGTHS = {"reformer": 4096}
"""Of types that train at one length alone: the product of reformer's `axial_pos_shape`."""


class Row(Struct, frozen=True, kw_only=True):
    """What became of one model type."""

    head: Head
    model_type: str
    attention: str
    precision: str
    """bf16 weights, or fp32 weights under autocast."""
    operators_per_token: float
    """Where it is traced at one length, as its step has more operators the longer it is: how many for two layers."""
    longest_tokens: int | None
    """The longest sequence at which so many operators are traced, with the class's own number of layers; None: any."""
    reason: str
    """Why it is not traced; empty where it is."""
    refused_by: str
    """transformers, where its own run would end so; else autofit."""
    image_tokens: int = 0
    """What of each sequence was images'; 0: it was text alone."""
    why_text_alone: str = ""
    """Why a step with images is not traced, of a type that has them."""

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
    """Trace one type, with images where it takes them, else with text alone."""
    if head != VISION:
        return _attempt_with(head, model_type, 0)
    try:
        image_tokens, why = _usual_image_tokens(model_type), UNKNOWN_IMAGES
    except Exception as error:  # noqa: BLE001 - what a library raises is the answer
        image_tokens, why = None, _one_line(error)
    if image_tokens:
        row = _attempt_with(head, model_type, image_tokens)
        if row.traced:
            return row
        why = row.reason
    return replace(_attempt_with(head, model_type, 0), why_text_alone=why)


def _usual_image_tokens(model_type: str) -> int | None:
    """Return how many tokens an image of the type becomes; None where it is not known how one is made."""
    regime = _regime(VISION, "sdpa", "bfloat16", "no")
    try:
        model = build(_small(model_type, regime), regime)
    except Exception as error:
        if "--attention eager" not in str(error):
            raise
        regime = replace(regime, attention="eager")
        model = build(_small(model_type, regime), regime)
    known = KnownValues()
    with FakeTensorMode(allow_non_fake_inputs=True), environment(regime):
        fill_with_fakes(model)
        with known, images_attended_at_once(model, regime):
            return usual_image_tokens(model, known)


def _attempt_with(head: Head, model_type: str, image_tokens: int) -> Row:
    """Trace one type with the attention and the precision that it has."""
    for dtype, autocast in (("bfloat16", "no"), ("float32", "bf16")):
        for attention in ("sdpa", "eager"):
            regime = replace(_regime(head, attention, dtype, autocast), image_tokens=image_tokens)
            growth, longest_tokens, error = _traced(model_type, regime)
            if "--attention eager" not in str(error):
                break
        if not isinstance(error, RuntimeError):  # a product of two dtypes: the class needs autocast
            break
    reason = _one_line(error)
    by_us = isinstance(error, InputError) and not reason.startswith("transformers")
    return Row(
        head=head,
        model_type=model_type,
        attention=attention,
        precision="bf16" if autocast == "no" else "autocast",
        operators_per_token=growth.per_token if growth else 0.0,
        longest_tokens=longest_tokens,
        reason=reason,
        refused_by="" if not reason else "autofit" if by_us else "transformers",
        image_tokens=image_tokens,
    )


def _regime(head: Head, attention: str, dtype: str, autocast: str) -> Regime:
    return Regime(
        method="full",
        quantization=None,
        lora=None,
        weights_dtype=dtype,  # type: ignore[arg-type]
        adapter_dtype="float32",
        autocast=autocast,  # type: ignore[arg-type]
        gradient_checkpointing=False,
        use_reentrant=False,
        attention=attention,  # type: ignore[arg-type]
        task=head,
        device="cuda",
    )


def _config(model_type: str, regime: Regime) -> dict[str, Any]:
    return {"model_type": model_type, **_needed(regime.task), **MISSING.get(model_type, {})}


def _traced(model_type: str, regime: Regime) -> tuple[Growth | None, int | None, Exception | None]:
    """Trace a step.

    Returns how its operators grow and up to which length they are traced, where they grow; and why it cannot be traced,
    where it cannot. Of a type that loops the class's own depth has to be buildable: two layers may be of one kind.
    """
    try:
        small = _small(model_type, regime)
        only = ONLY_LENGTHS.get(model_type)
        lengths = lengths_to_trace(text_config(small), only, image_tokens=regime.image_tokens).traced[:2]
        growth = None if only else _growth(small, regime, lengths)
        if only or growth:
            _run(small, regime, trace_points([only or lengths[0]]))
        longest_tokens = _longest_tokens(model_type, regime, growth) if growth else None
    except Exception as error:  # noqa: BLE001 - what a library raises is the answer
        return None, None, error
    return growth, longest_tokens, None


def _small(model_type: str, regime: Regime) -> Any:
    """Load a config with a few layers, also in a vision tower; with its own where it cannot be built so.

    A tower's features become as wide as the language model, which defaults of Qwen's classes are not.

    Raises:
        Exception: what the library raises where it cannot be built with its own either, or not with this attention.
    """
    config = _config(model_type, regime)
    for num_layers, shortens_towers in ((NUM_LAYERS, True), (NUM_LAYERS, False)):
        try:
            small = load_config(config, num_layers, regime)
            for part in list(vars(small).values()) if shortens_towers else ():
                if isinstance(part, PretrainedConfig) and part is not text_config(small):
                    set_depth(part, num_layers)
                    for name, value in (("depth", num_layers), ("out_hidden_size", width(small))):
                        if isinstance(getattr(part, name, None), int):
                            setattr(part, name, value)
            build(small, regime)
        except Exception as error:
            if "--attention eager" in str(error):
                raise
        else:
            return small
    return load_config(config, None, regime)


def _growth(config: Any, regime: Regime, lengths: Sequence[int]) -> Growth | None:
    """Run two lengths; None where the step has the same operators at both."""
    try:
        _run(config, regime, trace_points(lengths)[: len(lengths)], max_operators=MAX_OPERATORS_OF_SEVERAL)
    except StructureDiffersError as error:
        return error.growth
    except TooManyOperatorsError:
        return _growth(config, regime, SHORT_LENGTHS)
    return None


def _run(config: Any, regime: Regime, points: Sequence[tuple[int, int]], **options: Any) -> None:
    try:
        trace_model(build(config, regime), regime, points, lambda _done, _total: None, **options)
    except ValuesNeededError:
        trace_model(build(config, regime), regime, points, lambda _done, _total: None, knows_values=True, **options)


def _longest_tokens(model_type: str, regime: Regime, growth: Growth) -> int:
    """Estimate the longest sequence that is traced, from the operators of two layers."""
    whole = load_config(_config(model_type, regime), None, regime)
    chosen = choose_depth(_config(model_type, regime), whole, regime)
    num_layers = chosen[2].num_traced if chosen else text_config(whole).num_hidden_layers
    return growth.of_layers(num_layers / NUM_LAYERS).longest_tokens()


def _one_line(error: Exception | None) -> str:
    """Say why a type is not traced; nothing where it is."""
    if error is None:
        return ""
    text = error.message if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]


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
        with_images = [f"`{row.model_type}` ({row.image_tokens:,})" for row in mine if row.traced and row.image_tokens]
        if with_images:
            lines += [f"Traced with images in each sequence, of so many tokens: {', '.join(with_images)}.", ""]
        mine = [row for row in mine if not (row.traced and row.image_tokens)]
        alike = [row for row in mine if row.traced and not row.operators_per_token and row.precision == "bf16"]
        for attention in ("sdpa", "eager"):
            names = [f"`{row.model_type}`" for row in alike if row.attention == attention]
            alone = "text alone and " if with_images else ""
            lines += [f"Traced with {alone}{attention} attention: {', '.join(names)}.", ""] if names else []
        names = [f"`{row.model_type}`" for row in mine if row.traced and row.precision != "bf16"]
        lines += [f"Traced with fp32 weights under autocast alone: {', '.join(names)}.", ""] if names else []
        loops = [row for row in mine if row.traced and row.operators_per_token]
        if loops:
            lines += ["| traced at one length | operators for a token, two layers | longest sequence |"]
            lines += ["| --- | ---: | ---: |", *map(_loop_cells, loops), ""]
        whys = {row.why_text_alone: None for row in mine if row.traced and row.why_text_alone}
        for why in whys:
            names = [f"`{row.model_type}`" for row in mine if row.traced and row.why_text_alone == why]
            lines += [f"Text alone, for {_cell(why)}: {', '.join(names)}.", ""]
        walked = {row.model_type for row in rows if row.head == head}
        untried = [f"`{name}`" for name in registered(head) if name not in walked]
        lines += [f"Not tried: {', '.join(untried)}.", ""] if untried else []
        refused = [row for row in mine if not row.traced]
        if refused:
            lines += ["| refused | by | why |", "| --- | --- | --- |"]
            lines += [f"| `{row.model_type}` | {row.refused_by} | {_cell(row.reason)} |" for row in refused]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _loop_cells(row: Row) -> str:
    tokens = row.longest_tokens or 0
    grows = row.operators_per_token > 0
    longest = f"{tokens:,}" if grows and tokens <= MANY_TOKENS else f"over {MANY_TOKENS:,}"
    return f"| `{row.model_type}` | {max(row.operators_per_token, 0.0):,.1f} | {longest} |"


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
