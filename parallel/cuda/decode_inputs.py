"""Unpacks the inputs of a replayed decode step in one launch. The reference is `engine.run.decode_inputs.unpack_decode_inputs_torch`."""

import triton
import triton.language as tl
from torch import Tensor

from parallel.cuda.sizes import cdiv

BLOCK = 128


@triton.jit(do_not_specialize=["num_rows"])
def _decode_inputs_kernel(
    given, sampled, tokens, slots, lengths, tables, num_rows, given_stride, table_stride, BLOCK_TOKENS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    token = tl.load(given + rows, mask=mask, other=0)
    position = tl.load(given + given_stride + rows, mask=mask, other=0)
    block = tl.load(given + 2 * given_stride + rows, mask=mask, other=0)
    before = tl.load(sampled + tl.where(token < 0, -1 - token, 0), mask=mask & (token < 0), other=0)
    tl.store(tokens + rows, tl.where(token < 0, before, token), mask=mask)
    fills = block < 0
    block = tl.where(fills, -1 - block, block)
    column = position // BLOCK_TOKENS
    tl.store(slots + rows, tl.where(fills, -1, block * BLOCK_TOKENS + position - column * BLOCK_TOKENS), mask=mask)
    tl.store(lengths + rows, (position + 1).to(tl.int32), mask=mask)
    tl.store(tables + rows * table_stride + column, block.to(tl.int32), mask=mask)


def unpack_decode_inputs(
    inputs_3S: Tensor, sampled_P: Tensor, tokens_S: Tensor, slots_S: Tensor, lengths_S: Tensor, tables_SM: Tensor, block_tokens: int
) -> None:
    """See the reference."""
    num_rows = tokens_S.shape[0]
    _decode_inputs_kernel[(cdiv(num_rows, BLOCK),)](
        inputs_3S, sampled_P, tokens_S, slots_S, lengths_S, tables_SM, num_rows, inputs_3S.stride(0), tables_SM.stride(0),
        BLOCK_TOKENS=block_tokens, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
