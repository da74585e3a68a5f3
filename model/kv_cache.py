"""One rank's KV cache. L layers of this stage, N blocks, B tokens per block, G KV heads of this rank, K head width."""

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.host_memory import lazy_zeros


@dataclass(frozen=True, kw_only=True)
class KvLayout:
    """The shape of one block on one rank, from which the cache is sized."""

    num_layers: int
    """Of this rank's stage."""
    num_kv_heads: int
    """Of this rank. A head that two ranks hold counts on both."""
    head_dim: int
    block_tokens: int
    dtype: torch.dtype

    @property
    def bytes_per_block(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.num_layers * self.block_tokens * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class KvCache:
    """``num_blocks`` blocks of KV, one pair of tensors per layer."""

    def __init__(self, layout: KvLayout, num_blocks: int, device: torch.device) -> None:
        self.layout, self.num_blocks, self.device = layout, num_blocks, device
        shape = (num_blocks, layout.block_tokens, layout.num_kv_heads, layout.head_dim)

        def zeros() -> Tensor:
            """Zeroed, because a backend may gather past a sequence's end, and NaN times a weight of zero is NaN."""
            if device.type == "cpu":
                return lazy_zeros(shape, layout.dtype)
            return torch.zeros(shape, dtype=layout.dtype, device=device)

        self.keys_NBGK: list[Tensor] = [zeros() for _ in range(layout.num_layers)]
        self.values_NBGK: list[Tensor] = [zeros() for _ in range(layout.num_layers)]

    def __repr__(self) -> str:
        mib = self.num_blocks * self.layout.bytes_per_block / 2**20
        return (
            f"<KvCache [{self.num_blocks} blocks of {self.layout.block_tokens} tokens | {self.layout.num_layers} layers | {mib:.1f} MiB]>"
        )
