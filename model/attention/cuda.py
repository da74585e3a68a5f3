"""Attention on CUDA devices with our own kernels over paged KV.

Sequences that compute one token use the decode kernel, all in one launch. Those that compute a few tokens (drafts, or the end of a
prompt that is mostly cached) use it too, with a row for each token, so that long contexts are split into parts. The others use the
prefill kernel, in tiles of tokens.
"""

from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from model.attention.backend import AttentionConfig, GraphBreak
from model.batch import ForwardBatch
from model.rope import Rotation
from parallel.cuda.elementwise import rope_and_write_kv
from parallel.cuda.paged_attention import HOPPER_SHARED_BYTES, HeadGroups
from parallel.cuda.paged_decode import decode, decode_multi_token, decode_tile, max_multi_tokens, multi_token_tile
from parallel.cuda.paged_prefill import PrefillTiles, prefill, prefill_tile
from parallel.quantisation import FP8, FP8_MIN_CAPABILITY

PROGRAMS_PER_PROCESSOR = 2
"""Decode programs that each multiprocessor should get, ..."""
MAX_PARTS = 128
"""... by splitting contexts into at most so many parts."""
FEW_PARTS = (1, 4, 16, 64)
"""Numbers of parts for sequences that compute a few tokens."""
SIMULATED_PROCESSORS = 8
"""Assumed by Triton's interpreter, which has no device."""


class CudaAttention:
    """See the module's docstring."""

    kv_dtypes: tuple[torch.dtype, ...] = (FP8,)
    supports_capture = supports_graph_breaks = True
    graph_break: GraphBreak | None = None
    _sequence_F: Tensor | None = None
    """int32: the sequences of the step that compute a few tokens; None: there are none."""
    _is_sorted = True
    """Whether the sequences of the step are sorted by kernel. That happens in the first layer, because tiles depend on the dtype."""

    def __init__(self, config: AttentionConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        groups = [config.kv_of_query.count(kv_head) for kv_head in range(config.num_kv_heads)]
        firsts = [config.kv_of_query.index(kv_head) for kv_head in range(config.num_kv_heads)]
        self._heads = HeadGroups(first_G=self._upload(firsts), count_G=self._upload(groups), largest_group=max(groups))
        on_device = device.type == "cuda"
        if on_device and torch.cuda.get_device_capability(device) < FP8_MIN_CAPABILITY:
            self.kv_dtypes = ()
        properties = torch.cuda.get_device_properties(device) if on_device else None
        self._processors = properties.multi_processor_count if properties else SIMULATED_PROCESSORS
        self._shared_bytes: int = getattr(properties, "shared_memory_per_block_optin", HOPPER_SHARED_BYTES)
        """Shared memory of a program. (torch's stubs lack it.)"""

    def prepare(self, batch: ForwardBatch) -> None:
        self._is_sorted = batch.num_decodes == batch.num_sequences

    def attend(self, heads_TXK: Tensor, rotation: Rotation, keys_NBGK: Tensor, values_NBGK: Tensor, batch: ForwardBatch) -> Tensor:
        cut = self.graph_break
        q_THK = rope_and_write_kv(
            heads_TXK, rotation.cos_T1F, rotation.sin_T1F, batch.slots_T, keys_NBGK, values_NBGK, self.config.num_heads,
            None if cut is None else cut.q_THK,
        )  # fmt: skip
        if cut is not None:
            cut.split(partial(self._attend, q_THK, keys_NBGK, values_NBGK, cut.out_THK))
            return cut.out_THK
        out_THK = torch.empty_like(q_THK)
        self._attend(q_THK, keys_NBGK, values_NBGK, out_THK, batch)
        return out_THK

    def _attend(self, q_THK: Tensor, keys_NBGK: Tensor, values_NBGK: Tensor, out_THK: Tensor, batch: ForwardBatch) -> None:
        """Keys and values of the new tokens are already in the cache."""
        if batch.num_decodes:
            some, parts = slice(0, batch.num_decodes), self.parts(batch.num_decodes)
            decode(
                q_THK[some], keys_NBGK, values_NBGK, batch.block_tables_SM[some], batch.lengths_S[some], self._heads, out_THK[some],
                parts=parts, tile=decode_tile(self.config.head_dim, keys_NBGK.dtype, parts, self._shared_bytes),
            )  # fmt: skip
        if batch.num_decodes == batch.num_sequences:
            return
        if not self._is_sorted:
            self._sort(batch, q_THK.dtype)
        num_few = 0 if self._sequence_F is None else len(self._sequence_F)
        if self._sequence_F is not None:
            decode_multi_token(
                q_THK, keys_NBGK, values_NBGK, batch.block_tables_SM, batch.lengths_S, self._sequence_F, self._query_starts, self._heads,
                out_THK, parts=self.parts_of_few(num_few), tile=multi_token_tile(self.config.head_dim, keys_NBGK.dtype, self._shared_bytes),
            )  # fmt: skip
        if batch.num_decodes + num_few < batch.num_sequences:
            self.prefill(q_THK, keys_NBGK, values_NBGK, batch, out_THK)

    def prefill(self, q_THK: Tensor, keys_NBGK: Tensor, values_NBGK: Tensor, batch: ForwardBatch, out_THK: Tensor) -> None:
        """Compute the sequences with several new tokens, and write the result to ``out_THK``. Their K and V are already in the cache."""
        prefill(
            q_THK, keys_NBGK, values_NBGK, batch.block_tables_SM, batch.lengths_S, self._query_starts, self._tiles, self._heads,
            out_THK, is_causal=self.config.is_causal, tile=self._tile,
        )  # fmt: skip

    def parts(self, num_decodes: int) -> int:
        """Into how many parts contexts are split. Does not depend on their lengths, so a captured step stays valid as they grow."""
        wanted = PROGRAMS_PER_PROCESSOR * self._processors // (num_decodes * self.config.num_kv_heads)
        return 1 << min(max(wanted, 1), MAX_PARTS).bit_length() - 1

    def parts_of_few(self, num_sequences: int) -> int:
        """The same for sequences that compute a few tokens: at least half as many, and one of few values, because the kernels for all
        others are not compiled in advance."""
        return max(parts for parts in FEW_PARTS if parts <= self.parts(num_sequences))

    def _sort(self, batch: ForwardBatch, dtype: torch.dtype) -> None:
        """Find the sequences that compute a few tokens, and the tiles of the others; uploaded in one copy."""
        most = max_multi_tokens(self._heads) if self.config.is_causal else 1
        self._tile = prefill_tile(self.config.head_dim, dtype, self._shared_bytes)
        step = self._tile.rows // self._heads.largest_group
        few, tiles = [], []
        for sequence, (start, stop) in enumerate(pairwise(batch.query_starts)):
            if sequence < batch.num_decodes:
                continue
            if stop - start <= most:
                few.append(sequence)
            else:
                tiles += [(sequence, token) for token in range(0, stop - start, step)]
        pieces = (batch.query_starts, few, [sequence for sequence, _ in tiles], [token for _, token in tiles])
        numbers = self._upload([number for piece in pieces for number in piece])
        ends = list(accumulate(map(len, pieces)))
        self._query_starts, sequence_F, sequence_X, token_X = numbers.tensor_split(ends[:-1])
        self._sequence_F, self._is_sorted = sequence_F if few else None, True
        self._tiles = PrefillTiles(sequence_X=sequence_X, token_X=token_X)

    def _upload(self, numbers: list[int] | tuple[int, ...]) -> Tensor:
        """int32 on the device, without waiting for the copy."""
        host = torch.tensor(numbers, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        return host.to(self.device, non_blocking=True)
