"""Autotuning of matrix products: kernel and tile are measured once per kind of device and kept in a file for the next start.

Within one way (kernel) the tile changes the speed and not the result: each output is one chain of sums over its inputs, or `Tile.parts`
of them. Results of different ways differ by rounding, as those of cuBLAS for different numbers of rows do.
"""

import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import triton
from triton.runtime.errors import PTXASError

from parallel.cpp_build import cache_path

logger = logging.getLogger(__name__)

Key = str
Measure = Callable[[Callable[[], object]], float]
"""Returns the seconds that a launch takes."""


@dataclass(frozen=True, order=True)
class Tile:
    rows: int
    columns: int
    num_warps: int = 4
    num_stages: int = 4
    way: Literal["rows", "swapped", "few", "library"] = "rows"
    """The kernel: of `parallel.cuda.matmul`, `parallel.cuda.swap_ab` or `parallel.cuda.gemv`, or cuBLAS (which chooses its own tiles)."""
    parts: int = 1
    """Split-K: number of parts of the input features, each computed by its own program, if outputs alone do not fill the device."""


LIBRARY = Tile(0, 0, way="library")
_INT4_STAGES = {16: 3, 32: 4, 64: 3}
STAGES = {
    "int8": {16: 3, 32: 4, 64: 3, 128: 4},
    "int4": _INT4_STAGES,
    "int4_zeros": _INT4_STAGES,
    "fp8": {16: 6, 32: 4, 64: 4, 128: 4},
}
"""num_stages of `parallel.cuda.swap_ab` by kind and rows: the fastest on an H200, always with 64 outputs and four warps, of two to six
candidates each. With more rows than listed cuBLAS was faster. int4_zeros was not measured yet and uses the values of int4."""
PARTS = (2, 1, 4, 8)
FALLBACK_TILES = {16: Tile(16, 64), 32: Tile(16, 64), 64: Tile(64, 64), 128: Tile(64, 64)}
"""Tiles of `parallel.cuda.matmul` for other devices; on an H200 they were never the fastest."""
WITHOUT_LIBRARY = Tile(128, 128, 8, 3)
MAX_ROWS = (16, 32, 64, 128)
"""Row buckets: products with numbers of rows in the same bucket use the same tile."""
AUTOTUNED_ROWS = (*MAX_ROWS, 512)
"""Step sizes in tokens that cover all products to be measured; in the last one, routed experts get several rows each."""
MAX_CUSTOM_ROWS = 64
"""Up to so many rows our kernels are faster than cuBLAS on an H200 for every kind. With more rows, fewer values of split-K are tried."""


def candidates_for(kind: str, most: int | None, *, has_library: bool = True) -> tuple[Tile, ...]:
    """Candidate tiles for the bucket ``most`` (from `row_bucket`). The first is used unmeasured. Each candidate, except for different
    ``parts``, costs a second or two of compiling at the first start on a kind of device."""
    library = (LIBRARY,) if has_library else ()
    if most is None or (most > MAX_CUSTOM_ROWS and most not in STAGES[kind]):
        return library or (WITHOUT_LIBRARY,)
    ours = (*swap_ab_tiles(kind, most), FALLBACK_TILES[most])
    return ours if most <= MAX_CUSTOM_ROWS else (*library, *ours)


def swap_ab_tiles(kind: str, most: int) -> tuple[Tile, ...]:
    parts = PARTS if most <= MAX_CUSTOM_ROWS else PARTS[:2]
    return tuple(Tile(most, 64, 4, STAGES[kind][most], "swapped", some) for some in parts)


def row_bucket(num_rows: int) -> int | None:
    """The upper bound of the bucket that ``num_rows`` is in; None for the last, unbounded one."""
    return next((most for most in MAX_ROWS if num_rows <= most), None)


def bucket_name(most: int | None) -> str:
    return "more rows" if most is None else f"up to {most} rows"


class Autotuner:
    """Measures and remembers the best tile of each product on this kind of device."""

    def __init__(self, file: Path | None) -> None:
        """``file``: where results are kept; None: they are not. A file that cannot be read is ignored."""
        self._file = file
        self._found: dict[Key, Tile] = {}
        self._failed: set[Key] = set()
        """Products that this process failed to measure; not kept."""
        self._measure: Measure | None = None
        if file is not None and file.exists():
            try:
                self._found = {key: Tile(**tile) for key, tile in json.loads(file.read_text()).items()}
            except (OSError, ValueError, TypeError) as error:
                logger.warning("%s cannot be read and is measured anew: %s", file, error)

    def __repr__(self) -> str:
        return f"<Autotuner [{len(self._found)} measured]>"

    def best(self, key: Key, candidates: Sequence[Tile], launch: Callable[[Tile], object]) -> Tile:
        """The fastest of the candidates if it is known or may be measured now (within `measuring`); else the first."""
        if len(candidates) == 1:
            return candidates[0]
        if self._measure is not None and key not in self._found and key not in self._failed:
            seconds = self._seconds(key, candidates, launch, self._measure)
            if not seconds:
                self._failed.add(key)  # else every layer would try again
            else:
                self._found[key] = min(seconds, key=seconds.__getitem__)
        return self._found.get(key, candidates[0])

    @contextmanager
    def measuring(self, measure: Measure) -> Iterator[None]:
        """Within this context, unknown products are measured with ``measure``. Results are written to the file at the end unless there was
        an error."""
        before = len(self._found)
        self._measure = measure
        try:
            yield
        finally:
            self._measure = None
        if len(self._found) > before and self._file is not None:
            _keep(self._file, {key: asdict(tile) for key, tile in sorted(self._found.items())})

    def _seconds(self, key: Key, candidates: Sequence[Tile], launch: Callable[[Tile], object], measure: Measure) -> dict[Tile, float]:
        """Seconds of each candidate that runs. Empty if memory does not suffice to measure all: the fastest might be missing.

        Raises:
            torch.AcceleratorError: the CUDA context is lost to this process.
        """
        seconds: dict[Tile, float] = {}
        for tile in candidates:
            try:
                seconds[tile] = measure(lambda tile=tile: launch(tile))  # type: ignore[misc]
            except (triton.OutOfResources, PTXASError):  # more shared memory or registers than this device has
                continue
            except RuntimeError as error:  # a compiler failure on one candidate must not abort the start
                if "out of memory" in str(error):  # torch's or Triton's, which has no type of its own for it
                    logger.warning("%s is not measured: %s", key, error)
                    return {}
                if isinstance(error, torch.AcceleratorError):
                    raise
                logger.warning("%s: %s does not compile, or not run: %s", key, tile, error)
        logger.debug("%s: %s", key, {str(tile): f"{s * 1e6:.1f} us" for tile, s in seconds.items()})
        return seconds


REPEATS = 25
"""Runs of which the median counts."""
CLEARED_BYTES = 256 << 20
"""Overwritten before each run: more than any device's L2 cache holds."""
CYCLES_PER_S = 2e9
"""About as many as a device has; one with more waits shorter, which the doubled time allows for."""


def launch_seconds(run: Callable[[], object]) -> float:
    """Median time on the device, with its cache cleared before each run, as weights come from memory in a real step.

    The device waits before each run until the host has launched all of it. A launch takes the host up to 50 us, longer than many kernels
    run: without the wait, candidates of several kernels (split-K) would be charged for gaps that a replayed step does not have.
    """
    run()  # compiles
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    wait_s = 2 * (time.perf_counter() - began) + 20e-6
    cleared = _cleared_memory()
    spin: Callable[[int], None] = torch.cuda._sleep
    event = partial(torch.cuda.Event, enable_timing=True)
    pairs = [(event(), event()) for _ in range(REPEATS)]
    for before, after in pairs:
        cleared.zero_()
        spin(int(wait_s * CYCLES_PER_S))
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in pairs) / 1000


def _cleared_memory() -> torch.Tensor:
    return torch.empty(CLEARED_BYTES, dtype=torch.uint8, device="cuda")


_of_device: dict[int, Autotuner] = {}


def autotuner_for(device: torch.device) -> Autotuner:
    """The autotuner of this device. Devices other than CUDA (Triton's interpreter) share one without a file."""
    index = device.index or 0 if device.type == "cuda" else -1
    if index not in _of_device:
        _of_device[index] = Autotuner(_file_of(device) if index >= 0 else None)
    return _of_device[index]


def _file_of(device: torch.device) -> Path:
    """A separate file for every kind of device and Triton version."""
    kind = "".join(letter if letter.isalnum() else "-" for letter in torch.cuda.get_device_name(device))
    return cache_path("tiles", f"{kind}-triton-{triton.__version__}", "tiles.json")


def _keep(file: Path, found: object) -> None:
    """Write atomically, as other ranks may write the same file."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(descriptor, "w") as output:
            json.dump(found, output, indent=1)
        Path(name).replace(file)
    except OSError as error:
        logger.warning("what was measured of tiles is not kept: %s", error)
