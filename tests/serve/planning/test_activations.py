"""Planned activations are the tensors that are alive together in the heaviest step of a real rank."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.executor import Capacity
from engine.run.runner import Runner
from engine.run.sampling import sampler
from engine.run.sampling.sampler import Sampler
from engine.run.warm_up import full_step
from model.attention.backend import AttentionConfig
from model.attention.rotate_heads import rotate_heads
from model.batch import ForwardBatch
from model.kv_cache import KvCache
from model.rope import Rotation
from parallel.topology import Topology
from serve.planning.memory import activation_bytes
from serve.planning.shape import shape_of_config
from tests.serve.planning.allocated import BLOCK_TOKENS, load, write_checkpoint_of
from tests.serve.planning.live_bytes import LiveBytes, tensors_of
from tests.serve.planning.plan_inputs import config, moe


class NoAttention:
    """An attention kernel without a workspace, as the planner assumes it."""

    def __init__(self, config: AttentionConfig) -> None:
        self.config = config

    def prepare(self, batch: ForwardBatch) -> None: ...

    def attend(self, heads_TXK: Tensor, rotation: Rotation, keys: Tensor, values: Tensor, batch: ForwardBatch) -> Tensor:
        q_THK, _, _ = rotate_heads(heads_TXK, rotation, self.config)
        return torch.zeros_like(q_THK)


def heaviest_step(raw: dict[str, object], folder: Path, *, tokens: int, rows: int) -> int:
    """Bytes alive at its worst moment, measured on a rank alone."""
    model = load(write_checkpoint_of(folder, raw), Topology(), 0)
    backend = NoAttention(model.attention_config)
    model.backend = backend
    for layer in model.layers:
        layer.attention.backend = backend
    num_blocks, device = tokens // BLOCK_TOKENS, torch.device("cpu")
    cache = KvCache(model.kv_layout, num_blocks, device)
    capacity = Capacity(num_blocks=num_blocks, block_tokens=BLOCK_TOKENS, max_context_tokens=tokens)
    sampling = Sampler(vocab_size=model.config.vocab_size, device=device)
    runner = Runner(model=model, cache=cache, capacity=capacity, sampler=sampling, device=device)
    plan = full_step(max_step_tokens=tokens, max_running=rows, num_blocks=num_blocks, block_tokens=BLOCK_TOKENS)
    with LiveBytes([*tensors_of(model), *cache.keys_NBGK, *cache.values_NBGK]) as live:
        runner.run(plan)
    return live.peak


def planned(raw: dict[str, object], *, tokens: int, rows: int) -> int:
    topology = Topology()
    return activation_bytes(shape_of_config(raw, name="x"), topology, topology.coordinates(0), tokens=tokens, rows=rows)


# Two layers, as the last one's MLP is for the tokens that sample alone.
@pytest.mark.parametrize(
    "raw",
    [
        config(14, 2, 896, 4864, 500, 2),  # its MLP is the hungriest
        config(14, 2, 896, 400, 500, 2),  # its norm and attention are
        config(8, 2, 512, 64, 500, 2, **moe(16, 8, 64, 128)),  # its routed experts are
        config(8, 2, 512, 64, 500, 2, **moe(16, 1, 64, 4096)),  # its shared expert is
    ],
    ids=["mlp", "attention", "routed", "shared"],
)
def test_a_layer_needs_what_is_planned(raw: dict[str, object], tmp_path: Path) -> None:
    measured = heaviest_step(raw, tmp_path, tokens=512, rows=16)
    assert planned(raw, tokens=512, rows=16) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("vocab", "rows"), [(20_000, 64), (151_936, 64)])
def test_sampling_needs_no_more_than_is_planned(vocab: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By plain torch, as where there are no kernels; with the CPU kernels it needs less."""
    monkeypatch.setattr(sampler, "cpu_kernels_for", lambda _logits: None)
    raw = config(2, 1, 16, 16, vocab, 1)
    measured = heaviest_step(raw, tmp_path, tokens=rows * 2, rows=rows)
    assert measured <= planned(raw, tokens=rows * 2, rows=rows) <= 1.5 * measured
