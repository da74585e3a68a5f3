"""Elementwise kernels against torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.native.elementwise import NativeElementwise
from parallel.native.library import Native, native

SHAPES = [(1, 896), (3, 50), (200, 1024), (0, 64)]


@pytest.fixture
def library() -> Native:
    found = native()
    if found is None:
        pytest.skip("the kernels are not built here")
    return found


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 4


@pytest.mark.parametrize("shape", SHAPES)
def test_add_and_norm(library: Native, shape: tuple[int, int]) -> None:
    x, delta, weight = random(*shape), random(*shape, seed=1), random(shape[1], seed=2)
    total = x + delta
    found = NativeElementwise(library).add_norm(x, delta, weight, 1e-6)
    assert torch.equal(x, total)
    torch.testing.assert_close(found, F.rms_norm(total, (shape[1],), weight, 1e-6), rtol=1e-5, atol=1e-5)
    assert torch.equal(NativeElementwise(library).add_norm(total, None, weight, 1e-6), found)


@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(library: Native, shape: tuple[int, int]) -> None:
    x = random(*shape)
    left, right = x.chunk(2, dim=-1)
    torch.testing.assert_close(NativeElementwise(library).swiglu(x), F.silu(left) * right, rtol=1e-5, atol=1e-5)


def test_swiglu_of_extreme_numbers(library: Native) -> None:
    left = torch.tensor([[0.0, -200.0, 200.0, 1e30, -1e30, torch.nan, torch.inf, 1.0] * 2])
    found = NativeElementwise(library).swiglu(torch.cat((left, torch.ones_like(left)), dim=-1))
    wanted = F.silu(left)
    torch.testing.assert_close(found.nan_to_num(7.0, 1e38), wanted.nan_to_num(7.0, 1e38), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 5, 300])
def test_heads_are_rotated(library: Native, num_tokens: int) -> None:
    x = random(num_tokens, 8, 32)[:, 1:6]  # heads that lie among others
    angles = random(num_tokens, 1, 16, seed=1)
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    wanted = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    torch.testing.assert_close(NativeElementwise(library).apply_rope(x, cos, sin), wanted)
