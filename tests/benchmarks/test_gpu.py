"""The prepared script for a GPU, as far as a CPU can prove it."""

import gc
import json
import logging
import signal
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import collectives, compare_settings, graph_replays, parts, run_ahead, whole_model
from benchmarks.gpu.ceilings import GUESSED, Ceilings, found_in
from benchmarks.gpu.floors import Floors
from benchmarks.gpu.models import ServedModel, config_of, random_model
from benchmarks.gpu.results import Results
from benchmarks.gpu.run_ahead import wrong_ahead, wrong_beside_prompts
from engine.request import SamplingParams
from engine.run.warm_up import capture
from model.config import ModelConfig
from model.formats import Formats
from model.qwen2 import Qwen2
from parallel.weight_format import Dense
from tests.engine.run.capturable_ranks import use_capturable_parts
from tests.fakes.graphs import RecordedGraphs


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
    def fail(_self: parts.Bench, _check: str) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(parts.Bench, "check_kernels", fail)
    options = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--only", "ceilings", "--only", "noise", "--only", "launched"]
    assert parts.main(options) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["failed"] == {"kernels: noise": "RuntimeError: no such kernel"}
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


@pytest.mark.parametrize("is_told_in_time", [True, False])
def test_a_part_that_loses_the_device_ends_its_process_and_another_one_goes_on_behind_it(
    is_told_in_time: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault of its last kernel comes up when nobody waits for it any more."""
    seen: list[str] = []

    def check(_self: parts.Bench, name: str) -> None:
        seen.append(name)
        if name == "noise" and is_told_in_time:
            raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(parts.Bench, "check_kernels", check)
    monkeypatch.setattr(parts.Bench, "forget", lambda _self: seen[-1] != "noise")
    options = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--only", "noise", "--only", "edits"]
    assert parts.main(options) == parts.LOST
    results = Results(tmp_path, 1.0)
    results.take_up()
    assert results.under_way == "kernels: noise"
    assert parts.main([*options, "--behind", "kernels: noise"]) == 1
    assert seen == ["noise", "edits"]
    results.take_up()
    why = "RuntimeError: an illegal memory access" if is_told_in_time else "the device was lost behind it"
    assert (results.under_way, results.failed) == (None, {"kernels: noise": why})


def test_memory_that_cannot_be_given_back_tells_that_the_device_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_device: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)

    bench = parts.Bench(Results(None, 1.0), torch.device("cuda", 0), tiny=True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert bench.forget()
    for name in ("synchronize", "empty_cache"):
        with monkeypatch.context() as at_one:
            at_one.setattr(torch.cuda, name, fail)
            assert not bench.forget()


PROCESS = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu.results import Results, ended_after

here = Path(sys.argv[sys.argv.index("--out") + 1])
results, names = Results(here, 1.0), ["first", "crashes", "hangs", "last"]
if "--behind" in sys.argv:
    results.take_up()
    names = names[names.index(sys.argv[sys.argv.index("--behind") + 1]) + 1 :]

def part(name):
    if name == "crashes":
        os.abort()
    if name == "hangs":
        with ended_after(0.2):
            time.sleep(300)
    results.add(name, "a figure", 1.0, "s")

for name in names:
    results.run(name, 1.0, lambda: part(name))
"""


def test_what_was_measured_outlasts_crashes_and_parts_that_hang(tmp_path: Path) -> None:
    assert gpu.attend([sys.executable, "-c", PROCESS], tmp_path, 1.0) == 0
    results = Results(tmp_path, 1.0)
    results.take_up()
    assert [figure.part for figure in results.figures] == ["first", "last"]
    wanted = {"crashes": f"its process was lost (exit code {-signal.SIGABRT})", "hangs": "its process was lost (exit code 1)"}
    assert results.failed == wanted


def test_what_another_call_has_left_is_not_taken_up(tmp_path: Path) -> None:
    """It was cut short in a part that this one does not even have."""
    before = {"figures": [], "failed": {"old": "it failed"}, "seconds": {}, "under_way": "old"}
    (tmp_path / "gpu.json").write_text(json.dumps(before))
    assert gpu.attend([sys.executable, "-c", "import sys; sys.exit(7 if '--behind' not in sys.argv else 8)"], tmp_path, 1.0) == 7


def test_a_word_of_a_part_chooses_it() -> None:
    names = [name for name, _, _ in parts.parts(parts.Bench(Results(None, 1.0), torch.device("cpu"), tiny=False))]
    assert [name for name in names if parts.is_chosen(name, ["7B"])] == ["7B", "7B launched", "7B transformers"]
    assert [name for name in names if parts.is_chosen(name, ["57B"])] == ["57B-A14B", "57B-A14B fp8"]
    assert all(name.startswith("kernels: ") for name in names if parts.is_chosen(name, ["kernels"]))
    assert [name for name in names if parts.is_chosen(name, [])] == names
    names += [*parts.REPLAYED, *parts.EARLY]  # on a device
    assert [name for name in names if parts.is_chosen(name, ["kernels: experts"])] == ["kernels: experts"]
    assert len([name for name in names if parts.is_chosen(name, ["experts"])]) == 3


def test_a_model_that_was_served_is_gone_before_the_next_one_comes(caplog: pytest.LogCaptureFixture) -> None:
    """On a device it and its KV fill nearly all of the memory. Whoever keeps what was logged keeps nothing of it."""
    caplog.set_level(logging.DEBUG)
    served = ServedModel(random_model("tiny", torch.device("cpu")), max_running=4, kv_cache_bytes=1 << 20)
    parts_of_it = [weakref.ref(one) for one in (served.model, served.runner, served.runner.cache, served.engine)]
    del served
    gc.collect()
    assert [part() for part in parts_of_it] == [None] * 4


def _turns_the_other_way(heads: Tensor, cos: Tensor, sin: Tensor, *rest: object) -> Tensor:
    from parallel.cuda.elementwise import rope_and_write_kv

    return rope_and_write_kv(heads, cos, -sin, *rest)  # type: ignore[arg-type]


def _writes_nothing(heads: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, *rest: object) -> Tensor:
    from parallel.cuda.elementwise import rope_and_write_kv

    return rope_and_write_kv(heads, cos, sin, torch.full_like(slots, -1), *rest)  # type: ignore[arg-type]


@pytest.mark.parametrize("broken", [_turns_the_other_way, _writes_nothing])
def test_what_the_kernel_turns_and_writes_is_judged(broken: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu.kernels.attention import attend
    from benchmarks.gpu.kernels.checks import TINY, Checks
    from benchmarks.gpu.kernels.registry import CHECKS, run

    checks = Checks(Results(None, 1.0), torch.device("cpu"), GUESSED, TINY)
    attend(checks, [(4, 1), (17, 1)], (4, 2, 16), torch.float32)
    assert not checks.wrong
    monkeypatch.setattr("model.attention.cuda.rope_and_write_kv", broken)
    monkeypatch.setitem(CHECKS, "decode", (1.0, lambda checks: attend(checks, [(4, 1), (17, 1)], (4, 2, 16), torch.float32)))
    with pytest.raises(AssertionError, match=r"keys is wrong.*; .*contexts at 1 behind"):  # all that is wrong, and not the first alone
        run("decode", checks)


def _once(compute: Callable[[], object], _device: torch.device) -> float:
    """In place of seven runs, whose time under Triton's interpreter says nothing."""
    compute()
    return 1e-3


@pytest.mark.parametrize(
    ("module", "name", "check"),
    [("gemv", "multiply", "gemv"), ("gated_gemv", "multiply", "gated gemv"), ("grouped_experts", "combine_rows", "tiles")],
)
def test_a_candidate_tile_that_computes_something_else_is_seen(module: str, name: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from benchmarks.gpu.kernels.checks import TINY, Checks
    from benchmarks.gpu.kernels.registry import run

    checks = Checks(Results(None, 1.0), torch.device("cpu"), GUESSED, replace(TINY, inner=16, rows_of_tiles=(3,)))
    monkeypatch.setattr("benchmarks.gpu.kernels.checks.replayed_s", _once)
    path = f"parallel.cuda.{module}"
    right = getattr(import_module(path), name)
    monkeypatch.setattr(f"{path}.{name}", lambda *arguments: right(*arguments) * 1.1)
    with pytest.raises(AssertionError, match=r"is wrong by 0\.1"):
        run(check, checks)


def test_replays_are_compared_with_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    use_capturable_parts(monkeypatch)
    monkeypatch.setattr("benchmarks.gpu.models.choose_formats", lambda *_args: Formats(Dense(torch.float32), Dense(torch.float32)))
    monkeypatch.setattr("engine.run.memory._run_ahead", lambda *_args: True)
    monkeypatch.setattr(graph_replays, "ROWS", (3,))
    monkeypatch.setattr(graph_replays, "ANSWERS", (3,))
    monkeypatch.setattr(run_ahead, "TOKENS_OUT", 3)
    served = ServedModel(random_model("tiny", torch.device("cpu")), max_running=3, kv_cache_bytes=1 << 22)
    capture(served.runner, RecordedGraphs(), served.config)
    results = Results(None, 9.0)
    graph_replays.check(results, "tiny", served)
    assert len(results.figures) == 6
    compute = graph_replays.replayed_logits

    def other(*arguments: Any) -> Any:
        works, tables, logits_RV = compute(*arguments)
        return works, tables, logits_RV * 1.1

    monkeypatch.setattr(graph_replays, "replayed_logits", other)
    for name in ("wrong_ahead", "wrong_beside_prompts"):
        monkeypatch.setattr(graph_replays, name, lambda *_args, **_options: [])
    with pytest.raises(AssertionError, match=r"tiny: replayed logits of 3 are off by 0\.1"):
        graph_replays.check(results, "tiny", served)


def test_a_model_that_computes_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    results, cpu = Results(None, 1.0), torch.device("cpu")
    whole_model.check(results, cpu, tiny=True)
    assert all(figure.value < 1e-5 for figure in results.figures)
    right, calls = whole_model.logits_of_steps, count()

    def other(model: Qwen2, tokens: list[list[int]]) -> Tensor:
        """The two read other first tokens."""
        return right(model, [[next(calls) % 2, *of_one[1:]] for of_one in tokens])

    monkeypatch.setattr(whole_model, "logits_of_steps", other)
    with pytest.raises(AssertionError, match=r"tiny: logits are off by .*tiny-moe: logits are off by"):
        whole_model.check(results, cpu, tiny=True)


def test_answers_that_differ_a_step_ahead_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    served = ServedModel(random_model("tiny", torch.device("cpu")), max_running=8, kv_cache_bytes=1 << 20)
    kinds = [SamplingParams(temperature=0.0), SamplingParams(top_k=20, repetition_penalty=1.1), SamplingParams()]
    results = Results(None, 1.0)
    monkeypatch.setattr(run_ahead, "TOKENS_OUT", 4)
    assert wrong_ahead(results, "tiny", served, kinds=kinds, count=5) == []
    assert [figure.value for figure in results.figures] == [0.0, 0.0]
    answers, calls = run_ahead._answers, count(1)

    def other(*arguments: Any) -> dict[str, list[int]]:
        found = answers(*arguments)
        return found | {"ahead-2": []} if next(calls) == 3 else found

    monkeypatch.setattr(run_ahead, "_answers", other)
    assert wrong_ahead(results, "tiny", served, kinds=kinds, count=5) == ["tiny: 1 of 5 answers differ a step ahead"]


def test_answers_that_differ_beside_prompts_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    served = ServedModel(random_model("tiny", torch.device("cpu")), max_running=8, kv_cache_bytes=1 << 20)
    results, kinds = Results(None, 1.0), [SamplingParams(temperature=0.0), SamplingParams(top_k=20, repetition_penalty=1.1)]
    monkeypatch.setattr(run_ahead, "TOKENS_OUT", 6)
    assert wrong_beside_prompts(results, "tiny", served, kinds=kinds, count=5) == []
    assert [figure.value for figure in results.figures] == [0.0, 0.0]
    assert served.runner.mixed_steps is None
    answers, calls = run_ahead._answers, count(1)

    def other(*arguments: Any, **named: Any) -> dict[str, list[int]]:
        found = answers(*arguments, **named)
        return found | {"beside-2": []} if next(calls) == 2 else found

    monkeypatch.setattr(run_ahead, "_answers", other)
    (wrong,) = wrong_beside_prompts(results, "tiny", served, kinds=kinds, count=5)
    assert wrong.startswith("tiny: 1 of 5 answers differ")


@pytest.mark.slow
def test_all_of_it_runs_through_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 0
    assert "| kernels |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("changes", [False, True])
def test_steps_with_a_setting_are_compared_with_those_without(changes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_capturable_parts(monkeypatch)
    monkeypatch.setattr("benchmarks.gpu.models.choose_formats", lambda *_args: Formats(Dense(torch.float32), Dense(torch.float32)))
    monkeypatch.setattr(compare_settings, "KV_CACHE_BYTES", 1 << 20)

    def served(model: Qwen2, *, settings: dict[str, Any], **options: Any) -> ServedModel:
        found = ServedModel(model, settings=settings, **options)
        capture(found.runner, RecordedGraphs(), found.config)
        if changes and settings:
            assert found.model.norm is not None
            assert found.model.norm.weight is not None
            found.model.norm.weight.mul_(1.05)
        return found

    monkeypatch.setattr(compare_settings, "ServedModel", served)
    results, ways = Results(tmp_path, 1.0), compare_settings.GATED_GEMV  # the first other way may differ by 0.1, the second not at all
    wrong = r"^tiny: logits of 1, gated and early, are off by 0.05; .* of 3, gated and early, are off by 0.05$"
    with pytest.raises(AssertionError, match=wrong) if changes else nullcontext():
        compare_settings.compare(results, "tiny", random_model("tiny", torch.device("cpu")), ways, (1, 3))
    assert [figure.name for figure in results.figures] == [f"tiny: step of {rows}, {way.name}" for way in ways for rows in (1, 3)]
