"""How new keys and values get into the cache."""

from torch import Tensor


def write_kv(k_TGK: Tensor, v_TGK: Tensor, keys_NBGK: Tensor, values_NBGK: Tensor, slots_T: Tensor) -> None:
    """Token t goes to slot ``slots_T[t]``, counted over all blocks of the cache."""
    keys_NBGK.flatten(0, 1).index_copy_(0, slots_T, k_TGK)
    values_NBGK.flatten(0, 1).index_copy_(0, slots_T, v_TGK)
