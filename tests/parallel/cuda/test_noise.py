"""Random numbers in one launch against plain torch, bit for bit; else answers would depend on the device."""

import pytest
import torch

from engine.run.noise import seed_bits, uniform


@pytest.mark.parametrize("stream", [0, 3])
@pytest.mark.parametrize("num_rows", [1, 130])
def test_results_are_bit_identical_to_the_reference(num_rows: int, stream: int, device: torch.device) -> None:
    from parallel.cuda.noise import uniform as in_one_launch

    generator = torch.Generator().manual_seed(num_rows)
    seeds = torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator)
    seeds[0] = seed_bits(2**64 - 1)
    choices = torch.randint(0, 2**32, (num_rows,), generator=generator)
    positions = torch.randint(0, 2**32, (num_rows,), generator=generator)
    found = in_one_launch(*(words.to(device) for words in (seeds, choices, positions)), stream)
    assert torch.equal(found.cpu(), uniform(seeds, choices, positions, stream))
