"""Quantiles of cumulative histograms, as Prometheus has them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TypeAlias

Counts: TypeAlias = Mapping[float, float]
"""By upper bound, how many values were at most that; the last bound is infinite."""


def merge_counts(samples: Iterable[tuple[float, float]]) -> Counts:
    """The sum of histograms with the same bounds."""
    counts: dict[float, float] = defaultdict(float)
    for bound, count in samples:
        counts[bound] += count
    return dict(sorted(counts.items()))


def counts_between(now: Counts, before: Counts) -> Counts:
    """What was counted in between. If a count has fallen, the process has restarted, and counts from zero."""
    return {bound: count if count < (old := before.get(bound, 0.0)) else count - old for bound, count in now.items()}


def quantile(counts: Counts, share: float) -> float | None:
    """The value below which ``share`` of all values lie, interpolated linearly within its bucket; None if there are no values. In the
    last, infinite bucket: its lower bound.

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
