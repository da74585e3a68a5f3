"""Output for people: as wide as the terminal, and whole lines where it goes to a file or a pipe.

Escape sequences are written to terminals only, and to none that says it is dumb (``TERM=dumb``). ``NO_COLOR`` (https://no-color.org), if it
is set and not empty, takes away colours and nothing else: its text is about colour alone, for terminals that could show it. Bold and the
cursor movements of progress bars stay; who wants neither sets ``TERM=dumb``. Rich keeps to this.
"""

import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

UNLIMITED = 1_000_000
"""Columns of a file or a pipe: whoever reads it there cuts lines up, or searches them."""
LEAST_WIDTH = 24
GAP = 2
"""Columns between two columns of a table."""
WRAPPED_WIDTH = 24
"""Columns that a long text in a table gets at least."""
DUMB = ("dumb", "unknown")


def results() -> Console:
    """A console for stdout that prints texts as they are: `[red]` and `:smile:` mean nothing in them."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = UNLIMITED
    return console


def can_redraw() -> bool:
    """Whether stderr is a terminal that can draw a progress bar over itself."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in DUMB


def wrapped(text: str, width: int, *, first: str = "", then: str = "") -> list[str]:
    """``text`` in lines of at most ``width``, indented by ``first`` and ``then``. Paths and commands stay whole: they are to be copied."""
    return textwrap.wrap(
        text, max(width, LEAST_WIDTH), initial_indent=first, subsequent_indent=then, break_on_hyphens=False, break_long_words=False
    )


@dataclass(frozen=True, kw_only=True)
class Column:
    heading: str
    """May have several lines."""
    is_text: bool = False
    """At the left; numbers are at the right."""
    wraps: bool = False
    """May take several lines, where it is long."""
    is_key: bool = False
    """Says what a row is about; repeated where the columns do not fit side by side."""


class ColumnTable:
    """A table whose columns, where they do not fit side by side, stand in several blocks one below the other.

    Where there is too little room columns without any entry are left out first.
    """

    def __init__(self, columns: Sequence[Column], rows: Sequence[Sequence[str | Text]]) -> None:
        self._columns, self._rows = tuple(columns), [tuple(row) for row in rows]
        if wrong := [row for row in self._rows if len(row) != len(self._columns)]:
            raise ValueError(f"a row has {len(wrong[0])} cells and not {len(self._columns)}")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Text]:
        for number, block in enumerate(self._blocks(options.max_width)):
            if number:
                yield Text("")
            yield self._table(block)

    def _blocks(self, width: int) -> list[list[int]]:
        """Of each block the columns' numbers."""
        every = list(range(len(self._columns)))
        if self._needed(every) <= width:
            return [every]
        keys = [at for at in every if self._columns[at].is_key]
        blocks = [list(keys)]
        for at in every:
            if at in keys or not any(map(_length, (row[at] for row in self._rows))):
                continue
            if len(blocks[-1]) > len(keys) and self._needed([*blocks[-1], at]) > width:
                blocks.append(list(keys))
            blocks[-1].append(at)
        return [sorted(block) for block in blocks]

    def _needed(self, block: Sequence[int]) -> int:
        return sum(map(self._width, block)) + GAP * (len(block) - 1)

    def _width(self, at: int) -> int:
        column = self._columns[at]
        heading = max(map(cell_len, column.heading.splitlines()))
        longest = max((_length(row[at]) for row in self._rows), default=0)
        return max(heading, min(longest, WRAPPED_WIDTH) if column.wraps else longest)

    def _table(self, block: Sequence[int]) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in (self._columns[at] for at in block):
            table.add_column(column.heading, justify="left" if column.is_text else "right", overflow="fold", no_wrap=not column.wraps)
        for row in self._rows:
            table.add_row(*(_as_text(row[at]) for at in block))
        return table


def _as_text(cell: str | Text) -> Text:
    """The cell; a `str` as it is. Rich would read markup and names of emoji in it."""
    return cell if isinstance(cell, Text) else Text(cell)


def _length(cell: str | Text) -> int:
    return cell.cell_len if isinstance(cell, Text) else cell_len(cell)
