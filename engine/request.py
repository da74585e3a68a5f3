"""What the engine is asked for: one choice of one request, as token ids."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen from the logits. Applied in the order of the fields' groups below.

    Every value is already validated and resolved (the seed too): the engine never guesses and never clamps.
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
    """Output tokens at most. 0 = what is asked for is known of the prompt alone."""
    min_tokens: int = 0
    """`stop_token_ids` cannot be sampled before this many output tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Ends the answer; the id itself is the last output token. The caller puts the model's end-of-sequence ids here."""
    grammar: str | None = None
    """What the text of the answer must match: Lark in the dialect of llguidance. None = anything.

    Control tokens are then sampled only if they are stop ids and the text is whole; where it cannot go on, it ends before `min_tokens`."""
    logprobs: int | None = None
    """None = none; k = the sampled token's log-probability and the k most probable alternatives. Of the raw logits' softmax,
    before penalties and temperature."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens: k alternatives at the place of each but the first, before which there is nothing."""

    @property
    def needs_history(self) -> bool:
        """Whether sampling looks at the tokens seen so far."""
        return self.penalises or self.grammar is not None

    @property
    def penalises(self) -> bool:
        """Whether the tokens seen so far change logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """Of a request for an embedding: instead of an answer it gets one vector, of its prompt's hidden states behind the last norm."""

    kind: Literal["last", "mean", "first"]
    """The last token's, the mean of all tokens', or the first one's."""
    is_causal: bool = True
    """False: every token sees all others. The prompt is then computed in one step, and its KV is of no use to any other request."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One choice of a client's request. A client's ``n`` choices are ``n`` of these with one id and choices 0 .. n - 1."""

    id: str
    choice: int = 0
    attempt: int = 0
    """How often this choice was handed to an engine before; events carry it so that a late answer can be told apart."""
    prompt: tuple[int, ...]
    committed: tuple[int, ...] = ()
    """Output tokens that a lost replica delivered already; the engine goes on behind them."""
    losses: int = 0
    """How often workers were lost while they computed it, on other replicas; see `engine.isolation`."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    pooling: Pooling | None = None
    """None = an answer is wanted. Else `sampling` has no say."""
    salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""
    session: str = ""
    """Requests of one session go to the same replica where that costs little; the engine does not look at it."""
    tenant: str = ""
    """Whose request it is: tenants get the engine in proportion to their `share`. See `engine.policy`."""
    share: float = 1.0
    priority: int = 0
    """Lower is served first; arrival order within."""
    deadline_s: float | None = None
    """Unix time after which the request is ended with `DeadlineExceeded`."""
    tag: int = field(default=-1, compare=False)
    """A number by which whoever submitted it wants to hear of its tokens (`engine.output.TokenBatch`); the engine does not look at it."""

    @property
    def key(self) -> tuple[str, int]:
        return (self.id, self.choice)
