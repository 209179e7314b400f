"""The file of remembered runs: one record a line, appended whole, and safe with several runs at once."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from autofit.calibrate.records import RunRecord, decode, encode
from autofit.errors import InputError
from autofit.files import replace_text
from autofit.spec.calibration import Calibration, calibrated_device_name, plain_versions
from autofit.spec.hardware import Device

RUNS_FILE = "runs.jsonl"
CALIBRATION_SCHEMA_VERSION = 1


class BrokenLine(Struct, frozen=True, kw_only=True):
    """A line of the store that is no record of this release; it stays where it is."""

    number: int
    reason: str


class Stored(Struct, frozen=True, kw_only=True):
    """What the store holds."""

    path: Path
    records: tuple[RunRecord, ...]
    """In the order in which they were written."""
    broken: tuple[BrokenLine, ...]


def store_path(cache: Path) -> Path:
    """Return the file of remembered runs in the user's cache."""
    return cache / RUNS_FILE


def append(path: Path, records: Sequence[RunRecord]) -> None:
    """Append records in one write, under a lock; a line that a dying writer left unfinished is ended first.

    Raises:
        OSError: the file cannot be written.
    """
    text = b"".join(encode(record) + b"\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        whole = text if _ends_a_line(file.fileno()) else b"\n" + text
        written = file.write(whole)
        if written < len(whole):
            raise OSError(f"the disk is full: {written} of {len(whole)} bytes were written to {path}")


def _ends_a_line(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"


def read(path: Path) -> Stored:
    """Read all that can be read; each other line is named, and none hides the rest.

    Raises:
        OSError: the file is there and cannot be read.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    records: list[RunRecord] = []
    broken: list[BrokenLine] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            broken.append(BrokenLine(number=number, reason=str(error)))
    return Stored(path=path, records=tuple(records), broken=tuple(broken))


def new_ones(known: Sequence[RunRecord], given: Sequence[RunRecord]) -> tuple[RunRecord, ...]:
    """Return the given records that are not known yet, each once."""
    ids = {record.id for record in known}
    return tuple({record.id: record for record in given if record.id not in ids}.values())


class _Calibrations(Struct, frozen=True, kw_only=True):
    """The content of calibration.json."""

    schema_version: int
    calibrations: tuple[Calibration, ...]


def write_calibrations(path: Path, calibrations: Sequence[Calibration]) -> None:
    """Write all calibrations of this machine's store in place of those that were there.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = _Calibrations(schema_version=CALIBRATION_SCHEMA_VERSION, calibrations=tuple(calibrations))
    replace_text(path, msgspec.json.format(msgspec.json.encode(content), indent=1).decode() + "\n")


def read_calibrations(path: Path) -> tuple[Calibration, ...]:
    """Read the calibrations that were fitted; none where nothing was.

    Raises:
        InputError: the file is there and cannot be read.
    """
    if not path.exists():
        return ()
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_Calibrations)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"the calibration {str(path)!r} cannot be read: {error}",
            to_fix="fit it anew with `autofit calibrate`, or leave it out with --no-calibration",
        ) from error
    return found.calibrations if found.schema_version == CALIBRATION_SCHEMA_VERSION else ()


def calibration_of(
    calibrations: Sequence[Calibration], device: Device, installed: Mapping[str, str]
) -> Calibration | None:
    """Choose the calibration of a device: that of the installed libraries; where none are installed, any of it.

    An estimate applies it only if its own profile was traced under the same libraries.
    """
    name = calibrated_device_name(device.name, device.kind)
    same = [each for each in calibrations if each.device_name == name]
    here = plain_versions(dict(installed))
    return next((each for each in same if each.versions == here or not installed), None)
