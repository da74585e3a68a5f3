"""Which logits decide a step's rows, where they are few: then the head need not give all of them (`parallel.native.screened`)."""

from collections.abc import Sequence

import numpy as np

from engine.run.sampling.groups import FEW_TOP_K
from engine.run.sampling.state import Row
from parallel.native.screened import Sought

_NONE = np.empty(0, np.int64)


def needed_top_logits(rows: Sequence[Row], vocab_size: int) -> Sought | None:
    """None where some row looks at more than a few of its logits, or something may raise one of them. ``vocab_size`` ids can be sampled."""
    counts = [_num_needed(row) for row in rows]
    if not rows or not all(counts):
        return None
    return Sought(counts, [_lowered(row) for row in rows], vocab_size)


def _num_needed(row: Row) -> int:
    """How many of the highest decide the row; 0: all do.

    A top-k is decided by its k, with what ties with the last of them: the filters behind it see no more.
    """
    sampling = row.state.sampling
    if row.state.entry >= 0 and sampling.penalises:  # what it has seen is counted elsewhere
        return 0
    if row.allowed is not None or sampling.grammar is not None or sampling.logprobs is not None or len(row.state.bias_ids):
        return 0
    if sampling.repetition_penalty < 1 or sampling.presence_penalty < 0 or sampling.frequency_penalty < 0:
        return 0
    if sampling.temperature == 0:
        return 1
    return sampling.top_k if 0 < sampling.top_k <= FEW_TOP_K else 0


def _lowered(row: Row) -> np.ndarray:
    """Ids (int64) whose logits are made lower, or impossible, before the highest is looked for."""
    history = row.history
    seen = history.ids if history is not None else _NONE
    return np.concatenate([seen, row.state.stop_ids]) if row.is_too_early_to_stop else seen
