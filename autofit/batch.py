"""Many estimates at once: what rows of one model, code path and length share is worked out once."""

from __future__ import annotations

import codecs
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import groupby
from multiprocessing import get_context
from typing import Any

import msgspec
from msgspec import Struct

from autofit.errors import AutofitError, InputError
from autofit.memory.assemble import MemoryModel, WholeModel
from autofit.memory.limits import refuse_unmodelled
from autofit.search.evaluate import refuse_length
from autofit.search.rules import LIBRARIES, Rule, Site, broken_rule, rules_for_given
from autofit.sources.profiles import Progress, profiles_and_refusals
from autofit.sources.rows import Case, Row, read_case
from autofit.spec.job import Model
from autofit.spec.libraries import software_here
from autofit.spec.profile import Regime, RegimeProfile
from autofit.timing import TimeModel

_CodePath = tuple[str, Regime, int]
"""Model, regime and tokens of a sequence."""
NUM_ROWS_A_TASK = 16
"""Rows that one process takes at a time: enough for what they share to count, few enough to spread over cores."""


class _Task(Struct, frozen=True, kw_only=True):
    """Rows that share a profile."""

    profile: RegimeProfile
    cases: dict[int, Case]
    """By number of the row; those that share most are neighbours."""
    replays: bool


def estimate_rows(
    rows: Iterable[Row | InputError],
    *,
    replays: bool = True,
    num_processes: int | None = None,
    allow_hub: bool = False,
    progress: Progress = lambda _name, _done, _total: None,
) -> Iterator[bytes]:
    """Estimate rows; yield one JSON object for each, in their order.

    That is the row's id and the objects `memory` and `time` of `autofit estimate --json`, or `refused` with the reason.

    Args:
        rows: see `autofit.sources.rows`; an error stands for a row that could not be read.
        replays: whether each row's allocations go through the allocator's policy, for `peak_reserved_bytes`.
        num_processes: that replay at the same time; None: one for each core.
        allow_hub: whether a config.json may be downloaded.
        progress: called with (model, regimes traced, regimes in all) while something is traced.
    """
    read = [_read(row, allow_hub=allow_hub) for row in rows]
    answers = {number: answer for number, answer in enumerate(read) if isinstance(answer, bytes)}
    cases = {number: case for number, case in enumerate(read) if isinstance(case, Case)}
    profiles, refusals = _profiles(cases.values(), progress)
    for number, case in cases.items():
        key = _key(case.model), case.regime, case.workload.sequence_tokens
        if key in refusals:
            answers[number] = _refused(case.id, refusals[key])
    todo = {number: case for number, case in cases.items() if number not in answers}
    yield from _in_order(answers, _estimated(list(_tasks(todo, profiles, replays=replays)), num_processes), len(read))


def read_rows(content: bytes) -> Iterator[Row | InputError]:
    """Read JSON lines; empty ones are left out, and one that is no object is an error in its place."""
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            yield InputError(f"line {number} is not JSON: {error}")
            continue
        yield row if isinstance(row, dict) else InputError(f"line {number} is not a JSON object.")


def _read(row: Row | InputError, *, allow_hub: bool) -> Case | bytes:
    if isinstance(row, InputError):
        return _refused(None, row)
    try:
        case = read_case(row, allow_hub=allow_hub)
        _refuse_impossible(case)
    except Exception as error:  # noqa: BLE001 - a row of the wrong kinds must not lose the others
        return _refused(row.get("id"), error)
    return case


def _refuse_impossible(case: Case) -> None:
    """Refuse what is not modelled, and what a library refuses to run in a Trainer; a loop of one's own may do it."""
    refuse_unmodelled(case.configuration)
    site = Site(cluster=case.cluster, config=case.model.config)
    rule = broken_rule(case.configuration, site, _rules_here())
    if rule is not None and not case.configuration.keeps_outputs:
        raise InputError(f"{rule.reason} ({rule.name}: {rule.library} {rule.releases}).", to_fix="correct the row")


@lru_cache(maxsize=1)
def _rules_here() -> tuple[Rule, ...]:
    """Rules of the releases that are traced; what is not installed is taken to be current."""
    return rules_for_given(software_here(LIBRARIES, trains_here=False))


def _refused(row_id: Any, error: Exception) -> bytes:
    reason = error.message if isinstance(error, AutofitError) else f"{type(error).__name__}: {error}"
    return b'{"id":%b,"refused":%b}' % (_echoed(row_id), json.dumps(reason).encode())


def _echoed(row_id: Any) -> msgspec.Raw:
    """Write an id as JSON, whatever it is."""
    try:
        return msgspec.Raw(json.dumps(row_id, separators=(",", ":"), allow_nan=False).encode())
    except (ValueError, RecursionError):
        return msgspec.Raw(b"null")


def _key(model: Model) -> str:
    """Tell models apart by name and content."""
    return f"{model.name} {json.dumps(model.config, sort_keys=True, default=str)}"


def _profiles(
    cases: Iterable[Case], progress: Progress
) -> tuple[dict[_CodePath, RegimeProfile], dict[_CodePath, Exception]]:
    """Look up or trace every code path, those of one model together."""
    models: dict[str, Model] = {}
    regimes: dict[tuple[str, int], dict[Regime, None]] = defaultdict(dict)
    for case in cases:
        models[_key(case.model)] = case.model
        regimes[_key(case.model), case.workload.sequence_tokens][case.regime] = None
    found: dict[_CodePath, RegimeProfile] = {}
    refused: dict[_CodePath, Exception] = {}
    for (key, tokens), wanted in sorted(regimes.items(), key=lambda item: item[0]):  # each model's file is read once
        try:
            traced, refusals = profiles_and_refusals(models[key], tuple(wanted), tokens, progress=progress)
        except Exception as error:  # noqa: BLE001 - what goes wrong with one model must not lose the others
            refused |= {(key, regime, tokens): error for regime in wanted}
            continue
        found |= {(key, regime, tokens): profile for regime, profile in traced.items()}
        refused |= {(key, regime, tokens): error for regime, error in refusals.items()}
    return found, refused


def _tasks(cases: Mapping[int, Case], profiles: Mapping[_CodePath, RegimeProfile], *, replays: bool) -> Iterator[_Task]:
    groups: dict[int, list[int]] = defaultdict(list)
    shared: dict[int, RegimeProfile] = {}
    for number, case in cases.items():
        profile = profiles[_key(case.model), case.regime, case.workload.sequence_tokens]
        shared[id(profile)] = profile
        groups[id(profile)].append(number)
    for key, numbers in groups.items():
        numbers.sort(key=lambda number: _shares(cases[number]))
        for first in range(0, len(numbers), NUM_ROWS_A_TASK):
            chosen = numbers[first : first + NUM_ROWS_A_TASK]
            yield _Task(profile=shared[key], cases={number: cases[number] for number in chosen}, replays=replays)


def _shares(case: Case) -> tuple[int, str, int]:
    """Order rows so that neighbours share lengths, then configurations; of those the smallest device comes first."""
    return case.workload.sequence_tokens, repr(case.configuration), case.cluster.device.memory_bytes


def _estimated(tasks: Sequence[_Task], num_processes: int | None) -> Iterator[dict[int, bytes]]:
    workers = min(num_processes or len(os.sched_getaffinity(0)), len(tasks))
    if workers < 2 or not tasks[0].replays:
        yield from map(_estimate, tasks)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        yield from pool.map(_estimate, tasks)


def _estimate(task: _Task) -> dict[int, bytes]:
    """Estimate the rows of one task."""
    answers: dict[int, bytes] = {}
    whole: WholeModel | None = None
    for tokens, numbers in groupby(task.cases, key=lambda number: task.cases[number].workload.sequence_tokens):
        cases = {number: task.cases[number] for number in numbers}
        batches = sorted({case.configuration.per_device_train_batch_size for case in cases.values()})
        try:
            refuse_length(task.profile, tokens)
            model = MemoryModel(task.profile, tokens, batches, whole=whole)
            whole = model.whole
        except Exception as error:  # noqa: BLE001 - as below
            answers |= {number: _refused(case.id, error) for number, case in cases.items()}
            continue
        answers |= {number: _answer(case, model, task) for number, case in cases.items()}
    return answers


def _answer(case: Case, model: MemoryModel, task: _Task) -> bytes:
    try:
        memory = model.estimate(case.configuration, case.cluster, replays=task.replays)
        time = TimeModel(task.profile, case.cluster, case.workload).time(case.configuration)
    except Exception as error:  # noqa: BLE001 - what goes wrong with one row must not lose the others
        return _refused(case.id, error)
    return msgspec.json.encode({"id": _echoed(case.id), "memory": memory, "time": time})


def _in_order(known: dict[int, bytes], parts: Iterator[dict[int, bytes]], num_rows: int) -> Iterator[bytes]:
    """Yield each row's answer as soon as it and all before it are there."""
    for number in range(num_rows):
        while number not in known:
            known |= next(parts)
        yield known.pop(number)
