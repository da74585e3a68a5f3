"""Random inputs for checks of attention: a batch of works, and a KV cache whose unused blocks contain NaN.

T rows, H query heads, G KV heads, K head width, S works, M the most blocks of a work.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.gpu.kernels.checks import Checks
from model.attention.backend import AttentionConfig
from model.batch import ForwardBatch
from model.rope import Rotation

if TYPE_CHECKING:
    from model.attention.cuda import CudaAttention  # triton

BLOCK_TOKENS = 16
Heads = tuple[int, int, int]
"""(H, G, K)"""


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """Attention over a batch, with all of its inputs."""

    run: Callable[[], Tensor]
    fused: Tensor
    """(T, H + 2 G, K)"""
    rotation: Rotation
    keys: Tensor
    values: Tensor
    tables: Tensor
    slots: Tensor
    """(T): slots of the new tokens' keys and values."""
    starts: list[int]
    """Index of each work's first token."""


def attention_case(
    checks: Checks, works: list[tuple[int, int]], heads: Heads, kv_dtype: torch.dtype, kind: "type[CudaAttention] | None" = None
) -> AttentionCase:
    """Inputs for works (tokens in the cache, new tokens) and a backend ``kind`` (None: our own). Blocks are in random order; unused blocks
    and the new tokens' slots contain NaN."""
    from model.attention.cuda import CudaAttention

    num_heads, num_kv_heads, head_dim = heads
    batch, strangers = _batch(checks.device, works)
    num_tokens, num_blocks = batch.num_tokens, max(strangers[1], int(batch.block_tables_SM.max())) + 1
    caches = [checks.random(num_blocks, BLOCK_TOKENS, num_kv_heads, head_dim) for _ in range(2)]
    for cache in caches:
        cache[strangers] = torch.nan
        cache.flatten(0, 1)[batch.slots_T] = torch.nan
    keys, values = (cache.to(kv_dtype) for cache in caches)
    fused = checks.random(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    angles = torch.rand(num_tokens, 1, head_dim // 2, device=checks.device) * 2 * math.pi
    rotation = Rotation(angles.cos().to(checks.dtype), angles.sin().to(checks.dtype))
    group = num_heads // num_kv_heads
    config = AttentionConfig(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_tokens=BLOCK_TOKENS,
        kv_of_query=tuple(head // group for head in range(num_heads)),
    )  # fmt: skip
    backend = (kind or CudaAttention)(config, checks.device)
    backend.prepare(batch)
    return AttentionCase(
        run=lambda: backend.attend(fused, rotation, keys, values, batch),
        fused=fused,
        rotation=rotation,
        keys=keys,
        values=values,
        tables=batch.block_tables_SM,
        slots=batch.slots_T,
        starts=list(batch.query_starts),
    )


def _batch(device: torch.device, works: list[tuple[int, int]]) -> tuple[ForwardBatch, list[int]]:
    """A batch of works (tokens in the cache, new tokens), and two unused blocks: the first one, and one among the others."""
    counts = [-(-(behind + new) // BLOCK_TOKENS) for behind, new in works]
    order = torch.randperm(sum(counts) + 1) + 1
    tables_SM = pad_sequence(list(order[: sum(counts)].split(counts)), batch_first=True).int()
    starts, slots = [0], []
    for number, (behind, new) in enumerate(works):
        places = torch.arange(behind, behind + new)
        slots.append(tables_SM[number, places // BLOCK_TOKENS].long() * BLOCK_TOKENS + places % BLOCK_TOKENS)
        starts.append(starts[-1] + new)
    lengths = tuple(behind + new for behind, new in works)
    batch = ForwardBatch(
        tokens_T=torch.zeros(starts[-1], dtype=torch.int64),
        positions_T=torch.zeros(starts[-1], dtype=torch.int64),
        slots_T=torch.cat(slots).to(device),
        block_tables_SM=tables_SM.to(device),
        lengths_S=torch.tensor(lengths, dtype=torch.int32, device=device),
        query_starts=tuple(starts),
        context_lengths=lengths,
        num_decodes=len(works) if all(new == 1 for _, new in works) else 0,
        logit_rows_R=torch.arange(0),
    )
    return batch, [0, int(order[-1])]
