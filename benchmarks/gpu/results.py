"""Collect figures with their floors and expectations. They are saved after every figure, so that an interrupted call keeps them."""

import faulthandler
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu.expectations import EXPECTED

HANG_S = 60.0
"""Seconds beyond a part's time limit after which its process is killed. Between two figures, kernels may compile and a model is created."""
RATES = ("TB/s", "TFLOP/s", "tokens/s")
"""Units where more is better; for all others less is better."""


@dataclass(frozen=True)
class Figure:
    part: str
    name: str
    value: float
    unit: str
    floor: float | None = None
    """The best value possible on this machine, in the same unit."""
    expected: str = ""

    @property
    def of_floor(self) -> float | None:
        if self.floor is None or not self.value:
            return None
        return self.value / self.floor if self.unit in RATES else self.floor / self.value


class OutOfTime(Exception):
    """The part has used up its time."""


class Results:
    """``minutes`` limits the whole call; parts call `go_on` regularly to check their time."""

    def __init__(self, out: Path | None, minutes: float) -> None:
        self._out, self._began, self._deadline = out, time.monotonic(), time.monotonic() + 60 * minutes
        self._part_deadline = self._deadline
        self.figures: list[Figure] = []
        self.failed: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.under_way: str | None = None
        """The part that is running."""

    def add(self, part: str, name: str, value: float, unit: str, floor: float | None = None) -> None:
        figure = Figure(part, name, value, unit, floor, EXPECTED.get((part, name), ""))
        self.figures.append(figure)
        print(_line(figure), flush=True)
        self._save()

    def go_on(self) -> None:
        """
        Raises:
            OutOfTime: the part's time is over.
        """
        if time.monotonic() > self._part_deadline:
            raise OutOfTime("its time is over; what it has measured stands")

    def seconds_for(self, minutes: float) -> float:
        """Seconds for a part of ``minutes`` that starts now, limited by the whole call."""
        return max(0.0, min(60 * minutes, self._deadline - time.monotonic()))

    def take_up(self) -> None:
        """Load the results of an earlier process."""
        if self._out is not None and (self._out / "gpu.json").exists():
            found = json.loads((self._out / "gpu.json").read_text())
            self.figures = [Figure(**one) for one in found["figures"]]
            self.failed, self.seconds, self.under_way = found["failed"], found["seconds"], found["under_way"]

    def lose(self, code: int) -> None:
        """Record that the process running a part ended with this exit code (negative: signal). A reason it recorded itself is kept."""
        assert self.under_way is not None
        self.failed.setdefault(self.under_way, f"its process was lost (exit code {code})")
        self.under_way = None
        self._save()

    def run(self, name: str, minutes: float, part: Callable[[], None], survives: Callable[[], bool] = lambda: True) -> bool:
        """Run a part; an exception is recorded, not raised. Returns whether this process can go on, according to ``survives``: a part's
        last kernel may fail after the part has returned, and break the process's CUDA context."""
        began = time.monotonic()
        self._part_deadline = began + self.seconds_for(minutes)
        print(f"--- {name} ({began - self._began:.0f} s)", flush=True)
        self.under_way = name
        self._save()
        try:
            self.go_on()
            part()
        except Exception as error:  # any error: the other parts must still run
            self.failed[name] = f"{type(error).__name__}: {error}"
            print(traceback.format_exc()[-3000:], flush=True)
        self.seconds[name] = time.monotonic() - began
        goes_on = survives()
        if goes_on:
            self.under_way = None
        else:
            self.failed.setdefault(name, "the device was lost behind it")
        self._save()
        return goes_on

    def table(self) -> str:
        lines = ["| part | figure | value | floor | of floor | expected |", "|---|---|---|---|---|---|"]
        for one in self.figures:
            floor = "" if one.floor is None else f"{one.floor:.4g}"
            share = "" if one.of_floor is None else f"{one.of_floor:.0%}"
            lines.append(f"| {one.part} | {one.name} | {one.value:.4g} {one.unit} | {floor} | {share} | {one.expected} |")
        lines += ["", *(f"**{part} failed**: {why}" for part, why in self.failed.items())]
        return "\n".join([*lines, "", ", ".join(f"{part} {seconds:.0f} s" for part, seconds in self.seconds.items())])

    def _save(self) -> None:
        if self._out is not None:
            self._out.mkdir(parents=True, exist_ok=True)
            figures = [asdict(one) for one in self.figures]
            found = {"figures": figures, "failed": self.failed, "seconds": self.seconds, "under_way": self.under_way}
            for name, text in (("gpu.json", json.dumps(found, indent=1)), ("gpu.md", self.table() + "\n")):
                half = self._out / f"{name}.half"
                half.write_text(text)
                half.replace(self._out / name)  # atomically: the process may be killed while it writes


@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Watchdog: if the context is still open after ``seconds``, dump all threads' stacks and exit, even from native code."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _line(one: Figure) -> str:
    share = "" if one.of_floor is None else f"  {one.of_floor:4.0%} of floor {one.floor:.4g}"
    return f"{one.part:12} {one.name:44} {one.value:10.4g} {one.unit}{share}{'  expected ' + one.expected if one.expected else ''}"
