"""What copies of a process work out is what the process would have worked out by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from autofit.errors import InputError
from autofit.search.ahead import Ahead, num_usable_cores

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are copied on Linux alone")


def process_of(number: int) -> tuple[int, int]:
    """Return a number's square, and where it was worked out; a negative one is refused."""
    if number < 0:
        raise InputError(f"{number} is negative.", to_fix="give another")
    return number**2, os.getpid()


def children() -> str:
    """Return the processes that this one has begun and not waited for."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


def num_open_files() -> int:
    """Return how many files, pipes among them, this process has open."""
    return len([*Path("/proc/self/fd").iterdir()])


@pytest.mark.parametrize("num_cores", [2, 3, 9])
@pytest.mark.parametrize("asked", [range(7), range(6, -1, -1), [3, 0, 3, 6]], ids=str)
def test_every_question_is_answered_once_by_whoever_is_free(num_cores: int, asked: Sequence[int]) -> None:
    """In whatever order it is asked, each has its answer, and no process or pipe is left."""
    before, opened = children(), num_open_files()
    with Ahead(process_of, [*range(7), 3], num_cores) as ahead:
        answers = {number: ahead.get(number) for number in asked}
        assert ahead.get(7) is None
    assert {number: answer and answer[0] for number, answer in answers.items()} == {n: n**2 for n in asked}
    assert (children(), num_open_files()) == (before, opened)


def test_with_one_core_nothing_is_answered_or_copied() -> None:
    """All is left to whoever asks."""
    before = children()
    with Ahead(process_of, range(7), 1) as ahead:
        assert [ahead.get(number) for number in range(7)] == [None] * 7
        assert children() == before


def test_what_is_refused_is_left_to_whoever_asks_and_the_others_are_answered() -> None:
    """A refusal ends no copy, and is not raised where something else is asked for."""
    with Ahead(process_of, [0, 1, -2, 3, -4, 5], 3) as ahead:
        assert [answer and answer[0] for answer in map(ahead.get, [5, -4, -2, 0])] == [25, None, None, 0]


def test_copies_work_while_nobody_asks() -> None:
    """Copies answer all that is expected, each when it is done with another."""
    told, telling = os.pipe()

    def answer(number: int) -> int:
        os.write(telling, b".")
        return os.getpid() - number

    with Ahead(answer, range(5), 3) as ahead:
        assert sum(len(os.read(told, 1)) for _ in range(5)) == 5
        processes = {number + (ahead.get(number) or 0) for number in range(5)}
    assert os.getpid() not in processes
    assert len(processes) <= 2


def test_a_copy_that_ends_leaves_the_others_at_work() -> None:
    """What the copies were at has no answer; all else has."""
    us, (told, telling) = os.getpid(), os.pipe()

    def answer(number: int) -> int:
        if os.getpid() != us:
            os.write(telling, b".")
            os._exit(3)
        return number + 100

    with Ahead(answer, range(9), 3) as ahead:
        assert len(os.read(told, 1) + os.read(told, 1)) == 2
        answers = [ahead.get(number) for number in range(9)]
    assert answers == [None, None, *range(102, 109)]


def test_copies_that_nobody_waits_for_end() -> None:
    """Stopping ends a copy that would work for a minute, at once."""
    before = children()
    with Ahead(time.sleep, [60.0, 61.0], 2):
        assert children() != before
    assert children() == before


def test_a_large_answer_comes_whole() -> None:
    """An answer that is larger than a pipe is not cut."""
    with Ahead(bytes, [3_000_000, 5_000_000], 2) as ahead:
        time.sleep(0.1)
        assert [len(ahead.get(number) or b"") for number in (3_000_000, 5_000_000)] == [3_000_000, 5_000_000]


def test_where_no_process_can_be_made_nothing_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that allows no further process leaves all to this one, and no pipe open."""

    def refused() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refused)
    opened = num_open_files()
    with Ahead(process_of, range(7), 3) as ahead:
        assert [ahead.get(number) for number in range(7)] == [None] * 7
    assert num_open_files() == opened


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
