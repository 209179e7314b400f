"""How a finished launch is judged, evidence by evidence."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from autofit.launch.evidence import Evidence
from autofit.launch.verdict import judge
from autofit.spec.event import Event

TRAINED = Event(kind="verified", rank=0, seconds=1.0)
OUT_OF_MEMORY = Event(
    kind="out_of_memory", rank=1, seconds=3.0, detail={"error": "OutOfMemoryError", "message": "CUDA out of memory."}
)
CONNECTION_LOST = Event(
    kind="failed", rank=0, seconds=2.0, detail={"error": "RuntimeError", "message": "Connection closed by peer"}
)
A_BUG = Event(kind="failed", rank=1, seconds=1.5, detail={"error": "KeyError", "message": "'x'", "where": "train.py:3"})
MISMATCH = (
    Event(kind="mismatch", rank=0, seconds=1.0, detail={"checks": [["optim", "adamw_8bit", "SGD"]]}),
    Event(kind="failed", rank=0, seconds=1.1, detail={"exit_code": 78}),
)
FINISHED = tuple(
    Event(kind=kind, rank=rank, seconds=4.0, detail={"pid": 7}) for kind in ("started", "finished") for rank in (0, 1)
)
REPORT = """
Failures:
  rank      : 1 (local_rank: 1)
  exitcode  : {peer} (pid: 2)
Root Cause (first observed failure):
  rank      : 0 (local_rank: 0)
  exitcode  : {root} (pid: 1)
"""

CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "all ranks finished": ({"exit_code": 0, "events": (TRAINED,)}, "none", "finished"),
    "a process that dies while it shuts down": ({"events": (TRAINED, *FINISHED)}, "none", "after that a process died"),
    "the same, where it trained otherwise than planned": (
        {"events": (MISMATCH[0], *FINISHED)},
        "none",
        "after that a process died",
    ),
    "one rank that dies before its script ends": (
        {"events": (TRAINED, *FINISHED[:-1])},
        "script_failed",
        "exit code",
    ),
    "a script that never trains": ({"exit_code": 0}, "plan_not_in_effect", "without training"),
    "the user's Ctrl-C outweighs all": (
        {"events": (OUT_OF_MEMORY,), "interrupted_by": signal.SIGINT},
        "interrupted",
        "SIGINT",
    ),
    "one rank's lack of memory outweighs its peers' earlier errors": (
        {"events": (CONNECTION_LOST, OUT_OF_MEMORY)},
        "out_of_memory",
        "rank 1",
    ),
    "a mismatch stops the ladder": ({"events": MISMATCH}, "plan_not_in_effect", "planned adamw_8bit, in effect SGD"),
    "a bug is the first failure by the clock": ({"events": (A_BUG, CONNECTION_LOST)}, "script_failed", "train.py:3"),
    "sys.exit of the script": (
        {"events": (Event(kind="failed", rank=0, seconds=1.0, detail={"exit_code": 3}),)},
        "script_failed",
        "exited with 3",
    ),
    "the host's OOM killer took the first rank": (
        {"events": (CONNECTION_LOST,), "log_tail": REPORT.format(peer=-15, root=-9)},
        "out_of_memory",
        "signal 9",
    ),
    "torchrun killed a peer that hung": (
        {"events": (A_BUG,), "log_tail": REPORT.format(peer=-9, root=1)},
        "script_failed",
        "KeyError",
    ),
    "the host's OOM killer took the launcher": ({"exit_code": -9}, "out_of_memory", "signal 9"),
    "a single process was killed": (
        {"log_tail": "CalledProcessError: Command died with <Signals.SIGKILL: 9>."},
        "out_of_memory",
        "signal 9",
    ),
    "only the log tells of the allocator": (
        {"log_tail": "terminate called after throwing an instance of 'std::bad_alloc'"},
        "out_of_memory",
        "std::bad_alloc",
    ),
    "an event outweighs the log's text": (
        {"events": (A_BUG,), "log_tail": "warning: CUDA out of memory was caught and handled"},
        "script_failed",
        "KeyError",
    ),
    "nothing is known": ({"exit_code": 7}, "script_failed", "exit code 7"),
}


@pytest.mark.parametrize("name", CASES)
def test_verdict(name: str) -> None:
    """Each kind of evidence leads to its verdict, and the reason says what was seen."""
    given, failure, reason = CASES[name]
    verdict = judge(Evidence(**{"exit_code": 1, "events": (), "log_tail": ""} | given))
    assert verdict.failure == failure
    assert reason in verdict.reason
