"""What copies of a process work out is what the process would have worked out by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autofit.search.ahead import Ahead, num_usable_cores

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are copied on Linux alone")


def process_of(number: int) -> tuple[int, int]:
    """Return a number's square, and where it was worked out; there is none for a negative one."""
    if number < 0:
        raise ValueError(number)
    return number**2, os.getpid()


def children() -> str:
    """Return the processes that this one has begun and not waited for."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


@pytest.mark.parametrize("num_cores", [1, 2, 3, 9])
def test_copies_answer_all_but_the_first_share(num_cores: int) -> None:
    """Of seven questions this process is left a share as large as a copy's, rounded down; the others are answered."""
    before = children()
    with Ahead(process_of, [*range(7), 3], num_cores) as ahead:
        answers = [ahead.get(number) for number in range(7)]
    mine = 7 // num_cores
    assert answers[:mine] == [None] * mine
    assert [answer and answer[0] for answer in answers[mine:]] == [number**2 for number in range(mine, 7)]
    assert len({answer[1] for answer in answers if answer}) == min(num_cores - 1, 7 - mine)
    assert children() == before


def test_a_copy_that_fails_leaves_its_questions_to_the_process() -> None:
    """An error in a copy is no answer for all of its share; the other copy's share is answered."""
    with Ahead(process_of, [0, 1, -2, 3, -4, 5], 3) as ahead:
        assert ahead.get(-2) is ahead.get(-4) is None
        assert ahead.get(3) is not None


def test_copies_that_nobody_waits_for_end() -> None:
    """Stopping ends a copy that would work for a minute, at once."""
    before = children()
    with Ahead(time.sleep, [60.0, 61.0], 2):
        assert children() != before
    assert children() == before


def test_where_no_process_can_be_made_nothing_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that allows no further process leaves all to this one, and no pipe open."""

    def refused() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refused)
    opened = len([*Path("/proc/self/fd").iterdir()])
    with Ahead(process_of, range(7), 3) as ahead:
        assert [ahead.get(number) for number in range(7)] == [None] * 7
    assert len([*Path("/proc/self/fd").iterdir()]) == opened


def test_a_process_with_torch_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is one core to use where torch is loaded, and otherwise as many as the system lets the process have."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert num_usable_cores() == len(os.sched_getaffinity(0))
    monkeypatch.setitem(sys.modules, "torch", sys)
    assert num_usable_cores() == 1


def printed(command: list[str], cores: str, folder: Path) -> str:
    """Return what `autofit` prints as JSON where the system says that it may use some cores."""
    bound = f"import os; os.sched_getaffinity = lambda _: {cores}; from autofit.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", bound, *command, "--json"],
        env={**os.environ, "AUTOFIT_CACHE": str(folder)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout


JOB = ["--model", "meta-llama/Llama-3.1-8B", "--seq-len", "4096", "--global-batch", "64"]


@pytest.mark.parametrize(
    "command",
    [
        ["plan", *JOB, "--gpus", "8xA100-80G"],
        ["plan", *JOB, "--gpus", "1xRTX4090-24G", "--method", "lora", "--method", "qlora"],
        ["compare", *JOB, "--gpus", "2xA100-40G", "--gpus", "1xT4-16G", "--gpus", "4xL4-24G"],
    ],
    ids=["eight", "one", "compare"],
)
def test_more_cores_change_no_figure(command: list[str], tmp_path: Path) -> None:
    """What is printed is the same to the byte with one core, with three and with more than there are questions."""
    alone = printed(command, "{0}", tmp_path)
    assert "needed_bytes" in alone
    assert printed(command, "range(3)", tmp_path) == printed(command, "range(64)", tmp_path) == alone


def test_more_cores_explain_alike(tmp_path: Path) -> None:
    """What each value of a knob would need and cost is the same with one core and with three."""
    run = tmp_path / "run"
    printed(["plan", *JOB, "--gpus", "8xA100-80G", "-o", str(run)], "{0}", tmp_path)
    alone, shared = (printed(["explain", str(run / "plan.json")], cores, tmp_path) for cores in ("{0}", "range(3)"))
    assert json.loads(alone)["knobs"]
    assert shared == alone
