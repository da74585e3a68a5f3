"""int4 groups with a zero point each: lossless if they were stored so, else rounded to fifteen steps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.zero_points import LEVELS, pack_words, quantise_groups, unpack_words


def value(numbers_xC: Tensor, words_x: Tensor) -> Tensor:
    scales_x, zeros_x = unpack_words(words_x)
    return (numbers_xC.int() - zeros_x.unsqueeze(-1)).float() * scales_x.unsqueeze(-1)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), width=st.sampled_from([1, 2, 32, 128]), narrow=st.booleans(), exponent=st.integers(-14, 3))
def test_weights_stored_with_any_scale_and_zero_point_are_lossless(seed: int, width: int, narrow: bool, exponent: int) -> None:
    """Also if all numbers of a group are far from its zero point."""
    random = torch.Generator().manual_seed(seed)
    zeros_X = torch.randint(0, LEVELS + 1, (24, 5), generator=random)
    numbers_XC = torch.randint(0, LEVELS + 1, (24, 5, width), generator=random)
    if narrow:
        numbers_XC = torch.where(numbers_XC < 8, 0, LEVELS) if seed % 2 else numbers_XC.clamp(min=12)
    scales_X = ((1 + torch.rand(24, 5, generator=random)) * 2.0**exponent).half()
    scales_X[0, 0] = 0
    weight_XC = (numbers_XC - zeros_X.unsqueeze(-1)).float() * scales_X.float().unsqueeze(-1)
    found_XC, words_X = quantise_groups(weight_XC)
    assert found_XC.dtype == torch.uint8
    assert found_XC.max() <= LEVELS
    assert torch.equal(value(found_XC, words_X), weight_XC)


def test_other_groups_are_rounded_beside_the_lossless_ones() -> None:
    random = torch.Generator().manual_seed(0)
    any_XC = torch.randn(64, 128, generator=random) + torch.linspace(-3, 3, 64).unsqueeze(-1)
    stored_XC = torch.randint(-3, 13, (64, 128), generator=random) * 0.125
    numbers_XC, words_X = quantise_groups(torch.cat((any_XC, stored_XC)))
    found_XC = value(numbers_XC, words_X)
    assert torch.equal(found_XC[64:], stored_XC)
    step_X = (any_XC.amax(-1).clamp(min=0) - any_XC.amin(-1).clamp(max=0)) / LEVELS
    assert ((found_XC[:64] - any_XC).abs().amax(-1) <= 1.01 * step_X).all()
    assert (found_XC[:64] - any_XC).square().mean() < 0.12 * step_X.square().mean(), "as of even steps: a twelfth"


def test_zeros_stay_zeros_and_nan_is_visible() -> None:
    numbers_XC, words_X = quantise_groups(torch.zeros(3, 2, 128))
    assert not value(numbers_XC, words_X).any()
    half_XC = torch.cat((torch.rand(5, 64) + 1, torch.zeros(5, 64)), -1)
    assert not value(*quantise_groups(half_XC))[:, 64:].any()
    broken_XC = torch.rand(2, 128)
    broken_XC[1, 3] = torch.nan
    found_XC = value(*quantise_groups(broken_XC))
    assert found_XC[0].isfinite().all()
    assert found_XC[1].isnan().all()


@pytest.mark.parametrize("scale", [0.0, -0.0, 1.5, -1.5, 6e-8, 65504.0])
def test_a_word_holds_a_scale_and_a_zero_point(scale: float) -> None:
    zeros = torch.arange(LEVELS + 1)
    scales, found = unpack_words(pack_words(torch.full((LEVELS + 1,), scale), zeros))
    assert torch.equal(found, zeros.int())
    assert torch.equal(scales, torch.full_like(scales, scale).half().float())
