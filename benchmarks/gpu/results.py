"""Figures as they come, each beside its floor and what was expected of it: kept after every one, so that a call cut short keeps its own."""

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu.expected import EXPECTED

RATES = ("TB/s", "TFLOP/s", "tokens/s")
"""Units of which more is better; of all others less is."""


@dataclass(frozen=True)
class Figure:
    part: str
    name: str
    value: float
    unit: str
    floor: float | None = None
    """The best that this machine could do, in the same unit."""
    expected: str = ""

    @property
    def of_floor(self) -> float | None:
        if self.floor is None or not self.value:
            return None
        return self.value / self.floor if self.unit in RATES else self.floor / self.value


class OutOfTime(Exception):
    """The part has had its minutes."""


class Results:
    """``minutes`` bounds the whole call: a part that has begun is asked now and then whether it may go on."""

    def __init__(self, out: Path | None, minutes: float) -> None:
        self._out, self._began, self._deadline = out, time.monotonic(), time.monotonic() + 60 * minutes
        self._part_deadline = self._deadline
        self.figures: list[Figure] = []
        self.failed: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def add(self, part: str, name: str, value: float, unit: str, floor: float | None = None) -> None:
        figure = Figure(part, name, value, unit, floor, EXPECTED.get((part, name), ""))
        self.figures.append(figure)
        print(_line(figure), flush=True)
        self._save()

    def go_on(self) -> None:
        """
        Raises:
            OutOfTime: it is enough.
        """
        if time.monotonic() > self._part_deadline:
            raise OutOfTime("its time is over; what it has measured stands")

    @property
    def minutes_left(self) -> float:
        return max(0.0, self._deadline - time.monotonic()) / 60

    def keep_in(self, out: Path) -> None:
        """From now on, and what there is already."""
        self._out = out
        self._save()

    def take_up(self) -> None:
        """What a process before this one has found."""
        if self._out is not None and (self._out / "gpu.json").exists():
            found = json.loads((self._out / "gpu.json").read_text())
            self.figures = [Figure(**one) for one in found["figures"]]
            self.failed, self.seconds = found["failed"], found["seconds"]

    def run(self, name: str, minutes: float, part: Callable[[], None]) -> None:
        """What goes wrong in a part is told and goes no further."""
        began = time.monotonic()
        self._part_deadline = min(began + 60 * minutes, self._deadline)
        print(f"--- {name} ({began - self._began:.0f} s)", flush=True)
        try:
            self.go_on()
            part()
        except Exception as error:  # whatever it was: the others shall have their turn
            self.failed[name] = f"{type(error).__name__}: {error}"
            print(traceback.format_exc()[-3000:], flush=True)
        self.seconds[name] = time.monotonic() - began
        self._save()

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
            found = {"figures": [asdict(one) for one in self.figures], "failed": self.failed, "seconds": self.seconds}
            (self._out / "gpu.json").write_text(json.dumps(found, indent=1))
            (self._out / "gpu.md").write_text(self.table() + "\n")


def _line(one: Figure) -> str:
    share = "" if one.of_floor is None else f"  {one.of_floor:4.0%} of floor {one.floor:.4g}"
    return f"{one.part:12} {one.name:44} {one.value:10.4g} {one.unit}{share}{'  expected ' + one.expected if one.expected else ''}"
