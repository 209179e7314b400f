"""Judges a finished launch: events first, then exit signals, and the text of the log last."""

from __future__ import annotations

import re
import signal
from typing import Literal

from msgspec import Struct

from autofit.launch.evidence import Evidence
from autofit.spec.event import MISMATCH_EXIT_CODE, Event

Failure = Literal["none", "interrupted", "out_of_memory", "plan_not_in_effect", "script_failed"]

OUT_OF_MEMORY_TEXTS = (
    "CUDA out of memory",
    "OutOfMemoryError",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "cudaErrorMemoryAllocation",
    "Cuda failure 2 'out of memory'",
    "std::bad_alloc",
    "MemoryError",
)
"""What libraries print when memory runs out where no Python exception can be caught.

Source: accelerate/utils/memory.py, `should_reduce_batch_size`; the CUBLAS, NCCL and C++ ones from their own messages.
"""
KILLED = re.compile(r"exitcode\s*:\s*-9\b|<Signals\.SIGKILL: 9>")
"""How torchrun's report, or accelerate's for one process, says that a process got SIGKILL."""


class Verdict(Struct, frozen=True, kw_only=True):
    """Why a launch ended."""

    failure: Failure
    reason: str


def judge(evidence: Evidence) -> Verdict:
    """Decide why a launch ended, by the strongest evidence there is."""
    return (
        _judge_interruption(evidence)
        or _judge_success(evidence)
        or _judge_finished(evidence)
        or _judge_events(evidence)
        or _judge_signal(evidence)
        or _judge_failed_events(evidence)
        or _judge_log(evidence)
        or Verdict(failure="script_failed", reason=f"the launcher ended with exit code {evidence.exit_code}")
    )


def _judge_interruption(evidence: Evidence) -> Verdict | None:
    if evidence.interrupted_by is None:
        return None
    return Verdict(failure="interrupted", reason=f"stopped by {signal.Signals(evidence.interrupted_by).name}")


def _judge_success(evidence: Evidence) -> Verdict | None:
    """A script that ends well without ever training has not had the plan applied, which must not pass in silence."""
    if evidence.exit_code != 0:
        return None
    if not evidence.is_watched:
        return Verdict(failure="none", reason="the script ended well; it ran without hooks, so nothing was verified")
    if not any(event.kind in {"verified", "mismatch"} for event in evidence.events):
        return Verdict(
            failure="plan_not_in_effect",
            reason="the script ended without training a transformers Trainer, or a model that accelerate prepared, so "
            "the plan was never in effect",
        )
    return Verdict(failure="none", reason="every rank finished")


def _judge_finished(evidence: Evidence) -> Verdict | None:
    """A script that ended well on every rank has trained and saved, whatever its process does while it shuts down.

    Seen with gloo and DeepSpeed on CPU ranks: "terminate called without an active exception" after the last line.
    """
    started = {event.rank for event in evidence.events if event.kind == "started"}
    finished = {event.rank for event in evidence.events if event.kind == "finished"}
    was_checked = any(event.kind in {"verified", "mismatch"} for event in evidence.events)
    if not started or started != finished or not was_checked:
        return None
    died = f"a process died while it shut down, the launcher ended with exit code {evidence.exit_code}"
    return Verdict(failure="none", reason=f"every rank finished; after that {died}")


def _judge_events(evidence: Evidence) -> Verdict | None:
    """Look for what a rank said of itself. Any rank's lack of memory outweighs what it did to its peers."""
    for event in evidence.events:
        if event.kind == "out_of_memory":
            return Verdict(failure="out_of_memory", reason=_said(event))
    if any(event.kind == "failed" and event.detail.get("exit_code") == MISMATCH_EXIT_CODE for event in evidence.events):
        return Verdict(failure="plan_not_in_effect", reason=_mismatch(evidence.events))
    return None


def _judge_signal(evidence: Evidence) -> Verdict | None:
    """SIGKILL is what the host's OOM killer sends. Only the first failure counts: torchrun kills the peers itself."""
    _, _, root_cause = evidence.log_tail.rpartition("Root Cause (first observed failure)")
    if evidence.exit_code != -signal.SIGKILL and not KILLED.search(root_cause):
        return None
    return Verdict(
        failure="out_of_memory",
        reason="a rank was killed by signal 9, most often by the host's out-of-memory killer",
    )


def _judge_failed_events(evidence: Evidence) -> Verdict | None:
    """Take the first failure by the clock: later ones are most often its peers losing their connection."""
    for event in evidence.events:
        if event.kind == "failed":
            return Verdict(failure="script_failed", reason=_said(event))
    return None


def _judge_log(evidence: Evidence) -> Verdict | None:
    for text in OUT_OF_MEMORY_TEXTS:
        if text in evidence.log_tail:
            return Verdict(failure="out_of_memory", reason=f"the log says {text!r}")
    return None


def _said(event: Event) -> str:
    if "exit_code" in event.detail:
        return f"rank {event.rank}: the script exited with {event.detail['exit_code']!r}"
    where = f" ({event.detail['where']})" if event.detail.get("where") else ""
    return f"rank {event.rank}: {event.detail.get('error')}: {event.detail.get('message')}{where}"


def _mismatch(events: tuple[Event, ...]) -> str:
    """List the settings that were not in effect on the first rank that said so."""
    event = next(event for event in events if event.kind == "mismatch")
    settings = [f"{setting} planned {planned}, in effect {found}" for setting, planned, found in event.detail["checks"]]
    return f"rank {event.rank}: " + "; ".join(settings)
