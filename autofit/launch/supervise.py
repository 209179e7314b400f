"""The ladder: run a rung in a new process, judge how it ended, and take the next one only if memory ran out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Struct

from autofit.launch.evidence import Evidence
from autofit.launch.verdict import Verdict, judge
from autofit.plan import Plan

Run = Callable[[int, Plan], Evidence]
"""Runs one rung to its end: (number, plan) -> what it left behind."""


class Attempt(Struct, frozen=True, kw_only=True):
    """One rung that was run."""

    number: int
    plan: Plan
    evidence: Evidence
    verdict: Verdict


def supervise(rungs: Sequence[Plan], run: Run, tell: Callable[[str], None]) -> tuple[Attempt, ...]:
    """Run rungs until one ends otherwise than by running out of memory; return all attempts, the decisive one last."""
    attempts: list[Attempt] = []
    for number, plan in enumerate(rungs):
        evidence = run(number, plan)
        attempts.append(Attempt(number=number, plan=plan, evidence=evidence, verdict=judge(evidence)))
        if attempts[-1].verdict.failure != "out_of_memory":
            break
        tell(_what_next(attempts[-1], is_last=number == len(rungs) - 1))
    return tuple(attempts)


def _what_next(attempt: Attempt, *, is_last: bool) -> str:
    next_step = "there is no further fallback" if is_last else f"starting fallback {attempt.number + 1}"
    return f"rung {attempt.number} ran out of memory ({attempt.verdict.reason}); {next_step}"
