"""Quantiles of histograms that count how many were at most so large, as Prometheus has them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TypeAlias

Counts: TypeAlias = Mapping[float, float]
"""Upper bound to how many were at most that; the last bound is infinite."""


def counts_of(samples: Iterable[tuple[float, float]]) -> Counts:
    """Several histograms with the same bounds, as one."""
    counts: dict[float, float] = defaultdict(float)
    for bound, count in samples:
        counts[bound] += count
    return dict(sorted(counts.items()))


def since(now: Counts, before: Counts) -> Counts:
    """What was counted in between. A process that began anew counts from the beginning."""
    return {bound: count if count < (old := before.get(bound, 0.0)) else count - old for bound, count in now.items()}


def quantile(counts: Counts, share: float) -> float | None:
    """Where ``share`` of all lie below, by a straight line within its bucket; None of nothing. In the last, infinite bucket its
    lower bound, as nobody knows more.

    {1: 0, 2: 10, inf: 10}, 0.5  ->  1.5
    """
    total = max(counts.values(), default=0.0)
    if not total:
        return None
    lower, below = 0.0, 0.0
    for bound, count in counts.items():
        if count >= share * total:
            if bound == float("inf") or count == below:
                return lower
            return lower + (bound - lower) * (share * total - below) / (count - below)
        lower, below = bound, count
    return lower
