"""Norms, SwiGLU, and rotation with the write to the cache, against plain torch."""

import pytest
import torch
import torch.nn.functional as F

from model.attention.write_kv import write_kv
from model.config import RopeConfig
from model.layers import RmsNorm
from model.rope import Rope

DTYPES = [torch.float32, torch.float16]


def norm(width: int, dtype: torch.dtype, device: torch.device) -> RmsNorm:
    layer = RmsNorm(width, eps=1e-6, dtype=dtype)
    layer.weight = torch.randn(width, device=device).to(dtype)
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 896), (5, 24), (3, 1000), (0, 64)])
def test_the_norm_equals_the_layers(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    from parallel.cuda.elementwise import rms_norm

    layer, x = norm(shape[1], dtype, device), torch.randn(shape, device=device).to(dtype)
    assert layer.weight is not None
    torch.testing.assert_close(rms_norm(x, layer.weight, layer.eps), layer(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_residual_add_gives_the_same(dtype: torch.dtype, device: torch.device) -> None:
    from parallel.cuda.elementwise import add_rms_norm

    layer = norm(96, dtype, device)
    x, residual = (torch.randn(7, 96, device=device).to(dtype) for _ in range(2))
    wanted = x + residual
    assert layer.weight is not None
    torch.testing.assert_close(add_rms_norm(x, residual, layer.weight, layer.eps), layer(wanted))
    assert torch.equal(residual, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 40), (4, 2 * 1100), (0, 8)])
def test_swiglu_equals_torch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    from parallel.cuda.elementwise import swiglu

    gate_up = torch.randn(shape, device=device).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(gate_up), F.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(6, 2, 16), (5, 2, 24), (7, 1, 128)])
def test_rotated_heads_are_written_to_their_slots(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    from parallel.cuda.elementwise import rope_and_write_kv

    num_tokens = 5
    heads = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, device=device).to(dtype)
    rotation = Rope(RopeConfig(theta=10000.0, yarn=None), head_dim, device).rotation(torch.tensor([0, 3, 4, 100, 9], device=device), dtype)
    slots = torch.tensor([7, 0, 33, 16, 40], device=device)
    ours = [torch.zeros(3, 16, num_kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2)]
    theirs = [cache.clone() for cache in ours]
    q = rope_and_write_kv(heads, rotation.cos_T1F, rotation.sin_T1F, slots, *ours, num_heads)
    turned, values = heads.split((num_heads + num_kv_heads, num_kv_heads), dim=1)
    wanted_q, keys = rotation.apply(turned).split((num_heads, num_kv_heads), dim=1)
    write_kv(keys, values, *theirs, slots)
    tolerance = {"atol": 2e-3, "rtol": 2e-3} if dtype == torch.float16 else {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(q, wanted_q, **tolerance)
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, **tolerance)


def test_a_padding_token_is_not_written(device: torch.device) -> None:
    from parallel.cuda.elementwise import rope_and_write_kv

    cache = torch.zeros(2, 16, 1, 16, device=device)
    ones = torch.ones(2, 1, 8, device=device)
    rope_and_write_kv(torch.ones(2, 3, 16, device=device), ones, ones, torch.tensor([-1, 20], device=device), cache, cache.clone(), 1)
    assert cache.flatten(0, 1).any(dim=(1, 2)).nonzero().flatten().tolist() == [20]


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_rotated_in_a_strided_tensor(dtype: torch.dtype, device: torch.device) -> None:
    from parallel.cuda.elementwise import apply_rope

    x = torch.randn(6, 8, 32, device=device).to(dtype)[:, 1:6]
    rotation = Rope(RopeConfig(theta=10000.0, yarn=None), 32, device).rotation(torch.arange(6, device=device), dtype)
    tolerance = {"atol": 2e-3, "rtol": 2e-3} if dtype == torch.float16 else {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(apply_rope(x, rotation.cos_T1F, rotation.sin_T1F), rotation.apply(x), **tolerance)
