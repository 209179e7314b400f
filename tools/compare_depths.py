"""Compares steps that are assembled from few traced layers with a trace of every layer, and writes the errors.

    python tools/compare_depths.py                 every architecture, to docs/architectures.md
    python tools/compare_depths.py llama t5        a few, printed

Configs are tiny in width and deeper than what is traced. The step (full fine-tuning in bf16 on a GPU) is compared at a
size that was not traced; where a profile holds for one length, at that length and a batch that was not traced.
"""  # noqa: INP001 - a script, not a module

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from msgspec import Struct

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from autofit.memory.tape import phase_peaks
from autofit.profile.models import choose_depth, load_config
from autofit.profile.recorder import RawSegment
from autofit.profile.trace import trace, trace_steps
from autofit.spec.profile import Regime

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
BEGIN, END = "<!-- depths: begin -->", "<!-- depths: end -->"
SIZE = (5, 384)
"""Sequences and tokens; was not traced."""
ONE_LENGTH = 136
"""Tokens where a profile holds for the planned length alone: not a whole number of chunks."""

SMALL: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
HEADS: dict[str, Any] = {**SMALL, "head_dim": 16}
EXPERTS: dict[str, Any] = {**SMALL, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT: dict[str, Any] = {"vocab_size": 1000, "n_embd": 64, "n_layer": 8, "n_head": 4, "n_positions": 2048}
LATENT: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
}
DELTA_RULE: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


class Architecture(Struct, frozen=True, kw_only=True):
    """A tiny config, and what its type is an example of."""

    kind: str
    config: dict[str, Any]
    attention: str = "sdpa"
    sequence_tokens: int | None = None
    """Where it is traced at one length: the length."""


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(kind="dense", config=SMALL),
    "mistral": Architecture(kind="window on every layer", config={**HEADS, "sliding_window": 128}),
    "qwen2": Architecture(kind="biases", config=SMALL),
    "qwen3": Architecture(kind="norms of heads, tied head", config={**HEADS, "tie_word_embeddings": True}),
    "phi": Architecture(kind="attention beside the MLP", config=SMALL),
    "granite": Architecture(kind="scaled residuals", config=SMALL),
    "olmo2": Architecture(kind="norms after", config=SMALL),
    "gpt2": Architecture(kind="learned positions", config=GPT),
    "gpt_neox": Architecture(kind="partial rotation", config=SMALL),
    "gpt_bigcode": Architecture(kind="one key for all heads", config=GPT),
    "falcon": Architecture(kind="one key, attention beside the MLP", config=SMALL),
    "opt": Architecture(
        kind="positions with an offset", config={**SMALL, "ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0}
    ),
    "bloom": Architecture(
        kind="alibi", attention="eager", config={"vocab_size": 1000, "hidden_size": 64, "n_layer": 8, "n_head": 4}
    ),
    "gpt_neo": Architecture(
        kind="local and global attention in turn",
        attention="eager",
        config={
            "vocab_size": 1000,
            "hidden_size": 64,
            "num_layers": 12,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 6]],
            "window_size": 128,
        },
    ),
    "gemma2": Architecture(
        kind="window on every other layer",
        attention="eager",
        config={**HEADS, "num_hidden_layers": 12, "sliding_window": 128, "query_pre_attn_scalar": 16},
    ),
    "gemma3_text": Architecture(
        kind="window on five layers of six", config={**HEADS, "num_hidden_layers": 26, "sliding_window": 128}
    ),
    "cohere2": Architecture(
        kind="window on three layers of four", config={**SMALL, "num_hidden_layers": 20, "sliding_window": 128}
    ),
    "mixtral": Architecture(kind="experts", config={**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": Architecture(kind="many small experts", config={**EXPERTS, "head_dim": 16, "num_experts": 4}),
    "gpt_oss": Architecture(
        kind="experts, sinks, window on every other layer",
        attention="eager",
        config={**EXPERTS, "head_dim": 16, "num_hidden_layers": 12, "num_local_experts": 4, "sliding_window": 128},
    ),
    "deepseek_v3": Architecture(
        kind="latent attention, dense layers before routed ones",
        config={
            **EXPERTS,
            **LATENT,
            "num_hidden_layers": 12,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 2,
        },
    ),
    "dbrx": Architecture(
        kind="experts in a loop, routed by values",
        config={
            "vocab_size": 1000,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 8,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.0},
        },
    ),
    "bert": Architecture(kind="encoder", config={**SMALL, "architectures": ["BertForMaskedLM"]}),
    "t5": Architecture(
        kind="encoder and decoder: every layer is traced",
        config={
            "vocab_size": 1000,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 3,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "mamba2": Architecture(
        kind="scan in whole-tensor chunks, at one length",
        attention="eager",
        sequence_tokens=ONE_LENGTH,
        config={
            "vocab_size": 1000,
            "hidden_size": 64,
            "state_size": 16,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 64,
            "num_hidden_layers": 8,
        },
    ),
    "qwen3_next": Architecture(
        kind="gated delta rule on three layers of four, experts, at one length",
        sequence_tokens=ONE_LENGTH,
        config={
            **EXPERTS,
            **DELTA_RULE,
            "head_dim": 16,
            "num_hidden_layers": 20,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
        },
    ),
}


class Row(Struct, frozen=True, kw_only=True):
    """How far the assembled peak of one architecture is off."""

    name: str
    num_layers: int
    num_traced_layers: int
    relative_error: float
    architecture: Architecture


def config_of(name: str) -> dict[str, Any]:
    """Content of a tiny config.json."""
    return {"model_type": name, **ARCHITECTURES[name].config}


def regime_of(name: str, **changes: Any) -> Regime:
    """Full fine-tuning in bf16 on a GPU, with the attention that the type has."""
    values: dict[str, Any] = {
        "method": "full",
        "quantization": None,
        "lora": None,
        "weights_dtype": "bfloat16",
        "adapter_dtype": "float32",
        "autocast": "no",
        "gradient_checkpointing": False,
        "use_reentrant": False,
        "attention": ARCHITECTURES[name].attention,
        "device": "cuda",
    }
    return Regime(**{**values, **changes})


def compare(names: Iterable[str], **changes: Any) -> Iterator[Row]:
    """Trace a few layers of each architecture and all of them.

    Args:
        names: of `ARCHITECTURES`.
        changes: of the regime.
    """
    for name in names:
        given, regime, config = ARCHITECTURES[name], regime_of(name, **changes), config_of(name)
        size = (SIZE[0], given.sequence_tokens or SIZE[1])
        profile = trace(name, config, regime, sequence_tokens=size[1], at_one_length=given.sequence_tokens is not None)
        whole = load_config(config, None, regime)
        ((segments,), _) = trace_steps(whole, regime, [size])
        chosen = choose_depth(config, whole, regime)
        assembled = max(float(peak.kept[0]) for peak in phase_peaks(profile, [size[0]], size[1]))
        yield Row(
            name=name,
            num_layers=profile.num_layers,
            num_traced_layers=chosen[2].num_traced if chosen else profile.num_layers,
            relative_error=assembled / _highest_alive(segments) - 1,
            architecture=given,
        )


def _highest_alive(segments: list[RawSegment]) -> int:
    """Play every birth and death, each rounded up as CUDA's allocator does; return the most bytes alive."""
    alive = highest = 0
    for segment in segments:
        for event in segment.events:
            rounded = -(-event[0] // 512) * 512
            alive += rounded if len(event) == 2 else -rounded
            highest = max(highest, alive)
    return highest


def table(rows: Iterable[Row]) -> str:
    """Write the rows as a table."""
    head = ("| type | an example of | layers | traced | error |", "| --- | --- | ---: | ---: | ---: |")
    return "\n".join([*head, *map(line, rows)]) + "\n"


def line(row: Row) -> str:
    """Write a row of the table."""
    kind, layers = row.architecture.kind, f"{row.num_layers} | {row.num_traced_layers}"
    return f"| `{row.name}` | {kind} | {layers} | {row.relative_error:+.4%} |"


def main() -> int:
    """Compare, and write the page where everything was compared."""
    names = sys.argv[1:] or list(ARCHITECTURES)
    rows = []
    for row in compare(names):
        rows.append(row)
        sys.stdout.write(f"{row.name:14} {row.num_layers:3} {row.num_traced_layers:3} {row.relative_error:+.5%}\n")
        sys.stdout.flush()
    if not sys.argv[1:]:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
