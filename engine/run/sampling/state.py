"""What the sampling rank knows about a sequence between steps."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from engine.plan import NewSequence, Work
from engine.run.noise import seed_bits


class TokenHistory:
    """The distinct tokens of a sequence and how often each occurs in its output, as growing arrays."""

    def __init__(self, *, num_prompt: int, vocab_size: int) -> None:
        self.num_tokens = 0
        self._num_prompt = num_prompt
        self._vocab_size = vocab_size
        self._indices: dict[int, int] = {}
        self._ids = np.empty(64, np.int64)
        self._output_counts = np.zeros(64, np.int64)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add the tokens from position `num_tokens` on. Ids beyond the vocabulary have no logit to change and only advance the position."""
        for token in tokens:
            is_output = self.num_tokens >= self._num_prompt
            self.num_tokens += 1
            if token < self._vocab_size:
                index = self._index_of(token)
                self._output_counts[index] += is_output

    @property
    def ids(self) -> np.ndarray:
        """int64, distinct, in order of first occurrence."""
        return self._ids[: len(self._indices)]

    @property
    def output_counts(self) -> np.ndarray:
        """int64, one per id; 0 for those only in the prompt."""
        return self._output_counts[: len(self._indices)]

    def extended(self, tokens: Iterable[int]) -> "TokenHistory":
        """A copy with more tokens added."""
        after = TokenHistory(num_prompt=self._num_prompt, vocab_size=self._vocab_size)
        after.num_tokens, after._indices = self.num_tokens, dict(self._indices)
        after._ids, after._output_counts = self._ids.copy(), self._output_counts.copy()
        after.extend(tokens)
        return after

    def _index_of(self, token: int) -> int:
        index = self._indices.setdefault(token, len(self._indices))
        if index == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._output_counts = np.concatenate([self._output_counts, np.zeros_like(self._output_counts)])
        self._ids[index] = token
        return index


class SamplingState:
    """A sequence's sampling parameters in the form that steps need, and its history if they depend on it."""

    def __init__(self, opening: NewSequence, *, vocab_size: int) -> None:
        """``vocab_size`` is the number of ids that can be sampled; rules about other ids have no effect."""
        self.sequence = opening.sequence
        self.request_id = opening.request_id
        self.sampling = opening.sampling
        self.choice = opening.choice
        self.seed = seed_bits(opening.sampling.seed)
        self.stop_ids = np.array([t for t in opening.sampling.stop_token_ids if t < vocab_size], np.int64)
        bias: dict[int, float] = {}
        for token, value in opening.sampling.logit_bias:
            if token < vocab_size:
                bias[token] = bias.get(token, 0.0) + value
        self.bias_ids = np.array(list(bias), np.int64)
        self.bias_values = np.array(list(bias.values()), np.float32)
        self.num_prompt, self.vocab_size = opening.num_prompt, vocab_size
        self.entry = -1
        """Its entry in the `engine.run.sampling.edit_table.EditTable`, which then replaces `history`; negative: none."""
        self.history: TokenHistory | None = None
        if opening.sampling.penalises:
            self.history = TokenHistory(num_prompt=opening.num_prompt, vocab_size=vocab_size)
            self.history.extend(opening.history)

    def add_tokens(self, work: Work) -> None:
        """Add the tokens of the work that are new, without its draft."""
        if self.history is not None:
            known = max(self.history.num_tokens - work.start, 0)
            self.history.extend(work.tokens[known : len(work.tokens) - work.num_draft])

    def accept_draft(self, tokens: Iterable[int]) -> None:
        """Add draft tokens that were accepted: no work will bring them again."""
        if self.history is not None:
            self.history.extend(tokens)

    def next_position(self, work: Work) -> int:
        """The output position of the token after the last known one of the work."""
        return work.start + len(work.tokens) - work.num_draft - self.num_prompt


class Row(NamedTuple):
    """One row of logits, and the sequence that it belongs to."""

    state: SamplingState
    position: int
    """Output position of the token to be sampled."""
    allowed: np.ndarray | None = None
    """int32 (W = ceil(V / 32)): a bit for each id, lowest first; 0 forbids it. Includes `min_tokens`. None = no restriction."""
    ahead: tuple[int, ...] = ()
    """Draft tokens between the last known one and this position."""

    @property
    def is_too_early_to_stop(self) -> bool:
        return self.position < self.state.sampling.min_tokens and len(self.state.stop_ids) > 0

    @property
    def history(self) -> TokenHistory | None:
        """The tokens that the row has seen, if its parameters depend on them."""
        history = self.state.history
        return history.extended(self.ahead) if history is not None and self.ahead else history
