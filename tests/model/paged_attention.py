"""Queries, keys and values of some works over a paged cache, for comparing attention backends."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model.attention.backend import AttentionBackend, AttentionConfig
from model.batch import ForwardBatch
from model.rope import Rotation
from parallel.axes import head_share

BLOCK_TOKENS = 16

Work = tuple[int, int]
"""(tokens in the cache already, tokens computed now)"""


def heads(query: int, kv: int, rank: int = 0, ranks: int = 1, *, head_dim: int = 32) -> AttentionConfig:
    share = head_share(query, kv, rank, ranks)
    return AttentionConfig(
        num_heads=len(share.query),
        num_kv_heads=len(share.kv),
        head_dim=head_dim,
        kv_of_query=share.kv_of_query,
        block_tokens=BLOCK_TOKENS,
    )


class Paged:
    """Random q, k, v for some works, and a cache whose blocks are scattered, with NaN where nothing has been written."""

    def __init__(self, config: AttentionConfig, works: Sequence[Work], dtype: torch.dtype, *, kv_dtype: torch.dtype | None = None) -> None:
        """``kv_dtype`` is the dtype of the cache; new keys and values are numbers that it represents exactly."""
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        counts = [-(-(behind + now) // config.block_tokens) for behind, now in works]
        num_blocks = sum(counts) + 3
        order = torch.randperm(num_blocks - 1, generator=generator) + 1  # block 0 pads the tables and belongs to no sequence
        tables = list(order[: sum(counts)].split(counts))
        shape = (num_blocks, config.block_tokens, config.num_kv_heads, config.head_dim)
        self.keys, self.values = torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
        slots = []
        for (behind, now), blocks in zip(works, tables, strict=True):
            places = (blocks.unsqueeze(1) * config.block_tokens + torch.arange(config.block_tokens)).flatten()
            for cache in (self.keys, self.values):
                cache.flatten(0, 1)[places[:behind]] = random(behind, config.num_kv_heads, config.head_dim)
            slots.append(places[behind : behind + now])
        total = sum(now for _, now in works)
        self.q = random(total, config.num_heads, config.head_dim)
        self.k = random(total, config.num_kv_heads, config.head_dim)
        self.v = random(total, config.num_kv_heads, config.head_dim)
        if kv_dtype is not None:
            self.k, self.v = self.k.to(kv_dtype).to(dtype), self.v.to(kv_dtype).to(dtype)
            self.keys, self.values = self.keys.to(kv_dtype), self.values.to(kv_dtype)
        starts = [0]
        for _, now in works:
            starts.append(starts[-1] + now)
        self.batch = ForwardBatch(
            tokens_T=torch.zeros(total, dtype=torch.int64),
            positions_T=torch.cat([torch.arange(behind, behind + now) for behind, now in works]),
            slots_T=torch.cat(slots),
            block_tables_SM=torch.nn.utils.rnn.pad_sequence(tables, batch_first=True).int(),
            lengths_S=torch.tensor([behind + now for behind, now in works], dtype=torch.int32),
            query_starts=tuple(starts),
            context_lengths=tuple(behind + now for behind, now in works),
            num_decodes=sum(now == 1 for _, now in works),
            logit_rows_R=torch.arange(0),
        )

    def to(self, device: torch.device) -> "Paged":
        """A copy on another device."""
        for name in ("q", "k", "v", "keys", "values"):
            setattr(self, name, getattr(self, name).to(device))
        moved = {name: value.to(device) for name, value in vars(self.batch).items() if isinstance(value, Tensor)}
        self.batch = replace(self.batch, **moved)
        return self

    def attend(self, backend: AttentionBackend) -> tuple[Tensor, Tensor, Tensor]:
        """The result, and the caches afterwards."""
        keys, values = self.keys.clone(), self.values.clone()
        backend.prepare(self.batch)
        heads = torch.cat((self.q, self.k, self.v), dim=1)
        return backend.attend(heads, unturned(heads), keys, values, self.batch), keys, values


def unturned(heads_TXK: Tensor) -> Rotation:
    """The identity rotation."""
    ones = heads_TXK.new_ones(heads_TXK.shape[0], 1, heads_TXK.shape[2] // 2)
    return Rotation(ones, torch.zeros_like(ones))
