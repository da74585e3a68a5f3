"""What a rank of the real model allocates, without its peers: loading needs no collectives."""

from pathlib import Path

import torch
from torch import nn

from model.checkpoint import Checkpoint, write_checkpoint
from model.config import ModelConfig
from model.formats import Formats
from model.load import load_model
from model.qwen2 import Qwen2
from model.qwen2_moe import Qwen2Moe
from parallel.groups import Group, ParallelGroups
from parallel.topology import Topology, TopologyAxis
from parallel.weight_format import Dense
from tests.serve.planning.live_bytes import tensors_of

BLOCK_TOKENS = 16


def groups_of(topology: Topology, rank: int) -> ParallelGroups:
    """The place of one rank; it cannot talk to others."""

    def group(axis: TopologyAxis) -> Group:
        ranks = topology.peers(rank, axis)
        return Group(axis=axis, rank=ranks.index(rank), size=len(ranks), ranks=ranks)

    return ParallelGroups(
        topology=topology,
        rank=rank,
        coordinates=topology.coordinates(rank),
        tp=group("tp"),
        dp=group("dp"),
        pp=group("pp"),
        ep=group("ep"),
        expert_tp=group("expert_tp"),
        stage=group("stage"),
        world=group("world"),
    )


def allocate(config: ModelConfig, topology: Topology, rank: int, *, redundant_experts: int = 0) -> Qwen2:
    """The rank's model with its tensors on torch's meta device: shapes of any size, and no memory."""
    kind = Qwen2 if config.moe is None else Qwen2Moe
    model = kind(
        config,
        groups_of(topology, rank),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        format=Dense(torch.bfloat16),
        backend="reference",
        dispatch="local",
        redundant_experts=redundant_experts,
        block_tokens=BLOCK_TOKENS,
    )
    for layer in {id(binding.layer): binding.layer for binding in model.bindings()}.values():
        layer.allocate(torch.device("meta"))
    return model


def write_checkpoint_of(folder: Path, raw: dict[str, object]) -> Path:
    """A checkpoint of zeros in bfloat16, with all the names that the model wants."""
    config = ModelConfig.from_dict(raw)
    shapes = {binding.name: binding.slot.shape for binding in allocate(config, Topology(), 0).bindings()}
    write_checkpoint(folder, {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, raw)
    return folder


def load(folder: Path, topology: Topology, rank: int, formats: Formats | None = None) -> Qwen2:
    with Checkpoint(folder) as checkpoint:
        model, _ = load_model(
            checkpoint,
            ModelConfig.from_checkpoint(folder),
            groups_of(topology, rank),
            device=torch.device("cpu"),
            dtype=torch.bfloat16,
            block_tokens=BLOCK_TOKENS,
            format=formats and formats.matrices,
            table_format=formats and formats.table,
        )
    return model


def tensor_bytes(model: nn.Module) -> int:
    """Of all tensors that hang anywhere in the model, each counted once."""
    return sum(tensor.nbytes for tensor in {id(found): found for found in tensors_of(model)}.values())
