"""How far off a figure may be: intervals from the residuals of published runs, for each figure and kind of run.

Nothing is fitted. A kind of run is what decides the code path: method, attention kernel, sharded or not. Of a kind that
only one source has published, or few runs, nothing is known: then the widest that was seen of any kind is taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

from msgspec import Struct

from autofit.spec.profile import Regime

Figure = Literal["peak_allocated", "peak_reserved", "process"]
Kernel = Literal["eager", "efficient", "flash"]
FIGURES: tuple[Figure, ...] = ("peak_allocated", "peak_reserved", "process")
LEVEL = 0.9
"""Share of runs that an interval is to hold."""
MIN_RUNS = 5
"""Of fewer runs of one kind nothing is said: less than two thirds of further runs would lie between the extremes."""
MIN_SOURCES = 3
"""Runs of one source share machine, driver and releases, and say nothing about another's."""


class RunKind(Struct, frozen=True, kw_only=True):
    """What of a run decides how far off a prediction may be."""

    method: str
    attention: Kernel
    """The kernel: scores written out, torch's memory-efficient one, or flash attention."""
    is_sharded: bool
    """Whether several ranks share weights, gradients or state, or reduce gradients."""
    has_images: bool = False
    """Whether sequences hold images, of which no measured run was published."""


class Residual(Struct, frozen=True, kw_only=True):
    """One published figure beside its prediction."""

    source: str
    kind: RunKind
    figure: Figure
    ratio: float
    """Measured over predicted."""


class Interval(Struct, frozen=True, kw_only=True):
    """Between which ratios to a prediction a figure lies."""

    low: float
    high: float
    num_runs: int
    """Residuals that it comes from."""
    coverage: float
    """Share of further runs of the same sort that it holds, at least, if they are drawn as these were."""
    is_of_kind: bool
    """False where the kind of run was not published often enough, and all kinds stand in for it."""

    def around(self, num_bytes: int) -> tuple[int, int]:
        """Return the lower and the upper bound of a predicted figure, in bytes."""
        return int(num_bytes * self.low), -int(-num_bytes * self.high // 1)


def run_kind(regime: Regime, *, is_sharded: bool) -> RunKind:
    """Return the kind of run that a traced code path is."""
    efficient = regime.attention == "sdpa" and not regime.flash_kernel
    attention: Kernel = "eager" if regime.attention == "eager" else "efficient" if efficient else "flash"
    has_images = regime.image_tokens > 0
    return RunKind(method=regime.method, attention=attention, is_sharded=is_sharded, has_images=has_images)


@lru_cache(maxsize=64)
def interval(figure: Figure, kind: RunKind) -> Interval | None:
    """Return how far off a figure may be; None where no residual of it was ever published."""
    return interval_of(shipped(), figure, kind)


def interval_of(residuals: Iterable[Residual], figure: Figure, kind: RunKind) -> Interval | None:
    """Return what given residuals say of a figure; None where they have none of it."""
    chosen = [each for each in residuals if each.figure == figure]
    same = [each for each in chosen if each.kind == kind]
    if len(same) >= MIN_RUNS and len({each.source for each in same}) >= MIN_SOURCES:
        return _interval(same, is_of_kind=True)
    return _interval(chosen, is_of_kind=False) if chosen else None


def _interval(residuals: Sequence[Residual], *, is_of_kind: bool) -> Interval:
    """Order statistics: of n exchangeable residuals the k-th from either end are passed with probability 2k / (n + 1).

    k is the largest with which an interval keeps `LEVEL`; with fewer than 19 residuals there is none, and the extremes
    are taken, which hold (n - 1) / (n + 1). So are they where runs of other kinds have to stand in. The prediction
    itself is always inside.
    Source: Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2005 (conformal prediction).
    """
    ordered, num = sorted(each.ratio for each in residuals), len(residuals)
    rank = max(1, int((num + 1) * (1 - LEVEL) / 2 + 1e-9)) if is_of_kind else 1
    return Interval(
        low=min(1.0, ordered[rank - 1]),
        high=max(1.0, ordered[-rank]),
        num_runs=num,
        coverage=max(0.0, 1 - 2 * rank / (num + 1)),
        is_of_kind=is_of_kind,
    )


@lru_cache(maxsize=1)
def shipped() -> tuple[Residual, ...]:
    """Return the residuals that come with the package, as benchmarks/residuals.py wrote them."""
    text = resources.files("autofit.memory").joinpath("data", "residuals.json").read_text(encoding="utf-8")
    return residuals_of(json.loads(text))


def residuals_of(rows: Sequence[dict[str, Any]]) -> tuple[Residual, ...]:
    """Read rows of a source, a kind of run, and ratios by figure."""
    return tuple(
        Residual(source=row["source"], kind=RunKind(**row["kind"]), figure=figure, ratio=row["ratios"][figure])
        for row in rows
        for figure in FIGURES
        if figure in row["ratios"]
    )
