"""The sampling parameters of open sequences as columns, so that a few operations upload them for hundreds of sequences."""

import numpy as np

from engine.run.sampling.groups import FEW_TOP_K, draw_mode_of, top_k_of
from engine.run.sampling.state import SamplingState

SEED, CHOICE, NUM_PROMPT, TOP_K, DRAW_MODE, ENTRY, MAY_STOP_FROM, NEEDS, TEMPERATURE, TOP_P, MIN_P = range(11)
"""Columns; the last three are float64 in the bits of an int64. NUM_PROMPT: tokens of the prompt. ENTRY: see `SamplingState.entry`.
MAY_STOP_FROM: number of known tokens from which its stop ids are allowed."""

GREEDY, FEW, FILTERED, UNFILTERED = range(4)
"""`DRAW_MODE`: not drawn; drawn among the few of a small top-k; with any filters; from the whole vocabulary."""

GRAPH_MODES = (GREEDY, FEW, UNFILTERED)
"""The draw modes for which the sampler is captured. Each also handles the modes before it."""

EDITS, TRACKS_TOKENS, LOGPROBS, GRAMMAR = 1, 2, 4, 8
"""`NEEDS`: penalties or biases change its logits; the host reads its tokens; it wants log-probabilities; it has a grammar."""


class SamplingColumns:
    """One column for each row of `engine.run.block_tables.BlockTables`."""

    def __init__(self) -> None:
        self._columns = np.zeros((11, 16), np.int64)
        self._cached_for: tuple[np.ndarray, np.ndarray] | None = None
        """The last argument of `of` and its result. Most steps ask for the same array again."""

    def put(self, row: int, state: SamplingState) -> None:
        """Write the parameters of a newly opened sequence, over those of the row's previous owner."""
        while row >= self._columns.shape[1]:
            self._columns = np.concatenate([self._columns, np.zeros_like(self._columns)], axis=1)
        self._cached_for = None
        sampling, guided = state.sampling, state.sampling.grammar is not None
        changes = sampling.penalises or len(state.bias_ids) > 0
        floats = np.array([sampling.temperature, sampling.top_p, sampling.min_p], np.float64)
        self._columns[:, row] = (
            state.seed,
            state.choice,
            state.num_prompt,
            top_k_of(sampling, state.vocab_size),
            draw_mode_code(state),
            state.entry,
            state.num_prompt + sampling.min_tokens if len(state.stop_ids) else 0,
            EDITS * changes
            | TRACKS_TOKENS * (guided or state.history is not None)
            | LOGPROBS * (sampling.logprobs is not None)
            | GRAMMAR * guided,
            *floats.view(np.int64),
        )

    def of(self, rows_S: np.ndarray) -> np.ndarray:
        """int64 (11, S). The same array for the same array of rows until a sequence is opened."""
        if self._cached_for is None or self._cached_for[0] is not rows_S:
            self._cached_for = rows_S, self._columns.take(rows_S, axis=1)
        return self._cached_for[1]


def stop_ids_forbidden(columns: np.ndarray, known_S: np.ndarray) -> np.ndarray:
    """bool (S): whether stop ids are forbidden to sequences with so many known tokens. A grammar has its own rule."""
    forbidden: np.ndarray = (known_S < columns[MAY_STOP_FROM]) & ((columns[NEEDS] & GRAMMAR) == 0)
    return forbidden


def are_edited(columns: np.ndarray, known_S: np.ndarray) -> bool:
    """Whether the logits of any of the sequences, with so many known tokens, are edited."""
    return bool((columns[NEEDS] & (EDITS | GRAMMAR)).any() or stop_ids_forbidden(columns, known_S).any())


def may_be_edited(columns: np.ndarray) -> bool:
    """Whether `are_edited` can be true for any number of known tokens."""
    return bool((columns[NEEDS] & (EDITS | GRAMMAR)).any() or columns[MAY_STOP_FROM].any())


def are_edited_by_host(columns: np.ndarray, known_S: np.ndarray) -> bool:
    """Whether the host must edit the logits of any of them because it has no entry. A grammar's mask can be uploaded."""
    changed_S = (columns[NEEDS] & EDITS > 0) | stop_ids_forbidden(columns, known_S)
    return bool((changed_S & (columns[ENTRY] < 0)).any())


def needs_host(columns: np.ndarray, known_S: np.ndarray) -> bool:
    """Whether the results of any of them need the host: then it must have read the previous step, or must wait for this one."""
    return bool((columns[NEEDS] & (TRACKS_TOKENS | LOGPROBS | GRAMMAR)).any()) or are_edited_by_host(columns, known_S)


def may_need_host(columns: np.ndarray) -> bool:
    """Whether `needs_host` can be true for any number of known tokens."""
    may_be_edited_S = (columns[NEEDS] & EDITS > 0) | (columns[MAY_STOP_FROM] > 0)
    return bool((columns[NEEDS] & (TRACKS_TOKENS | LOGPROBS | GRAMMAR)).any() or (may_be_edited_S & (columns[ENTRY] < 0)).any())


def graph_mode(mode: int) -> int:
    """The first of `GRAPH_MODES` that handles rows of this mode."""
    return next(captured for captured in GRAPH_MODES if captured >= mode)


def draw_mode_code(state: SamplingState) -> int:
    """The sequence's `DRAW_MODE`."""
    match draw_mode_of(state.sampling, state.vocab_size):
        case "greedy":
            return GREEDY
        case "unfiltered":
            return UNFILTERED
        case "bounded":
            return FEW if 0 < state.sampling.top_k <= FEW_TOP_K else FILTERED
        case "open":
            return FILTERED
