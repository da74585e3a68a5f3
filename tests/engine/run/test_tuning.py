"""A starting rank tunes its kernels before anything else, and its answers do not change."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.request import Request, SamplingParams
from engine.run.settings import RunnerConfig
from engine.run.start import make_runner
from engine.run.warm_up import tune
from model.formats import Formats
from parallel.groups import single_rank_groups
from parallel.quantised_format import QuantisedFormat
from tests.engine.run.capturable_ranks import engine_over, open_executor, runner_of
from tests.engine.run.test_end_to_end import PROMPTS, answer, serve
from tests.engine.run.tiny_models import engine_config

CONFIG = engine_config(max_step_tokens=48, max_running=16)


def test_few_and_many_rows_are_measured_and_no_answer_changes(dense_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from parallel.cuda import autotune, gemv, quantised_matmul
    from parallel.cuda.quantised_matmul import multiply

    formats = Formats(QuantisedFormat("int8", torch.float32), QuantisedFormat("int8", torch.float32))
    monkeypatch.setattr("engine.run.start.choose_formats", lambda *_args, **_options: formats)
    monkeypatch.setattr("parallel.quantised_format.multiply_reference", multiply)
    found = autotune.Autotuner(None)
    monkeypatch.setattr(autotune, "autotuner_for", lambda _device: found)
    for module in (gemv, quantised_matmul):
        monkeypatch.setattr(module, "autotuner_for", lambda _device: found)
    for rows in gemv.GEMV_ROWS:
        monkeypatch.setitem(gemv.CANDIDATES, rows, (autotune.Tile(rows, 64, 1, 1),))  # the interpreter counts programs
    monkeypatch.setattr(autotune, "launch_seconds", lambda _run: 1.0 / len(found._found or "1"))
    executor = open_executor(dense_folder, max_step_tokens=48)
    requests = [Request(id="r", prompt=PROMPTS[3], sampling=SamplingParams(temperature=0.0, max_tokens=3))]
    before = answer(serve(engine_over(executor, CONFIG), requests)["r", 0])
    open_before = repr(runner_of(executor).sequences)
    tune(runner_of(executor), CONFIG)
    few = {"up to 1 rows", "up to 2 rows"}
    assert {key.rpartition(", ")[2] for key in found._found} == few | {"up to 16 rows", "up to 32 rows", "up to 64 rows"}
    assert repr(runner_of(executor).sequences).split("|")[0] == open_before.split("|")[0], "nothing is left open"
    assert answer(serve(engine_over(executor, CONFIG), requests)["r", 0]) == before
    executor.close()


@pytest.mark.parametrize("tune_tiles", [True, False])
def test_a_device_whose_memory_for_kv_is_set_is_measured_too(tune_tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise that is done before memory is measured."""
    tuned: list[object] = []
    runner = SimpleNamespace(device=torch.device("cuda", 0), rebalancer=SimpleNamespace(reset=lambda: None))
    for name, stand_in in {
        "measure_capacity": lambda *_args, **_options: SimpleNamespace(num_blocks=4),
        "KvCache": lambda *_args: None,
        "Runner": lambda **_options: runner,
        "warm_up": lambda _runner: None,
        "_phase": lambda *_args: nullcontext(),
        "tune": lambda one, _config: tuned.append(one),
    }.items():
        monkeypatch.setattr(f"engine.run.start.{name}", stand_in)
    model = SimpleNamespace(groups=single_rank_groups(), device=torch.device("cuda", 0), kv_layout=None)
    config = RunnerConfig(kv_cache_bytes=1 << 20, tune_tiles=tune_tiles, cuda_graphs=False)
    make_runner(model, None, runner_config=config, engine_config=CONFIG)  # type: ignore[arg-type]
    assert tuned == [runner] * tune_tiles


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize(("setting", "module"), [("early_launches", "dependent_launch"), ("gated_gemv", "gated_gemv")])
def test_kernels_follow_the_setting(setting: str, module: str, is_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    said: list[bool] = []
    monkeypatch.setattr(f"parallel.cuda.{module}.enable", said.append)
    monkeypatch.setattr("engine.run.start.measure_capacity", lambda *_args, **_options: pytest.fail("said too late"))
    model = SimpleNamespace(groups=single_rank_groups(), device=torch.device("cuda", 0))
    with pytest.raises(pytest.fail.Exception, match="said too late"):
        make_runner(model, None, runner_config=RunnerConfig(**{setting: is_on}), engine_config=CONFIG)  # type: ignore[arg-type]
    assert said == [is_on]
