"""The comparison of ways to take steps with prompts, on a CPU with `tests.fakes.graphs` in place of a device's graphs."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import prefill_launches
from benchmarks.gpu.models import ServedModel, random_model
from benchmarks.gpu.results import Results
from model.formats import Formats
from parallel.weight_format import Dense
from tests.engine.run.capturable_ranks import use_capturable_parts
from tests.fakes.graphs import RecordedGraphs


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> ServedModel:
    pytest.importorskip("triton")
    use_capturable_parts(monkeypatch)
    plain = Formats(Dense(torch.float32), Dense(torch.float32))
    monkeypatch.setattr("benchmarks.gpu.models.choose_formats", lambda *_: plain)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(prefill_launches, "CudaGraphRecorder", lambda _device: RecordedGraphs())
    monkeypatch.setattr(prefill_launches, "SIZES", (8, 16))
    monkeypatch.setattr(prefill_launches, "STEPS", {"5 beside 3": (3, (5,)), "two": (0, (9, 4))})
    monkeypatch.setattr(prefill_launches, "REPEATS", 1)
    return ServedModel(random_model("tiny", torch.device("cpu")), max_running=4, cuda_graphs=False, kv_cache_bytes=1 << 25)


def test_it_finds_that_all_ways_give_the_same(served: ServedModel, tmp_path: Path) -> None:
    results = Results(tmp_path, 5.0)
    prefill_launches.compare(results, "tiny", served)
    names = [figure.name for figure in results.figures]
    assert names[0] == "tiny: 2 numbers of tokens captured"
    assert names[1:5] == [
        "tiny: step of 5 beside 3, Triton's launches",
        "tiny: step of 5 beside 3, quick launches",
        "tiny: step of 5 beside 3, in pieces",
        "tiny: logits of 5 beside 3 in pieces, error",
    ]
    assert served.runner.forward.prompt_graphs is None


def test_a_piece_that_gives_something_else_is_told(served: ServedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = prefill_launches.PromptGraphs.hidden
    monkeypatch.setattr(prefill_launches.PromptGraphs, "hidden", lambda self, batch: hidden(self, batch).flip(-1))
    with pytest.raises(AssertionError, match="tiny: logits of 5 beside 3 in pieces are off by"):
        prefill_launches.compare(Results(tmp_path, 5.0), "tiny", served)
