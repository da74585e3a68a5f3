"""Group quantisation: to nearest, and lossless if weights are multiples of a scale already."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parallel.quantisation import LEVELS, quantise_groups
from parallel.scale_groups import GROUP_SIZE

BITS = ("int4", "int8")


def value(numbers_xC: Tensor, scales_x: Tensor) -> Tensor:
    return numbers_xC.float() * scales_x.float().unsqueeze(-1)


@settings(deadline=None)
@given(bits=st.sampled_from(BITS), seed=st.integers(0, 2**32), narrow=st.booleans(), negative=st.booleans(), exponent=st.integers(-14, 3))
def test_weights_stored_in_few_bits_are_lossless(bits: str, seed: int, narrow: bool, negative: bool, exponent: int) -> None:
    """Also with the lowest number, -8 or -128, which has no negative, and with scales of any magnitude."""
    random = torch.Generator().manual_seed(seed)
    most = 4 if narrow else LEVELS[bits]
    numbers_XC = torch.randint(-most - (not narrow), most + 1, (24, 5, GROUP_SIZE[bits]), generator=random).float()
    scales_X = ((1 + torch.rand(24, 5, generator=random)) * 2.0**exponent).half()
    weight_XC = value(numbers_XC, -scales_X if negative else scales_X)
    assert torch.equal(value(*quantise_groups(weight_XC, LEVELS[bits])), weight_XC)


@pytest.mark.parametrize("bits", BITS)
def test_groups_without_exact_multiples_are_rounded_beside_lossless_ones(bits: str) -> None:
    torch.manual_seed(0)
    any_XC = torch.randn(64, GROUP_SIZE[bits])
    stored_XC = torch.randint(-7, 8, (64, GROUP_SIZE[bits])) * 0.125
    numbers, scales = quantise_groups(torch.cat((any_XC, stored_XC)), LEVELS[bits])
    alone = quantise_groups(any_XC, LEVELS[bits])
    assert torch.equal(numbers[:64], alone[0])
    assert torch.equal(scales[:64], alone[1])
    assert torch.equal(value(numbers, scales)[64:], stored_XC)
    step_X1 = alone[1].float().abs().unsqueeze(-1)
    is_end_XC = (alone[0] == LEVELS[bits]) | (alone[0] == -LEVELS[bits] - 1)
    assert ((value(*alone) - any_XC).abs() <= step_X1 * 0.51).logical_or(is_end_XC).all()


@pytest.mark.parametrize("bits", BITS)
def test_zeros_give_zeros_and_empty_gives_empty(bits: str) -> None:
    numbers, scales = quantise_groups(torch.zeros(3, 2, GROUP_SIZE[bits]), LEVELS[bits])
    assert not numbers.any()
    assert not scales.any()
    numbers, scales = quantise_groups(torch.zeros(0, 2, GROUP_SIZE[bits]), LEVELS[bits])
    assert (numbers.shape, scales.shape) == ((0, 2, GROUP_SIZE[bits]), (0, 2))


def test_a_group_without_a_multiple_near_zero_is_lossless_too() -> None:
    weight_XC = torch.tensor([5.0, -7.0]).repeat(40, 16) * torch.arange(1, 41).unsqueeze(-1) * 0.25
    weight_XC[0, 0] = 0.25
    assert torch.equal(value(*quantise_groups(weight_XC, LEVELS["int4"])), weight_XC)
