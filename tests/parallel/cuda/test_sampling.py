"""Sampling kernels against the sampler in plain torch: the same token for any parameters and logits."""

import random

import pytest
import torch
from torch import Tensor

from engine.request import SamplingParams
from engine.run.noise import seed_bits, uniform
from engine.run.sampling.columns import FEW, FILTERED, GREEDY, UNFILTERED
from engine.run.sampling.filters import DrawParams, draw_filtered, draw_unfiltered, total_weight
from engine.run.sampling.groups import FEW_TOP_K, draw_mode_of, top_k_of
from engine.run.sampling.top_k import highest
from tests.parallel.cuda.aligned import aligned

KINDS = {
    GREEDY: [SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, top_k=7)],
    FEW: [
        SamplingParams(top_k=20, top_p=0.8, temperature=0.7),
        SamplingParams(top_k=1),
        SamplingParams(top_k=64, temperature=3.0),
        SamplingParams(top_k=50, min_p=0.05),
        SamplingParams(top_k=3, top_p=0.5, temperature=1e-9),
        SamplingParams(top_k=40, top_p=0.99, min_p=1.0),
    ],
    FILTERED: [
        SamplingParams(top_p=0.9),
        SamplingParams(top_p=0.97, temperature=2.5),
        SamplingParams(top_p=1e-9),
        SamplingParams(min_p=0.1),
        SamplingParams(top_k=300, top_p=0.95),
        SamplingParams(top_k=100),
        SamplingParams(top_k=65, top_p=0.5, min_p=0.02, temperature=0.3),
    ],
    UNFILTERED: [SamplingParams(), SamplingParams(temperature=0.1), SamplingParams(temperature=5.0)],
}


def to_logit(kind: str, width: int, generator: torch.Generator) -> Tensor:
    """One row."""
    row = torch.randn(width, generator=generator) * 3
    match kind:
        case "ties":
            row = row.round()
        case "one":
            row = torch.full((width,), 1.5)
        case "two":
            row = (row > 6).float()
        case "few":
            row = torch.where(torch.rand(width, generator=generator) < 9 / width, row, -torch.inf)
        case "zeros":
            row = torch.where(row > 0, -0.0, 0.0)
            row[-3:] = torch.tensor([1e-45, -1e-45, 0.0])
        case "peak":
            row[width // 2] = 60.0
        case "head":  # the highest side by side, as ids of frequent words are
            row[: min(width, 900)] += 9
    return row


LOGITS = ("random", "ties", "one", "two", "few", "zeros", "peak", "head")


def wanted_of(row: Tensor, sampling: SamplingParams, numbers: tuple[int, int, int]) -> int:
    """By sorting the whole row."""
    row, width = row.unsqueeze(0), len(row)
    mode = draw_mode_of(sampling, width)
    if mode == "greedy":
        return int(highest(row)[1])
    uniform_1 = uniform(*(torch.tensor([number]) for number in numbers))
    one = [torch.tensor([number], dtype=torch.float64) for number in (sampling.temperature, sampling.top_p, sampling.min_p)]
    params = DrawParams(one[0], torch.tensor([top_k_of(sampling, width)]), one[1], one[2], uniform_1)
    if mode == "unfiltered":
        return int(draw_unfiltered(row, params)[0])
    return int(draw_filtered(row, params, width, total_weight(row, params))[0])


def column_of(sampling: SamplingParams, width: int) -> int:
    kinds = {"greedy": GREEDY, "unfiltered": UNFILTERED, "open": FILTERED}
    kinds["bounded"] = FEW if 0 < sampling.top_k <= FEW_TOP_K else FILTERED
    return kinds[draw_mode_of(sampling, width)]


def drawn(
    logits_RV: Tensor, sampling: list[SamplingParams], numbers: list[tuple[int, int, int]], most: int, raw: Tensor | None = None
) -> Tensor:
    from parallel.cuda.sampling import draw

    width, device = logits_RV.shape[1], logits_RV.device
    kinds, top_ks = ([one(some, width) for some in sampling] for one in (column_of, top_k_of))
    kinds = [UNFILTERED] * len(kinds) if most == GREEDY else kinds  # what lies there is nobody's
    report_3R = torch.full((3, len(sampling)), 77, device=device)
    floats = torch.tensor([(one.temperature, one.top_p, one.min_p) for one in sampling], dtype=torch.float64).T.contiguous()
    whole = torch.tensor([(*some, kind, top_k) for some, kind, top_k in zip(numbers, kinds, top_ks, strict=True)]).T.contiguous()
    names = ("seed_R", "choice_R", "position_R", "mode_R", "top_k_R")
    given = dict(zip(names, whole.to(device), strict=True)) | dict(
        zip(("temperature_R", "top_p_R", "min_p_R"), floats.to(device), strict=True)
    )
    draw(logits_RV, report_3R, hardest_mode=most, raw_highest_RN=raw, **given)
    return report_3R.cpu()


FLOAT, BF16 = torch.float32, torch.bfloat16
EVERY = [
    (width, dtype, most, lies) for width, dtype in ((2500, FLOAT), (9001, BF16)) for most in (FEW, UNFILTERED) for lies in (False, True)
]


@pytest.mark.parametrize(
    ("width", "dtype", "most", "lies_aligned", "count"),
    [
        (5000, FLOAT, GREEDY, True, 16),
        (2500, FLOAT, UNFILTERED, False, 8),
        (4500, BF16, FEW, True, 5),
        (4500, BF16, UNFILTERED, True, 6),
        (70, FLOAT, FEW, False, 4),
        *(pytest.param(*one, 200, marks=pytest.mark.slow) for one in EVERY),
    ],
)
def test_samples_equal_those_by_sorting(
    width: int, dtype: torch.dtype, most: int, lies_aligned: bool, count: int, device: torch.device
) -> None:
    draw, generator = random.Random(width + most), torch.Generator().manual_seed(width)
    params = [one for kind, some in KINDS.items() if kind <= most for one in some]
    cases = [(some, one) for some in LOGITS for one in (params if width > 1000 else draw.sample(params, 2))]
    cases = draw.sample(cases, min(len(cases), count))
    logits_RV = torch.stack([to_logit(some, width, generator) for some, _ in cases]).to(dtype)
    sampling = [one for _, one in cases]
    numbers = [(seed_bits(draw.getrandbits(64)), draw.randrange(3), draw.randrange(1 << 20)) for _ in cases]
    there_RV = logits_RV.to(device)
    found = drawn(aligned(there_RV) if lies_aligned else there_RV, sampling, numbers, most)
    wanted = [wanted_of(*one) for one in zip(logits_RV, sampling, numbers, strict=True)]
    wrong = [(case, one, other) for case, one, other in zip(cases, found[0].tolist(), wanted, strict=True) if one != other]
    assert not wrong
    assert found[1:].tolist() == [[1] * len(cases)] * 2


def test_rows_with_invalid_logits_are_reported_and_do_not_affect_others(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(4)
    logits_RV = torch.randn(10, 5000, generator=generator)
    logits_RV[0, 4999] = torch.nan
    logits_RV[1] = torch.nan
    logits_RV[2] = -torch.nan
    logits_RV[3, 17] = torch.inf
    logits_RV[4] = -torch.inf
    sampling = [
        SamplingParams(top_k=20),
        SamplingParams(temperature=0.0),
        SamplingParams(top_p=0.9),
        SamplingParams(),
        SamplingParams(),
    ] * 2
    numbers = [(at, 0, at) for at in range(10)]
    found = drawn(logits_RV.to(device), sampling, numbers, UNFILTERED)
    assert found[1].tolist() == found[2].tolist() == [0] * 5 + [1] * 5
    assert found[0].ge(0).all()
    assert found[0].lt(5000).all()
    assert found[0, 5:].tolist() == [wanted_of(*one) for one in zip(logits_RV[5:], sampling[5:], numbers[5:], strict=True)]
    raw_highest_RN = torch.tensor([[0, 5], [0x7FFFFFFF, 3], [-5, -3], [-0x7F800001, -0x7F800001]], dtype=torch.int32, device=device)
    found = drawn(logits_RV[4:8].to(device), sampling[5:9], numbers[5:9], UNFILTERED, raw_highest_RN)
    assert found[1:].tolist() == [[1, 0, 1, 0], [0, 1, 1, 1]]
