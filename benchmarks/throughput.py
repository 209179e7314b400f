"""Compares predicted speeds with those that others measured on GPUs and published.

    python benchmarks/throughput.py [FILE] [--json] [--rows]

Each row is read as a configuration, or listed with the reason why it cannot be (`published_speed.py`). It is traced
under the libraries of this environment, whatever release it was measured with; traces are kept as `autofit plan`'s are,
those of one model and length as soon as all of them are there, so that a run that is interrupted goes on from them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import asdict, replace

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from published_rows import Line, RefusedError, Row, print_fields_not_read, read_lines, text
from published_speed import READ, Stated, contradicts_size, read, second_speed, state, was_stopped
from published_traces import CodePath, Traced, code_path, traces

from autofit.errors import AutofitError
from autofit.memory.assemble import MemoryModel
from autofit.search.evaluate import misfit_of
from autofit.spec.estimate import MemoryEstimate, TimeEstimate
from autofit.spec.profile import RegimeProfile
from autofit.timing import TimeModel

PUBLISHED = Path(__file__).parent / "data" / "published_throughput.jsonl"
DEVELOPMENT_SOURCES = ("foundation-model-stack/fms-acceleration", "QwenLM/Qwen")
"""Rows that were looked at while the model was built. Chosen by source before anything was changed; every other source,
also one that is not in our file, is held out."""
GOALS = {"median": 0.15, "90th percentile": 0.35, "Spearman": 0.9, "median regret": 0.0, "95th percentile regret": 0.05}
SMALLEST_SWEEP = 3


class Compared(Struct, frozen=True, kw_only=True):
    """One row with what was predicted for it, or why nothing was."""

    id: str
    source: str
    table: str
    """The source and the table in it: one published sweep."""
    held_out: bool
    model: str
    gpus: str
    seq_len: int
    method: str
    software: str
    num_devices: int
    measured: float
    """Tokens a second over all devices."""
    measured_again: float | None = None
    """The same of the same run, by another published figure."""
    predicted: float | None = None
    lower: float | None = None
    upper: float | None = None
    terms: dict[str, float] | None = None
    step_seconds: float | None = None
    needed_bytes: int | None = None
    """Of device memory; None: memory is not modelled for it."""
    fits: bool = True
    """Whether a plan may choose it; it ran, so it does where its memory is not modelled."""
    nearest: str | None = None
    assumed: tuple[str, ...] = ()
    """What neither the row nor its source says, and what it was taken to be."""
    refused: str | None = None
    contradicts: str | None = None
    """How the row's own figures contradict its description; then it is in no table."""

    @property
    def error(self) -> float:
        """Predicted over measured tokens a second, less one."""
        assert self.predicted is not None, "a refused row has no error"
        return self.predicted / self.measured - 1

    @property
    def is_between(self) -> bool:
        """Whether the measured speed lies between the bounds."""
        assert self.lower is not None, "a refused row has no bounds"
        assert self.upper is not None, "a refused row has no bounds"
        return self.lower <= self.measured <= self.upper


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=PUBLISHED)
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of tables")
    parser.add_argument("--rows", action="store_true", help="print every row too")
    options = parser.parse_args(arguments)
    lines = read_lines(options.file)
    with tempfile.TemporaryDirectory(prefix="autofit-configs-") as folder:
        compared = compare_all(lines, Path(folder))
    if options.json:
        print(json.dumps([asdict(each) for each in compared], indent=1))
    else:
        print_all(compared, with_rows=options.rows)
        print_fields_not_read(lines, READ)
    return 0


def compare_all(lines: Sequence[Line], folder: Path) -> list[Compared]:
    """Predict every row; each code path is traced once."""
    stated: dict[str, Stated | str] = {}
    for line in lines:
        try:
            stated[line.id] = line.refused or "the line has no row" if line.row is None else state(line.row, folder)
        except RefusedError as refusal:
            stated[line.id] = str(refusal)
        except Exception as error:  # noqa: BLE001 - a row of the wrong kinds must not lose the others
            stated[line.id] = f"cannot be read: {type(error).__name__}: {error}"
    known = [each for each in stated.values() if isinstance(each, Stated)]
    found = traces([_path(each) for each in known])
    return [compare(line, stated[line.id], found) for line in lines]


def _path(stated: Stated) -> CodePath:
    return code_path(stated.case.model, stated.regime, stated.case.workload.sequence_tokens)


def compare(line: Line, stated: Stated | str, found: Traced) -> Compared:
    """Predict one row, unless it could not be stated, or cannot be traced or timed."""
    bare = _bare(line)
    if isinstance(stated, str):
        return replace(bare, refused=stated)
    profile = found[_path(stated).key]
    if isinstance(profile, str):
        return replace(bare, refused=profile)
    try:
        time = predict(stated, profile)
    except RefusedError as refusal:
        return replace(bare, refused=str(refusal))
    except AutofitError as error:
        return replace(bare, refused=error.message)
    except Exception as error:  # noqa: BLE001 - one row must not lose the others
        return replace(bare, refused=f"cannot be timed: {type(error).__name__}: {error}")
    assert line.row is not None, "it was stated"
    memory = memory_of(stated, profile)
    return replace(
        bare,
        contradicts=contradicts_size(stated, profile) or contradiction(read(line.row), memory),
        software=stated.software,
        nearest=stated.nearest,
        assumed=stated.assumed,
        needed_bytes=None if memory is None else memory.needed_bytes,
        fits=memory is None or misfit_of(memory, stated.case.cluster) == "none",
        predicted=time.tokens_per_second,
        lower=time.tokens_per_second_lower,
        upper=time.tokens_per_second_upper,
        terms=time.terms,
        step_seconds=time.step_seconds,
    )


def _bare(line: Line) -> Compared:
    """Return what a row says of itself, as far as it can be read."""
    said = line.row or {}
    try:
        row = read(said)
    except RefusedError:
        row = {"seq_len": 0, "gpus_count": 0, "tokens_per_second_total": 0.0}
    source = text(said, "source")
    return Compared(
        id=line.id,
        source=source_name(source),
        table=source,
        held_out=not source.startswith(DEVELOPMENT_SOURCES),
        model=text(said, "model"),
        gpus=f"{row['gpus_count']}x {text(said, 'gpu')}",
        seq_len=row["seq_len"],
        method=text(said, "method"),
        software="",
        num_devices=row["gpus_count"],
        measured=row["tokens_per_second_total"],
        measured_again=second_speed(row) if row["gpus_count"] else None,
    )


def predict(stated: Stated, profile: RegimeProfile) -> TimeEstimate:
    """Time a row's configuration.

    Raises:
        RefusedError: a figure of the hardware is not known.
    """
    case = stated.case
    model = TimeModel(profile, case.cluster, case.workload)
    missing = model.missing(case.configuration)
    if missing:
        raise RefusedError(f"of a {case.cluster.device.name} is not known: {', '.join(missing)}")
    return model.time(case.configuration)


def memory_of(stated: Stated, profile: RegimeProfile) -> MemoryEstimate | None:
    """Estimate what a row needs, as a search does; None where that is not modelled."""
    case = stated.case
    try:
        model = MemoryModel(profile, case.workload.sequence_tokens, (case.configuration.per_device_train_batch_size,))
        return model.estimate(case.configuration, case.cluster, replays=False)
    except AutofitError:
        return None


def contradiction(row: Row, memory: MemoryEstimate | None) -> str | None:
    """Say that a run that was stopped, so not by the defaults, could not have run as described; None if it could."""
    if memory is None or not was_stopped(row) or memory.needed_bytes <= memory.budget_bytes:
        return None
    return "was stopped, which no default does, and as described needs more memory than its device has"


def source_name(source: str) -> str:
    """Shorten a source to whom and what it is from."""
    whole = re.split(r"README\.md|\(IB|\(Ra", source)
    return " ".join(part.strip(" :") for part in whole if part.strip(" :"))[:90] or "(source not stated)"


def print_all(compared: Sequence[Compared], *, with_rows: bool) -> None:
    """Print errors by source, then what matters for choosing, then what was not compared."""
    predicted = [row for row in compared if row.refused is None and row.contradicts is None]
    if with_rows:
        _print_rows(predicted)
    halves: dict[str, list[Compared]] = {"held out": [], "development": [], "all": list(predicted)}
    by_source: dict[str, list[Compared]] = defaultdict(list)
    for row in predicted:
        halves["held out" if row.held_out else "development"].append(row)
        by_source[("" if row.held_out else "(development) ") + row.source].append(row)
    print("| source | rows | median error | 90th percentile | bias (median) | between the bounds |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, rows in (*sorted(by_source.items()), *((f"**{half}**", each) for half, each in halves.items())):
        if rows:
            print(_error_cells(name, rows))
    exact = {half: [row for row in rows if row.nearest is None] for half, rows in halves.items()}
    for half, rows in exact.items():
        if rows and len(rows) < len(halves[half]):
            print(_error_cells(f"{half}, without rows stated as the nearest that is modelled", rows))
    _print_ranks(predicted)
    for title, key in (("model, GPUs and length", _group), ("model, GPUs, length and software", _group_of_software)):
        _print_regrets(title, predicted, key)
    _print_reasons("Rows stated as the nearest that is modelled", ((row.id, row.nearest) for row in compared))
    _print_reasons(
        "What rows and their sources leave open, and what it was taken to be",
        ((row.id, each) for row in predicted for each in row.assumed),
    )
    _print_reasons("Rows that contradict their own description", ((row.id, row.contradicts) for row in compared))
    _print_reasons("Rows that were not compared", ((row.id, row.refused) for row in compared))


def _error_cells(name: str, rows: Sequence[Compared]) -> str:
    sizes = sorted(abs(row.error) for row in rows)
    bias = statistics.median(row.error for row in rows)
    between = sum(row.is_between for row in rows) / len(rows)
    return (
        f"| {name} | {len(rows)} | {statistics.median(sizes):.1%} | {percentile(sizes, 0.9):.1%} | {bias:+.1%} "
        f"| {between:.0%} |"
    )


def _print_rows(predicted: Iterable[Compared]) -> None:
    print("| row | model | GPUs | length | method | measured, tokens/s | predicted | between | error |")
    print("| --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for row in predicted:
        print(
            f"| {row.id} | {row.model} | {row.gpus} | {row.seq_len} | {row.method} {row.software} "
            f"| {row.measured:.0f} | {row.predicted:.0f} | {row.lower:.0f} to {row.upper:.0f} | {row.error:+.1%} |"
        )
    print()


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """Interpolate between the two nearest of an ordered sequence."""
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def ranks(values: Sequence[float]) -> list[float]:
    """Rank values from 1; equal ones share the mean of their ranks."""
    ordered = sorted(values)
    first = {value: ordered.index(value) for value in ordered}
    return [first[value] + (ordered.count(value) + 1) / 2 for value in values]


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Return the rank correlation; None where one side does not vary."""
    if len(set(left)) < 2 or len(set(right)) < 2:
        return None
    return statistics.correlation(ranks(left), ranks(right))


def _print_ranks(predicted: Sequence[Compared]) -> None:
    """Print how well speeds per device are ordered, in each table of one model.

    A plan only chooses among rows that fit. Where a source publishes a second figure of its runs, the order of the one
    by the other is the most that can be asked of the order by a prediction.
    """
    sweeps: dict[tuple[str, str], list[Compared]] = defaultdict(list)
    for row in predicted:
        sweeps[row.table, row.model].append(row)
    print(
        f"\n| sweep: one published table and model | rows | Spearman (goal {GOALS['Spearman']}) | of those that fit |"
    )
    print("| --- | ---: | ---: | ---: |")
    found, ceilings = [], list[str]()
    for (table, model), rows in sorted(sweeps.items()):
        each, name = _agreement(rows), f"{source_name(table)}: {model}"
        if len(rows) < SMALLEST_SWEEP or each is None:
            continue
        found.append(each)
        fitting = [row for row in rows if row.fits]
        among = _agreement(fitting)
        print(f"| {name} | {len(rows)} | {each:.3f} | {'-' if among is None else f'{among:.3f}'} ({len(fitting)}) |")
        ceilings += _ceiling(name, rows)
    if found:
        reached = sum(each >= GOALS["Spearman"] for each in found)
        print(f"\n{reached} of {len(found)} sweeps reach the goal; median {statistics.median(found):.3f}.")
    for words in ceilings:
        print(f"\n{words}")


def _agreement(rows: Sequence[Compared]) -> float | None:
    measured = [row.measured / row.num_devices for row in rows]
    return spearman(measured, [(row.predicted or 0) / row.num_devices for row in rows])


def _ceiling(name: str, rows: Sequence[Compared]) -> Iterator[str]:
    """Say how well a source's two figures of the same runs agree with each other, and the prediction with them."""
    twice = [row for row in rows if row.measured_again is not None]
    for words, some in (("", twice), (" that fit", [row for row in twice if row.fits])):
        first = [row.measured / row.num_devices for row in some]
        again = [(row.measured_again or 0) / row.num_devices for row in some]
        ceiling, ours = spearman(first, again), _agreement(some)
        if len(some) >= SMALLEST_SWEEP and ceiling is not None and ours is not None:
            yield (
                f"{name}: {len(some)} of its rows{words} are published twice, as speed and as duration. The two "
                f"figures order them alike by {ceiling:.3f}, the prediction and the first by {ours:.3f}."
            )


def _group(row: Compared) -> Hashable:
    return (row.model, row.gpus, row.seq_len)


def _group_of_software(row: Compared) -> Hashable:
    return (row.table, row.software, *_group(row))  # type: ignore[misc]


def regret(rows: Sequence[Compared]) -> tuple[float, Compared, Compared]:
    """Return how much slower the one that a plan would choose is than the fastest measured, and both.

    A plan takes the fastest by prediction of those that fit; where none does, the one that needs least.
    """
    fitting = [row for row in rows if row.fits]
    if fitting:
        chosen = max(fitting, key=lambda row: row.predicted or 0)
    else:
        chosen = min(rows, key=lambda row: row.needed_bytes or 0)
    fastest = max(rows, key=lambda row: row.measured)
    return fastest.measured / chosen.measured - 1, chosen, fastest


def _print_regrets(title: str, predicted: Sequence[Compared], key: Callable[[Compared], Hashable]) -> None:
    groups: dict[Hashable, list[Compared]] = defaultdict(list)
    for row in predicted:
        groups[key(row)].append(row)
    several = [rows for rows in groups.values() if len(rows) > 1]
    if not several:
        return
    print(f"\n| group: {title} | rows | that fit | regret | chosen | fastest |")
    print("| --- | ---: | ---: | ---: | --- | --- |")
    regrets: dict[str, list[float]] = defaultdict(list)
    for rows in several:
        loss, chosen, fastest = regret(rows)
        regrets["all"].append(loss)
        regrets["held out" if rows[0].held_out else "development"].append(loss)
        where = f"{chosen.model}, {chosen.gpus}, {chosen.seq_len}"
        names = [" ".join(filter(None, (row.id, row.software))) for row in (chosen, fastest)]
        fitting = sum(row.fits for row in rows)
        print(f"| {where} | {len(rows)} | {fitting} | {loss:.1%} | {names[0]} | {names[1]} |")
    for half, losses in regrets.items():
        within = sum(loss <= GOALS["95th percentile regret"] for loss in losses) / len(losses)
        print(
            f"\n{half}: {len(losses)} groups, median regret {statistics.median(losses):.1%} (goal 0 %), "
            f"95th percentile {percentile(sorted(losses), 0.95):.1%} (goal 5 %), {within:.0%} within 5 %."
        )


def _print_reasons(title: str, reasons: Iterable[tuple[str, str | None]]) -> None:
    grouped = defaultdict(list)
    for row_id, reason in reasons:
        if reason is not None:
            grouped[reason].append(row_id)
    if grouped:
        print(f"\n{title}:")
    for reason, ids in grouped.items():
        print(f"- {reason}: {len(ids)} rows ({', '.join(ids[:6])}{' ...' if len(ids) > 6 else ''})")


if __name__ == "__main__":
    sys.exit(main())
