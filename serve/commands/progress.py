"""Progress on stderr: a bar on a terminal, otherwise lines."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[str, float], None]
"""Called with (current activity, fraction of the whole that is done, 0 to 1)."""


@contextmanager
def progress_shown() -> Iterator[Report]:
    """Show progress on stderr; stdout is for results only."""
    from serve.terminal import can_redraw

    if not can_redraw():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<32}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("starting", total=1.0)  # until the first report: importing torch or ray takes seconds
        yield lambda doing, done: bars.update(task, description=doing, completed=done)


def _lines() -> Report:
    """Print a line when a new activity starts."""
    last = ""

    def report(doing: str, done: float) -> None:
        nonlocal last
        if doing != last:
            print(f"{done:4.0%}  {doing}", file=sys.stderr, flush=True)
        last = doing

    return report
