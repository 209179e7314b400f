"""Works out in copies of this process what is going to be asked for: a plan uses several cores of a machine."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


def num_usable_cores() -> int:
    """Return how many processes may work at once; 1 where this one must not be copied.

    A copy has the calling thread alone. torch has others, whose locks would stay shut in it; those of numpy sleep until
    a matrix is multiplied, which a copy does not do.
    """
    if sys.platform != "linux" or "torch" in sys.modules:
        return 1
    return len(os.sched_getaffinity(0))


class Ahead(Generic[Asked, Answer]):
    """Answers that copies of this process work out while it goes on; a context, at whose end they end.

    Args:
        answer: what a copy calls for each of its share.
        expected: what is likely to be asked, in that order. The first are left to this process, as many as to a copy.
        num_cores: how many processes may work, this one among them; with 1 there are no copies.
    """

    def __init__(self, answer: Callable[[Asked], Answer], expected: Iterable[Asked], num_cores: int) -> None:
        tasks = list(dict.fromkeys(expected))
        later = tasks[len(tasks) // num_cores :]
        self._copies: dict[Asked, _Copy[dict[Asked, Answer]]] = {}
        self._answers: dict[Asked, Answer] = {}
        for n in range(num_cores - 1):
            if share := later[n :: num_cores - 1]:
                with contextlib.suppress(OSError):  # no further process is allowed: this one answers
                    self._copies.update(dict.fromkeys(share, _Copy(partial(_answers, answer, share))))

    def get(self, asked: Asked) -> Answer | None:
        """Return an answer, which may have to be waited for; None where no copy came to one."""
        if asked in self._copies:
            copy = self._copies[asked]
            self._copies = {each: other for each, other in self._copies.items() if other is not copy}
            self._answers.update(copy.result() or {})
        return self._answers.get(asked)

    def __enter__(self) -> Ahead[Asked, Answer]:
        """Nothing is left to begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the copies that nobody waited for."""
        for copy in set(self._copies.values()):
            copy.stop()
        self._copies = {}


def _answers(answer: Callable[[Asked], Answer], share: Sequence[Asked]) -> dict[Asked, Answer]:
    return {asked: answer(asked) for asked in share}


class _Copy(Generic[Answer]):
    """A copy of this process that works out one result, which pickle can write; what it raises is not told."""

    def __init__(self, task: Callable[[], Answer]) -> None:
        reading, writing = os.pipe()
        try:
            self._process = os.fork()
        except OSError:
            os.close(reading)
            os.close(writing)
            raise
        if not self._process:
            _work(task, writing)
        os.close(writing)
        self._pipe = os.fdopen(reading, "rb")

    def result(self) -> Answer | None:
        """Wait for the result; None where the copy came to none."""
        with self._pipe:
            written = self._pipe.read()
        _, status = os.waitpid(self._process, 0)
        return None if status else pickle.loads(written)  # noqa: S301 - a copy of ours wrote it

    def stop(self) -> None:
        """End the copy, whether or not it is done."""
        self._pipe.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)


def _work(task: Callable[[], object], writing: int) -> None:
    """Write a task's result and end the process, without what belongs to the original's end."""
    status = 1
    try:
        written = pickle.dumps(task())
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(written)
        status = 0
    finally:
        os._exit(status)
