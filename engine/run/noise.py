"""Counter-based random numbers: the noise of an output position is a function of (seed, choice, position, stream) and nothing else.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). There is no generator state, so
recomputation after preemption, a failure or migration draws the same numbers again.
"""

import torch
from torch import Tensor

from parallel.quantised_format import has_triton

Words = tuple[Tensor, Tensor, Tensor, Tensor]

_WORD = 0xFFFF_FFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD251_1F53, 0xCD9E_8D57)
_WEYL = (0x9E37_79B9, 0xBB67_AE85)

UNIFORM_BITS = 52
"""A uniform is one of 2^52 evenly spaced values."""


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four random words for each counter. All tensors are int64 of one shape (or broadcast), each value a word in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_ in range(_ROUNDS):
        if round_:
            k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 64-bit product. int64 wraps around as uint64 does, and the mask removes the sign extension of the shift."""
    product = word * multiplier
    return (product >> 32) & _WORD, product & _WORD


def uniform(seed: Tensor, choice: Tensor, position: Tensor, stream: int = 0) -> Tensor:
    """float64 in (0, 1), exactly symmetric, with `UNIFORM_BITS` bits each. Takes int64 tensors of one shape.

    ``seed`` holds the 64 bits of a seed as int64 (see `seed_bits`); ``choice``, ``position`` and ``stream`` are words below 2^32. Each
    combination has its own counter, so no two share their noise. A second number for the same position needs another ``stream``.
    """
    if position.device.type == "cuda" and has_triton():
        from parallel.cuda.noise import uniform as in_one_launch  # imports triton, which exists only where there is a CUDA device

        return in_one_launch(seed, choice, position, stream)
    key = (seed & _WORD, (seed >> 32) & _WORD)
    zero = torch.zeros_like(position)
    first, second, _, _ = philox4x32((position, choice, zero + stream, zero), key)
    bits = (first << (UNIFORM_BITS - 32)) | (second >> (64 - UNIFORM_BITS))
    return (bits.to(torch.float64) + 0.5) * 2.0**-UNIFORM_BITS


def seed_bits(seed: int) -> int:
    """The int64 with the same 64 bits as ``seed``, which may be anywhere in [-2^63, 2^64): 2^64 - 1 and -1 are one seed.

    Raises:
        ValueError: the seed has more than 64 bits.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"a seed has at most 64 bits, got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed
