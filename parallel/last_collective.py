"""Which collective a rank began last, in a page of memory that others can read when the rank is dead, stopped, or waits for ever.

A rank maps the page with `record_to`; without one nothing is kept. Each collective then costs some tenths of a microsecond. The collectives
of a captured step are nobody's to note when it is replayed: of those the page has the step.
"""

import ctypes
import mmap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from parallel.topology import TopologyAxis

Kind = Literal["all_reduce", "all_gather", "all_to_all", "broadcast", "send", "receive", "barrier"]
KINDS: tuple[Kind, ...] = get_args(Kind)
AXES: tuple[TopologyAxis, ...] = get_args(TopologyAxis)
_KIND_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
_AXIS_NUMBERS = {axis: number for number, axis in enumerate(AXES)}
PAGE_BYTES = 64
_page: memoryview | None = None
"""Seven int64: how many were begun, kind, axis, elements, and when the last one was begun (`time.monotonic_ns`); the step replayed last,
and when that was begun (0: none was)."""


@dataclass(frozen=True)
class LastCollective:
    """What a rank's page says of the last one that was launched."""

    number: int
    """Of the collectives that the rank has launched since it started; those of one group's ranks rise together."""
    kind: Kind
    axis: TopologyAxis
    elements: int
    """Of this rank's tensor."""
    ago_s: float
    """Since it was begun. Of ranks of one host the one that is behind began its last one earliest, or stands before it."""

    def __str__(self) -> str:
        return f"{self.kind} number {self.number} over {self.axis}, {self.elements} elements, begun {self.ago_s:.2f} s ago"


@dataclass(frozen=True)
class LastReplay:
    """What a rank's page says where it has begun to replay a step since: it may be at any of that step's collectives, or past them."""

    step: int
    ago_s: float
    """Since it was begun."""
    launched: LastCollective | None
    """The last one before it."""

    def __str__(self) -> str:
        before = f" (launched before it: {self.launched})" if self.launched is not None else ""
        return f"replaying step {self.step}, begun {self.ago_s:.2f} s ago{before}"


def record_to(file: Path) -> None:
    """From now on note this process's collectives in ``file``, which is made new."""
    global _page
    file.write_bytes(bytes(PAGE_BYTES))
    with file.open("r+b") as opened:
        _page = memoryview(mmap.mmap(opened.fileno(), PAGE_BYTES)).cast("q")


def record(kind: Kind, axis: TopologyAxis, elements: int) -> None:
    """This rank is about to take part in a collective."""
    if _page is not None:
        _page[1], _page[2], _page[3] = _KIND_NUMBERS[kind], _AXIS_NUMBERS[axis], elements
        _page[4] = time.monotonic_ns()
        _page[0] += 1


def kind_and_axis_numbers(kind: Kind, axis: TopologyAxis) -> tuple[int, int]:
    """As they stand in the page."""
    return _KIND_NUMBERS[kind], _AXIS_NUMBERS[axis]


def page_address() -> int | None:
    """Of this process's page, for a kernel that notes its collectives itself (csrc/sublayers.cpp)."""
    return None if _page is None else ctypes.addressof(ctypes.c_char.from_buffer(_page))


def record_replay(step: int) -> None:
    """This rank is about to replay a captured step, whose collectives nobody notes."""
    if _page is not None:
        _page[5], _page[6] = step, time.monotonic_ns()


def read(file: Path) -> LastCollective | LastReplay | None:
    """Of another process of this host; None where it has begun none, or kept no page."""
    try:
        raw = file.read_bytes()
    except OSError:
        return None
    if len(raw) < PAGE_BYTES:
        return None
    number, kind, axis, elements, at, step, replayed_at, *_ = memoryview(raw).cast("q")
    now = time.monotonic_ns()
    launched = LastCollective(number, KINDS[kind], AXES[axis], elements, (now - at) / 1e9) if number else None
    return LastReplay(step, (now - replayed_at) / 1e9, launched) if replayed_at > at else launched
