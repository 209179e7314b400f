"""Profiles by architecture, regime and library versions: shipped, cached, or traced in a process of their own."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import lzma
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import msgspec

from autofit.errors import InputError
from autofit.files import user_cache_folder
from autofit.search.solve import required_regimes
from autofit.spec.hardware import Cluster
from autofit.spec.job import Job, Model
from autofit.spec.libraries import installed_versions
from autofit.spec.profile import PROFILE_SCHEMA_VERSION, ProfileHead, ProfileSet, Regime, RegimeProfile, holds_for

SHIPPED_FOLDER = Path(__file__).parent / "data" / "profiles"
IRRELEVANT_KEYS = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype"})
"""Of a config.json: they name the model or its checkpoint and change nothing in a step."""
MAX_TRACERS = 4
Progress = Callable[[str, int, int], None]
Pack = tuple[RegimeProfile, ...]
"""Profiles of one architecture; of a regime as many as there are ranges of lengths with a code path of their own."""


def cache_folder() -> Path:
    """Where traced profiles are kept."""
    return user_cache_folder() / "profiles"


def architecture_key(config: dict[str, Any]) -> str:
    """Hash what of a config.json changes a step."""
    relevant = {key: value for key, value in config.items() if key not in IRRELEVANT_KEYS}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()[:16]


def pack_name(config: dict[str, Any], versions: dict[str, str]) -> str:
    """File name of all profiles of one architecture under one set of library versions."""
    stack = hashlib.sha256(json.dumps([PROFILE_SCHEMA_VERSION, versions], sort_keys=True).encode()).hexdigest()[:12]
    return f"{architecture_key(config)}-{stack}.json.xz"


def read_pack(path: Path) -> Pack:
    """Read a file of profiles; a missing or unreadable one holds none (it is a cache, and is traced anew)."""
    try:
        return tuple(read() for _, read in _stored(path))
    except msgspec.DecodeError:
        return ()


Stored = tuple[ProfileHead, Callable[[], RegimeProfile]]
"""A stored profile by its head; the rest is decoded when it is asked for, which takes ten times as long."""


def _stored(path: Path) -> tuple[Stored, ...]:
    """List what a file holds; nothing where it is missing or unreadable."""
    try:
        return _listed(path, path.stat().st_mtime_ns)
    except (OSError, EOFError, lzma.LZMAError, msgspec.DecodeError):
        return ()


@lru_cache(maxsize=16)
def _listed(path: Path, _written_at: int) -> tuple[Stored, ...]:
    texts = msgspec.json.decode(lzma.decompress(path.read_bytes()), type=tuple[msgspec.Raw, ...])
    heads = map(msgspec.json.Decoder(ProfileHead).decode, texts)
    return tuple(
        (head, cache(partial(msgspec.json.decode, text, type=RegimeProfile)))
        for head, text in zip(heads, texts, strict=True)
        if head.schema_version == PROFILE_SCHEMA_VERSION
    )


def write_pack(path: Path, profiles: Pack) -> None:
    """Write a file of profiles beside and rename it, so that a reader never sees half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = lzma.compress(msgspec.json.encode(profiles))
    handle, beside = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(beside).replace(path)
    finally:
        Path(beside).unlink(missing_ok=True)


def merged(kept: Pack, added: Iterable[RegimeProfile]) -> Pack:
    """Put profiles into a pack, each in place of the one of the same regime and lengths."""
    by_path = {
        (profile.regime, profile.min_sequence_tokens, profile.max_sequence_tokens, profile.multiple_tokens): profile
        for profile in (*kept, *added)
    }
    return tuple(by_path.values())


def stored_profiles(model: Model, regimes: Sequence[Regime], sequence_tokens: int) -> ProfileSet:
    """Look regimes up among the cached and the shipped profiles, for sequences of a length.

    Where the libraries are not installed, a shipped profile of any versions is taken: it names the versions that it
    holds for, and so does the plan.
    """
    name = pack_name(model.config, installed_versions())
    packs = [_stored(cache_folder() / name), _stored(SHIPPED_FOLDER / name)]
    if not can_trace():
        packs += map(_stored, sorted(SHIPPED_FOLDER.glob(f"{architecture_key(model.config)}-*.json.xz")))
    wanted, found = dict.fromkeys(regimes), {}
    for head, read in sorted(itertools.chain.from_iterable(packs), key=lambda each: -each[0].multiple_tokens):
        if head.regime in wanted and head.regime not in found and holds_for(head, sequence_tokens):
            with suppress(msgspec.DecodeError):
                found[head.regime] = read()
    return {regime: found[regime] for regime in wanted if regime in found}


def can_trace() -> bool:
    """Whether the libraries that a trace runs are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers", "peft"))


def obtain_profiles(job: Job, cluster: Cluster, *, progress: Progress) -> ProfileSet:
    """Return a profile for every regime that the search may need, tracing those that are not stored.

    Args:
        job: the model and what the user restricts.
        cluster: decides whose kernels are imitated, and which regimes can occur.
        progress: called with (what is being traced, profiles done, profiles in all).

    Raises:
        InputError: a profile is missing and the libraries to trace it are not installed, or the model cannot be traced.
    """
    tokens = job.workload.sequence_tokens
    return profiles_for(job.model, required_regimes(job, cluster), tokens, progress=progress)


def profiles_for(model: Model, regimes: Sequence[Regime], sequence_tokens: int, *, progress: Progress) -> ProfileSet:
    """Return a profile for each regime; see `obtain_profiles`."""
    found, refused = profiles_and_refusals(model, regimes, sequence_tokens, progress=progress)
    for refusal in refused.values():
        raise refusal
    return found


def profiles_and_refusals(
    model: Model, regimes: Sequence[Regime], sequence_tokens: int, *, progress: Progress
) -> tuple[ProfileSet, dict[Regime, InputError]]:
    """Return a profile for each regime that has one or can be traced, and why the others cannot be."""
    found = stored_profiles(model, regimes, sequence_tokens)
    missing = [regime for regime in regimes if regime not in found]
    if not missing:
        return found, {}
    if not can_trace():
        refusal = InputError(
            f"no profile of {model.name} is stored, and the libraries to trace one are not installed.",
            to_fix="pip install 'autofit-launcher[trace]'",
            hint="`autofit models` lists the models whose profiles are shipped",
        )
        return found, dict.fromkeys(missing, refusal)
    answers = dict(_trace_all(model, missing, sequence_tokens, progress))
    traced = {regime: answer for regime, answer in answers.items() if isinstance(answer, RegimeProfile)}
    refused = {regime: answer for regime, answer in answers.items() if isinstance(answer, InputError)}
    if traced:
        path = cache_folder() / pack_name(model.config, installed_versions())
        _try_to_cache(path, merged(read_pack(path), traced.values()))
    return {**found, **traced}, refused


def _try_to_cache(path: Path, profiles: Pack) -> None:
    try:
        write_pack(path, profiles)
    except OSError as error:
        sys.stderr.write(f"autofit: profiles are not cached: {error}\n")


def _trace_all(
    model: Model, regimes: Sequence[Regime], sequence_tokens: int, progress: Progress
) -> Iterator[tuple[Regime, RegimeProfile | InputError]]:
    """Trace in as many processes as there are cores, up to a few; answers come as they are ready."""
    from concurrent.futures import ThreadPoolExecutor  # as long to import as profiles take to be read

    workers = max(1, min(MAX_TRACERS, os.cpu_count() or 1, len(regimes)))
    shares = [regimes[n::workers] for n in range(workers)]
    progress(model.name, 0, len(regimes))
    done = 0
    with ThreadPoolExecutor(workers) as pool:
        answers = pool.map(lambda share: _answers(model, share, sequence_tokens), shares)
        for share, profiles in zip(shares, answers, strict=True):
            done += len(profiles)
            progress(model.name, done, len(regimes))
            yield from zip(share, profiles, strict=True)


def _answers(model: Model, regimes: Sequence[Regime], sequence_tokens: int) -> list[RegimeProfile | InputError]:
    """Trace regimes in one process; where it ends before it has answered, each in one of its own."""
    try:
        return answers_of_subprocess(model, regimes, sequence_tokens)
    except InputError as error:
        if len(regimes) == 1:
            return [error]
    return [answer for regime in regimes for answer in _answers(model, [regime], sequence_tokens)]


def trace_in_subprocess(model: Model, regimes: Sequence[Regime], sequence_tokens: int) -> list[RegimeProfile]:
    """Trace regimes in one process, so that this one imports no torch.

    Raises:
        InputError: the model cannot be traced.
    """
    answers = answers_of_subprocess(model, regimes, sequence_tokens)
    for answer in answers:
        if isinstance(answer, InputError):
            raise answer
    return [answer for answer in answers if isinstance(answer, RegimeProfile)]


def answers_of_subprocess(
    model: Model, regimes: Sequence[Regime], sequence_tokens: int
) -> list[RegimeProfile | InputError]:
    """Trace regimes in one process; of each, the profile or why it cannot be traced.

    Raises:
        InputError: the process ended before it had answered.
    """
    request = msgspec.json.encode(
        {"model": model.name, "config": model.config, "regimes": regimes, "sequence_tokens": sequence_tokens}
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run(
        [sys.executable, "-m", "autofit.profile"], input=request, capture_output=True, env=environment, check=False
    )
    answers = [_read_answer(line) for line in child.stdout.splitlines()]
    if child.returncode or len(answers) != len(regimes):
        last = child.stderr.decode(errors="replace").strip().splitlines()[-5:]
        raise InputError(
            f"{model.name} could not be traced:\n" + "\n".join(last),
            to_fix="check the installation with `autofit doctor`",
        )
    return answers


def _read_answer(line: bytes) -> RegimeProfile | InputError:
    answer = msgspec.json.decode(line)
    if "error" in answer:
        return InputError(answer["error"]["message"], to_fix=answer["error"]["to_fix"])
    return msgspec.convert(answer, RegimeProfile)
