"""Attention for CPUs with our own kernels, for decode and prefill, which read blocks in place.

T tokens, S sequences, H query heads, G KV heads, K head width, N blocks, B tokens per block, M most blocks of a sequence.
"""

import torch
from torch import Tensor

from model.attention.backend import AttentionConfig, GraphBreak
from model.attention.cpu import CpuAttention
from model.attention.rotate_heads import rotate_heads
from model.batch import ForwardBatch
from model.rope import Rotation
from parallel.native.library import Native, num_threads
from parallel.native.sublayers import StepBatch


class NativeAttention:
    """A sequence is summed in the order of its positions, whatever else is in the batch. Ranks may share heads unevenly.

    With a KV cache in bfloat16, queries and attention weights are rounded to bfloat16 in products; scores, softmax and sums are in
    float32.
    """

    supports_capture = supports_graph_breaks = False
    graph_break: GraphBreak | None = None

    def __init__(self, config: AttentionConfig, library: Native) -> None:
        self.config, self._library = config, library
        self.kv_dtypes = tuple(dtype for dtype in library.prefill if dtype != torch.float32) if config.is_causal else ()
        self._torch = CpuAttention(config)
        starts = [config.kv_of_query.index(kv) for kv in range(config.num_kv_heads)]
        counts = [config.kv_of_query.count(kv) for kv in range(config.num_kv_heads)]
        self.heads_G3 = torch.tensor(list(zip(starts, counts, range(config.num_kv_heads), strict=True)))
        """For each KV head: its first query head, how many it has, and its own index."""
        self._lengths_S = torch.empty(0, dtype=torch.int64)
        self._starts_S = torch.empty(0, dtype=torch.int64)
        self._tables_SM = torch.empty(0, 0, dtype=torch.int32)

    def prepare(self, batch: ForwardBatch) -> None:
        self._lengths_S = torch.tensor(batch.context_lengths, dtype=torch.int64)
        self._starts_S = torch.tensor(batch.query_starts, dtype=torch.int64)
        self._tables_SM = batch.block_tables_SM.contiguous()

    def step_inputs(self, rotation: Rotation, batch: ForwardBatch) -> StepBatch:
        """The inputs of a fused kernel: what `prepare` computed, and the rotation."""
        cos, sin = rotation.cos_T1F.contiguous(), rotation.sin_T1F.contiguous()
        return StepBatch(cos, sin, batch.slots_T.contiguous(), self._tables_SM, self._starts_S, self._lengths_S, batch.num_decodes)

    def attend(self, heads_TXK: Tensor, rotation: Rotation, keys_NBGK: Tensor, values_NBGK: Tensor, batch: ForwardBatch) -> Tensor:
        if heads_TXK.dtype != torch.float32 or not self.config.is_causal:  # our kernels support only the causal mask
            self._torch.prepare(batch)
            return self._torch.attend(heads_TXK, rotation, keys_NBGK, values_NBGK, batch)
        q_THK, k_TGK, v_TGK = rotate_heads(heads_TXK, rotation, self.config)
        self._write(k_TGK, v_TGK, keys_NBGK, values_NBGK, batch.slots_T)
        q_THK = q_THK.contiguous()
        out_THK = torch.empty_like(q_THK)
        if batch.num_decodes:
            self._decode(q_THK, keys_NBGK, values_NBGK, out_THK, batch.num_decodes)
        if batch.num_decodes < batch.num_sequences:
            self._prefill(q_THK, keys_NBGK, values_NBGK, out_THK, batch.num_decodes)
        return out_THK

    def _write(self, k_TGK: Tensor, v_TGK: Tensor, keys_NBGK: Tensor, values_NBGK: Tensor, slots_T: Tensor) -> None:
        num_tokens, num_heads, width = k_TGK.shape
        k_TGK, v_TGK = _heads_together(k_TGK), _heads_together(v_TGK)
        self._library.write_kv[keys_NBGK.dtype](
            *(k_TGK.data_ptr(), v_TGK.data_ptr(), k_TGK.stride(0), v_TGK.stride(0), slots_T.data_ptr()),
            *(keys_NBGK.data_ptr(), values_NBGK.data_ptr(), num_tokens, num_heads * width, num_threads()),
        )

    def _decode(self, q_THK: Tensor, keys_NBGK: Tensor, values_NBGK: Tensor, out_THK: Tensor, num_sequences: int) -> None:
        """The first ``num_sequences`` tokens, each of a different sequence."""
        _, num_heads, width = q_THK.shape
        self._library.decode[keys_NBGK.dtype](
            *(q_THK.data_ptr(), keys_NBGK.data_ptr(), values_NBGK.data_ptr(), self._tables_SM.data_ptr(), self._lengths_S.data_ptr()),
            *(self.heads_G3.data_ptr(), out_THK.data_ptr(), num_sequences, num_heads, self.config.num_kv_heads, width),
            *(self._tables_SM.shape[1], self.config.block_tokens, num_threads()),
        )

    def _prefill(self, q_THK: Tensor, keys_NBGK: Tensor, values_NBGK: Tensor, out_THK: Tensor, first: int) -> None:
        """The sequences from ``first`` on."""
        tables_SM, starts_S, lengths_S = self._tables_SM[first:], self._starts_S[first:], self._lengths_S[first:]
        _, num_heads, width = q_THK.shape
        self._library.prefill[keys_NBGK.dtype](
            *(q_THK.data_ptr(), keys_NBGK.data_ptr(), values_NBGK.data_ptr(), tables_SM.data_ptr(), starts_S.data_ptr()),
            *(lengths_S.data_ptr(), self.heads_G3.data_ptr(), out_THK.data_ptr(), len(lengths_S), num_heads),
            *(self.config.num_kv_heads, width, tables_SM.shape[1], self.config.block_tokens, num_threads()),
        )


def _heads_together(x_TGK: Tensor) -> Tensor:
    return x_TGK if x_TGK.stride()[1:] == (x_TGK.shape[2], 1) else x_TGK.contiguous()
