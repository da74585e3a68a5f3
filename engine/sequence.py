"""A request's tokens and progress inside the engine."""

from engine.kv.keys import BlockKey, block_key, root_key
from engine.plan import FinishReason, NewSequence, TokenEvent, TokenLogprobs
from engine.request import Request

ISOLATION_TOKENS = 2
"""Tokens that a suspect of a worker loss must yield while it runs alone (see `engine.isolation`): the first comes from prefill of all its
tokens, the second from a decode step."""


class Sequence:
    """Its tokens, and how many of them have their KV in the cache. Everything else follows from these two.

    A fresh prompt, a partly computed prompt, a decoding sequence, a preempted one and one taken over from another replica differ only in
    the size of the gap between `tokens` and `num_computed`. Steps in flight cover the part of the gap up to `num_planned`.
    """

    def __init__(self, request: Request, arrival: int) -> None:
        self.request = request
        self.arrival = arrival
        """Order of arrival at the engine; kept over preemption."""
        self.tokens: list[int] = [*request.prompt, *request.committed]
        self.num_computed = 0
        self.num_planned = 0
        """Tokens that are computed or will be by a step in flight: the next work starts here."""
        self.shard = 0
        """Where its blocks are, while it has some."""
        self.blocks: list[int] = []
        self.num_blocks_sent = 0
        """How many of `blocks` the ranks know."""
        self.number: int | None = None
        """Its number in plans and results; None while it has no blocks. A new one each time it is opened."""
        self.ended = False
        self.losses = request.losses
        """How often workers were lost while they computed it."""
        self.isolation_tokens_left = ISOLATION_TOKENS if request.losses else 0
        """Tokens it must still yield alone; see `engine.isolation`."""
        self.num_cached_prompt: int | None = None
        """Prompt tokens found in the prefix cache at the first admission."""
        self.prompt_logprobs: list[TokenLogprobs] = []
        """Of the prompt's tokens from the second on, as far as known; kept when the sequence is rewound."""
        self._keys: list[BlockKey] = []

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Known tokens that no step computes yet.

        0 while the step of the last known token is in flight; -1 if the step after that one is in flight as well.
        """
        return len(self.tokens) - self.num_planned

    @property
    def in_flight(self) -> bool:
        """Whether a step that was not answered yet computes some of it."""
        return self.num_planned > self.num_computed

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether its client still waits for prompt log-probabilities. A client that has had output has had them before."""
        request = self.request
        wanted = request.sampling.prompt_logprobs is not None and not request.committed
        return wanted and len(self.prompt_logprobs) < self.num_prompt - 1

    @property
    def num_skippable(self) -> int:
        """How many of its first tokens need not be computed if their KV is cached. The rest must be, for logits or hidden states."""
        pooling = self.request.pooling
        if self.is_unsplittable or (pooling is not None and pooling.kind != "last"):
            return 0
        return len(self.prompt_logprobs) if self.lacks_prompt_logprobs else len(self.tokens) - 1

    @property
    def is_unsplittable(self) -> bool:
        """Whether all tokens must be computed in one step, and their KV cannot be shared: attention is not causal."""
        return self.request.pooling is not None and not self.request.pooling.is_causal

    def logprob_targets(self, start: int, stop: int) -> tuple[int, ...]:
        """`Work.targets` for a work on its tokens [start, stop)."""
        return tuple(self.tokens[start + 1 : min(stop + 1, self.num_prompt)]) if self.lacks_prompt_logprobs else ()

    def add_prompt_logprobs(self, start: int, logprobs: tuple[TokenLogprobs, ...]) -> None:
        """Record what a work that began at ``start`` yielded for its targets. Some may be known from before the sequence was rewound."""
        self.prompt_logprobs += logprobs[len(self.prompt_logprobs) - start :]

    def redo_last_token(self) -> None:
        """The step of its last token yielded no next one: compute that token again, after a step in flight behind it has ended."""
        assert self.num_computed == len(self.tokens)
        self.num_planned -= self.num_planned == self.num_computed
        self.num_computed -= 1

    def accept_draft(self, num_tokens: int) -> None:
        """The first ``num_tokens`` of the draft computed behind the known tokens were right: they are known and computed now."""
        assert self.num_planned == self.num_computed
        self.num_computed += num_tokens
        self.num_planned = self.num_computed

    def add_sent_block(self, block: int) -> None:
        """Append a block that the step being planned tells the ranks about."""
        self.blocks.append(block)
        self.num_blocks_sent += 1
        assert self.num_blocks_sent == len(self.blocks)

    def rewind(self) -> list[int]:
        """Forget all KV and the sequence's number. Returns the blocks it had."""
        blocks, self.blocks = self.blocks, []
        self.num_computed = self.num_planned = self.num_blocks_sent = 0
        self.number = None
        return blocks

    def keys(self, count: int, block_tokens: int) -> list[BlockKey]:
        """Content keys of its first `count` full blocks."""
        self._extend_keys(count, block_tokens)
        return self._keys[:count]

    def key(self, index: int, block_tokens: int) -> BlockKey:
        """Content key of one full block."""
        self._extend_keys(index + 1, block_tokens)
        return self._keys[index]

    def _extend_keys(self, count: int, block_tokens: int) -> None:
        while len(self._keys) < count:
            parent = self._keys[-1] if self._keys else root_key(self.request.salt)
            start = len(self._keys) * block_tokens
            self._keys.append(block_key(parent, self.tokens[start : start + block_tokens]))

    def new_sequence(self) -> NewSequence:
        """What the ranks must know to begin with it."""
        assert self.number is not None
        sampling = self.request.sampling
        return NewSequence(
            sequence=self.number,
            choice=self.request.choice,
            num_prompt=self.num_prompt,
            sampling=sampling,
            history=tuple(self.tokens) if sampling.needs_history else (),
            request_id=self.request.id,
            shard=self.shard,
            pooling=self.request.pooling,
        )

    def event(
        self,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        *,
        finish_reason: FinishReason | None = None,
        stop_token: int | None = None,
        error: Exception | None = None,
        embedding: bytes | None = None,
    ) -> TokenEvent:
        """An event about this sequence. ``tokens`` have been appended already."""
        is_first = self.num_output == len(tokens) and bool(tokens or finish_reason == "length")
        return TokenEvent(
            request_id=self.request.id,
            choice=self.request.choice,
            attempt=self.request.attempt,
            offset=self.num_output - len(tokens),
            tokens=tokens,
            logprobs=logprobs,
            num_cached=self.num_cached_prompt or 0,
            finish_reason=finish_reason,
            stop_token=stop_token,
            error_kind=type(error).__name__ if error else None,
            error_message=str(error) if error else None,
            losses=self.losses,
            prompt_logprobs=tuple(self.prompt_logprobs) if is_first else (),
            embedding=embedding,
        )

    def token_event(self, offset: int, token: int) -> TokenEvent:
        """An event with the one token at an output position; may be made at any time after that token was sampled."""
        request = self.request
        return TokenEvent(
            request.id, request.choice, request.attempt, offset, (token,), num_cached=self.num_cached_prompt or 0, losses=self.losses
        )

    def __repr__(self) -> str:
        where = "ended" if self.ended else "in flight" if self.in_flight else "running" if self.number is not None else "waiting"
        return f"<Sequence {self.request.id}/{self.request.choice} [{self.num_computed} of {len(self.tokens)} computed | {where}]>"
