"""Works out in copies of this process what is going to be asked for: a plan uses several cores of a machine."""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Generic, NoReturn, TypeVar

from autofit.errors import AutofitError

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")

_TURN_BYTES = 2
_LENGTH_BYTES = 8
MOST_EXPECTED = 2048
"""So many turns fit the smallest pipe that Linux makes, a page."""


def num_usable_cores() -> int:
    """Return how many processes may work at once; 1 where this one must not be copied.

    A copy has the calling thread alone. torch has others, whose locks would stay shut in it; those of numpy sleep until
    a matrix is multiplied, which a copy does not do.
    """
    if sys.platform != "linux" or "torch" in sys.modules:
        return 1
    return len(os.sched_getaffinity(0))


class Ahead(Generic[Asked, Answer]):
    """Answers that this process and copies of it work out, each taking the next question when it is done with one.

    A context, at whose end the copies end.

    Args:
        answer: what is called for each; it comes to the same wherever it is called.
        expected: what is likely to be asked, in that order.
        num_cores: how many processes may work, this one among them; with 1 there are no copies, and no answers.
    """

    def __init__(self, answer: Callable[[Asked], Answer], expected: Iterable[Asked], num_cores: int) -> None:
        self._answer = answer
        self._expected = list(dict.fromkeys(expected))[:MOST_EXPECTED]
        self._answers: dict[int, Answer] = {}
        self._turns = _Turns(len(self._expected))
        self._copies: list[_Copy[Answer]] = []
        for _ in range(min(num_cores, len(self._expected)) - 1):
            with contextlib.suppress(OSError):  # no further process is allowed: those there are answer
                self._copies.append(_Copy(self._answered, self._turns))
        self._number_of = {asked: n for n, asked in enumerate(self._expected)} if self._copies else {}

    def get(self, asked: Asked) -> Answer | None:
        """Return an answer, working on others while a copy works on it; None where nobody came to one."""
        number = self._number_of.get(asked, -1)
        while number >= 0 and number not in self._answers:
            if self._collect(waits=False):
                continue
            turn = self._turns.take()
            if turn is not None:
                self._answers.update(self._answered(turn))
            elif not self._collect(waits=True):
                break
        return self._answers.get(number)

    def _answered(self, turn: int) -> dict[int, Answer]:
        """Answer one question, unless it is refused: then whoever asks for it will hear why."""
        with contextlib.suppress(AutofitError):
            return {turn: self._answer(self._expected[turn])}
        return {}

    def _collect(self, *, waits: bool) -> bool:
        """Take what copies have answered; tell whether there was any, or a copy that has ended."""
        pipes = [copy.pipe for copy in self._copies]
        ready, _, _ = select.select(pipes, [], [], None if waits and pipes else 0)
        for copy in [copy for copy in self._copies if copy.pipe in ready]:
            answers = copy.read()
            if answers is None:
                self._copies.remove(copy)
                copy.stop()
            else:
                self._answers.update(answers)
        return bool(ready)

    def __enter__(self) -> Ahead[Asked, Answer]:
        """Nothing is left to begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the copies, whether or not they are done."""
        for copy in self._copies:
            copy.stop()
        self._copies, self._number_of = [], {}
        self._turns.close()


class _Turns:
    """Numbers from 0 on, each of which one of several processes takes."""

    def __init__(self, count: int) -> None:
        self._pipe, writing = os.pipe()
        os.write(writing, b"".join(n.to_bytes(_TURN_BYTES, "big") for n in range(count)))
        os.close(writing)

    def take(self) -> int | None:
        """Take the next; None where all are taken."""
        taken = os.read(self._pipe, _TURN_BYTES)
        return int.from_bytes(taken, "big") if taken else None

    def close(self) -> None:
        """Forget the rest."""
        os.close(self._pipe)


class _Copy(Generic[Answer]):
    """A copy of this process that answers as long as there are turns; what it raises is not told."""

    def __init__(self, answered: Callable[[int], dict[int, Answer]], turns: _Turns) -> None:
        self.pipe, writing = os.pipe()
        try:
            self._process = os.fork()
        except OSError:
            os.close(self.pipe)
            os.close(writing)
            raise
        if not self._process:
            _work(answered, turns, writing)
        os.close(writing)

    def read(self) -> dict[int, Answer] | None:
        """Wait for some answers; None where the copy has ended."""
        length = int.from_bytes(_read(self.pipe, _LENGTH_BYTES), "big")
        written = _read(self.pipe, length)
        if not length or len(written) < length:
            return None
        answers: dict[int, Answer] = pickle.loads(written)  # noqa: S301 - a copy of ours wrote it
        return answers

    def stop(self) -> None:
        """End the copy, whether or not it is done."""
        os.close(self.pipe)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)


def _work(answered: Callable[[int], dict[int, Answer]], turns: _Turns, writing: int) -> NoReturn:
    """Answer and end the process, without what belongs to the original's end."""
    try:
        with os.fdopen(writing, "wb") as pipe:
            while (turn := turns.take()) is not None:
                written = pickle.dumps(answered(turn))
                pipe.write(len(written).to_bytes(_LENGTH_BYTES, "big") + written)
                pipe.flush()
    finally:
        os._exit(0)


def _read(pipe: int, num_bytes: int) -> bytes:
    """Read so many bytes, fewer only where there are no more."""
    parts = []
    while num_bytes and (part := os.read(pipe, num_bytes)):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)
