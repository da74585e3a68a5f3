"""A request as the engine gets it: one choice of a client's request, as token ids."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is sampled from the logits. The groups of fields below are applied in order.

    Every value is validated and resolved already, the seed too: the engine applies no defaults and clamps nothing.
    """

    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of every token seen in prompt or output. 1 = off. (CTRL, arXiv 1909.05858)"""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token seen in the output (OpenAI)."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit times its count in the output (OpenAI)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, value added to its logit)."""

    temperature: float = 1.0
    """Divides the logits. 0 = greedy: the highest logit, lowest id on a tie; nothing below applies then."""
    top_k: int = 0
    """Keep the k highest logits. 0 = off."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens whose probability (after top_k) reaches this. 1 = off. (arXiv 1904.09751)"""
    min_p: float = 0.0
    """Keep tokens with at least this fraction of the most probable token's probability. 0 = off. (arXiv 2407.01082)"""
    seed: int = 0
    """Noise of output position i of choice c is a function of (seed, c, i) alone."""

    max_tokens: int = 16
    """Output tokens at most. 0 = only something about the prompt is wanted, for instance its log-probabilities."""
    min_tokens: int = 0
    """`stop_token_ids` cannot be sampled before this many output tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the answer; such an id is the last output token. The caller includes the model's end-of-sequence ids."""
    grammar: str | None = None
    """A grammar that the text of the answer must match, in Lark as llguidance reads it. None = any text.

    Control tokens are then sampled only if they are stop ids and the text is complete. A text that cannot continue ends before
    `min_tokens`."""
    logprobs: int | None = None
    """None = none; k = the log-probabilities of the sampled token and of the k most probable ones, by the softmax of the raw logits, before
    penalties and temperature."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens except the first, which has no logits before it."""

    @property
    def needs_history(self) -> bool:
        """Whether sampling depends on the tokens so far."""
        return self.penalises or self.grammar is not None

    @property
    def penalises(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """A request for an embedding: one vector, pooled from the prompt's hidden states after the last norm, instead of an answer."""

    kind: Literal["last", "mean", "first"]
    """The hidden state of the last token, the mean over all tokens, or that of the first token."""
    is_causal: bool = True
    """False: every token attends to all others. The prompt is then computed in one step, and its KV cannot be shared."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One choice of a client's request. A client's ``n`` choices are ``n`` of these with one id and choices 0 .. n - 1."""

    id: str
    choice: int = 0
    attempt: int = 0
    """How often this choice was submitted to an engine before. Events carry it, so that late ones of an earlier attempt are recognised."""
    prompt: tuple[int, ...]
    committed: tuple[int, ...] = ()
    """Output tokens that a lost replica delivered already; the engine continues after them."""
    losses: int = 0
    """How often workers of other replicas were lost while they computed it; see `engine.isolation`."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    pooling: Pooling | None = None
    """None = an answer is wanted. Otherwise `sampling` is ignored."""
    salt: str = ""
    """Requests share cached prefixes only with requests that have the same salt."""
    session: str = ""
    """Requests of one session go to the same replica where that costs little. The engine ignores it."""
    tenant: str = ""
    """Whose request it is. Tenants are served in proportion to their `share`; see `engine.fair_share`."""
    share: float = 1.0
    priority: int = 0
    """Lower is served first; among equals, in order of arrival."""
    deadline_s: float | None = None
    """Unix time after which the request ends with `DeadlineExceeded`."""
    tag: int = field(default=-1, compare=False)
    """The submitter's number for the request, returned with its tokens (`engine.output.TokenBatch`). The engine ignores it."""

    @property
    def key(self) -> tuple[str, int]:
        return (self.id, self.choice)
