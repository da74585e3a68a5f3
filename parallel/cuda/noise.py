"""Random numbers of output positions in one launch (plain torch takes a hundred). The reference is `engine.run.noise.uniform`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.cuda.quick_launch import quick
from parallel.cuda.sizes import cdiv

BLOCK = 128


@triton.jit
def uniform_of(seed, choice, position, stream):
    """float64 in (0, 1) from int64 inputs: Philox4x32-10 (SC 2011) in int64 arithmetic. A product of two words wraps as in uint64, and the
    mask removes the sign extension."""
    word = tl.full([], 0xFFFFFFFF, tl.int64)
    multiplier0, multiplier1 = tl.full([], 0xD2511F53, tl.int64), tl.full([], 0xCD9E8D57, tl.int64)
    weyl0, weyl1 = tl.full([], 0x9E3779B9, tl.int64), tl.full([], 0xBB67AE85, tl.int64)
    key0, key1 = seed & word, (seed >> 32) & word
    c0, c1, c2, c3 = position, choice, tl.full([], 0, tl.int64) + stream, tl.full([], 0, tl.int64)
    for number in tl.static_range(10):
        if number > 0:
            key0, key1 = (key0 + weyl0) & word, (key1 + weyl1) & word
        product0, product1 = c0 * multiplier0, c2 * multiplier1
        c0 = ((product1 >> 32) & word) ^ c1 ^ key0
        c2 = ((product0 >> 32) & word) ^ c3 ^ key1
        c1, c3 = product1 & word, product0 & word
    bits = (c0 << 20) | (c1 >> 12)
    return (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16


@quick
@triton.jit(do_not_specialize=["num_rows"])
def _uniform_kernel(seeds, choices, positions, out, num_rows, stream, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    seed, choice = tl.load(seeds + rows, mask=mask, other=0), tl.load(choices + rows, mask=mask, other=0)
    tl.store(out + rows, uniform_of(seed, choice, tl.load(positions + rows, mask=mask, other=0), stream), mask=mask)


def uniform(seed_R: Tensor, choice_R: Tensor, position_R: Tensor, stream: int) -> Tensor:
    """float64 (R), from int64 (R)."""
    num_rows = position_R.shape[0]
    out_R = torch.empty(num_rows, dtype=torch.float64, device=position_R.device)
    if num_rows:
        _uniform_kernel[(cdiv(num_rows, BLOCK),)](
            seed_R.contiguous(), choice_R.contiguous(), position_R.contiguous(), out_R, num_rows, stream, BLOCK=BLOCK, num_warps=4
        )
    return out_R
