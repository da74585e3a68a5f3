"""The messages of the engine: StepPlan down to the ranks, StepResult up, TokenEvent out to the fronts."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from engine.request import Pooling, SamplingParams


@dataclass(frozen=True, slots=True)
class NewSequence:
    """The ranks begin a block table for a sequence: a new request, or one that comes back after preemption or a loss."""

    sequence: int
    """The sequence's number. Unique over all shards and never used twice; a preempted sequence comes back under a new one."""
    choice: int
    num_prompt: int
    """Tokens that count as prompt: output position = token position - num_prompt."""
    sampling: SamplingParams
    history: tuple[int, ...] = ()
    """All tokens so far if `sampling.needs_history`, otherwise empty."""
    request_id: str = ""
    """For the logs of the ranks."""
    shard: int = 0
    """The dp position whose ranks hold it; see `Work.shard`."""
    pooling: Pooling | None = None
    """Set if an embedding is wanted instead of an answer."""


class Work(NamedTuple):
    """The part of one sequence that a step computes: its tokens [start, start + len(tokens)).

    A NamedTuple because a step may have hundreds, and a frozen dataclass takes four times as long to make.
    """

    sequence: int
    start: int
    tokens: tuple[int, ...]
    new_blocks: tuple[int, ...]
    """Appended to the sequence's block table before the step. Its first work also brings the blocks of the cached prefix."""
    samples: bool
    """Whether the tokens include the sequence's last known one, so that a next token is sampled from its logits."""
    num_draft: int = 0
    """How many of the tokens, at the end, are a draft. Such a work samples, and yields one more token for each accepted one."""
    targets: tuple[int, ...] = ()
    """The known next token at each of the first `len(targets)` positions, if their log-probabilities are wanted (`PromptLogprobs`)."""
    pools: bool = False
    """Whether the tokens include the last one of a prompt whose embedding is wanted (`PooledEmbedding`)."""
    num_next_draft: int = 0
    """How many tokens the ranks' draft model is to propose after what this work samples (`SampledTokens.next_draft`). Blocks for them are
    allocated."""
    shard: int = 0
    """The dp position that computes it, the same as in the sequence's `NewSequence`. Its block numbers refer to that shard's cache."""


COLUMN = np.dtype("<i8")
NO_BLOCK = NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Decodes:
    """Works of sequences that only decode: one token each, at most one new block, and all of them sample.

    Stored as columns, so that making, sending and reading hundreds costs hardly more than one.
    """

    packed: bytes
    """int64 (5, S), little-endian: sequence, start, token, new block (or `NO_BLOCK`) and shard of each work. `NO_TOKEN` in place of a token
    means the one that the ranks sampled for this sequence last, which only they know yet (`Capacity.runs_ahead`)."""

    @classmethod
    def of(cls, columns: np.ndarray) -> "Decodes":
        return cls(np.ascontiguousarray(columns, COLUMN).tobytes())

    @property
    def columns(self) -> np.ndarray:
        """int64 (5, S), read-only."""
        return np.frombuffer(self.packed, COLUMN).reshape(5, -1)

    def __len__(self) -> int:
        return len(self.packed) // (5 * COLUMN.itemsize)

    def works(self) -> tuple["Work", ...]:
        """The same as `Work` objects."""
        return tuple(
            Work(sequence, start, (token,), () if block == NO_BLOCK else (block,), samples=True, shard=shard)
            for sequence, start, token, block, shard in zip(*self.columns.tolist(), strict=True)
        )


NO_DECODES = Decodes(b"")


@dataclass(frozen=True, slots=True)
class Rebalance:
    """Measure the load of the routed experts, and move the experts of a layer between ranks if that evens it out."""

    threshold: float
    """A layer is left alone while the load of its busiest ep position is at most this many times the mean. Infinity: only measure."""


@dataclass(frozen=True, slots=True)
class RebalanceResult:
    """What a `Rebalance` found and did. Without loads: the model has no experts, or there is no choice of where to put them."""

    loads: tuple[tuple[float, ...], ...] = ()
    """For each sparse layer, in order: tokens sent to each expert. Those before the last measurement count half, and so on."""
    imbalance_before: float = 1.0
    """Load of the busiest ep position over the mean, in the layer where that is worst."""
    imbalance_after: float = 1.0
    """The same loads with the experts where they are now."""
    num_moved: int = 0
    """Copies of experts that were moved from one rank to another, in all layers."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass over a replica. Each rank applies `closed`, then `opened`, then computes the works, all for its own shard only.

    Every rank gets every plan, even without works for its shard: collectives of expert parallelism need it.
    """

    step: int
    other_works: tuple[Work, ...]
    """The works that are not in `decodes`: prompts, and decodes with anything special about them. In `works` they come after `decodes`."""
    opened: tuple[NewSequence, ...] = ()
    closed: tuple[int, ...] = ()
    """Sequences whose block tables the ranks forget. Unknown numbers are ignored, because workers may have been replaced."""
    rebalance: Rebalance | None = None
    """To be done first. Such a plan has no works, and no other step is in flight."""
    decodes: Decodes = NO_DECODES

    @property
    def works(self) -> tuple[Work, ...]:
        """All works as objects, which takes time to make."""
        return self.decodes.works() + self.other_works

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(len(work.tokens) for work in self.other_works)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position."""

    logprob: float
    """Of the token at that position."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), most probable first."""


class SampledTokens(NamedTuple):
    """What one sampling work yielded. A NamedTuple for the same reason as `Work`."""

    sequence: int
    tokens: tuple[int, ...]
    """The next token, preceded by the accepted draft tokens."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token if the request asked for them, otherwise empty."""
    fault: str | None = None
    """Why no token could be sampled (NaN logits, for instance); the engine then fails this sequence alone.

    No fault and no tokens: not yet, because its grammar is not ready; the last token is computed again."""
    is_grammar_fault: bool = False
    """Whether the fault is the grammar's and not the logits'."""
    next_draft: tuple[int, ...] = ()
    """The proposal of the ranks' draft model, `Work.num_next_draft` tokens or fewer."""


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """The log-probabilities of the tokens in `Work.targets`."""

    sequence: int
    logprobs: tuple[TokenLogprobs, ...]
    """One per target, with as many alternatives as `SamplingParams.prompt_logprobs` says."""


@dataclass(frozen=True, slots=True)
class PooledEmbedding:
    """The embedding that a work completed."""

    sequence: int
    vector: bytes
    """float32, little-endian, not normalised: as many numbers as the model is wide."""
    fault: str | None = None
    """Why there is none (NaN, for instance); the engine then fails this sequence alone."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """The answer to the plan with the same number: of a sampling rank for its shard, or of an executor for all shards."""

    step: int
    sampled: tuple[SampledTokens, ...]
    elapsed_s: float = 0.0
    """Seconds that the forward pass and sampling took on the sampling rank; of several ranks, the longest."""
    rebalanced: RebalanceResult | None = None
    tokens: bytes = b""
    """The next token, as int64, of each work in the plan's `decodes`, in order; `NO_TOKEN` if `sampled` or another shard has the answer.
    Empty if no work has its token here."""
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    embeddings: tuple[PooledEmbedding, ...] = ()
    drafting_s: float = 0.0
    """The part of `elapsed_s` that the draft model took beyond its first pass; of several ranks, the longest."""


FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """Seconds that one choice spent in one engine. Preemption, and the loss of workers, count in the phase in which they happened."""

    queue_s: float
    """From its admission until a step first computed some of it."""
    prefill_s: float
    """From then to its first token."""
    decode_s: float
    """From then on."""


@dataclass(frozen=True)
class TokenEvent:
    """Progress of one request: new output tokens, its end, or both."""

    request_id: str
    choice: int
    attempt: int
    offset: int
    """Output position of the first of `tokens`, or of the end if there are none."""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    num_cached: int = 0
    """Prompt tokens taken from the prefix cache at the first admission; the same in every event of a request."""
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The stop token id that ended it, if one did."""
    error_kind: str | None = None
    """With finish_reason "error": the name of a class in `engine.errors`, and its message."""
    error_message: str | None = None
    held_s: float = 0.0
    """How long it waited at its front for a replica. Added by the front, to the first event."""
    phase_times: PhaseTimes | None = None
    """In the first event with tokens, and in the last one."""
    losses: int = 0
    """How often workers were lost while they computed it, so far."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the prompt's tokens from the second on, if asked for: in the choice's first event with tokens or an end."""
    embedding: bytes | None = None
    """See `PooledEmbedding.vector`: in the only event of a request for one, with ``finish_reason="stop"``."""

    def with_next_token(self, offset: int, token: int) -> "TokenEvent":
        """A copy with one token at another offset. For plain token events only; takes a quarter of the time of making one."""
        event = object.__new__(TokenEvent)
        event.__dict__.update(self.__dict__, offset=offset, tokens=(token,))
        return event
