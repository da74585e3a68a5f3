"""Sampling from the full vocabulary by a kernel, against sorting."""

import pytest
import torch

from engine.run.sampling.filters import DrawParams, draw_filtered, total_weight
from tests.parallel.cuda.aligned import aligned

VOCAB_SIZE = 2100
ROWS = [  # temperature, top-k, top-p, min-p
    (1.0, VOCAB_SIZE, 0.97, 0.0),
    (0.3, 50, 1.0, 0.02),
    (2.5, VOCAB_SIZE, 0.9, 0.1),
    (5e-324, VOCAB_SIZE, 1.0, 0.0),
    (1.7, 3, 0.5, 0.0),
    (0.7, 1500, 0.99, 1.0),
    (3.0, 1500, 0.999, 0.0),
    (1.0, VOCAB_SIZE, 1e-9, 0.0),
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("lies_at_whole_units", [False, True])
def test_samples_equal_those_by_sorting(lies_at_whole_units: bool, ties: bool, device: torch.device) -> None:
    from parallel.cuda.sampling_full_vocab import draw_full_vocab

    generator = torch.Generator().manual_seed(int(ties))
    logits_RV = torch.randn(len(ROWS), VOCAB_SIZE + 5, generator=generator)[:, :VOCAB_SIZE] * 3
    logits_RV = (logits_RV * 2).round() / 2 if ties else logits_RV
    logits_RV[2, :700] = -torch.inf
    numbers = torch.tensor(ROWS, dtype=torch.float64).T
    params = DrawParams(numbers[0], numbers[1].long(), numbers[2], numbers[3], torch.rand(len(ROWS), generator=generator).double())
    wanted, _ = draw_filtered(logits_RV, params, VOCAB_SIZE, total_weight(logits_RV, params))
    decided_R = torch.zeros(len(ROWS), dtype=torch.int64)
    decided_R[4] = 1
    per_row = (params.temperature_R, params.top_k_R, params.top_p_R, params.min_p_R, params.uniform_R)
    chosen_R = torch.full_like(decided_R, 77)
    laid = aligned(logits_RV.to(device)) if lies_at_whole_units else logits_RV.to(device)
    found = chosen_R.to(device)
    draw_full_vocab(found, laid, *(x.contiguous().to(device) for x in (*per_row, decided_R)))
    wanted[4] = 77
    assert found.tolist() == wanted.tolist()


def test_a_row_of_nan_gives_some_id(device: torch.device) -> None:
    from parallel.cuda.sampling_full_vocab import draw_full_vocab

    row, one = torch.full((1, 300), torch.nan, device=device), torch.ones(1, dtype=torch.float64, device=device)
    undecided = torch.zeros(1, dtype=torch.int64, device=device)
    found = undecided - 7
    draw_full_vocab(found, row, one, undecided + 300, one, one * 0, one / 2, undecided)
    assert 0 <= found.item() < 300
