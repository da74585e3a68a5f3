"""Compare steps with and without early launches (`runner.early_launches`: a kernel starts while the last one ends): bits and times."""

import random

import torch
from torch import Tensor

from benchmarks.gpu.graph_replays import replayed_logits
from benchmarks.gpu.models import ServedModel
from benchmarks.gpu.results import Results
from benchmarks.gpu.timing import median_s
from model.qwen2 import Qwen2

ROWS = (1, 2, 4, 8, 32, 64)
KV_CACHE_BYTES = 1 << 31
TIMES = 20
"""Number of replays before the logits are compared again, so that rare races show up."""


@torch.inference_mode()
def compare(results: Results, name: str, model: Qwen2) -> None:
    """
    Raises:
        AssertionError: logits differ. Raised after everything was compared.
    """
    wrong, logits = list[str](), dict[int, Tensor]()
    for begins_early in (False, True):
        served = ServedModel(model, max_running=ROWS[-1], kv_cache_bytes=KV_CACHE_BYTES, early_launches=begins_early)
        graphs = served.runner.decode_graphs
        assert graphs is not None, "nothing was captured; the log says why"
        torch.manual_seed(0)
        for cache in (*served.runner.cache.keys_NBGK, *served.runner.cache.values_NBGK):
            cache.normal_()
        for rows in ROWS:
            results.go_on()
            _, _, found_RV = replayed_logits(served, graphs, rows, random.Random(rows))
            first_RV, replay = found_RV.clone(), graphs.replays[graphs.size_for(rows)]
            for _ in range(TIMES):
                replay()
            if not torch.equal(found_RV, first_RV):
                wrong.append(f"{name}: logits of {rows} are others when replayed again, {begins_early=}")
            if not torch.equal(first_RV, logits.setdefault(rows, first_RV)):
                wrong.append(f"{name}: launches that begin early change logits of {rows}")
            results.add(
                "early", f"{name}: step of {rows}, {'early' if begins_early else 'as ever'}", median_s(replay, model.device) * 1000, "ms"
            )
        served.runner.close()
    assert not wrong, "; ".join(wrong)
