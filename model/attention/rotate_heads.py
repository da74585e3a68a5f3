"""What every backend without a kernel for it does first: turn queries and keys. T tokens, H query heads, G KV heads, K head width."""

from torch import Tensor

from model.attention.backend import AttentionConfig
from model.rope import Rotation


def rotate_heads(heads_TXK: Tensor, rotation: Rotation, config: AttentionConfig) -> tuple[Tensor, Tensor, Tensor]:
    """``heads_TXK`` are a token's query, key and value heads, in this order: q (T, H, K), k and v (T, G, K)."""
    num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
    qk_TXK, v_TGK = heads_TXK.split((num_heads + num_kv_heads, num_kv_heads), dim=1)
    q_THK, k_TGK = rotation.apply(qk_TXK).split((num_heads, num_kv_heads), dim=1)
    return q_THK, k_TGK, v_TGK
