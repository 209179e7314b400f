"""What is shown while something slow runs: a moving bar on a terminal, one line per stage in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

Report = Callable[[str, int, int], None]
"""Called with the name of what is being done, how many are done, and of how many."""


@contextmanager
def discovery_display(console: Console, script: Path) -> Iterator[Report]:
    """Say that the script is being run up to its first step, and then how many of its samples were looked at.

    A bar moves from the beginning: the script's imports and its data take as long as they do.
    """
    words = f"Running {script.name} up to its first training step, to see what it trains ..."
    if console.is_terminal:
        with _bar("Discovering", console, beginning=words) as report:
            yield lambda name, done, total: report(f"lengths of the samples of {name}", done, total)
    else:
        console.print(words)
        yield lambda _name, _done, _total: None


@contextmanager
def measuring_display(console: Console) -> Iterator[Report]:
    """Show how much of a data set has been read and tokenised."""
    if console.is_terminal:
        with _bar("Measuring", console, counts_bytes=True) as report:
            yield report
    else:
        yield _announce_once(console, lambda name, _done, _total: f"Measuring the sequences of {name} ...")


@contextmanager
def tracing_display(console: Console) -> Iterator[Report]:
    """Show the tracing of a model that has no stored profile; show nothing where nothing is traced."""
    announce = _announce_once(console, _tracing_words)
    if not console.is_terminal:
        yield announce
        return
    with _bar("Tracing", console) as report:

        def both(name: str, num_done: int, num_total: int) -> None:
            announce(name, num_done, num_total)
            report(name, num_done, num_total)

        yield both


@contextmanager
def planning_display(console: Console) -> Iterator[Report]:
    """Show which of several kinds of hardware is planned for; in a pipe say nothing, it takes seconds."""
    if console.is_terminal:
        with _bar("Planning", console) as report:
            yield report
    else:
        yield lambda _name, _done, _total: None


@contextmanager
def _bar(verb: str, console: Console, *, counts_bytes: bool = False, beginning: str = "") -> Iterator[Report]:
    """Show a bar from the first report on; from the beginning, if there are words for it."""
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bar = (BarColumn(), DownloadColumn(True) if counts_bytes else MofNCompleteColumn(), TimeElapsedColumn())
    name_column = TextColumn("{task.description}")
    with Progress(TextColumn(verb), *bar, name_column, console=console, transient=True) as progress:
        task = progress.add_task(beginning, total=None, visible=bool(beginning))

        def report(name: str, num_done: int, num_total: int) -> None:
            progress.update(task, description=name, completed=num_done, total=num_total, visible=True)

        yield report


def _tracing_words(_name: str, num_done: int, num_total: int) -> str:
    count = num_total - num_done
    return f"No stored profile: tracing {count} variants of the training step, some seconds each; they are kept."


def _announce_once(console: Console, words: Callable[[str, int, int], str]) -> Report:
    announced: list[str] = []

    def report(name: str, num_done: int, num_total: int) -> None:
        if not announced:
            announced.append(name)
            console.print(words(name, num_done, num_total))

    return report
