"""Compare replayed steps with and without settings of a rank (`RunnerConfig`) that change how the model is computed: logits and times."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.graph_replays import replayed_logits
from benchmarks.gpu.models import ServedModel
from benchmarks.gpu.results import Results
from benchmarks.gpu.timing import median_s
from model.qwen2 import Qwen2


@dataclass(frozen=True)
class Way:
    """How a step is computed."""

    name: str
    settings: dict[str, Any]
    """Of `RunnerConfig`."""
    most: float = 0.0
    """How much the logits may differ, relative, from those of the way before it in the list."""


AS_EVER = Way("as ever", {})
EARLY_LAUNCHES = (AS_EVER, Way("early", {"early_launches": True}))
GATED_GEMV = (
    AS_EVER,
    Way("gated", {"gated_gemv": True}, most=0.1),  # of all layers: another kernel may have been the fastest, with sums in another order
    Way("gated and early", {"gated_gemv": True, "early_launches": True}),
)
FEW_ROWS, UP_TO_PDL_ROWS = (1, 2), (1, 2, 4, 8, 32, 64)
KV_CACHE_BYTES = 1 << 31
TIMES = 20
"""Number of replays before the logits are compared again, so that rare races show up."""


@torch.inference_mode()
def compare(results: Results, name: str, model: Qwen2, ways: tuple[Way, ...], all_rows: tuple[int, ...]) -> None:
    """
    Raises:
        AssertionError: logits differ. Raised after everything was compared.
    """
    wrong, logits = list[str](), dict[int, Tensor]()
    for way in ways:
        served = ServedModel(model, max_running=all_rows[-1], kv_cache_bytes=KV_CACHE_BYTES, settings=way.settings)
        graphs = served.runner.decode_graphs
        assert graphs is not None, "nothing was captured; the log says why"
        torch.manual_seed(0)
        for cache in (*served.runner.cache.keys_NBGK, *served.runner.cache.values_NBGK):
            cache.normal_()
        for rows in all_rows:
            results.go_on()
            _, _, found_RV = replayed_logits(served, graphs, rows, random.Random(rows))
            first_RV, replay = found_RV.clone(), graphs.replays[graphs.size_for(rows)]
            for _ in range(TIMES):
                replay()
            if not torch.equal(found_RV, first_RV):
                wrong.append(f"{name}: logits of {rows}, {way.name}, are others when replayed again")
            before_RV = logits.get(rows, first_RV)
            error = float((first_RV.double() - before_RV.double()).norm() / before_RV.double().norm())
            if not error <= way.most:  # as NaN is
                wrong.append(f"{name}: logits of {rows}, {way.name}, are off by {error:.2g}")
            logits[rows] = first_RV
            results.add("settings", f"{name}: step of {rows}, {way.name}", median_s(replay, model.device) * 1000, "ms")
        served.runner.close()
    assert not wrong, "; ".join(wrong)
