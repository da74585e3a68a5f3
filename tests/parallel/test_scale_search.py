"""int4 scale search: kernels and reference are bit-identical, and the error is smaller than with the largest weight alone."""

import pytest
import torch
from torch import Tensor

from parallel.native.library import native
from parallel.scale_search import LEAST, choose_scales, choose_scales_reference
from tests.parallel.groups_of_weights import GROUPS


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_the_kernel_is_bit_identical_to_the_reference(groups: Tensor) -> None:
    if native() is None:
        pytest.skip("the kernels are not built here")
    for some in (groups, groups[:1], groups[:0], groups.unflatten(0, (-1, 5))[:, 2]):
        found, wanted = choose_scales(some), choose_scales_reference(some)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1].isnan(), wanted[1].isnan())
        assert torch.equal(found[1].nan_to_num(), wanted[1].nan_to_num())


def test_each_weight_is_rounded_to_the_nearest_number() -> None:
    for name in ("drawn", "in bfloat16", "whole numbers"):
        weight_XC = GROUPS[name]
        numbers_XC, scales_X = choose_scales(weight_XC)
        all_16 = torch.arange(-8, 8) * scales_X.float().view(-1, 1, 1)
        least_XC = (weight_XC.unsqueeze(-1) - all_16).abs().amin(-1)
        lost_XC = (weight_XC - numbers_XC * scales_X.float().unsqueeze(-1)).abs()
        assert (lost_XC <= least_XC + 1e-6 * weight_XC.abs().amax()).all()


@pytest.mark.parametrize(("name", "part"), [("drawn", 0.95), ("in bfloat16", 0.95), ("with one far from the others", 0.995)])
def test_the_error_is_smaller_than_with_the_largest_weight_mapped_to_minus_eight(name: str, part: float) -> None:
    weight_XC = GROUPS[name]
    furthest_X1 = weight_XC.gather(-1, weight_XC.abs().argmax(-1, keepdim=True))
    scales_X1 = (furthest_X1 / -8).half().float()
    before = (weight_XC / scales_X1).round().clamp(-8, 7) * scales_X1
    numbers_XC, scales_X = choose_scales(weight_XC)
    after = numbers_XC * scales_X.float().unsqueeze(-1)
    assert (after - weight_XC).square().sum() < part * (before - weight_XC).square().sum()


def test_nan_gives_nan_and_tiny_weights_give_zeros() -> None:
    weight_XC = torch.randn(4, 32)
    weight_XC[0, 3], weight_XC[1, 4], weight_XC[2] = torch.nan, torch.inf, LEAST / 2
    numbers_XC, scales_X = choose_scales(weight_XC)
    assert scales_X.isnan().tolist() == [True, True, False, False]
    assert not numbers_XC[:3].any()
    assert scales_X[2] == 0
