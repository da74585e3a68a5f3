"""Writes new keys and values to the cache."""

import torch
from torch import Tensor

from parallel.quantisation import FP8, FP8_MAX


def write_kv(k_TGK: Tensor, v_TGK: Tensor, keys_NBGK: Tensor, values_NBGK: Tensor, slots_T: Tensor) -> None:
    """Write token t to slot ``slots_T[t]``, counted over all blocks, rounded to the dtype of the cache."""
    for new_TGK, cache_NBGK in ((k_TGK, keys_NBGK), (v_TGK, values_NBGK)):
        cache = cache_NBGK.flatten(0, 1)
        if cache.dtype == FP8:
            rounded_TGK = new_TGK.float().clamp(-FP8_MAX, FP8_MAX).to(FP8)
            cache.view(torch.uint8).index_copy_(0, slots_T, rounded_TGK.view(torch.uint8))
        else:
            cache.index_copy_(0, slots_T, new_TGK.to(cache.dtype))
