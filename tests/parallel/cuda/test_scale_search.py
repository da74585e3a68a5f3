"""int4 scale search on a device: bit-identical to plain torch, and so to the CPU kernel."""

import pytest
import torch
from torch import Tensor

from parallel.scale_search import choose_scales_reference
from tests.parallel.groups_of_weights import GROUPS


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_the_kernel_is_bit_identical_to_the_reference(groups: Tensor, device: torch.device) -> None:
    from parallel.cuda.scale_search import choose_scales

    for some in (groups, groups[:1], groups[:0]):
        (numbers, scales), (wanted, wanted_scales) = choose_scales(some.to(device)), choose_scales_reference(some)
        assert torch.equal(numbers.cpu(), wanted)
        assert torch.equal(scales.cpu().isnan(), wanted_scales.isnan())
        assert torch.equal(scales.cpu().nan_to_num(), wanted_scales.nan_to_num())
