"""Unpacking decode inputs in one launch against plain torch."""

from collections.abc import Callable

import pytest
import torch

from engine.run.decode_inputs import unpack_decode_inputs_torch


@pytest.mark.parametrize("num_rows", [1, 5, 130])
def test_it_unpacks_like_the_reference(num_rows: int, device: torch.device) -> None:
    from parallel.cuda.decode_inputs import unpack_decode_inputs as in_one_launch

    generator = torch.Generator().manual_seed(num_rows)

    def numbers(least: int, most: int, *shape: int) -> torch.Tensor:
        return torch.randint(least, most, shape, generator=generator)

    block_tokens, most_rows = 16, num_rows + 3
    given = torch.stack([numbers(-most_rows, 9, most_rows), numbers(0, 7 * block_tokens, most_rows), numbers(-40, 40, most_rows)])
    sampled = numbers(0, 1000, most_rows)
    tables = numbers(0, 99, most_rows, 7).int()

    def unpacked(unpack: Callable[..., None], device: torch.device) -> list[torch.Tensor]:
        tokens, slots, lengths = (torch.zeros(num_rows, dtype=dtype, device=device) for dtype in (torch.int64, torch.int64, torch.int32))
        written = tables.to(device, copy=True)
        unpack(given.to(device)[:, :num_rows], sampled.to(device), tokens, slots, lengths, written[:num_rows], block_tokens)
        return [tokens.cpu(), slots.cpu(), lengths.cpu(), written.cpu()]

    found, wanted = unpacked(in_one_launch, device), unpacked(unpack_decode_inputs_torch, torch.device("cpu"))
    assert all(map(torch.equal, found, wanted))
    assert (wanted[1] < 0).equal(given[2, :num_rows] < 0)
