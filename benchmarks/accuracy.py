"""Compares predicted memory with figures that others measured on GPUs and published.

    python benchmarks/accuracy.py [FILE] [--ids ID,ID] [--json] [--peers]

A row is compared only under the transformers release that it was measured with; the others are listed with the reason.
What is traced is kept as `autofit plan` keeps it, so that a run that is interrupted goes on from there.
`benchmarks/make_environment.sh 4.48.1` makes a folder with an older release to put on PYTHONPATH, `make_peers.sh` one
with other estimators, whose figures `--peers` sets beside ours.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict, replace

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from published_rows import (
    Line,
    RefusedError,
    flag,
    letters,
    number_beside,
    print_fields_not_read,
    read_lines,
    text,
    whole,
)
from published_spellings import attention_of, method_of, offload_of, optimizer_of, sharding_of
from published_traces import CodePath, Traced, code_path, traces

from autofit.errors import AutofitError
from autofit.memory.assemble import MemoryModel
from autofit.sources.hardware import parse_cluster
from autofit.sources.models import resolve_model
from autofit.sources.rows import NOT_READ, PACKED, READ, Case, read_case
from autofit.spec.estimate import MemoryEstimate
from autofit.spec.libraries import installed_versions
from autofit.spec.profile import RegimeProfile
from autofit.units import GIB, MIB

Row = dict[str, Any]
PUBLISHED = Path(__file__).parent / "data" / "published_memory.jsonl"
FIGURES = ("peak_allocated", "peak_reserved", "process", "after_step_allocated")
RECENT_STACKS = ("late-2026 transformers", "torch 2.6.0+cu124")
"""The second is canifinetune's, whose runner passes `dtype` to from_pretrained, as releases since 4.56 take it."""
UNDER_FRACTION = 0.03
"""An estimate lower than measured by more than this may cost a run."""
REMAINDERS_BYTES = 64 * MIB
"""What blocks that loading left too large to be worth splitting may add to it, up to 1 MiB each."""
AFTER_STEP_TOLERANCE = 0.02
"""Between two steps only weights and state are held: a figure further off is of another model than is said."""


class Compared(Struct, frozen=True, kw_only=True):
    """One row with what was predicted for it, or why nothing was."""

    id: str
    source: str
    method: str
    predicted_bytes: dict[str, int]
    """By figure; empty where the row was refused."""
    measured_bytes: dict[str, int]
    """By figure; only those that were published."""
    refused: str | None = None
    contradicts: str | None = None
    """How the row's own figures contradict its description; then it counts in no summary."""

    @property
    def errors(self) -> dict[str, float]:
        """Relative error of each figure that was both predicted and published."""
        return {
            name: self.predicted_bytes[name] / measured - 1
            for name, measured in self.measured_bytes.items()
            if name in self.predicted_bytes
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each row, and a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=PUBLISHED)
    parser.add_argument("--ids", help="compare only these rows, separated by commas; a trailing * matches any ending")
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of tables")
    parser.add_argument("--peers", action="store_true", help="ask other estimators about the same rows")
    options = parser.parse_args(arguments)
    lines = [line for line in read_lines(options.file) if _is_chosen(line.id, options.ids)]
    compared = compare_all(lines)
    peers = peer_errors({line.id: dict(line.row or {}) for line in lines}, compared) if options.peers else []
    if options.json:
        print(json.dumps([asdict(each) for each in compared], indent=1))
    else:
        print_all(compared, peers)
        print_fields_not_read(lines, {*READ, *NOT_READ, *MEASURED, *NOT_OF_MEMORY})
    return 0


def _is_chosen(row_id: str, patterns: str | None) -> bool:
    return patterns is None or any(
        row_id.startswith(pattern[:-1]) if pattern.endswith("*") else row_id == pattern
        for pattern in patterns.split(",")
    )


def compare_all(lines: Sequence[Line]) -> list[Compared]:
    """Compare rows; each code path is traced once."""
    cases: dict[str, Case | str] = {}
    for line in lines:
        try:
            cases[line.id] = line.refused or "the line has no row" if line.row is None else stated(line.row)
        except RefusedError as refusal:
            cases[line.id] = str(refusal)
        except AutofitError as error:
            cases[line.id] = error.message
        except Exception as error:  # noqa: BLE001 - a row of the wrong kinds must not lose the others
            cases[line.id] = f"cannot be read: {type(error).__name__}: {error}"
    found = traces([_path(case) for case in cases.values() if isinstance(case, Case)])
    return [compare(line, cases[line.id], found) for line in lines]


def _path(case: Case) -> CodePath:
    return code_path(case.model, case.regime, case.workload.sequence_tokens)


def stated(row: Mapping[str, Any]) -> Case:
    """State a row as a configuration.

    Raises:
        RefusedError: something about it is not stated, or this environment does not run it.
        InputError: it is not modelled.
    """
    complete = completed(known(row))
    reason = refusal(complete)
    if reason is not None:
        raise RefusedError(reason)
    refuse_what_is_open(complete)
    return read_case({name: value for name, value in complete.items() if name in {*READ, *NOT_READ}})


def compare(line: Line, case: Case | str, found: Traced) -> Compared:
    """Predict one row, unless something about it is not modelled or not known."""
    row = line.row or {}
    measured = {name: number_beside(row, f"{name}_gib") or 0 for name in FIGURES}
    bare = Compared(
        id=line.id,
        source=source_name(text(row, "source")),
        method=text(row, "method"),
        predicted_bytes={},
        measured_bytes={name: int(gib * GIB) for name, gib in measured.items() if gib > 0},
    )
    if isinstance(case, str):
        return replace(bare, refused=case)
    profile = found[_path(case).key]
    if isinstance(profile, str):
        return replace(bare, refused=profile)
    try:
        predicted = predict(case, profile)
    except AutofitError as error:
        return replace(bare, refused=error.message)
    except Exception as error:  # noqa: BLE001 - one row must not lose the others
        return replace(bare, refused=f"cannot be estimated: {type(error).__name__}: {error}")
    figures = {name: getattr(predicted, f"{name}_bytes") for name in FIGURES}
    counted = {name: figure for name, figure in figures.items() if figure is not None}
    if case.configuration.keeps_outputs:  # and so alive after the step, which the figure leaves out
        del counted["after_step_allocated"]
    full = replace(bare, predicted_bytes=counted)
    return replace(full, contradicts=contradiction(full))


LLM_INT8_BITS = 8
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
AUTOCASTS = {"bfloat16": "bf16", "float16": "fp16", "none": "no", "false": "no", "off": "no"}
FLAGS = ("outputs_kept", "gradient_checkpointing", "kbit_prepare", "recasts_tables", "use_reentrant")
MEASURED = (*(f"{name}_gib" for name in FIGURES), "peak_gib")
NOT_OF_MEMORY = ("family", "num_params", "mfu", "tokens_per_second_per_gpu")
"""Fields beside those of `autofit.sources.rows` that say nothing of memory."""


def known(row: Mapping[str, Any]) -> Row:
    """Return a row with every field that is looked at, in its kind and spelt as `autofit.sources.rows` does.

    Raises:
        RefusedError: a value is of no such kind, or not modelled.
    """
    found: Row = {name: value for name, value in row.items() if value is not None}
    found |= {name: text(row, name) for name in ("source", "stack", "notes", "method", "sharding", "gpus", "model")}
    found |= {name: whole(row, name) for name in ("seq_len", "micro_batch_size", "lora_rank")}
    found |= {name: flag(row, name) for name in FLAGS}
    for name, words in (("weights_dtype", DTYPES), ("autocast", AUTOCASTS)):
        said = text(row, name).casefold().removeprefix("torch.")
        found[name] = words.get(said, said) or None
    found["quantization"] = _quantization(row)
    bits = (found["quantization"] or {}).get("bits")
    method = method_of({"method": found["method"], "quant_bits": bits})
    bits = method.pop("bits", None)
    if method["method"] == "qlora" and not found["quantization"] and bits is not None:
        found["quantization"] = {"bits": bits}
    found |= method
    found["optimizer"] = optimizer_of(row)
    attention = attention_of(row)
    if attention.pop("nearest", None):
        raise RefusedError(f"the attention {row['attention']!r} is not modelled")
    found |= attention
    if found["gpus"]:
        cluster = parse_cluster(found["gpus"])
        counted = {"sharding": found["sharding"], "gpus_count": cluster.num_devices}
        found |= sharding_of(counted, cluster.num_nodes) or {}
    found["offload"] = "none"
    found |= offload_of(row)
    targets = row.get("lora_target_modules")
    if isinstance(targets, str):
        found["lora_target_modules"] = [each.strip() for each in targets.split(",") if each.strip()]
    return {"outputs_kept": None, **found}


def _quantization(row: Mapping[str, Any]) -> Row | None:
    said = row.get("quantization")
    if isinstance(said, dict):
        return dict(said) or None
    name = letters(text(row, "quantization"))
    if name in {"", "none", "no", "false", "16"}:
        return None
    if name in {"int8", "8bit", "8", "llmint8"}:
        return {"bits": 8}
    if name in {"4bit", "4"}:
        return {"bits": 4}
    if name in {"nf4", "fp4", "gptq", "awq"}:
        return {"bits": 4, "type": name}
    raise RefusedError(f"the quantization {said!r} is not modelled")


def refuse_what_is_open(row: Row) -> None:
    """Refuse a row that leaves open what its memory depends on.

    Raises:
        RefusedError: it does; the message says what.
    """
    names = ["model", "gpus", "seq_len", "micro_batch_size", "gradient_checkpointing", "weights_dtype", "autocast"]
    names += ["optimizer", "sharding"]
    if row["method"] in {"lora", "qlora"}:
        names += ["lora_rank", "lora_target_modules"]
    missing = [name for name in names if row.get(name) in (None, "", [])]
    quantization = row.get("quantization") or {}
    loads_bits = row["method"] == "qlora" and quantization.get("type") not in PACKED
    if loads_bits and quantization.get("bits") != LLM_INT8_BITS and "double_quant" not in quantization:
        missing.append("whether the scales of quantised weights are quantised (double_quant)")
    if loads_bits and row.get("kbit_prepare") is None:
        missing.append("kbit_prepare")
    if missing:
        raise RefusedError(f"not stated: {', '.join(missing)}")
    if not any(number_beside(row, f"{name}_gib") for name in FIGURES):
        raise RefusedError("no figure of its memory is stated")


def source_name(source: str) -> str:
    """Shorten a source to whom it is from."""
    return re.split(r",| scripts/| sdist| row ", source)[0].removeprefix("PyPI ") or "(source not stated)"


class Addition(Struct, frozen=True, kw_only=True):
    """What the code that made a source's measurements says about its rows, and they do not say or say otherwise."""

    fields: dict[str, Any]
    applies: Callable[[Row], bool] = lambda _row: True
    because: str


ADDITIONS: dict[str, tuple[Addition, ...]] = {
    "foundation-model-stack/fms-acceleration": (
        Addition(
            fields={"use_reentrant": True},
            because="transformers 4.45 and 4.48 modeling_utils.py, gradient_checkpointing_enable, without arguments",
        ),
        Addition(
            fields={"lora_dropout": 0.1, "lora_alpha": 16},
            applies=lambda row: row["method"] != "full",
            because="scripts/benchmarks/scenarios*.yaml",
        ),
        Addition(
            fields={"recasts_tables": True},
            applies=lambda row: bool(row["kbit_prepare"]) and row["sharding"] == "none" and not _comes_packed(row),
            because="trl 0.13 sft_trainer.py: after preparing, peft_module_casting_to_bf16",
        ),
        Addition(
            fields={"storage": "bfloat16", "kbit_prepare": False},
            applies=lambda row: row["method"] == "qlora" and row["sharding"] != "none" and not _comes_packed(row),
            because="plugins/accelerated-peft framework_plugin_bnb.py: stored in the weights' dtype under FSDP; "
            "trl 0.13 sft_trainer.py: a sharded quantised model is not prepared",
        ),
    ),
    "canifinetune benchmarks": (
        Addition(
            fields={"autocast": "no", "outputs_kept": True},
            because="PyPI canifinetune 0.1.0-0.3.0 bench/runner.py, run_bench: no autocast, `outputs` stays bound",
        ),
    ),
}
"""By what the source's name begins with."""


def _comes_packed(row: Row) -> bool:
    return (row.get("quantization") or {}).get("type") in PACKED


def completed(row: Row) -> Row:
    """Add what is known of a row's source."""
    found = dict(row)
    for prefix, additions in ADDITIONS.items():
        for addition in additions if row["source"].startswith(prefix) else ():
            if addition.applies(row):
                storage = {name: value for name, value in addition.fields.items() if name == "storage"}
                if storage:
                    found["quantization"] = {**found["quantization"], **storage}
                found |= {name: value for name, value in addition.fields.items() if name not in storage}
    return found


def refusal(row: Row) -> str | None:
    """Say what is not stated about a row, or not what this environment would run; None for nothing."""
    if row["outputs_kept"] is None:
        return "whether the loop kept the model's output is not known"
    return release_refusal(row["stack"])


def release_refusal(stack: str) -> str | None:
    """Say why the transformers in effect is not what a row was measured with; None if it is."""
    if "custom training loop" in stack:
        return "a training loop of its own"
    here = installed_versions(("transformers",)).get("transformers", "")
    exact = re.search(r"transformers[ =~v-]*(\d+(?:\.\d+)+)", stack)
    if exact:
        same = here == exact[1] or here.startswith(f"{exact[1]}.")
        return None if same else f"measured with transformers {exact[1]}, in effect is {here}"
    if any(words in stack for words in RECENT_STACKS):
        is_recent = int(here.split(".")[0]) >= 5
        return None if is_recent else f"measured with transformers 5, in effect is {here}"
    return "the transformers release it was measured with is not stated"


def predict(case: Case, profile: RegimeProfile) -> MemoryEstimate:
    """Assemble a row's configuration from the profile of its code path."""
    micro_batch = case.configuration.per_device_train_batch_size
    model = MemoryModel(profile, case.workload.sequence_tokens, (micro_batch,))
    return model.estimate(case.configuration, case.cluster, replays=True)


def contradiction(row: Compared) -> str | None:
    """Say that what was held between two steps is not what the row says was trained; None if it is."""
    if abs(row.errors.get("after_step_allocated", 0.0)) <= AFTER_STEP_TOLERANCE:
        return None
    held, needs = row.measured_bytes["after_step_allocated"], row.predicted_bytes["after_step_allocated"]
    if abs(held - needs) <= REMAINDERS_BYTES:
        return None
    return f"held {held / GIB:.2f} GiB between steps; the weights and state it describes need {needs / GIB:.2f} GiB"


def print_all(rows: Sequence[Compared], peers: Sequence[PeerError]) -> None:
    """Print what was compared, the summary, and what was not compared and why."""
    predicted = [row for row in rows if row.refused is None]
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    print(f"Traced with {versions}\n")
    print("| row | method | " + " | ".join(f"{name}, GiB | error" for name in FIGURES) + " |")
    print("| --- | --- |" + " ---: | ---: |" * len(FIGURES))
    for row in predicted:
        print(f"| {row.id} | {row.method} | " + " | ".join(_cells(row)) + " |")
    print_summary([row for row in predicted if row.contradicts is None], peers)
    _print_reasons("Rows that contradict their own description (in no summary)", ((r.id, r.contradicts) for r in rows))
    _print_reasons("Rows that were not compared", ((r.id, r.refused) for r in rows))


def _cells(row: Compared) -> Iterator[str]:
    for name in FIGURES:
        predicted = f"{row.predicted_bytes[name] / GIB:.4f}" if name in row.predicted_bytes else "-"
        measured = f"{row.measured_bytes[name] / GIB:.4f}" if name in row.measured_bytes else "-"
        yield f"{predicted} / {measured}"
        yield f"{row.errors[name]:+.2%}" if name in row.errors else "-"


class Summary(Struct, frozen=True, kw_only=True):
    """How far off one estimator is on one figure of the rows of one source and method."""

    source: str
    method: str
    figure: str
    estimator: str
    errors: tuple[tuple[float, str], ...]
    """Relative error and id of each row."""

    def cells(self) -> str:
        """Write the summary as the cells of a table's row."""
        sizes = sorted(abs(error) for error, _ in self.errors)
        worst, where = max(self.errors, key=lambda each: abs(each[0]))
        under = sum(error < -UNDER_FRACTION for error, _ in self.errors)
        return (
            f"| {self.source} | {self.method} | {self.figure} | {self.estimator} | {len(sizes)} | "
            f"{statistics.median(sizes):.2%} | {percentile(sizes, 0.95):.2%} | {worst:+.2%} ({where}) | "
            f"{under / len(sizes):.0%} |"
        )


PeerError = tuple[str, str, str, float, str]
"""Source, method, estimator, relative error of the whole process, row."""


def peer_errors(content: Mapping[str, Row], compared: Sequence[Compared]) -> list[PeerError]:
    """Ask the other estimators about every row that was compared and whose whole process was measured."""
    from peers import ask_all

    errors = []
    for each in compared:
        measured = each.measured_bytes.get("process")
        if each.refused or each.contradicts or measured is None:
            continue
        row = content[each.id]
        model = resolve_model(row["model"])
        if model.num_params is None:
            continue
        for name, predicted in ask_all(row, model.config, model.num_params).items():
            errors.append((each.source, each.method, name, predicted / measured - 1, each.id))
    return errors


def print_summary(rows: Sequence[Compared], peers: Sequence[PeerError]) -> None:
    """Print how far off the rows of each source and method are; peers' under ours, where the process was measured."""
    groups: dict[tuple[str, str, int, str, str], list[tuple[float, str]]] = defaultdict(list)
    for row in rows:
        for name, error in row.errors.items():
            groups[row.source, row.method, FIGURES.index(name), name, "autofit"].append((error, row.id))
    for source, method, peer, error, row_id in peers:
        groups[source, method, FIGURES.index("process"), "process", peer].append((error, row_id))
    print("\n| source | method | figure | estimator | rows | median | 95th percentile | worst | under by > 3 % |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for (source, method, _, name, estimator), errors in sorted(groups.items()):
        summary = Summary(source=source, method=method, figure=name, estimator=estimator, errors=tuple(errors))
        print(summary.cells())


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """Interpolate between the two nearest of an ordered sequence."""
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def _print_reasons(title: str, reasons: Iterable[tuple[str, str | None]]) -> None:
    grouped = defaultdict(list)
    for row_id, reason in reasons:
        if reason is not None:
            grouped[reason].append(row_id)
    if grouped:
        print(f"\n{title}:")
    for reason, ids in grouped.items():
        print(f"- {reason}: {', '.join(ids)}")


if __name__ == "__main__":
    sys.exit(main())
