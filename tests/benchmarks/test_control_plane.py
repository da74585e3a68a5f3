"""The benchmark of the control plane runs, and ends what it has begun."""

import asyncio
import gc
import warnings

from benchmarks.control_plane import BESIDE, COUNTED, one_round


def test_a_round_measures_every_part_and_leaves_nothing_unawaited() -> None:
    """It never yields to the event loop, so its link is closed before any of the link's tasks has begun."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        parts, num_tokens = asyncio.run(one_round(4, 3, churn=False, speculate=None, far_ends=True))
        gc.collect()
    assert parts.keys() >= {*COUNTED, *BESIDE}
    assert num_tokens == 4
    assert [str(each.message) for each in warned if "never awaited" in str(each.message)] == []
