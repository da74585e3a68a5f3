"""What sampling wants to know of each open sequence, as columns, so that hundreds are handed to a device by some operations."""

import numpy as np

from engine.run.sampling.groups import FEW_TOP_K, kind_of, top_k_of
from engine.run.sampling.state import SamplingState

SEED, CHOICE, FIRST, TOP_K, KIND, ENTRY, MAY_STOP_FROM, NEEDS, TEMPERATURE, TOP_P, MIN_P = range(11)
"""Columns; the last three are float64 in the bits of an int64. FIRST: tokens of its prompt. ENTRY: see `SamplingState.entry`.
MAY_STOP_FROM: known tokens from which its stop ids are allowed."""

GREEDY, FEW, FILTERED, UNFILTERED = range(4)
"""`KIND`: drawn not at all; among the few of a small top-k; by whatever filters; from the whole vocabulary."""

GRAPH_KINDS = (GREEDY, FEW, UNFILTERED)
"""The hardest kind of row that each of the ways to draw a whole step takes."""

EDITED, LEARNS, TELLS, GUIDED = 1, 2, 4, 8
"""`NEEDS`: penalties or biases change its logits; the host looks at the tokens that it has; its log-probabilities are wanted; a grammar
says what may be sampled."""


class SamplingColumns:
    """By the rows of `engine.run.block_tables.BlockTables`."""

    def __init__(self) -> None:
        self._columns = np.zeros((11, 16), np.int64)
        self._latest: tuple[np.ndarray, np.ndarray] | None = None
        """Rows that were asked for, and what they have: mostly it is the very same ones again."""

    def put(self, row: int, state: SamplingState) -> None:
        """A sequence that has been opened, over whoever had the row."""
        while row >= self._columns.shape[1]:
            self._columns = np.concatenate([self._columns, np.zeros_like(self._columns)], axis=1)
        self._latest = None
        sampling, guided = state.sampling, state.sampling.grammar is not None
        changes = sampling.penalises or len(state.bias_ids) > 0
        numbers = np.array([sampling.temperature, sampling.top_p, sampling.min_p], np.float64)
        self._columns[:, row] = (
            state.seed,
            state.choice,
            state.num_prompt,
            top_k_of(sampling, state.vocab_size),
            draw_code(state),
            state.entry,
            state.num_prompt + sampling.min_tokens if len(state.stop_ids) else 0,
            EDITED * changes | LEARNS * (guided or state.history is not None) | TELLS * (sampling.logprobs is not None) | GUIDED * guided,
            *numbers.view(np.int64),
        )

    def of(self, rows_S: np.ndarray) -> np.ndarray:
        """int64 (11, S); the same array for the same array of rows, while nobody is put in."""
        if self._latest is None or self._latest[0] is not rows_S:
            self._latest = rows_S, self._columns.take(rows_S, axis=1)
        return self._latest[1]


def stop_ids_forbidden(columns: np.ndarray, known_S: np.ndarray) -> np.ndarray:
    """bool (S): whether stop ids are forbidden to sequences with so many known tokens, by no grammar."""
    forbidden: np.ndarray = (known_S < columns[MAY_STOP_FROM]) & ((columns[NEEDS] & GUIDED) == 0)
    return forbidden


def are_edited(columns: np.ndarray, known_S: np.ndarray) -> bool:
    """Whether any of the sequences, which have so many known tokens, has its logits changed."""
    return bool((columns[NEEDS] & (EDITED | GUIDED)).any() or stop_ids_forbidden(columns, known_S).any())


def may_be_edited(columns: np.ndarray) -> bool:
    """Whether `are_edited` may say so, however many tokens are known."""
    return bool((columns[NEEDS] & (EDITED | GUIDED)).any() or columns[MAY_STOP_FROM].any())


def are_edited_by_host(columns: np.ndarray, known_S: np.ndarray) -> bool:
    """Whether the host must change the logits of any of them, as it has no entry. What a grammar says the device can be told."""
    changed_S = (columns[NEEDS] & EDITED > 0) | stop_ids_forbidden(columns, known_S)
    return bool((changed_S & (columns[ENTRY] < 0)).any())


def needs_host(columns: np.ndarray, known_S: np.ndarray) -> bool:
    """Whether in what a step gives any of them: then the host must have read the step before, or waits for this one."""
    return bool((columns[NEEDS] & (LEARNS | TELLS | GUIDED)).any()) or are_edited_by_host(columns, known_S)


def may_need_host(columns: np.ndarray) -> bool:
    """Whether it has one, or may have one some time, however many tokens are known."""
    may_be_edited_S = (columns[NEEDS] & EDITED > 0) | (columns[MAY_STOP_FROM] > 0)
    return bool((columns[NEEDS] & (LEARNS | TELLS | GUIDED)).any() or (may_be_edited_S & (columns[ENTRY] < 0)).any())


def graph_kind(kind: int) -> int:
    """The first of `GRAPH_KINDS` that takes such a row."""
    return next(most for most in GRAPH_KINDS if most >= kind)


def draw_code(state: SamplingState) -> int:
    """Its `KIND`."""
    match kind_of(state.sampling, state.vocab_size):
        case "greedy":
            return GREEDY
        case "unfiltered":
            return UNFILTERED
        case "bounded":
            return FEW if 0 < state.sampling.top_k <= FEW_TOP_K else FILTERED
        case "open":
            return FILTERED
