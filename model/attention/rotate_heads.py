"""Applies the rotary embedding, for backends without a kernel for it. T tokens, H query heads, G KV heads, K head width."""

from torch import Tensor

from model.attention.backend import AttentionConfig
from model.rope import Rotation


def rotate_heads(heads_TXK: Tensor, rotation: Rotation, config: AttentionConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Query heads (T, H, K), key heads and value heads (T, G, K) of ``heads_TXK``, which has them in this order, with queries and keys
    rotated."""
    num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
    qk_TXK, v_TGK = heads_TXK.split((num_heads + num_kv_heads, num_kv_heads), dim=1)
    q_THK, k_TGK = rotation.apply(qk_TXK).split((num_heads, num_kv_heads), dim=1)
    return q_THK, k_TGK, v_TGK
