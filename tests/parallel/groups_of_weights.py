"""Groups of 32 weights with every kind of edge case for quantisation: (groups, 32) in float32."""

import torch
from torch import Tensor


def _groups() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)

    def drawn(count: int = 500) -> Tensor:
        return torch.randn(count, 32, generator=random)

    far = drawn() * 0.1
    far[:, 17] = drawn(500)[:, 0]
    broken = drawn(10)
    broken[0, 3], broken[1, 4], broken[2, 31], broken[3] = torch.nan, torch.inf, -torch.inf, 0
    return {
        "drawn": drawn() * 0.02,
        "in bfloat16": (drawn() * 0.02).bfloat16().float(),
        "with one far from the others": far,
        "whole numbers": torch.randint(-9, 10, (500, 32), generator=random).float(),
        "two at most": torch.randint(-1, 2, (500, 32), generator=random).float(),
        "of one sign": -drawn().abs(),
        "beyond the scales of half precision": torch.cat([drawn(100) * size for size in (1e-7, 1e-6, 3e-5, 1e5, 1e6, 1e30)]),
        "next to nothing": torch.cat([drawn(100) * size for size in (1e-40, 1e-33, 1e-31, 1e-30, 0)]),
        "broken": broken,
    }


GROUPS = _groups()
