"""A request's tokens and progress inside the engine."""

from engine.kv.keys import BlockKey, block_key, root_key
from engine.plan import FinishReason, NewSequence, TokenEvent, TokenLogprobs
from engine.request import Request

ISOLATION_TOKENS = 2
"""Tokens that a suspect computes alone (see `engine.isolation`): one from all that it had, one as decoding goes on."""


class Sequence:
    """Its tokens, and how many of them have their KV in the cache. Everything else follows from these two.

    A fresh prompt, a cut prompt, decoding, a preempted sequence and one that another replica began differ only in the size of
    the gap between `tokens` and `num_computed`. Steps that were not answered yet cover the part of it up to `num_planned`.
    """

    def __init__(self, request: Request, arrival: int) -> None:
        self.request = request
        self.arrival = arrival
        """Order of admission into the engine; kept over preemption."""
        self.tokens: list[int] = [*request.prompt, *request.committed]
        self.num_computed = 0
        self.num_planned = 0
        """Tokens that are computed, or will be by a step in flight: the next work starts here."""
        self.shard = 0
        """Where its blocks are, while it has some."""
        self.blocks: list[int] = []
        self.num_blocks_sent = 0
        """How many of `blocks` the ranks know."""
        self.number: int | None = None
        """What the ranks call it; None while it has no blocks."""
        self.ended = False
        self.losses = request.losses
        """How often workers were lost while they computed it."""
        self.isolation_tokens_left = ISOLATION_TOKENS if request.losses else 0
        """Tokens it must still compute alone; see `engine.isolation`."""
        self.num_cached_prompt: int | None = None
        """Prompt tokens found in the prefix cache at the first admission."""
        self.prompt_logprobs: list[TokenLogprobs] = []
        """Of the prompt's tokens from the second on, as far as they are known; kept when it is rewound."""
        self._keys: list[BlockKey] = []

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Known tokens that no step computes yet. None are left once the last one's step is in flight, until that gives the next; -1 if
        a step of that next one is in flight already."""
        return len(self.tokens) - self.num_planned

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether its client still waits for some. Who has had output has had them before."""
        request = self.request
        wanted = request.sampling.prompt_logprobs is not None and not request.committed
        return wanted and len(self.prompt_logprobs) < self.num_prompt - 1

    @property
    def num_skippable(self) -> int:
        """So many of its first tokens need not be computed if their KV is there: what is wanted are the last one's logits, or more."""
        pooling = self.request.pooling
        if self.is_whole or (pooling is not None and pooling.kind != "last"):
            return 0
        return len(self.prompt_logprobs) if self.lacks_prompt_logprobs else len(self.tokens) - 1

    @property
    def is_whole(self) -> bool:
        """Whether it can neither be cut nor share its KV."""
        return self.request.pooling is not None and not self.request.pooling.is_causal

    def targets(self, start: int, stop: int) -> tuple[int, ...]:
        """Those of a work on its tokens [start, stop)."""
        return tuple(self.tokens[start + 1 : min(stop + 1, self.num_prompt)]) if self.lacks_prompt_logprobs else ()

    def score(self, start: int, logprobs: tuple[TokenLogprobs, ...]) -> None:
        """Learn what a work that began at ``start`` gave for its targets; some may be known, from before it was rewound."""
        self.prompt_logprobs += logprobs[len(self.prompt_logprobs) - start :]

    @property
    def in_flight(self) -> bool:
        """Whether a step that was not answered yet computes some of it."""
        return self.num_planned > self.num_computed

    def step_back(self) -> None:
        """The step of its last token gave no next one: that token is to be computed again, once a step in flight behind it is over."""
        assert self.num_computed == len(self.tokens)
        self.num_planned -= self.num_planned == self.num_computed
        self.num_computed -= 1

    def hold(self, num_tokens: int) -> None:
        """So many tokens, guessed and computed behind the known ones, have turned out to be right, and are known now."""
        assert self.num_planned == self.num_computed
        self.num_computed += num_tokens
        self.num_planned = self.num_computed

    def add_sent_block(self, block: int) -> None:
        """One more block, which the step that is being planned tells the ranks."""
        self.blocks.append(block)
        self.num_blocks_sent += 1
        assert self.num_blocks_sent == len(self.blocks)

    def rewind(self) -> list[int]:
        """Forget all KV and the ranks' number. Returns the blocks that were held."""
        blocks, self.blocks = self.blocks, []
        self.num_computed = self.num_planned = self.num_blocks_sent = 0
        self.number = None
        return blocks

    def keys(self, count: int, block_tokens: int) -> list[BlockKey]:
        """Content keys of its first `count` full blocks."""
        self._know_keys(count, block_tokens)
        return self._keys[:count]

    def key(self, index: int, block_tokens: int) -> BlockKey:
        """Content key of one full block."""
        self._know_keys(index + 1, block_tokens)
        return self._keys[index]

    def _know_keys(self, count: int, block_tokens: int) -> None:
        while len(self._keys) < count:
            parent = self._keys[-1] if self._keys else root_key(self.request.salt)
            start = len(self._keys) * block_tokens
            self._keys.append(block_key(parent, self.tokens[start : start + block_tokens]))

    def opening(self) -> NewSequence:
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
        """What happened, told after `tokens` were appended."""
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
        """That it had this token at this output position, told at any time afterwards."""
        request = self.request
        return TokenEvent(
            request.id, request.choice, request.attempt, offset, (token,), num_cached=self.num_cached_prompt or 0, losses=self.losses
        )

    def __repr__(self) -> str:
        where = "ended" if self.ended else "in flight" if self.in_flight else "running" if self.number is not None else "waiting"
        return f"<Sequence {self.request.id}/{self.request.choice} [{self.num_computed} of {len(self.tokens)} computed | {where}]>"
