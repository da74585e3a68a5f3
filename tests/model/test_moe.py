"""The parts of a sparse MLP that every rank computes."""

import torch

from model.config import MoeConfig
from model.moe import ExpertRouter
from parallel.weight_format import Dense


def test_the_router_is_the_same_on_every_rank() -> None:
    config = MoeConfig(
        num_experts=4, experts_per_token=2, expert_intermediate_size=8, shared_intermediate_size=8, renormalise=False, sparse_step=1,
        dense_layers=(),
    )  # fmt: skip
    router = ExpertRouter(config, 8, torch.bfloat16, Dense(torch.bfloat16))
    assert router.projection.format == Dense(torch.bfloat16, is_replicated=True)
