"""The highest of a row by kernels against plain torch."""

import pytest
import torch

from engine.run.sampling.search import highest as slowly
from tests.parallel.cuda.aligned import aligned


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 300, 4096, 9000])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("lies_at_whole_units", [False, True])
def test_the_highest_is_that_of_the_twin_and_of_equal_ones_the_first(
    lies_at_whole_units: bool, width: int, ties: bool, dtype: torch.dtype, device: torch.device
) -> None:
    from parallel.cuda.highest import highest

    x = torch.randn(5, width + 7, generator=torch.Generator().manual_seed(width)).to(dtype)[:, :width]
    x = x.round() if ties else x
    x[3] = -torch.inf
    found, wanted = highest(aligned(x.to(device)) if lies_at_whole_units else x.to(device)), slowly(x)
    assert torch.equal(found[0].cpu(), wanted[0].float())
    assert torch.equal(found[1].cpu(), wanted[1])


def test_a_row_with_a_nan_is_told_and_its_id_is_one(device: torch.device) -> None:
    from parallel.cuda.highest import highest

    x = torch.randn(3, 5000, device=device)
    x[1, 4999] = torch.nan
    x[2] = torch.nan
    values, ids = highest(x)
    assert values.isnan().tolist() == [False, True, True]
    assert ids.lt(5000).tolist()[:2] == [True, True]
