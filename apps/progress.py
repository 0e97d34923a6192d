"""A progress bar on standard error."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

Report = Callable[[str, int, int], None]    # (what is being done, done, in total), of bytes or of steps


def progress_bar() -> AbstractContextManager[Report]:
    """Shows the calls of the function it gives, as bytes; vanishes at the end, and is silent when not on a terminal."""
    return _bar(DownloadColumn())


def steps_bar() -> AbstractContextManager[Report]:
    """The same for steps."""
    return _bar(MofNCompleteColumn())


@contextmanager
def _bar(amount: ProgressColumn) -> Iterator[Report]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def report(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield report
