"""CPU ranks whose steps can be captured: graphs from `tests.fakes.graphs`, and attention that reads its lengths as a kernel would."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import StepPlan
from engine.run.local_executor import LocalExecutor
from engine.run.runner import Runner
from engine.run.warm_up import capture
from model.attention.backend import AttentionConfig, GraphBreak
from model.attention.reference import ReferenceAttention, attend_one_head
from model.attention.rotate_heads import rotate_heads
from model.attention.write_kv import write_kv
from model.batch import ForwardBatch
from model.formats import Formats
from model.rope import Rotation
from parallel import collectives
from parallel.experts import RoutedExperts
from parallel.groups import Group
from parallel.weight_format import Dense
from tests.engine.run.tiny_models import engine_config, float32_config
from tests.fakes.graphs import RecordedGraphs, kernel


class CapturableAttention(ReferenceAttention):
    """The reference backend, with attention of a decode-only step as one kernel."""

    supports_capture = supports_graph_breaks = True

    def attend(self, heads_TXK: Tensor, rotation: Rotation, keys_NBGK: Tensor, values_NBGK: Tensor, batch: ForwardBatch) -> Tensor:
        if self.graph_break is not None:
            q_THK, k_TGK, v_TGK = rotate_heads(heads_TXK, rotation, self.config)
            self.graph_break.q_THK.copy_(q_THK)
            _write(k_TGK, v_TGK, keys_NBGK, values_NBGK, batch.slots_T)
            self.graph_break.split(partial(self._between, self.graph_break, keys_NBGK, values_NBGK))
            return self.graph_break.out_THK
        if batch.num_decodes < batch.num_sequences:
            return super().attend(heads_TXK, rotation, keys_NBGK, values_NBGK, batch)
        q_SHK, k_SGK, v_SGK = rotate_heads(heads_TXK, rotation, self.config)
        out_SHK = torch.empty_like(q_SHK)
        _decode(
            q_SHK, k_SGK, v_SGK, keys_NBGK, values_NBGK, batch.slots_T, batch.block_tables_SM, batch.lengths_S, out_SHK, config=self.config
        )  # fmt: skip
        return out_SHK

    def _between(self, graph_break: GraphBreak, keys_NBGK: Tensor, values_NBGK: Tensor, batch: ForwardBatch) -> None:
        """Padding reads numbers that were never computed."""
        graph_break.q_THK[batch.num_tokens :] = torch.nan
        graph_break.out_THK.fill_(torch.nan)
        self.attend_to_written(graph_break.q_THK, keys_NBGK, values_NBGK, batch, graph_break.out_THK)


@kernel
def _write(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    real = slots >= 0
    write_kv(k[real], v[real], keys, values, slots[real])


@kernel
def _decode(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, tables: Tensor, lengths: Tensor, out: Tensor,
    *, config: AttentionConfig,
) -> None:  # fmt: skip
    real = slots >= 0
    write_kv(k[real], v[real], keys, values, slots[real])
    for row, length in enumerate(lengths.tolist()):
        blocks = tables[row, : -(-length // config.block_tokens)].long()
        seen = [cache[blocks].flatten(0, 1)[:length] for cache in (keys, values)]
        for head, kv_head in enumerate(config.kv_of_query):
            out[row, head] = attend_one_head(q[row : row + 1, head], *(some[:, kv_head] for some in seen), is_causal=True)[0]


def use_capturable_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the parts that a model has on a GPU: unquantised matrices, one kernel for attention and one for all experts, no CPU kernels."""
    plain = Formats(Dense(torch.float32), Dense(torch.float32))
    monkeypatch.setattr("engine.run.start.choose_formats", lambda *_args, **_options: plain)
    monkeypatch.setattr("model.qwen2.choose_backend", lambda _device, config, *_: CapturableAttention(config))
    for module in ("model.layers", "model.rope"):
        monkeypatch.setattr(f"{module}.elementwise_kernels_for", lambda _x: None)
    monkeypatch.setattr(RoutedExperts, "_compute", lambda self, x, ids, weights: self._on_cuda()(x, ids, weights))


def open_executor(folder: Path, *, num_blocks: int = 400, runs_ahead: bool = False, **changes: object) -> LocalExecutor:
    """An executor whose steps are launched. ``runs_ahead``: plans may lack tokens, as on CUDA."""
    config = engine_config(**changes)
    runner_config = float32_config(num_blocks=num_blocks, block_tokens=config.block_tokens)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("engine.run.memory._run_ahead", lambda _model, _config: runs_ahead)
        return LocalExecutor.open(folder, runner_config=runner_config, engine_config=config)


def runner_of(executor: LocalExecutor) -> Runner:
    assert executor._runner is not None
    return executor._runner


def capture_steps(executor: LocalExecutor, config: EngineConfig, *, prompts: bool = False, prompts_ahead: bool = False) -> RecordedGraphs:
    """Capture decode-only steps, and with ``prompts`` others too, so that they are replayed from now on."""
    graphs = RecordedGraphs()
    capture(runner_of(executor), graphs, config, prompts=prompts, prompts_ahead=prompts_ahead)
    graphs.num_replays = 0
    return graphs


def engine_over(executor: LocalExecutor, config: EngineConfig) -> Engine:
    """A new engine for an executor that may have served another one."""
    executor.submit(StepPlan(0, (), closed=tuple(range(1000)))).result()
    return Engine(executor, config)


def record_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives as on a device: executed again at every replay, on the same memory."""

    @kernel
    def sum_into(x: Tensor, out: Tensor, *, group: Group) -> None:
        out.copy_(collectives.all_reduce(x.clone(), group))

    @kernel
    def gather_into(x: Tensor, out: Tensor, *, group: Group, dim: int, sizes: Sequence[int]) -> None:
        out.copy_(collectives.all_gather(x, group, dim, sizes))

    @kernel
    def write_over(x: Tensor, *, root: int, group: Group) -> None:
        collectives.broadcast(x, root, group)

    def broadcast(x: Tensor, root: int, group: Group) -> Tensor:
        assert x.is_contiguous()
        write_over(x, root=root, group=group)
        return x

    def all_reduce(x: Tensor, group: Group) -> Tensor:
        out = torch.empty_like(x)
        sum_into(x, out, group=group)
        return out

    def all_gather(x: Tensor, group: Group, dim: int, sizes: Sequence[int]) -> Tensor:
        shape = list(x.shape)
        shape[dim] = sum(sizes)
        out = x.new_empty(shape)
        gather_into(x, out, group=group, dim=dim, sizes=sizes)
        return out

    monkeypatch.setattr("parallel.linear.all_reduce", all_reduce)
    monkeypatch.setattr("parallel.embedding.all_reduce", all_reduce)
    monkeypatch.setattr("parallel.dispatch.all_reduce", all_reduce)
    monkeypatch.setattr("parallel.embedding.all_gather", all_gather)
    monkeypatch.setattr("engine.run.last_tokens.broadcast", broadcast)
