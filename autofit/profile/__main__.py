"""Traces regimes in a process of its own: a request on stdin, one JSON line for each profile on stdout.

Request: `{"model": str, "config": {...}, "regimes": [...], "sequence_tokens": int}`. Answers: a RegimeProfile, or
`{"error": {"message", "to_fix"}}`.
What libraries print goes to stderr.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import msgspec
from msgspec import Struct

from autofit.errors import AutofitError
from autofit.spec.profile import Regime, RegimeProfile


class TraceRequest(Struct, frozen=True, kw_only=True):
    """What to trace."""

    model: str
    config: dict[str, Any]
    regimes: tuple[Regime, ...]
    sequence_tokens: int
    """Of the sequences that are planned: windows of attention make the code path depend on it."""


def main() -> int:
    """Answer one request; the exit code is 0 unless the request itself cannot be read."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=TraceRequest)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from autofit.profile.trace import trace

    loops = False
    for regime in request.regimes:
        with contextlib.redirect_stdout(sys.stderr):
            answer = _answer(trace, request, regime, at_one_length=loops)
        loops = loops or (isinstance(answer, RegimeProfile) and answer.only_length is not None)
        answers.write(msgspec.json.encode(answer) + b"\n")
        answers.flush()
    return 0


def _answer(trace: Any, request: TraceRequest, regime: Regime, *, at_one_length: bool) -> Any:
    """Answer for one regime; where another was traced at one length, so is this one, without trying several."""
    tokens = request.sequence_tokens
    try:
        return trace(request.model, request.config, regime, sequence_tokens=tokens, at_one_length=at_one_length)
    except AutofitError as error:
        return {"error": {"message": error.message, "to_fix": error.to_fix}}
    except Exception as error:  # noqa: BLE001 - whatever a library raises while it is traced is the answer, not our crash
        message = f"{request.model} cannot be traced under {describe(regime)}: {type(error).__name__}: {error}"
        return {"error": {"message": message, "to_fix": "choose another method or attention, or report the model"}}


def describe(regime: Regime) -> str:
    """Name a regime in a few words."""
    words = [regime.method, regime.weights_dtype, f"autocast {regime.autocast}", regime.attention]
    return ", ".join([*words, "checkpointing"] if regime.gradient_checkpointing else words)


if __name__ == "__main__":
    sys.exit(main())
