"""What sampling wants to know of each open sequence, as columns, so that hundreds are handed to a device by some operations."""

import numpy as np

from engine.run.sampling.groups import FEW_TOP_K, kind_of, top_k_of
from engine.run.sampling.state import SamplingState

SEED, CHOICE, FIRST, TOP_K, KIND, MAY_STOP_FROM, NEEDS, TEMPERATURE, TOP_P, MIN_P = range(10)
"""Columns; the last three are float64 in the bits of an int64. FIRST: tokens of its prompt. MAY_STOP_FROM: known tokens from which its
stop ids are allowed."""

GREEDY, FEW, FILTERED, UNFILTERED = range(4)
"""`KIND`: drawn not at all; among the few of a small top-k; by whatever filters; from the whole vocabulary."""

EDITED, LEARNS, TELLS = 1, 2, 4
"""`NEEDS`: its logits are changed before they are sampled; it looks at the tokens that it has; its log-probabilities are wanted."""


class SamplingColumns:
    """By the rows of `engine.run.block_tables.BlockTables`."""

    def __init__(self) -> None:
        self._columns = np.zeros((10, 16), np.int64)

    def put(self, row: int, state: SamplingState) -> None:
        """A sequence that has been opened, over whoever had the row."""
        while row >= self._columns.shape[1]:
            self._columns = np.concatenate([self._columns, np.zeros_like(self._columns)], axis=1)
        sampling, learns = state.sampling, state.sampling.needs_history
        numbers = np.array([sampling.temperature, sampling.top_p, sampling.min_p], np.float64)
        self._columns[:, row] = (
            state.seed,
            state.choice,
            state.num_prompt,
            top_k_of(sampling, state.vocab_size),
            _kind(state),
            state.num_prompt + sampling.min_tokens if len(state.stop_ids) else 0,
            EDITED * (learns or len(state.bias_ids) > 0) | LEARNS * learns | TELLS * (sampling.logprobs is not None),
            *numbers.view(np.int64),
        )

    def of(self, rows_S: np.ndarray) -> np.ndarray:
        """int64 (10, S)."""
        return self._columns.take(rows_S, axis=1)


def are_edited(columns: np.ndarray, known_S: np.ndarray) -> bool:
    """Whether any of the sequences, which have so many known tokens, has its logits changed."""
    return bool(((columns[NEEDS] & EDITED) | (known_S < columns[MAY_STOP_FROM])).any())


def _kind(state: SamplingState) -> int:
    match kind_of(state.sampling, state.vocab_size):
        case "greedy":
            return GREEDY
        case "unfiltered":
            return UNFILTERED
        case "bounded":
            return FEW if 0 < state.sampling.top_k <= FEW_TOP_K else FILTERED
        case "open":
            return FILTERED
