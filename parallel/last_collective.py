"""Records the last collective that a rank began in a memory-mapped file, which others can read when the rank is dead, stopped or hangs.

A rank maps the file with `record_to`; without it nothing is recorded. Recording costs some tenths of a microsecond per collective. The
collectives within a replayed CUDA graph cannot be recorded; instead the step that is replayed is.
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
"""Seven int64: number of collectives begun; kind, axis, elements and start time (`time.monotonic_ns`) of the last one; the last replayed
step and its start time (0: none)."""


@dataclass(frozen=True)
class LastCollective:
    """The last collective that a rank launched, as read from its page."""

    number: int
    """Counts the collectives that the rank has launched since it started; it is equal on the ranks of one group."""
    kind: Kind
    axis: TopologyAxis
    elements: int
    """Size of this rank's tensor."""
    ago_s: float
    """Time since it began. Among ranks of one host, the one that lags behind began its last collective earliest, or has not begun it."""

    def __str__(self) -> str:
        return f"{self.kind} number {self.number} over {self.axis}, {self.elements} elements, begun {self.ago_s:.2f} s ago"


@dataclass(frozen=True)
class LastReplay:
    """A rank that has begun to replay a step since its last launched collective: it may be at any collective of that step, or past them."""

    step: int
    ago_s: float
    """Time since the replay began."""
    launched: LastCollective | None
    """The last collective launched before the replay."""

    def __str__(self) -> str:
        before = f" (launched before it: {self.launched})" if self.launched is not None else ""
        return f"replaying step {self.step}, begun {self.ago_s:.2f} s ago{before}"


def record_to(file: Path) -> None:
    """Record this process's collectives in ``file`` from now on. The file is created anew."""
    global _page
    file.write_bytes(bytes(PAGE_BYTES))
    with file.open("r+b") as opened:
        _page = memoryview(mmap.mmap(opened.fileno(), PAGE_BYTES)).cast("q")


def record(kind: Kind, axis: TopologyAxis, elements: int) -> None:
    """Record that this rank is about to take part in a collective."""
    if _page is not None:
        _page[1], _page[2], _page[3] = _KIND_NUMBERS[kind], _AXIS_NUMBERS[axis], elements
        _page[4] = time.monotonic_ns()
        _page[0] += 1


def kind_and_axis_numbers(kind: Kind, axis: TopologyAxis) -> tuple[int, int]:
    """The numbers that stand for them in the page."""
    return _KIND_NUMBERS[kind], _AXIS_NUMBERS[axis]


def page_address() -> int | None:
    """Address of this process's page, for a kernel that records its collectives itself (csrc/sublayers.cpp); None if there is none."""
    return None if _page is None else ctypes.addressof(ctypes.c_char.from_buffer(_page))


def record_replay(step: int) -> None:
    """Record that this rank is about to replay a captured step, whose collectives are not recorded."""
    if _page is not None:
        _page[5], _page[6] = step, time.monotonic_ns()


def read(file: Path) -> LastCollective | LastReplay | None:
    """Read another process's page on this host; None if it has begun no collective or records none."""
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
