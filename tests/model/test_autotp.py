"""A second opinion on tensor parallelism: DeepSpeed's AutoTP splits the same checkpoints over two ranks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint import Checkpoint
from parallel.topology import Topology
from tests.model.autotp import logits_by_autotp
from tests.model.driver import logits_of, seeded_prompts
from tests.model.oracle import SHAPES, Oracle, write_half
from tests.ranks import end_pools, run_ranks

SCALED: dict[str, dict[str, Any]] = {
    "0.5B": SHAPES["0.5B"],
    "1.5B": SHAPES["1.5B"],
    "7B": SHAPES["7B"] | {"hidden_size": 448, "intermediate_size": 2368},
    "72B": SHAPES["72B"] | {"hidden_size": 1024, "intermediate_size": 3696},
}


@pytest.fixture(autouse=True)
def _ranks_end_with_deepspeed_in_them() -> Iterator[None]:
    yield
    end_pools()


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALED)
def test_autotp_on_two_ranks_agrees_with_ours(name: str, tmp_path: Path) -> None:
    kind = write_half(SCALED[name], tmp_path)
    (prompt,) = seeded_prompts(SCALED[name]["vocab_size"], [23])
    wanted = Oracle.read(tmp_path, kind, torch.float32).logits(prompt)
    ours = run_ranks(Topology(tp=2), logits_of, tmp_path, prompt)
    theirs = run_ranks(Topology(tp=2), logits_by_autotp, tmp_path, prompt, timeout_s=250.0)
    with Checkpoint(tmp_path) as checkpoint:
        whole = sum(torch.Size(t.shape).numel() for tensor, t in checkpoint.tensors.items() if ".layers." in tensor)
    for mine, (their, num_parameters) in zip(ours, theirs, strict=True):
        assert num_parameters < 0.6 * whole, "AutoTP has not split the layers"
        torch.testing.assert_close(their, mine, atol=1e-4, rtol=0)
        torch.testing.assert_close(their, wanted, atol=1e-4, rtol=0)
        assert their.argmax(-1).tolist() == mine.argmax(-1).tolist()
        print(f"{name}: AutoTP against ours {(their - mine).abs().max():.1e}, {num_parameters} of {whole} parameters in the layers")
