"""Attention on CUDA devices with FlashInfer (https://flashinfer.ai) for prefill, if it is installed.

Only launched steps use it, for sequences that compute several tokens. FlashInfer's `plan` computes a schedule on the host, so decode-only
steps, which are captured and replayed, use our own kernel. Written for `flashinfer-python` 0.7.2 after reading its source; its kernels are
built, by nvcc, when they are first needed.

`plan` writes the schedule to a page-locked buffer of the wrapper and only queues the copy to the device. Nobody waits for the chunks of
a long prompt that do not sample, so a plan could overwrite one that a queued copy has still to read. Therefore the previous copy is
waited for before each plan, and the host is never more than one such step ahead.
"""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from model.attention.backend import AttentionConfig
from model.attention.cuda import CudaAttention
from model.batch import ForwardBatch

DTYPES = (torch.bfloat16, torch.float16)
"""Dtypes in which it computes."""
WORKSPACE_BYTES = 128 * 2**20
"""FlashInfer's recommendation, for partial results of long contexts."""


class FlashInferAttention(CudaAttention):
    """See the module's docstring. The KV cache must be in the dtype of the computation."""

    kv_dtypes: tuple[torch.dtype, ...] = ()

    def __init__(self, config: AttentionConfig, device: torch.device) -> None:
        """
        Raises:
            ImportError: it is not installed.
            ValueError: heads are shared unevenly.
        """
        if not config.is_uniform:
            raise ValueError(
                "FlashInfer needs the same number of query heads for every KV head; choose the attention backend 'auto', or another tp"
            )
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        super().__init__(config, device)
        # Zeroed, because some of its kernels count in it.
        self._wrapper: Any = BatchPrefillWithPagedKVCacheWrapper(torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device), "NHD")
        self._planned: torch.dtype | None = None
        """The dtype for which the current step is planned; None: it is not planned yet."""
        self._copied = _event(device)
        """Recorded after the copy of the last schedule; see the module's docstring."""

    def prepare(self, batch: ForwardBatch) -> None:
        self._planned = None

    def prefill(self, q_THK: Tensor, keys_NBGK: Tensor, values_NBGK: Tensor, batch: ForwardBatch, out_THK: Tensor) -> None:
        if self._planned != q_THK.dtype:  # in the first layer, where the dtype is known
            self._plan(batch, q_THK.dtype)
        some = slice(batch.query_starts[batch.num_decodes], batch.num_tokens)  # a captured step is padded
        out_THK[some] = self._wrapper.run(q_THK[some], (keys_NBGK, values_NBGK))

    def _plan(self, batch: ForwardBatch, dtype: torch.dtype) -> None:
        """Plan without the sequences that decode. Uses the host's numbers, so that nothing waits for the device."""
        first, block_tokens, most_blocks = batch.num_decodes, self.config.block_tokens, batch.block_tables_SM.shape[1]
        lengths, starts = batch.context_lengths[first:], batch.query_starts[first:]
        counts = [-(-length // block_tokens) for length in lengths]
        entries = [(first + at) * most_blocks + block for at, count in enumerate(counts) for block in range(count)]
        if self._copied is not None:
            self._copied.synchronize()
        self._wrapper.plan(
            _numbers([start - starts[0] for start in starts]),
            _numbers([0, *accumulate(counts)]),
            batch.block_tables_SM.flatten()[self._upload(entries)],
            _numbers([length - (count - 1) * block_tokens for length, count in zip(lengths, counts, strict=True)]),
            self.config.num_heads,
            self.config.num_kv_heads,
            self.config.head_dim,
            block_tokens,
            causal=self.config.is_causal,
            sm_scale=self.config.head_dim**-0.5,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        if self._copied is not None:
            self._copied.record()
        self._planned = dtype


def _event(device: torch.device) -> torch.cuda.Event | None:
    return torch.cuda.Event() if device.type == "cuda" else None


def _numbers(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)
