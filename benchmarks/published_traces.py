"""Traces what rows of published measurements need: each code path once, kept as `autofit plan` keeps its own."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from msgspec import Struct

from autofit.sources.profiles import MAX_TRACERS, profiles_and_refusals, stored_profiles
from autofit.spec.job import Model
from autofit.spec.profile import Regime, RegimeProfile

Key = tuple[str, Regime, int]
TRACED_AT_ONCE = 8
"""Code paths after which what was traced is kept: enough for every core, few enough to lose little."""
Traced = dict[Key, RegimeProfile | str]
"""A profile, or why there is none."""


class CodePath(Struct, frozen=True, kw_only=True):
    """What one trace is of."""

    key: Key
    model: Model


def code_path(model: Model, regime: Regime, sequence_tokens: int) -> CodePath:
    """Name a code path, by what of the model decides it."""
    content = json.dumps(model.config, sort_keys=True, default=str)
    return CodePath(key=(content, regime, sequence_tokens), model=model)


def traces(paths: Iterable[CodePath]) -> Traced:
    """Look every code path up, or trace it: several models at a time, and those of one model and length together.

    What they are of, and how many are left, goes to stderr.
    """
    lengths: dict[str, dict[int, dict[Regime, Model]]] = defaultdict(lambda: defaultdict(dict))
    for path in paths:
        content, regime, tokens = path.key
        lengths[content][tokens][regime] = path.model
    with ThreadPoolExecutor(max(1, min(MAX_TRACERS, os.cpu_count() or 1))) as pool:
        number = count(1)
        answers = pool.map(
            lambda item: _of_model(item[0], item[1], f"{next(number)} of {len(lengths)}"), lengths.items()
        )
        return {key: answer for found in answers for key, answer in found.items()}


def _of_model(content: str, lengths: Mapping[int, Mapping[Regime, Model]], where: str) -> Traced:
    """Do so for one model, length by length: what one length was traced for may hold for the next."""
    found: Traced = {}
    for tokens, models in lengths.items():
        model = next(iter(models.values()))
        stored = stored_profiles(model, list(models), tokens)
        missing = [regime for regime in models if regime not in stored]
        answers: dict[Regime, RegimeProfile | str] = dict(stored)
        for done in range(0, len(missing), TRACED_AT_ONCE):
            left = f"{len(missing) - done} code paths, model {where}"
            print(f"tracing {model.name}, {tokens} tokens: {left}", file=sys.stderr, flush=True)
            answers |= _traced(model, missing[done : done + TRACED_AT_ONCE], tokens)
        found |= {(content, regime, tokens): answer for regime, answer in answers.items()}
    return found


def _traced(model: Model, regimes: Sequence[Regime], tokens: int) -> dict[Regime, RegimeProfile | str]:
    try:
        profiles, refused = profiles_and_refusals(model, regimes, tokens, progress=lambda *_: None)
    except Exception as error:  # noqa: BLE001 - whatever a library raises while it is traced is the rows' reason
        return dict.fromkeys(regimes, f"cannot be traced: {error}")
    return {**profiles, **{regime: error.message for regime, error in refused.items()}}
