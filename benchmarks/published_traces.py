"""Traces what rows of published measurements need: each code path once, kept as `autofit plan` keeps its own."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence

from msgspec import Struct

from autofit.sources.profiles import profiles_and_refusals, stored_profiles
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
    """Look every code path up, or trace it: those of one model and length together, on as many cores as there are.

    What they are of, and how many are left, goes to stderr.
    """
    groups: dict[tuple[str, int], dict[Regime, Model]] = defaultdict(dict)
    for path in paths:
        content, regime, tokens = path.key
        groups[content, tokens][regime] = path.model
    found: Traced = {}
    for number, ((content, tokens), models) in enumerate(groups.items(), 1):
        model = next(iter(models.values()))
        stored = stored_profiles(model, list(models), tokens)
        missing = [regime for regime in models if regime not in stored]
        answers: dict[Regime, RegimeProfile | str] = dict(stored)
        for done in range(0, len(missing), TRACED_AT_ONCE):
            where = f"{len(missing) - done} code paths left; {number} of {len(groups)} models and lengths"
            print(f"tracing {model.name}, {tokens} tokens: {where}", file=sys.stderr, flush=True)
            answers |= _traced(model, missing[done : done + TRACED_AT_ONCE], tokens)
        found |= {(content, regime, tokens): answer for regime, answer in answers.items()}
    return found


def _traced(model: Model, regimes: Sequence[Regime], tokens: int) -> dict[Regime, RegimeProfile | str]:
    try:
        profiles, refused = profiles_and_refusals(model, regimes, tokens, progress=lambda *_: None)
    except Exception as error:  # noqa: BLE001 - whatever a library raises while it is traced is the rows' reason
        return dict.fromkeys(regimes, f"cannot be traced: {error}")
    return {**profiles, **{regime: error.message for regime, error in refused.items()}}
