"""What is shown while something slow runs: a moving bar on a terminal, one line per stage in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

Report = Callable[[str, int, int], None]
"""Called with the name of what is being done, how many are done, and of how many."""


@contextmanager
def discovery_display(console: Console, script: Path) -> Iterator[None]:
    """Say that the script is being run up to its first step, which takes as long as its imports and its data do."""
    words = f"Running {script.name} up to its first training step, to see what it trains ..."
    if console.is_terminal:
        with console.status(words):
            yield
    else:
        console.print(words)
        yield


@contextmanager
def tracing_display(console: Console) -> Iterator[Report]:
    """Show the tracing of a model that has no stored profile; show nothing where nothing is traced."""
    if console.is_terminal:
        with _bar("Tracing", console) as report:
            yield report
    else:
        yield _announce_once(console)


@contextmanager
def planning_display(console: Console) -> Iterator[Report]:
    """Show which of several kinds of hardware is planned for; in a pipe say nothing, it takes seconds."""
    if console.is_terminal:
        with _bar("Planning", console) as report:
            yield report
    else:
        yield lambda _name, _done, _total: None


@contextmanager
def _bar(verb: str, console: Console) -> Iterator[Report]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bar = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    name_column = TextColumn("{task.description}")
    with Progress(TextColumn(verb), *bar, name_column, console=console, transient=True) as progress:
        task = progress.add_task("", total=None, visible=False)

        def report(name: str, num_done: int, num_total: int) -> None:
            progress.update(task, description=name, completed=num_done, total=num_total, visible=True)

        yield report


def _announce_once(console: Console) -> Report:
    announced: list[str] = []

    def report(name: str, num_done: int, num_total: int) -> None:
        if not announced:
            announced.append(name)
            console.print(
                f"No stored profile: tracing {num_total - num_done} variants of the training step, some seconds each."
            )

    return report
