"""The file of runs: nothing is lost by a broken line, by two writers, or by a foreign file."""

from __future__ import annotations

import json
import subprocess
import sys

import msgspec
import pytest
from msgspec import structs

from autofit.calibrate.records import (
    Ending,
    MeasuredPhase,
    decode,
    encode,
    export_text,
    import_text,
    phase_outcomes,
    record_of,
)
from autofit.calibrate.store import append, calibration_of, new_ones, read
from autofit.errors import InputError
from autofit.spec.calibration import Calibration, Correction
from autofit.spec.event import Event
from tests.calibrate.some_records import VERSIONS, a_record
from tests.plans import A100, CPU_RANK, a_plan


def test_what_was_appended_is_read_back(tmp_path):
    """Two appends, in a folder that was not there: all records, in order."""
    path = tmp_path / "new" / "runs.jsonl"
    append(path, [a_record(1)])
    append(path, [a_record(2), a_record(3)])
    assert read(path).records == (a_record(1), a_record(2), a_record(3))
    assert not read(path).broken


def test_broken_lines_hide_nothing_and_are_named(tmp_path):
    """Half a line of a writer that died, bytes that are no text, and another schema: three named, all others read."""
    path = tmp_path / "runs.jsonl"
    append(path, [a_record(1)])
    with path.open("ab") as file:
        file.write(b'\xff\xfe\n{"schema_version": 99}\n' + encode(a_record(2))[:100])
    append(path, [a_record(3)])
    stored = read(path)
    assert stored.records == (a_record(1), a_record(3))
    assert [line.number for line in stored.broken] == [2, 3, 4]


def test_a_record_from_before_phases_were_kept_is_read(tmp_path):
    """It has no phase; every figure that it has is as it was."""
    line = json.loads(encode(a_record(1)))
    del line["in_effect"], line["predicted"]["run_phases_bytes"], line["predicted"]["batches"]
    del line["ranks"][0]["phases"]
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(line) + "\n")
    (record,) = read(path).records
    assert record == a_record(1)
    assert (record.phases, record.in_effect) == ((), True)


def test_phases_compare_where_they_are_of_the_same_batch():
    """Of the rank that held most; a phase no rank had is left out, one on another batch has no error, nor has one that
    was not predicted, and what lies between steps is not shown.
    """
    ranks = [
        structs.replace(a_record(1).ranks[0], rank=rank, phases=phases)
        for rank, phases in enumerate(
            [
                {"loading": MeasuredPhase(allocated_bytes=100), "between_steps": MeasuredPhase(allocated_bytes=1)},
                {
                    "loading": MeasuredPhase(allocated_bytes=90),
                    "evaluation": MeasuredPhase(allocated_bytes=50, rows=8, row_tokens=64),
                    "first_step": MeasuredPhase(allocated_bytes=80, rows=2, row_tokens=64),
                    "steady_steps": MeasuredPhase(allocated_bytes=80, rows=2, row_tokens=64),
                },
            ]
        )
    ]
    predicted = {"loading": 101, "first_step": 88, "evaluation": 40, "saving": 70}
    found = {
        each.phase: each
        for each in phase_outcomes(predicted, ranks, dict.fromkeys(("first_step", "evaluation"), (2, 64)))
    }
    assert list(found) == ["loading", "first_step", "steady_steps", "evaluation"]
    assert found["loading"].error_fraction == pytest.approx(0.01)
    assert found["first_step"].error_fraction == pytest.approx(0.1)
    assert (found["evaluation"].error_fraction, found["steady_steps"].error_fraction) == (None, None)


WRITER = """
import sys
from pathlib import Path
from autofit.calibrate.store import append
from tests.calibrate.some_records import a_record
first = int(sys.argv[2])
for number in range(first, first + 100):
    append(Path(sys.argv[1]), [a_record(number), a_record(1000 + number)])
"""


def test_two_runs_at_once_lose_nothing(tmp_path):
    """Two processes that append at the same time leave every record whole."""
    path = tmp_path / "runs.jsonl"
    commands = [[sys.executable, "-c", WRITER, path, str(first)] for first in (0, 100)]
    for writer in [subprocess.Popen(command) for command in commands]:
        assert writer.wait(timeout=60) == 0
    stored = read(path)
    assert not stored.broken
    expected = {*range(200), *range(1000, 1200)}
    assert {int(record.id, 16) for record in stored.records} == expected
    assert len(stored.records) == len(expected)


def test_records_are_shared_whole_and_once(tmp_path):
    """What is exported is imported unchanged; what is known already is not added again."""
    records = (a_record(1), a_record(2))
    given = import_text(export_text(records).encode(), origin="shared.json")
    assert given == records
    assert new_ones([a_record(1)], [*given, *given]) == (a_record(2),)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"id": "../../etc"}, "id"),
        ({"num_devices": -1}, "num_devices"),
        ({"failure": 3}, "failure"),
        ({"architecture": "x" * 1000}, "architecture"),
        ({"ranks": [{"rank": 0}]}, "ranks"),
        ({"schema_version": 2}, "schema_version"),
    ],
)
def test_an_import_is_checked_and_all_or_nothing(change, complaint):
    """A record with a wrong field is refused with its number and the field's name, and so is the whole file."""
    document = json.loads(export_text([a_record(1), a_record(2)]))
    document["records"][1] |= change
    with pytest.raises(InputError, match="record 2 of shared") as caught:
        import_text(json.dumps(document).encode(), origin="shared.json")
    assert complaint in caught.value.message


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"[]", b"{}", b'{"records": 3}', b'{"schema_version": 7, "records": []}']
)
def test_what_is_no_export_is_refused(text):
    """Anything else is an InputError with what to do."""
    with pytest.raises(InputError) as caught:
        import_text(text, origin="shared.json")
    assert caught.value.to_fix


def test_a_record_holds_no_path_and_no_private_name():
    """Script, folders, host and user are nowhere in it; a model in a folder is its architecture alone."""
    plan = a_plan(model_name="/home/jane/secret-model", script="/home/jane/train.py")
    event = Event(kind="memory", rank=0, seconds=0.0, detail={"peak_bytes": 5, "num_steps": 2})
    record = record_of(
        plan,
        [event, Event(kind="saved", rank=0, seconds=0.0, detail={"folder": "/home/jane/out"})],
        Ending(rung=0, failure="none"),
        record_id="0" * 16,
        ended_at="2026-11-26T12:00:00Z",
        autofit_version="0.1.0",
    )
    assert b"jane" not in encode(record)
    assert (record.model, record.architecture, record.device) == (None, "LlamaForCausalLM", "CPU")
    assert record.ranks[0].peak_allocated_bytes == 5
    assert decode(encode(record)) == record


def test_a_calibration_is_that_of_the_device_and_the_libraries():
    """Another device or release has none; a build's name (+cpu) is no other release; CPU ranks share one."""

    def fitted(device_name):
        corrections = {name: Correction() for name in ("static", "per_token", "time")}
        return Calibration(device_name=device_name, versions=VERSIONS, num_runs=1, **corrections)

    known = (fitted("A100-SXM-80G"), fitted("CPU"))
    assert calibration_of(known, A100, {"torch": "2.13.0+cpu", "transformers": "5.23.0"}) == known[0]
    assert calibration_of(known, A100, {"torch": "2.14.0", "transformers": "5.23.0"}) is None
    assert calibration_of(known, CPU_RANK, VERSIONS) == known[1]
    assert calibration_of(known[1:], A100, VERSIONS) is None


def test_a_record_of_another_release_is_no_record():
    """A line whose schema is another is not taken for one of this release."""
    with pytest.raises(msgspec.DecodeError):
        decode(encode(a_record(1)).replace(b'"schema_version":1', b'"schema_version":2'))
