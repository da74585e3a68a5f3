"""Which logits decide the rows of a step: if they are few, the head need not compute all of them (`parallel.native.screened`)."""

from collections.abc import Sequence

import numpy as np

from engine.run.sampling.groups import FEW_TOP_K
from engine.run.sampling.state import Row
from parallel.native.screened import TopLogits

_NONE = np.empty(0, np.int64)


def needed_top_logits(rows: Sequence[Row], vocab_size: int) -> TopLogits | None:
    """None if a row depends on more than a few logits, or if its parameters may raise one. ``vocab_size`` ids can be sampled."""
    counts = [_num_needed(row) for row in rows]
    if not rows or not all(counts):
        return None
    return TopLogits(counts, [_lowered(row) for row in rows], vocab_size)


def _num_needed(row: Row) -> int:
    """How many of the highest logits decide the row; 0: all of them.

    A top-k is decided by its k highest, and those equal to the last: later filters see no others.
    """
    sampling = row.state.sampling
    if row.state.entry >= 0 and sampling.penalises:  # its history is on the device
        return 0
    if row.allowed is not None or sampling.grammar is not None or sampling.logprobs is not None or len(row.state.bias_ids):
        return 0
    if sampling.repetition_penalty < 1 or sampling.presence_penalty < 0 or sampling.frequency_penalty < 0:
        return 0
    if sampling.temperature == 0:
        return 1
    return sampling.top_k if 0 < sampling.top_k <= FEW_TOP_K else 0


def _lowered(row: Row) -> np.ndarray:
    """Ids (int64) whose logits are lowered, or forbidden, before the highest is searched."""
    history = row.history
    seen = history.ids if history is not None else _NONE
    return np.concatenate([seen, row.state.stop_ids]) if row.is_too_early_to_stop else seen
