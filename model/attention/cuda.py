"""Attention on CUDA devices: our own kernels over blocks of KV where they lie.

Sequences that compute one token go through the decode kernel, all in one launch; the others through the prefill kernel,
cut into tiles of tokens, all in another.
"""

from functools import partial
from itertools import chain

import torch
from torch import Tensor

from model.attention.backend import AttentionConfig, Cut
from model.batch import ForwardBatch
from model.rope import Rotation
from parallel.cuda.elementwise import rotate_and_write
from parallel.cuda.paged import Heads
from parallel.cuda.paged_decode import decode
from parallel.cuda.paged_prefill import PrefillTiles, prefill, tokens_per_tile
from parallel.rounding import FP8, FP8_CAPABILITY

PROGRAMS_PER_PROCESSOR = 2
"""Decode programs that every multiprocessor of the device should have to do, ..."""
MAX_PARTS = 128
"""... as far as cutting contexts into so many parts gives them."""
SIMULATED_PROCESSORS = 8
"""Where Triton's interpreter stands in for a device."""


class CudaAttention:
    """See the file's first lines."""

    kv_dtypes: tuple[torch.dtype, ...] = (FP8,)
    can_be_captured = can_be_cut = True
    cut: Cut | None = None

    def __init__(self, config: AttentionConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        groups = [config.kv_of_query.count(kv_head) for kv_head in range(config.num_kv_heads)]
        firsts = [config.kv_of_query.index(kv_head) for kv_head in range(config.num_kv_heads)]
        self._heads = Heads(first_G=self._upload(firsts), count_G=self._upload(groups), largest_group=max(groups))
        on_device = device.type == "cuda"
        if on_device and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
            self.kv_dtypes = ()
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count if on_device else SIMULATED_PROCESSORS

    def prepare(self, batch: ForwardBatch) -> None:
        if batch.num_decodes < batch.num_sequences:
            self._query_starts = self._upload(batch.query_starts)
            self._tiles = self._cut(batch)

    def attend(self, heads_TXK: Tensor, rotation: Rotation, keys_NBGK: Tensor, values_NBGK: Tensor, batch: ForwardBatch) -> Tensor:
        cut = self.cut
        q_THK = rotate_and_write(
            heads_TXK, rotation.cos_T1F, rotation.sin_T1F, batch.slots_T, keys_NBGK, values_NBGK, self.config.num_heads,
            None if cut is None else cut.q_THK,
        )  # fmt: skip
        if cut is not None:
            cut.here(partial(self._attend, q_THK, keys_NBGK, values_NBGK, cut.out_THK))
            return cut.out_THK
        out_THK = torch.empty_like(q_THK)
        self._attend(q_THK, keys_NBGK, values_NBGK, out_THK, batch)
        return out_THK

    def _attend(self, q_THK: Tensor, keys_NBGK: Tensor, values_NBGK: Tensor, out_THK: Tensor, batch: ForwardBatch) -> None:
        """Keys and values of the new tokens are in the cache already."""
        if batch.num_decodes:
            some = slice(0, batch.num_decodes)
            decode(
                q_THK[some], keys_NBGK, values_NBGK, batch.block_tables_SM[some], batch.lengths_S[some], self._heads, out_THK[some],
                parts=self.parts(batch.num_decodes),
            )  # fmt: skip
        if batch.num_decodes < batch.num_sequences:
            self.prefill(q_THK, keys_NBGK, values_NBGK, batch, out_THK)

    def prefill(self, q_THK: Tensor, keys_NBGK: Tensor, values_NBGK: Tensor, batch: ForwardBatch, out_THK: Tensor) -> None:
        """Write to ``out_THK`` what sequences with several new tokens give; their K and V are in the cache already."""
        prefill(
            q_THK, keys_NBGK, values_NBGK, batch.block_tables_SM, batch.lengths_S, self._query_starts, self._tiles, self._heads,
            out_THK, is_causal=self.config.is_causal,
        )  # fmt: skip

    def parts(self, num_decodes: int) -> int:
        """Into how many parts contexts are cut. Not a question of their lengths, so that a captured step stays right as they grow."""
        wanted = PROGRAMS_PER_PROCESSOR * self._processors // (num_decodes * self.config.num_kv_heads)
        return 1 << min(max(wanted, 1), MAX_PARTS).bit_length() - 1

    def _cut(self, batch: ForwardBatch) -> PrefillTiles:
        step = tokens_per_tile(self._heads, self.config.head_dim)
        cuts = []
        for sequence in range(batch.num_decodes, batch.num_sequences):
            num_new = batch.query_starts[sequence + 1] - batch.query_starts[sequence]
            cuts.append([(sequence, token) for token in range(0, num_new, step)])
        tiles = self._upload([*chain.from_iterable(zip(*chain.from_iterable(cuts), strict=True))]).view(2, -1)
        return PrefillTiles(sequence_X=tiles[0], token_X=tiles[1])

    def _upload(self, numbers: list[int] | tuple[int, ...]) -> Tensor:
        """int32 on the device, without waiting for it."""
        host = torch.tensor(numbers, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)
