"""Which tile is taken, and that it does not matter which."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parallel.scaled_format import ScaledFormat


def test_without_measurement_the_first_is_taken(device: torch.device) -> None:
    from parallel.cuda.tiles import LIBRARY, Tiles, candidates_for

    tiles = Tiles(None)
    assert tiles.best("a product", candidates_for(1), lambda _tile: pytest.fail("nobody measures")) == candidates_for(1)[0]
    assert tiles.best("a product", candidates_for(1000), lambda _tile: None) == LIBRARY


def test_the_fastest_is_measured_once_kept_and_found_again(tmp_path: Path, device: torch.device) -> None:
    from triton import OutOfResources

    from parallel.cuda.tiles import FEW_ROWS, Tiles

    file, launched = tmp_path / "folder" / "tiles.json", []

    def launch(tile: object) -> None:
        if tile == FEW_ROWS[1]:
            raise OutOfResources(2, 1, "shared memory")
        if tile == FEW_ROWS[2]:
            raise RuntimeError("PassManager::run failed")
        launched.append(tile)

    def measure(run) -> float:
        run()
        return 1.0 if launched[-1] == FEW_ROWS[3] else 2.0

    tiles = Tiles(file)
    with tiles.measuring(measure):
        assert tiles.best("a product", FEW_ROWS, launch) == FEW_ROWS[3]
        assert tiles.best("a product", FEW_ROWS, launch) == FEW_ROWS[3]
    assert len(launched) == len(FEW_ROWS) - 2, "all but the two that do not run, once"
    assert Tiles(file).best("a product", FEW_ROWS, launch) == FEW_ROWS[3]
    assert Tiles(file).best("another product", FEW_ROWS, launch) == FEW_ROWS[0]
    file.write_text("{")
    assert Tiles(file).best("a product", FEW_ROWS, launch) == FEW_ROWS[0]


def _failing_at_fourth(error: RuntimeError) -> Callable[[object], None]:
    from parallel.cuda.tiles import FEW_ROWS

    def launch(tile: object) -> None:
        if tile == FEW_ROWS[3]:
            raise error

    return launch


def _one_second(run: Callable[[], object]) -> float:
    run()
    return 1.0


def test_a_kernel_that_takes_the_device_along_ends_the_start_and_nothing_of_it_is_kept(tmp_path: Path, device: torch.device) -> None:
    from parallel.cuda.tiles import FEW_ROWS, Tiles

    tiles = Tiles(tmp_path / "tiles.json")
    launch = _failing_at_fourth(torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700))

    def step() -> None:
        with tiles.measuring(_one_second):
            tiles.best("a product before it", FEW_ROWS[:2], launch)
            tiles.best("a product", FEW_ROWS, launch)

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
def test_what_cannot_be_measured_now_is_at_the_next_start(error: RuntimeError, tmp_path: Path, device: torch.device) -> None:
    """The tiles that came before a full memory are not the fastest of all."""
    from parallel.cuda.tiles import FEW_ROWS, Tiles

    tiles, file = Tiles(tmp_path / "tiles.json"), tmp_path / "tiles.json"
    candidates = FEW_ROWS[3:4] if "PassManager" in str(error) else FEW_ROWS  # none of them runs, or memory is full at one
    with tiles.measuring(_one_second):
        assert tiles.best("a product", candidates, _failing_at_fourth(error)) == candidates[0]
        assert tiles.best("a product", candidates, lambda _tile: pytest.fail("it was tried in vain")) == candidates[0]
        assert tiles.best("another product", FEW_ROWS, lambda _tile: None) == FEW_ROWS[0]
    assert list(json.loads(file.read_text())) == ["another product"]


@pytest.mark.parametrize("num_rows", [3, 40])
def test_a_product_is_the_same_to_the_bit_whatever_its_tile(num_rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from parallel.cuda import scaled
    from parallel.cuda.tiles import candidates_for

    torch.manual_seed(1)
    x = torch.randn(num_rows, 256, device=device)
    tensors = ScaledFormat("int8", torch.float32).prepare({"weight": torch.randn(90, 256, device=device)})
    found = []
    for tile in [tile for tile in candidates_for(num_rows) if tile.way == "rows"]:
        monkeypatch.setattr(scaled, "candidates_for", lambda _rows, tile=tile: (tile,))
        found.append(scaled.multiply(x, tensors, None))
    assert all(torch.equal(one, found[0]) for one in found)


def test_what_was_measured_with_one_dtype_is_not_taken_for_another(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits into shared memory with 16 bits may not with 32."""
    from parallel.cuda import experts, scaled
    from parallel.cuda.by_expert import sort_by_expert
    from parallel.cuda.tiles import Tiles

    tiles = Tiles(None)
    for module in (experts, scaled):
        monkeypatch.setattr(module, "tiles_of", lambda _device: tiles)
    tensors = ScaledFormat("int8", torch.float32).prepare({"weight": torch.randn(32, 128, device=device)})
    table, by_expert = experts.matrices([tensors], device), sort_by_expert(torch.zeros(3, 1, dtype=torch.int64, device=device), 1)
    with tiles.measuring(lambda _run: 1.0):
        for dtype in (torch.float32, torch.float16):
            x = torch.randn(3, 128, device=device).to(dtype)
            scaled.multiply(x, tensors, None)
            experts.expert_products(x, table, by_expert, rows_per_source=1, num_assigned=3)
    assert len(tiles._found) == 4
