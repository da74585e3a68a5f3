"""A model computed only with the CUDA kernels, against the same model without them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.engine import Engine
from engine.request import Request, SamplingParams
from engine.run.local_executor import LocalExecutor
from engine.run.warm_up import capture
from model.attention.backend import AttentionBackend, AttentionConfig
from model.formats import Formats
from parallel.quantised_format import Kind, QuantisedFormat
from parallel.weight_format import MAX_GEMV_ROWS, Dense, WeightFormat
from tests.engine.run.capturable_ranks import runner_of
from tests.engine.run.test_end_to_end import answer, serve
from tests.engine.run.tiny_models import engine_config, float32_config, write_dense
from tests.fakes.graphs import RecordedGraphs

PROMPTS = ((5, 9, 1), tuple(range(40, 61)))


def answers(folder: Path, graphs: RecordedGraphs | None = None) -> list[tuple[int, ...]]:
    """With ``graphs``, decode-only steps are replayed from them."""
    config = engine_config(max_step_tokens=16, max_running=3, prefix_cache=False)
    executor = LocalExecutor.open(
        folder, runner_config=float32_config(num_blocks=100, block_tokens=config.block_tokens), engine_config=config
    )
    if graphs is not None:
        capture(runner_of(executor), graphs, config)
    sampling = SamplingParams(temperature=0.0, max_tokens=5)
    events = serve(Engine(executor, config), [Request(id=str(i), prompt=prompt, sampling=sampling) for i, prompt in enumerate(PROMPTS)])
    executor.close()
    return [answer(events[str(i), 0]) for i in range(len(PROMPTS))]


@pytest.mark.usefixtures("exact_fp8")
@pytest.mark.parametrize("kind", [None, "int8", "int4", pytest.param("int4_zeros", marks=pytest.mark.slow), "fp8"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU, and the model of this test on the CPU")
def test_it_answers_the_same(kind: Kind | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from model.attention.cuda import CudaAttention
    from parallel.cuda import gated_gemv
    from parallel.cuda.autotune import Tile
    from parallel.cuda.elementwise import CudaElementwise
    from parallel.cuda.quantised_matmul import multiply

    folder = write_dense(tmp_path)
    plain: WeightFormat = Dense(torch.float32)
    formats = Formats(QuantisedFormat(kind, torch.float32), QuantisedFormat("int8", torch.float32)) if kind else Formats(plain, plain)
    monkeypatch.setattr("engine.run.start.choose_formats", lambda *_args, **_options: formats)
    wanted = answers(folder)

    def cuda(device: torch.device, config: AttentionConfig, _name: str, _dtype: torch.dtype) -> AttentionBackend:
        return CudaAttention(config, device)

    monkeypatch.setattr("model.qwen2.choose_backend", cuda)
    for module in ("model.layers", "model.rope"):
        monkeypatch.setattr(f"{module}.elementwise_kernels_for", lambda _x: CudaElementwise())
    monkeypatch.setattr("parallel.quantised_format.multiply_reference", multiply)
    monkeypatch.setattr("model.layers.uses_gemv", lambda x: len(x) <= MAX_GEMV_ROWS)
    monkeypatch.setattr(gated_gemv, "autotuner_for", lambda _device: SimpleNamespace(best=lambda *_product: Tile(0, 2, 2, 1)))
    monkeypatch.setattr(gated_gemv, "_is_enabled", True)
    assert answers(folder) == wanted
    if kind is None:
        graphs = RecordedGraphs()
        assert answers(folder, graphs) == wanted
        assert graphs.num_replays > 4
