"""The first kernel of a captured step: derives the model's inputs from a few numbers per row. S rows, P rows of the largest step."""

import torch
from torch import Tensor

from parallel.quantised_format import has_triton

TOKENS, POSITIONS, BLOCKS = range(3)
"""Rows of the numbers that the host uploads."""


def unpack_decode_inputs(
    inputs_3S: Tensor, sampled_P: Tensor, tokens_S: Tensor, slots_S: Tensor, lengths_S: Tensor, tables_SM: Tensor, block_tokens: int
) -> None:
    """Write a step's tokens, slots, lengths, and the newest block of each block table.

    ``inputs_3S``, int64, has for each row: its token, or -1 - n for the token at index n of ``sampled_P``; the token's position in its
    sequence; and the block of that position, or -1 - block for a padding row, which writes nowhere. Lengths and tables are int32, the
    rest int64.
    """
    if inputs_3S.device.type == "cuda" and has_triton():
        from parallel.cuda.decode_inputs import (
            unpack_decode_inputs as in_one_launch,  # imports triton, which exists only where there is a CUDA device
        )

        in_one_launch(inputs_3S, sampled_P, tokens_S, slots_S, lengths_S, tables_SM, block_tokens)
    else:
        unpack_decode_inputs_torch(inputs_3S, sampled_P, tokens_S, slots_S, lengths_S, tables_SM, block_tokens)


def unpack_decode_inputs_torch(
    inputs_3S: Tensor, sampled_P: Tensor, tokens_S: Tensor, slots_S: Tensor, lengths_S: Tensor, tables_SM: Tensor, block_tokens: int
) -> None:
    """`unpack_decode_inputs` in plain torch: the reference for the kernel."""
    token_S, position_S, block_S = inputs_3S
    tokens_S.copy_(torch.where(token_S < 0, sampled_P[(-1 - token_S).clamp(min=0)], token_S))
    fills_S, block_S = block_S < 0, torch.where(block_S < 0, -1 - block_S, block_S)
    column_S = position_S // block_tokens
    slots_S.copy_(torch.where(fills_S, -1, block_S * block_tokens + position_S % block_tokens))
    lengths_S.copy_(position_S + 1)
    tables_SM.scatter_(1, column_S.unsqueeze(1), block_S.unsqueeze(1).to(tables_SM.dtype))
