"""Which tile is chosen, and that results do not depend on it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from parallel.quantised_format import QuantisedFormat

if TYPE_CHECKING:
    from parallel.cuda.autotune import Tile


def test_without_measurement_the_first_candidate_is_used(device: torch.device) -> None:
    from parallel.cuda.autotune import LIBRARY, Autotuner, candidates_for

    tiles, few = Autotuner(None), candidates_for("int8", 16)
    assert tiles.best("a product", few, lambda _tile: pytest.fail("nobody measures")) == few[0]
    assert tiles.best("a product", candidates_for("int8", 128), lambda _tile: None) == LIBRARY


def test_a_single_candidate_is_not_measured(device: torch.device) -> None:
    from parallel.cuda.autotune import LIBRARY, Autotuner, candidates_for

    tiles = Autotuner(None)
    with tiles.measuring(lambda _run: pytest.fail("there is nothing to choose from")):
        assert tiles.best("a product", candidates_for("int4", None), lambda _tile: None) == LIBRARY


def test_products_without_cublas_have_candidates_for_every_number_of_rows(device: torch.device) -> None:
    from parallel.cuda.autotune import MAX_ROWS, candidates_for

    for most in (*MAX_ROWS, None):
        ways = {tile.way for tile in candidates_for("fp8", most, has_library=False)}
        assert ways
        assert "library" not in ways


def _some() -> "tuple[Tile, ...]":
    from parallel.cuda.autotune import Tile

    return tuple(Tile(16, columns) for columns in (16, 32, 64, 128, 256))


def test_the_fastest_is_measured_once_and_kept(tmp_path: Path, device: torch.device) -> None:
    from triton import OutOfResources

    from parallel.cuda.autotune import Autotuner

    some = _some()
    file, launched = tmp_path / "folder" / "tiles.json", []

    def launch(tile: object) -> None:
        if tile == some[1]:
            raise OutOfResources(2, 1, "shared memory")
        if tile == some[2]:
            raise RuntimeError("PassManager::run failed")
        launched.append(tile)

    def measure(run) -> float:
        run()
        return 1.0 if launched[-1] == some[3] else 2.0

    tiles = Autotuner(file)
    with tiles.measuring(measure):
        assert tiles.best("a product", some, launch) == some[3]
        assert tiles.best("a product", some, launch) == some[3]
    assert len(launched) == len(some) - 2, "all but the two that do not run, once"
    assert Autotuner(file).best("a product", some, launch) == some[3]
    assert Autotuner(file).best("another product", some, launch) == some[0]
    file.write_text("{")
    assert Autotuner(file).best("a product", some, launch) == some[0]


def _failing_at_fourth(error: RuntimeError) -> Callable[[object], None]:
    some = _some()

    def launch(tile: object) -> None:
        if tile == some[3]:
            raise error

    return launch


def _one_second(run: Callable[[], object]) -> float:
    run()
    return 1.0


def test_a_lost_device_aborts_the_start_and_keeps_nothing(tmp_path: Path, device: torch.device) -> None:
    from parallel.cuda.autotune import Autotuner

    some = _some()
    tiles = Autotuner(tmp_path / "tiles.json")
    launch = _failing_at_fourth(torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700))

    def step() -> None:
        with tiles.measuring(_one_second):
            tiles.best("a product before it", some[:2], launch)
            tiles.best("a product", some, launch)

    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        step()
    assert not (tmp_path / "tiles.json").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 MiB"),
        torch.AcceleratorError("CUDA error: out of memory", 2),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("PassManager::run failed"),
    ],
)
def test_what_cannot_be_measured_now_is_measured_at_the_next_start(error: RuntimeError, tmp_path: Path, device: torch.device) -> None:
    """The fastest of the candidates measured before memory ran out need not be the fastest of all."""
    from parallel.cuda.autotune import Autotuner

    some = _some()
    tiles, file = Autotuner(tmp_path / "tiles.json"), tmp_path / "tiles.json"
    candidates = some[3:4] if "PassManager" in str(error) else some  # none of them runs, or memory is full at one
    with tiles.measuring(_one_second):
        assert tiles.best("a product", candidates, _failing_at_fourth(error)) == candidates[0]
        assert tiles.best("a product", candidates, lambda _tile: pytest.fail("it was tried in vain")) == candidates[0]
        assert tiles.best("another product", some, lambda _tile: None) == some[0]
    assert list(json.loads(file.read_text())) == ["another product"]


def test_the_host_has_launched_a_run_before_the_device_begins_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a candidate of several kernels would be charged for what the host takes between them."""
    from parallel.cuda import autotune

    done: list[str] = []

    class Event:
        def __init__(self, **_options: bool) -> None:
            self.at = 0

        def record(self) -> None:
            done.append("event")
            self.at = len(done)

        def elapsed_time(self, after: "Event") -> float:
            return float(after.at - self.at)  # milliseconds: what was done between the two, and the second

    class Memory:
        def zero_(self) -> None:
            done.append("clear")

    monkeypatch.setattr(autotune, "_cleared_memory", Memory)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("wait" if cycles > 0 else "no wait"), raising=False)
    assert autotune.launch_seconds(lambda: done.append("run")) == pytest.approx(0.002)
    assert done == ["run"] * 2 + ["clear", "wait", "event", "run", "event"] * autotune.REPEATS


@pytest.mark.parametrize("num_rows", [3, 40])
def test_a_product_is_bit_identical_for_all_tiles(num_rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from parallel.cuda import quantised_matmul
    from parallel.cuda.autotune import Tile

    torch.manual_seed(1)
    x = torch.randn(num_rows, 256, device=device)
    tensors = QuantisedFormat("int8", torch.float32).prepare({"weight": torch.randn(90, 256, device=device)})
    found = []
    cuts = ((16, 64), (16, 32), (16, 16, 2, 6)) if num_rows < 16 else ((64, 64), (64, 128), (128, 128, 8, 3))
    for tile in [Tile(*cut) for cut in cuts]:
        monkeypatch.setattr(quantised_matmul, "_choice", lambda *_product, tile=tile: ("", (tile,)))
        found.append(quantised_matmul.multiply(x, tensors, None))
    assert all(torch.equal(one, found[0]) for one in found)


def test_measurements_are_separate_for_each_dtype(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile that fits into shared memory with 16 bits may not with 32."""
    from parallel.cuda import grouped_gemm, quantised_matmul
    from parallel.cuda.autotune import Autotuner
    from parallel.cuda.expert_sort import sort_by_expert

    tiles = Autotuner(None)
    for module in (grouped_gemm, quantised_matmul):
        monkeypatch.setattr(module, "autotuner_for", lambda _device: tiles)
    tensors = QuantisedFormat("int8", torch.float32).prepare({"weight": torch.randn(32, 128, device=device)})
    table, by_expert = (
        grouped_gemm.expert_matrices([tensors], device),
        sort_by_expert(torch.zeros(3, 1, dtype=torch.int64, device=device), 1),
    )
    with tiles.measuring(lambda _run: 1.0):
        for dtype in (torch.float32, torch.float16):
            x = torch.randn(3, 128, device=device).to(dtype)
            quantised_matmul.multiply(x, tensors, None)
            grouped_gemm.grouped_gemm(x, table, by_expert, rows_per_source=1, num_assigned=3)
    assert len(tiles._found) == 4
