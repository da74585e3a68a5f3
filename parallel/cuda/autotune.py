"""How a matrix product is computed and cut into programs: measured once on each kind of device, and kept for the next start.

Within one way a tile changes how fast a product is and not what it gives: every output is one chain of sums over its inputs whatever the
tile (of `Tile.parts` as many). Ways differ by roundings, as those that cuBLAS has for different numbers of rows.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import triton
from triton.runtime.errors import PTXASError

from parallel.cpp_build import cache_path

log = logging.getLogger(__name__)

Key = str
Measure = Callable[[Callable[[], object]], float]
"""Seconds that something takes."""


@dataclass(frozen=True, order=True)
class Tile:
    rows: int
    columns: int
    num_warps: int = 4
    num_stages: int = 4
    way: Literal["rows", "swapped", "few", "library"] = "rows"
    """By which kernel: `parallel.cuda.matmul`, `parallel.cuda.swap_ab`, `parallel.cuda.gemv`, or cuBLAS, which cuts
    products as it likes."""
    parts: int = 1
    """Into which the input features are cut, each a program of its own, where outputs alone do not fill the device."""


LIBRARY = Tile(0, 0, way="library")
_INT4_STAGES = {16: 3, 32: 4, 64: 3}
STAGES = {
    "int8": {16: 3, 32: 4, 64: 3, 128: 4},
    "int4": _INT4_STAGES,
    "int4_zeros": _INT4_STAGES,
    "fp8": {16: 6, 32: 4, 64: 4, 128: 4},
}
"""Of `parallel.cuda.swap_ab` with so many rows: what won on an H200, always with 64 outputs and four warps, of two to six cuts each. With
more rows than those cuBLAS won. With zeros none was measured yet: as without."""
PARTS = (2, 1, 4, 8)
FALLBACK_TILES = {16: Tile(16, 64), 32: Tile(16, 64), 64: Tile(64, 64), 128: Tile(64, 64)}
"""By `parallel.cuda.matmul`, for devices that are no H200: there they won nowhere."""
WITHOUT_LIBRARY = Tile(128, 128, 8, 3)
MAX_ROWS = (16, 32, 64, 128)
"""Products of as many rows, or of fewer but more than the next smaller number, are cut alike."""
AUTOTUNED_ROWS = (*MAX_ROWS, 512)
"""Steps of so many tokens show all products that are to be measured; with the last, routed experts have some rows each."""
MAX_FINE = 64
"""Rows of which our kernels are faster than cuBLAS on an H200, whatever the numbers; with more, the matrix is cut into fewer parts."""


def candidates_for(kind: str, most: int | None, *, has_library: bool = True) -> tuple[Tile, ...]:
    """For what `row_bucket` gives. The first is taken unmeasured, if this device can do it at all. Each costs the first start on a kind
    of device a second or two of compiling, but for numbers of parts."""
    library = (LIBRARY,) if has_library else ()
    if most is None or (most > MAX_FINE and most not in STAGES[kind]):
        return library or (WITHOUT_LIBRARY,)
    ours = (*swap_ab_tiles(kind, most), FALLBACK_TILES[most])
    return ours if most <= MAX_FINE else (*library, *ours)


def swap_ab_tiles(kind: str, most: int) -> tuple[Tile, ...]:
    parts = PARTS if most <= MAX_FINE else PARTS[:2]
    return tuple(Tile(most, 64, 4, STAGES[kind][most], "swapped", some) for some in parts)


def row_bucket(num_rows: int) -> int | None:
    """The most rows of those that are cut like so many; None if that is without end."""
    return next((most for most in MAX_ROWS if num_rows <= most), None)


def bucket_name(most: int | None) -> str:
    return "more rows" if most is None else f"up to {most} rows"


class Autotuner:
    """The best tile of each product that was measured on this kind of device."""

    def __init__(self, file: Path | None) -> None:
        """``file`` keeps them; None: nobody does. One that cannot be read is as none."""
        self._file = file
        self._found: dict[Key, Tile] = {}
        self._vain: set[Key] = set()
        """What could not be measured by this process; it is not kept."""
        self._measure: Measure | None = None
        if file is not None and file.exists():
            try:
                self._found = {key: Tile(**tile) for key, tile in json.loads(file.read_text()).items()}
            except (OSError, ValueError, TypeError) as error:
                log.warning("%s cannot be read and is measured anew: %s", file, error)

    def __repr__(self) -> str:
        return f"<Autotuner [{len(self._found)} measured]>"

    def best(self, key: Key, candidates: Sequence[Tile], launch: Callable[[Tile], object]) -> Tile:
        """Of the candidates that run at all the fastest, if it is known or may be measured now; else the first."""
        if len(candidates) == 1:
            return candidates[0]
        if self._measure is not None and key not in self._found and key not in self._vain:
            seconds = self._seconds(key, candidates, launch, self._measure)
            if not seconds:
                self._vain.add(key)  # every layer would try it again
            else:
                self._found[key] = min(seconds, key=seconds.__getitem__)
        return self._found.get(key, candidates[0])

    @contextmanager
    def measuring(self, measure: Measure) -> Iterator[None]:
        """Within, what is not known yet is measured, and kept at the end: nothing is, if there is an error."""
        before = len(self._found)
        self._measure = measure
        try:
            yield
        finally:
            self._measure = None
        if len(self._found) > before and self._file is not None:
            _keep(self._file, {key: asdict(tile) for key, tile in sorted(self._found.items())})

    def _seconds(self, key: Key, candidates: Sequence[Tile], launch: Callable[[Tile], object], measure: Measure) -> dict[Tile, float]:
        """Of those that run; of none where memory does not suffice to measure, as those that came before are not the fastest of all.

        Raises:
            torch.AcceleratorError: the device is lost to this process.
        """
        seconds: dict[Tile, float] = {}
        for tile in candidates:
            try:
                seconds[tile] = measure(lambda tile=tile: launch(tile))  # type: ignore[misc]
            except (triton.OutOfResources, PTXASError):  # this device has not so much shared memory, or so many registers
                continue
            except RuntimeError as error:  # a compiler that fails at a tile nobody needs must not end the start
                if "out of memory" in str(error):  # torch's error or Triton's, who has no type for it
                    log.warning("%s is not measured: %s", key, error)
                    return {}
                if isinstance(error, torch.AcceleratorError):
                    raise
                log.warning("%s: %s does not compile, or not run: %s", key, tile, error)
        log.debug("%s: %s", key, {str(tile): f"{s * 1e6:.1f} us" for tile, s in seconds.items()})
        return seconds


def launch_seconds(run: Callable[[], object]) -> float:
    """On a device, with its cache cleared before each of some runs: weights come from memory in a step, too."""
    return float(triton.testing.do_bench(run, warmup=2, rep=10, return_mode="median")) / 1000


_of_device: dict[int, Autotuner] = {}


def autotuner_for(device: torch.device) -> Autotuner:
    """Those of this device. Triton's interpreter, and whatever else is no GPU, has none of its own."""
    index = device.index or 0 if device.type == "cuda" else -1
    if index not in _of_device:
        _of_device[index] = Autotuner(_file_of(device) if index >= 0 else None)
    return _of_device[index]


def _file_of(device: torch.device) -> Path:
    """Another one for every kind of device and every Triton."""
    kind = "".join(letter if letter.isalnum() else "-" for letter in torch.cuda.get_device_name(device))
    return cache_path("tiles", f"{kind}-triton-{triton.__version__}", "tiles.json")


def _keep(file: Path, found: object) -> None:
    """Whole or not at all: other ranks may write the same."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(descriptor, "w") as output:
            json.dump(found, output, indent=1)
        Path(name).replace(file)
    except OSError as error:
        log.warning("what was measured of tiles is not kept: %s", error)
