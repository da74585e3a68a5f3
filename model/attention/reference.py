"""The reference for all other backends: attention one sequence and one head at a time, straight from the formula, in float32."""

import torch
from torch import Tensor

from model.attention.backend import AttentionConfig, GraphBreak
from model.attention.rotate_heads import rotate_heads
from model.attention.write_kv import write_kv
from model.batch import ForwardBatch
from model.rope import Rotation
from parallel.quantisation import FP8


class ReferenceAttention:
    """Slow, and simple enough to be correct. All other backends are tested against it."""

    kv_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, FP8)
    supports_capture = supports_graph_breaks = False
    graph_break: GraphBreak | None = None

    def __init__(self, config: AttentionConfig) -> None:
        self.config = config

    def prepare(self, batch: ForwardBatch) -> None:
        """Nothing is shared between layers."""

    def attend(self, heads_TXK: Tensor, rotation: Rotation, keys_NBGK: Tensor, values_NBGK: Tensor, batch: ForwardBatch) -> Tensor:
        q_THK, k_TGK, v_TGK = rotate_heads(heads_TXK, rotation, self.config)
        write_kv(k_TGK, v_TGK, keys_NBGK, values_NBGK, batch.slots_T)
        out_THK = torch.empty_like(q_THK)
        self.attend_to_written(q_THK, keys_NBGK, values_NBGK, batch, out_THK)
        return out_THK

    def attend_to_written(self, q_THK: Tensor, keys_NBGK: Tensor, values_NBGK: Tensor, batch: ForwardBatch, out_THK: Tensor) -> None:
        """Write attention of rotated queries to ``out_THK``. Keys and values of their tokens must be in the cache."""
        for sequence, length in enumerate(batch.context_lengths):
            tokens = slice(batch.query_starts[sequence], batch.query_starts[sequence + 1])
            blocks = batch.block_tables_SM[sequence, : -(-length // self.config.block_tokens)].long()
            keys_LGK = keys_NBGK[blocks].flatten(0, 1)[:length].float()
            values_LGK = values_NBGK[blocks].flatten(0, 1)[:length].float()
            for head, kv_head in enumerate(self.config.kv_of_query):
                out_THK[tokens, head] = attend_one_head(
                    q_THK[tokens, head].float(), keys_LGK[:, kv_head], values_LGK[:, kv_head], is_causal=self.config.is_causal
                )


def attend_one_head(q_PK: Tensor, keys_LK: Tensor, values_LK: Tensor, *, is_causal: bool) -> Tensor:
    """The P queries are the last P of the L positions. Each attends to itself and what precedes it, or to everything."""
    num_queries, length = q_PK.shape[0], keys_LK.shape[0]
    scores_PL = q_PK @ keys_LK.T * q_PK.shape[1] ** -0.5
    positions_P = torch.arange(length - num_queries, length, device=q_PK.device)
    hidden_PL = (torch.arange(length, device=q_PK.device) > positions_P.unsqueeze(1)) & is_causal
    out_PK: Tensor = scores_PL.masked_fill(hidden_PL, float("-inf")).softmax(-1) @ values_LK
    return out_PK
