"""Attention for CPUs with torch's fused attention over gathered blocks.

Sequences that compute one token are batched; the others are computed one by one, in tiles of queries. T tokens, S sequences, H query
heads, G KV heads, P query heads of one KV head, K head width, N blocks, B tokens per block, L positions of a context.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.backend import AttentionConfig, GraphBreak
from model.attention.rotate_heads import rotate_heads
from model.attention.write_kv import write_kv
from model.batch import ForwardBatch
from model.rope import Rotation

MAX_PADDING = 1 / 4
"""Decoding sequences are batched while padding is at most this fraction of the longest ..."""
FREE_PADDING_TOKENS = 64
"""... or at most so many tokens: another call costs about as much as that padding."""
TILE_TOKENS = 512
"""Queries per call if a mask is needed. Limits the mask's memory, and keys after a tile are not computed."""


@dataclass(frozen=True)
class _DecodeGroup:
    """Decoding sequences of similar context length, padded to the longest."""

    rows: Tensor | slice
    """Their indices among the batch's sequences, which are also the indices of their tokens. A slice avoids a copy."""
    num_sequences: int
    blocks: Tensor
    """Their blocks, sequence by sequence, each with as many as the longest has."""
    longest: int
    padding: Tensor | None
    """Positions after a sequence's end, as indices into all tokens of ``blocks``. None: there are none."""
    mask_S11L: Tensor | None
    """True for positions within the sequence."""


class CpuAttention:
    """See the module's docstring.

    If ranks share heads unevenly (`AttentionConfig.is_uniform` is false), the query heads of a decode are padded to the largest group at
    run time; weights and cache are not padded.
    """

    kv_dtypes: tuple[torch.dtype, ...] = ()
    supports_capture = supports_graph_breaks = False
    graph_break: GraphBreak | None = None

    def __init__(self, config: AttentionConfig) -> None:
        self.config = config
        self._heads_of_kv = _heads_of_kv(config)
        self._group_size = max(len(heads) for heads in self._heads_of_kv)
        self._place_H = torch.tensor(
            [kv * self._group_size + head - heads.start for kv, heads in enumerate(self._heads_of_kv) for head in heads]
        )
        self._groups: list[_DecodeGroup] = []

    def prepare(self, batch: ForwardBatch) -> None:
        self._groups = [
            _decode_group(rows, batch, self.config.block_tokens) for rows in group_by_length(batch.context_lengths[: batch.num_decodes])
        ]

    def attend(self, heads_TXK: Tensor, rotation: Rotation, keys_NBGK: Tensor, values_NBGK: Tensor, batch: ForwardBatch) -> Tensor:
        q_THK, k_TGK, v_TGK = rotate_heads(heads_TXK, rotation, self.config)
        write_kv(k_TGK, v_TGK, keys_NBGK, values_NBGK, batch.slots_T)
        out_THK = torch.empty_like(q_THK)
        for group in self._groups:
            out_THK[group.rows] = self._decode(q_THK[group.rows], keys_NBGK, values_NBGK, group)
        self.prefill(q_THK, k_TGK, v_TGK, keys_NBGK, values_NBGK, batch, out_THK)
        return out_THK

    def prefill(
        self,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        keys_NBGK: Tensor,
        values_NBGK: Tensor,
        batch: ForwardBatch,
        out_THK: Tensor,
    ) -> None:
        """Compute the sequences with several new tokens, and write the result to ``out_THK``. Their K and V are already in the cache."""
        for sequence in range(batch.num_decodes, batch.num_sequences):
            tokens = slice(batch.query_starts[sequence], batch.query_starts[sequence + 1])
            length = batch.context_lengths[sequence]
            q_PHK, keys_LGK, values_LGK = q_THK[tokens], k_TGK[tokens], v_TGK[tokens]
            if length > q_PHK.shape[0]:  # otherwise its whole context was computed in this step
                blocks = batch.block_tables_SM[sequence, : -(-length // self.config.block_tokens)]
                keys_LGK, values_LGK = (cache.index_select(0, blocks).flatten(0, 1)[:length] for cache in (keys_NBGK, values_NBGK))
            self._prefill(q_PHK, keys_LGK, values_LGK, out_THK[tokens])

    def _decode(self, q_SHK: Tensor, keys_NBGK: Tensor, values_NBGK: Tensor, group: _DecodeGroup) -> Tensor:
        keys_SGLK = _gather(keys_NBGK, group)
        values_SGLK = _gather(values_NBGK, group)
        # The query heads of one KV head take the place of queries, so that K and V are read once for all of them.
        q_SGPK = self._by_kv_head(q_SHK)
        out_SGPK = F.scaled_dot_product_attention(q_SGPK, keys_SGLK, values_SGLK, attn_mask=group.mask_S11L)
        return self._by_query_head(out_SGPK)

    def _by_kv_head(self, q_SHK: Tensor) -> Tensor:
        num_sequences, _, width = q_SHK.shape
        shape = (num_sequences, self.config.num_kv_heads, self._group_size, width)
        if self.config.is_uniform:
            return q_SHK.view(shape)
        q_SGPK = q_SHK.new_zeros(shape)
        q_SGPK.flatten(1, 2).index_copy_(1, self._place_H, q_SHK)
        return q_SGPK

    def _by_query_head(self, out_SGPK: Tensor) -> Tensor:
        out = out_SGPK.flatten(1, 2)
        return out if self.config.is_uniform else out.index_select(1, self._place_H)

    def _prefill(self, q_PHK: Tensor, keys_LGK: Tensor, values_LGK: Tensor, out_PHK: Tensor) -> None:
        """One sequence's new tokens (P of them) against its whole context, one KV head at a time, so that K and V need not be repeated."""
        for kv_head, heads in enumerate(self._heads_of_kv):
            head_slice = slice(heads.start, heads.stop)
            q_1hPK = q_PHK[:, head_slice].transpose(0, 1).unsqueeze(0)
            keys_1hLK = keys_LGK[:, kv_head].expand(1, len(heads), -1, -1)
            values_1hLK = values_LGK[:, kv_head].expand(1, len(heads), -1, -1)
            if self.config.is_causal:
                out_1hPK = _causal(q_1hPK, keys_1hLK, values_1hLK)
            else:
                out_1hPK = F.scaled_dot_product_attention(q_1hPK, keys_1hLK, values_1hLK)
            out_PHK[:, head_slice] = out_1hPK.squeeze(0).transpose(0, 1)


def group_by_length(lengths: tuple[int, ...]) -> list[list[int]]:
    """Indices of ``lengths``, grouped so that padding each group to its longest wastes little.

    lengths 1000, 900, 20, 4000, 60:   [3], [0, 1], [4, 2]
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if groups:
            longest = lengths[groups[-1][0]]
            if longest - lengths[index] <= max(FREE_PADDING_TOKENS, longest * MAX_PADDING):
                groups[-1].append(index)
                continue
        groups.append([index])
    return groups


def _heads_of_kv(config: AttentionConfig) -> list[range]:
    """The query heads of each KV head, which are adjacent."""
    starts = [config.kv_of_query.index(kv_head) for kv_head in range(config.num_kv_heads)]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], config.num_heads], strict=True)]


def _decode_group(members: list[int], batch: ForwardBatch, block_tokens: int) -> _DecodeGroup:
    members = sorted(members)
    rows = slice(0, batch.num_decodes) if len(members) == batch.num_decodes else torch.tensor(members)
    lengths_S = torch.tensor([batch.context_lengths[member] for member in members])
    longest = int(lengths_S.max())
    blocks = batch.block_tables_SM[rows, : -(-longest // block_tokens)].flatten()
    if int(lengths_S.min()) == longest:
        return _DecodeGroup(rows, len(members), blocks, longest, None, None)
    positions = torch.arange(-(-longest // block_tokens) * block_tokens)
    behind_SL = positions >= lengths_S.unsqueeze(1)
    padding = behind_SL.flatten().nonzero().squeeze(1)
    return _DecodeGroup(rows, len(members), blocks, longest, padding, ~behind_SL[:, None, None, :longest])


def _gather(cache_NBGK: Tensor, group: _DecodeGroup) -> Tensor:
    """(S, G, L, K), zeroed after each sequence's end: another sequence's block may hold NaN, and NaN times a weight of zero is NaN. A
    fault must stay within its sequence."""
    gathered_SLGK = cache_NBGK.index_select(0, group.blocks).view(group.num_sequences, -1, *cache_NBGK.shape[2:])
    if group.padding is not None:
        gathered_SLGK.flatten(0, 1).index_fill_(0, group.padding, 0)
    return gathered_SLGK[:, : group.longest].transpose(1, 2)


def _causal(q_1hPK: Tensor, keys_1hLK: Tensor, values_1hLK: Tensor) -> Tensor:
    """The P queries are the last of the L positions."""
    num_queries, length = q_1hPK.shape[2], keys_1hLK.shape[2]
    if num_queries == length:
        return F.scaled_dot_product_attention(q_1hPK, keys_1hLK, values_1hLK, is_causal=True)
    tiles = []
    for start, stop in _tiles(num_queries):
        visible = length - num_queries + stop
        mask_PL = torch.ones(stop - start, visible, dtype=torch.bool).tril(visible - (stop - start))
        seen = slice(0, visible)
        tiles.append(F.scaled_dot_product_attention(q_1hPK[:, :, start:stop], keys_1hLK[:, :, seen], values_1hLK[:, :, seen], mask_PL))
    return torch.cat(tiles, dim=2)


def _tiles(num_queries: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_queries, TILE_TOKENS):
        yield start, min(start + TILE_TOKENS, num_queries)
