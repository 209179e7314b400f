"""`--data`: from a path to the files that are trained on. Nothing outside that path is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from autofit.errors import InputError
from autofit.sources.dataset_arrow import ARROW, PARQUET
from autofit.sources.dataset_json import JSON
from autofit.sources.dataset_rows import Chunk, Format

FORMATS: dict[str, Format] = {
    ".jsonl": JSON,
    ".ndjson": JSON,
    ".jsonl.gz": JSON,
    ".json": JSON,
    ".json.gz": JSON,
    ".parquet": PARQUET,
}
_TO_GIVE = f"give a file ({', '.join(FORMATS)}), a folder of them, or one that datasets' save_to_disk wrote"
_SPLIT = re.compile(r"(?:^|[^a-z])(train|training|test|testing|validation|valid|val|dev|eval)(?:[^a-z]|$)")
"""Words by which `datasets` knows the split of a file. Source: datasets/data_files.py 5.2, SPLIT_KEYWORDS."""


class DatasetFiles(Struct, frozen=True, kw_only=True):
    """A data set on disk."""

    path: Path
    files: tuple[Path, ...]
    format: Format
    columns: tuple[str, ...]
    """As the schema names them; of JSON, those of the first row."""
    left_out: tuple[Path, ...] = ()
    """Files of other splits."""

    def total_bytes(self, columns: Sequence[str]) -> int:
        """Return what some columns of all rows take, about."""
        return self.format.total_bytes(self.files, columns)

    def chunks(self, columns: Sequence[str]) -> Iterator[Chunk]:
        """Read some columns of every file from the beginning.

        Raises:
            InputError: a file cannot be read to its end.
        """
        for file in self.files:
            yield from self.format.chunks(file, columns)


def open_dataset(text: str | Path) -> DatasetFiles:
    """Find out what a path is.

    Raises:
        InputError: it is nothing that is read here, holds no rows, or leads out of the folder.
    """
    path = Path(text).expanduser()
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError) as error:
        raise InputError(f"{str(text)!r} is no path: {error}.", to_fix=_TO_GIVE) from error
    if is_folder:
        return _open_folder(path)
    if not is_file:
        raise InputError(f"there is no data at {str(text)!r}.", to_fix=_TO_GIVE)
    known = _format(path)
    if known is None:
        raise InputError(f"{str(text)!r} is of no kind that is read here.", to_fix=_TO_GIVE)
    return _opened(path, (path,), known)


def _format(path: Path) -> Format | None:
    name = path.name.casefold()
    return next((found for ending, found in FORMATS.items() if name.endswith(ending)), None)


def _open_folder(folder: Path) -> DatasetFiles:
    if (folder / "dataset_dict.json").is_file():
        return _open_saved(_split_folder(folder), folder)
    if (folder / "state.json").is_file():
        return _open_saved(folder, folder)
    try:
        found = sorted(each for each in folder.iterdir() if _format(each) and each.is_file())
    except OSError as error:
        raise InputError(f"cannot read the folder {str(folder)!r}: {error.strerror}.", to_fix=_TO_GIVE) from error
    files, left_out = _training_split(found)
    formats = {each.name: each for file in files if (each := _format(file))}
    if not formats:
        raise InputError(f"the folder {str(folder)!r} has no file of a kind that is read here.", to_fix=_TO_GIVE)
    if len(formats) > 1:
        raise InputError(
            f"{str(folder)!r} holds files of several kinds: {', '.join(formats)}.", to_fix="give one of the files"
        )
    for file in files:
        _refuse_outside(file, folder)
    return _opened(folder, files, *formats.values(), left_out=left_out)


def _training_split(files: Sequence[Path]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Part the files that are trained on from those of other splits, by the words in their names.

    Raises:
        InputError: there are several splits, and none of them is for training.
    """
    splits = {file: match[1] if (match := _SPLIT.search(file.name.casefold())) else "" for file in files}
    if not any(split.startswith("train") for split in splits.values()):
        if len(set(splits.values())) > 1:
            names = ", ".join(file.name for file in files)
            raise InputError(f"which of these files is trained on is not clear: {names}.", to_fix="give one of them")
        return tuple(files), ()
    chosen = tuple(file for file, split in splits.items() if split.startswith("train"))
    return chosen, tuple(file for file in files if file not in chosen)


def _split_folder(folder: Path) -> Path:
    """Return the folder of the training split of a saved `DatasetDict`, or of its only one."""
    names = [str(name) for name in _read(folder / "dataset_dict.json", "splits", folder)]
    if "train" not in names and len(names) != 1:
        raise InputError(
            f"{str(folder)!r} holds the splits {', '.join(names) or '(none)'}; none of them is called train.",
            to_fix="give the folder of the one that is trained on",
        )
    return folder / ("train" if "train" in names else names[0])


def _open_saved(folder: Path, given: Path) -> DatasetFiles:
    """Open what `Dataset.save_to_disk` wrote: Arrow streams, which state.json lists in order.

    Source: datasets/arrow_dataset.py 5.2, Dataset.save_to_disk and load_from_disk.
    """
    _refuse_outside(folder, given)
    listed = _read(folder / "state.json", "_data_files", given)
    files = tuple(folder / str(each["filename"] if isinstance(each, dict) else each) for each in listed)
    for file in files:
        _refuse_outside(file, given)
        if not file.is_file():
            raise InputError(f"{str(folder)!r} lists {file.name!r}, which is not there.", to_fix="save the data anew")
    return _opened(given, files, ARROW)


def _read(file: Path, key: str, given: Path) -> list[object]:
    """Return a list that one of `datasets`' own files holds."""
    _refuse_outside(file, given)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise InputError(f"{str(file)!r} has no {key}, as datasets writes it.", to_fix="save the data anew")
    return found


def _refuse_outside(path: Path, folder: Path) -> None:
    """Read nothing but what the user named: a list or a link inside a folder can point anywhere."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"{str(path)!r} leads out of the folder that was given, to {str(path.resolve())!r}.",
            to_fix="give that path itself, if it is meant",
        )


def _opened(path: Path, files: tuple[Path, ...], known: Format, *, left_out: tuple[Path, ...] = ()) -> DatasetFiles:
    columns = known.columns(files)
    if not columns:
        raise InputError(f"{str(path)!r} holds no rows.", to_fix="give a data set with at least one row")
    return DatasetFiles(path=path, files=files, format=known, columns=columns, left_out=left_out)
