"""The messages of the engine: StepPlan down to the ranks, StepResult up, TokenEvent out to the fronts."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from engine.request import Pooling, SamplingParams


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence begins (or begins again after preemption) to have a block table on the ranks."""

    sequence: int
    """Engine-wide number, never used twice; a preempted sequence comes back under a new one."""
    choice: int
    num_prompt: int
    """Tokens that count as prompt: output position = token position - num_prompt."""
    sampling: SamplingParams
    history: tuple[int, ...] = ()
    """All tokens so far when `sampling.needs_history`, else empty."""
    request_id: str = ""
    """So that a rank's log can name the request."""
    shard: int = 0
    """The dp position whose ranks hold it; see `Work.shard`."""
    pooling: Pooling | None = None
    """What its tokens are computed for, where that is no answer."""


class Work(NamedTuple):
    """One sequence's share in a step: compute its tokens [start, start + len(tokens)).

    A tuple, as hundreds are made in a step, and a frozen dataclass takes four times as long to make.
    """

    sequence: int
    start: int
    tokens: tuple[int, ...]
    new_blocks: tuple[int, ...]
    """Appended to the sequence's block table before the step; its first work brings the cached prefix's blocks too."""
    samples: bool
    """Whether the last of the tokens is the sequence's last known one, so that its logits give the next."""
    num_draft: int = 0
    """The last so many of the tokens are guessed. Such a work samples, and each guess that the sampled tokens bear out gives one more."""
    targets: tuple[int, ...] = ()
    """The known tokens that follow on the first so many of the tokens, where their log-probabilities are wanted (`PromptLogprobs`)."""
    pools: bool = False
    """Whether the last of the tokens is the last one of a prompt of which an embedding is wanted (`PooledEmbedding`)."""
    num_next_draft: int = 0
    """How many tokens the ranks' draft model is to propose after what this work samples (`SampledTokens.next_draft`). Blocks for them are
    allocated."""
    shard: int = 0
    """The dp position that computes it: always that of the sequence's opening. Its blocks are numbers in that shard's cache."""


COLUMN = np.dtype("<i8")
NO_BLOCK = NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Decodes:
    """Works of sequences that only go on decoding: one token each, at most one new block, and all of them sample.

    As columns, so that making, sending and reading them costs hardly more for hundreds than for one.
    """

    packed: bytes
    """int64 (5, S), little-endian: sequence, start, token, new block (or `NO_BLOCK`) and shard of each work. `NO_TOKEN` in place of a
    token is the one that the ranks sampled for this sequence last, and that nobody else knows yet (`Capacity.runs_ahead`)."""

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
        """The same, one by one."""
        return tuple(
            Work(sequence, start, (token,), () if block == NO_BLOCK else (block,), samples=True, shard=shard)
            for sequence, start, token, block, shard in zip(*self.columns.tolist(), strict=True)
        )


NO_DECODES = Decodes(b"")


@dataclass(frozen=True, slots=True)
class Rebalance:
    """Measure what the routed experts had to do, and give those of a layer other places if that makes it fairer."""

    threshold: float
    """A layer is left alone while its busiest ep position has at most so many times the mean load. Infinity: only measure."""


@dataclass(frozen=True, slots=True)
class RebalanceResult:
    """What came of a `Rebalance`. Without loads: the model has no experts, or no choice of where to put them."""

    loads: tuple[tuple[float, ...], ...] = ()
    """Of each sparse layer, in order: tokens sent to each expert, those before the last measurement counted by half, and so on."""
    imbalance_before: float = 1.0
    """The busiest ep position's load over the mean, in the layer where that is worst."""
    imbalance_after: float = 1.0
    """The same loads on the new places."""
    num_moved: int = 0
    """Copies of experts that went from one rank to another, in all layers."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass over a replica. The ranks apply `closed`, then `opened`, then run the works, in this order, each those of its shard.

    Every rank takes every plan, also one without works of its shard: experts may be waiting for it.
    """

    step: int
    other_works: tuple[Work, ...]
    """Works told one by one: of prompts, and of what decodes with something particular about it. Those in `decodes` come before them."""
    opened: tuple[NewSequence, ...] = ()
    closed: tuple[int, ...] = ()
    """Sequences whose block tables the ranks forget. An unknown number is ignored (workers may have been replaced)."""
    rebalance: Rebalance | None = None
    """To be done before all else; such a plan has no works, and no other step is under way."""
    decodes: Decodes = NO_DECODES

    @property
    def works(self) -> tuple[Work, ...]:
        """All of them, each told by itself, which takes its time."""
        return self.decodes.works() + self.other_works

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(len(work.tokens) for work in self.other_works)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position."""

    logprob: float
    """Of the token that came there."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), most probable first."""


class SampledTokens(NamedTuple):
    """What one sampling work yielded; a tuple as `Work` is."""

    sequence: int
    tokens: tuple[int, ...]
    """The next one; after guessed tokens also those of them that were right, before it."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token where the request asked for them, else empty."""
    fault: str | None = None
    """Why no token could be sampled (for instance NaN logits); the engine then fails this sequence alone.

    Without a fault and without tokens: not now (its grammar is not ready); the step is repeated for this sequence."""
    is_grammar_fault: bool = False
    """Whether the fault is the grammar's and not the logits'."""
    next_draft: tuple[int, ...] = ()
    """What the ranks' draft model says comes next, where the work asked for it: as many tokens, or fewer."""


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """What the model thought of the known tokens that a work had as `Work.targets`."""

    sequence: int
    logprobs: tuple[TokenLogprobs, ...]
    """One per target, as many alternatives as `SamplingParams.prompt_logprobs` says."""


@dataclass(frozen=True, slots=True)
class PooledEmbedding:
    """The embedding that a work completed."""

    sequence: int
    vector: bytes
    """float32, little-endian, not normalised: as many numbers as the model is wide."""
    fault: str | None = None
    """Why there is none (for instance NaN); the engine then fails this sequence alone."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Answers the plan of the same number: a sampling rank for its shard, an executor for all of them."""

    step: int
    sampled: tuple[SampledTokens, ...]
    elapsed_s: float = 0.0
    """Seconds the forward pass and sampling took on the rank that sampled; of several, the longest."""
    rebalanced: RebalanceResult | None = None
    tokens: bytes = b""
    """For each work of the plan's `decodes`, in their order, the next token as int64, or `NO_TOKEN` where `sampled` says more, or another
    shard does. Empty = no work has one here."""
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    embeddings: tuple[PooledEmbedding, ...] = ()
    drafting_s: float = 0.0
    """Of `elapsed_s`, what guesses behind the first of each sequence took; of several ranks, the longest."""


FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """Seconds of one choice in one engine. Preemption, and the loss of workers, count in the phase they fell into."""

    queue_s: float
    """From its admission until a step first computed some of it."""
    prefill_s: float
    """From there to its first token."""
    decode_s: float
    """From there on."""


@dataclass(frozen=True)
class TokenEvent:
    """Progress of one request: new output tokens, its end, or both."""

    request_id: str
    choice: int
    attempt: int
    offset: int
    """Output position of the first of `tokens` (or of the end, when there are none)."""
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
    """How long it waited at its front for a replica; added there, to the first event."""
    phase_times: PhaseTimes | None = None
    """In the first event with tokens, and in the last one."""
    losses: int = 0
    """How often workers were lost while they computed it, so far."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the prompt's tokens from the second on, where they were asked for: in the choice's very first event with tokens or an end."""
    embedding: bytes | None = None
    """See `PooledEmbedding.vector`: in the only event of a request for one, with ``finish_reason="stop"``."""

    def with_next_token(self, offset: int, token: int) -> "TokenEvent":
        """That the same request has one more token, said of an event without anything particular: a quarter of the time of making one."""
        event = object.__new__(TokenEvent)
        event.__dict__.update(self.__dict__, offset=offset, tokens=(token,))
        return event
