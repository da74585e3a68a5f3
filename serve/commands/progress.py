"""A bar on a terminal, lines elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[str, float], None]
"""Told what is being done and how much of the whole is done, from 0 to 1."""


@contextmanager
def progress_shown() -> Iterator[Report]:
    """Shows progress on stderr, so that stdout has results only."""
    from serve.terminal import can_redraw

    if not can_redraw():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<32}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=1.0)
        yield lambda doing, done: bars.update(task, description=doing, completed=done)


def _lines() -> Report:
    """One line for each thing that begins."""
    last = ""

    def report(doing: str, done: float) -> None:
        nonlocal last
        if doing != last:
            print(f"{done:4.0%}  {doing}", file=sys.stderr, flush=True)
        last = doing

    return report
