"""The prepared script for a GPU, as far as a CPU can prove it."""

import json
import shutil
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import collectives
from benchmarks.gpu.ceilings import GUESSED, Ceilings, found_in
from benchmarks.gpu.floors import Floors
from benchmarks.gpu.models import config_of
from benchmarks.gpu.results import Results
from model.config import ModelConfig


@pytest.mark.parametrize(
    ("shape", "weight_bytes", "published_ms"),
    [
        ("0.5B", 2, (0.22, 0.24, 0.30, 0.56)),
        ("7B", 2, (3.09, 3.18, 3.48, 4.71)),
        ("57B-A14B", 2, (5.97, 17.5, 24.8, 26.4)),
        ("72B", 1, (15.9, 16.4, 18.1, 25.1)),
    ],
)
def test_floors_are_those_of_the_protocol(shape: str, weight_bytes: float, published_ms: tuple[float, ...]) -> None:
    """With 4.6 TB/s and 780 TFLOP/s, at a context of 1k."""
    ceilings = Ceilings(read_bytes_per_s=4.6e12, flop_per_s=7.8e14, fp8_flop_per_s=7.8e14)
    config = ModelConfig.from_dict(config_of(shape))
    floors = Floors(config, ceilings, weight_bytes=weight_bytes, kv_element_bytes=2, rate=7.8e14)
    found_ms = [floors.decode_s([1024] * rows) * 1000 for rows in (1, 8, 32, 128)]
    assert found_ms == pytest.approx(published_ms, rel=0.02)


def test_parts_that_fail_or_take_too_long_are_told_and_the_others_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: gpu.Bench) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu.Bench, "check_kernels", fail)
    threads = torch.get_num_threads()
    options = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--only", "ceilings", "--only", "kernels", "--only", "tiny launched"]
    assert gpu.main(options) == 1
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["failed"] == {"kernels": "RuntimeError: no such kernel"}
    assert {one["part"] for one in found["figures"]} == {"ceilings", "tiny launched"}
    assert all(one["value"] > 0 for one in found["figures"])
    again = Results(tmp_path, 1.0)
    again.take_up()
    assert found_in(again).read_bytes_per_s == max(one["value"] for one in found["figures"] if one["unit"] == "TB/s") * 1e12
    late = Results(None, 0.0)
    late.run("late", 1.0, lambda: pytest.fail("it has no time"))
    assert "OutOfTime" in late.failed["late"]


def test_a_rank_that_is_lost_ends_the_wait_for_figures_and_what_was_told_before_counts() -> None:
    told: Queue[list[collectives.Figure]] = Queue()
    ranks = [cast("BaseProcess", SimpleNamespace(exitcode=code)) for code in (None, -9)]
    with pytest.raises(RuntimeError, match="ranks ended before there were figures, with exit codes rank 1: -9"):
        collectives._figures(told, ranks)
    told.put([("a sum", 1.0, "us")])
    assert collectives._figures(told, ranks) == [("a sum", 1.0, "us")]


def test_figures_outlast_a_device_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody said where to keep them."""

    def fail(_self: gpu.Bench) -> None:
        raise RuntimeError("an illegal memory access")

    commands: list[list[str]] = []
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(gpu.Bench, "check_kernels", fail)
    monkeypatch.setattr(gpu, "_is_alive", lambda _device: False)
    monkeypatch.setattr("os.execv", lambda _program, command: commands.append(command))
    threads = torch.get_num_threads()
    gpu.main(["--device", "cpu", "--tiny", "--only", "ceilings", "--only", "kernels"])
    torch.set_num_threads(threads)
    out = Path(commands[0][commands[0].index("--out") + 1])
    next_one = Results(out, 1.0)
    next_one.take_up()
    shutil.rmtree(out)
    assert {figure.part for figure in next_one.figures} == {"ceilings"}
    assert next_one.failed == {"kernels": "RuntimeError: an illegal memory access"}


def _turns_the_other_way(heads: Tensor, cos: Tensor, sin: Tensor, *rest: object) -> Tensor:
    from parallel.cuda.elementwise import rotate_and_write

    return rotate_and_write(heads, cos, -sin, *rest)  # type: ignore[arg-type]


def _writes_nothing(heads: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, *rest: object) -> Tensor:
    from parallel.cuda.elementwise import rotate_and_write

    return rotate_and_write(heads, cos, sin, torch.full_like(slots, -1), *rest)  # type: ignore[arg-type]


@pytest.mark.parametrize("broken", [_turns_the_other_way, _writes_nothing])
def test_what_the_kernel_turns_and_writes_is_judged(broken: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu.kernels import TINY, Checks

    checks = Checks(Results(None, 1.0), torch.device("cpu"), GUESSED, TINY)
    checks._attend([(4, 1), (17, 1)], (4, 2, 16), torch.float32)
    monkeypatch.setattr("model.attention.cuda.rotate_and_write", broken)
    with pytest.raises(AssertionError, match="keys is wrong"):
        checks._attend([(4, 1), (17, 1)], (4, 2, 16), torch.float32)


@pytest.mark.slow
def test_all_of_it_runs_through_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 0
    assert "| kernels |" in (tmp_path / "gpu.md").read_text()
