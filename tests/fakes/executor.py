"""An executor whose KV is simulated for real: every slot remembers what was written to it, and every read is checked."""

import hashlib
import random
from collections.abc import Iterable

from engine.draft.catch_up import tokens_to_catch_up
from engine.errors import WorkersLost
from engine.executor import Capacity
from engine.plan import NO_TOKEN, NewSequence, PooledEmbedding, PromptLogprobs, SampledTokens, StepPlan, StepResult, TokenLogprobs, Work
from engine.shard_results import pack_tokens

VOCAB = 1_000


def next_token(tokens: Iterable[int], seed: int, choice: int) -> int:
    """What the fake model says after `tokens`: a function of the content, the seed and the choice alone."""
    text = repr((tuple(tokens), seed, choice)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") % VOCAB


def undisturbed(prompt: tuple[int, ...], seed: int, choice: int, max_tokens: int, stop_token_ids: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The answer without any scheduling."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(tokens, seed, choice))
        if tokens[-1] in stop_token_ids:
            break
    return tuple(tokens[len(prompt) :])


def told_logprobs(tokens: tuple[int, ...]) -> tuple[TokenLogprobs, ...]:
    """What the fake model thinks of each of `tokens` but the first: a function of all before it and of itself."""
    return tuple(TokenLogprobs(-float(next_token(tokens[: place + 1], 0, 0))) for place in range(1, len(tokens)))


class FakeExecutor:
    """Takes plans in order; a plan's result is worked out when it is asked for, unless the fake was told to lose its workers."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_tokens: int = 4,
        max_context_tokens: int | None = None,
        *,
        num_shards: int = 1,
        num_stages: int = 1,
        runs_ahead: bool = False,
    ) -> None:
        self._capacity = Capacity(
            num_blocks=num_blocks,
            block_tokens=block_tokens,
            max_context_tokens=max_context_tokens or num_blocks * block_tokens,
            num_shards=num_shards,
            num_stages=num_stages,
            runs_ahead=runs_ahead,
        )
        self._said: dict[int, int] = {}
        """Of each sequence what was sampled last, and has not been asked for since."""
        self.num_promised = 0
        """Works on a token that was not known when they were planned."""
        self.num_broken = 0
        """Those of which it did not come."""
        self._slots: dict[tuple[int, int], tuple[int, ...]] = {}
        """For each (shard, slot) all tokens of the sequence up to and with the one whose KV it holds: what real KV depends upon."""
        self._draft_slots: dict[tuple[int, int], tuple[int, ...]] = {}
        """The same of the draft model's KV."""
        self.draft_model: random.Random | None = None
        """Whether there is one; right three times of four."""
        self.num_guessed = 0
        self._opened: dict[int, NewSequence] = {}
        self._tables: dict[int, list[int]] = {}
        self.plans: list[StepPlan] = []
        self.lose_at_step: set[int] = set()
        """Steps (counted by this executor) whose result is the loss of all workers."""
        self.is_killed_from_outside = False
        """How it is lost at these steps: see `WorkersLost.from_outside`."""
        self.faulty: set[int] = set()
        """Choices that get a fault instead of a token."""
        self.reluctant: set[int] = set()
        """Steps (counted by this executor) in which no sequence gets a token, as if all their grammars were still compiled."""
        self.closed = False
        self.num_overlapping = 0
        """Works submitted while an earlier one of their sequence was not answered."""
        self._num_answered = 0

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    def submit(self, plan: StepPlan) -> "FakeStep":
        unanswered = {work.sequence for earlier in self.plans[self._num_answered :] for work in earlier.works}
        self.num_overlapping += sum(work.sequence in unanswered for work in plan.works)
        self.plans.append(plan)
        return FakeStep(self, len(self.plans) - 1)

    def close(self) -> None:
        self.closed = True

    def run(self, index: int) -> StepResult:
        if index in self.lose_at_step:
            message = f"rank 0 on fake was lost in step {index}"
            raise WorkersLost(message, rank=0, host="fake", from_outside=self.is_killed_from_outside)
        plan = self.plans[index]
        for number in plan.closed:
            self._opened.pop(number, None)
            self._tables.pop(number, None)
        for opening in plan.opened:
            assert opening.sequence not in self._opened, "a number was used twice"
            assert 0 <= opening.shard < self._capacity.num_shards
            self._opened[opening.sequence] = opening
            self._tables[opening.sequence] = []
        self._check_no_block_is_written_twice(plan)
        answers = [self._compute(work) for work in plan.works]
        if index in self.reluctant:
            answers = [answer and SampledTokens(answer.sequence, ()) for answer in answers]
        self._said |= {answer.sequence: answer.tokens[-1] for answer in answers if answer is not None and answer.tokens}
        assert index == self._num_answered, "steps are answered in order"
        self._num_answered += 1
        tokens, sampled = pack_tokens(plan.decodes, [answer for answer in answers if answer is not None])
        scored = tuple(self._score(work) for work in plan.other_works if work.targets)
        pooled = tuple(self._pool(work) for work in plan.other_works if work.pools)
        return StepResult(plan.step, sampled, elapsed_s=0.001, tokens=tokens, prompt_logprobs=scored, embeddings=pooled)

    def _compute(self, work: Work) -> SampledTokens | None:
        opening, table = self._opened[work.sequence], self._tables[work.sequence]
        assert work.shard == opening.shard, "a sequence's KV is in its own shard only"
        if opening.pooling is not None and (opening.pooling.kind != "last" or not opening.pooling.is_causal):
            assert table or work.start == 0, "of a cached prefix there are no hidden states"
        table.extend(work.new_blocks)
        said = self._said.pop(work.sequence, None)
        if work.tokens == (NO_TOKEN,):
            self.num_promised += 1
            if said is None:
                self.num_broken += 1
                return SampledTokens(work.sequence, (VOCAB + 1,))  # computed from nothing: nobody may look at it
            work = work._replace(tokens=(said,))
        before = self._read(work.shard, table, work.start - 1) if work.start else ()
        assert len(before) == work.start
        assert not work.num_draft or work.samples
        for position, token in enumerate(work.tokens, start=work.start):
            before = (*before, token)
            self._slots[work.shard, self._slot(table, position)] = before
        for position in range(len(before)):
            assert self._read(work.shard, table, position) == before[: position + 1], f"position {position} holds another content"
        if not work.samples:
            if self.draft_model:
                self._follow(work, before, ())
            return None
        if opening.sampling.needs_history:
            assert opening.history == before[: len(opening.history)]
        if opening.choice in self.faulty:
            return SampledTokens(work.sequence, (), fault="NaN")
        known, guesses = before[: len(before) - work.num_draft], before[len(before) - work.num_draft :]
        said: tuple[int, ...] = ()
        for guess in (*guesses, None):
            said = (*said, next_token((*known, *said), opening.sampling.seed, opening.choice))
            if said[-1] != guess:
                break
        return SampledTokens(work.sequence, said, next_draft=self._follow(work, (*known, *said), said) if self.draft_model else ())

    def _follow(self, work: Work, known: tuple[int, ...], said: tuple[int, ...]) -> tuple[int, ...]:
        """What the draft model guesses behind all known tokens, when it has seen all that it has not. Nothing it reads may be amiss."""
        assert self.draft_model is not None
        opening, table = self._opened[work.sequence], self._tables[work.sequence]
        start, tokens = tokens_to_catch_up(work, said)
        guesses: tuple[int, ...] = ()
        while True:
            stop = start + len(tokens)
            assert (*known, *guesses)[start:stop] == tokens
            for position in range(start):
                found = self._draft_slots[work.shard, self._slot(table, position)]
                assert found == (*known, *guesses)[: position + 1], f"the draft model has something else at position {position}"
            for position in range(start, stop):
                self._draft_slots[work.shard, self._slot(table, position)] = (*known, *guesses)[: position + 1]
            if len(guesses) == work.num_next_draft or self.draft_model.random() < 0.1:
                return guesses
            right = next_token((*known, *guesses), opening.sampling.seed, opening.choice)
            guesses += (right if self.draft_model.random() < 0.75 else right + 1,)
            self.num_guessed += 1
            start, tokens = stop, guesses[-1:]
            if len(guesses) == work.num_next_draft:
                return guesses

    def _pool(self, work: Work) -> PooledEmbedding:
        """The text of all tokens. Where all see all, they must have come in this one work."""
        pooling = self._opened[work.sequence].pooling
        assert pooling is not None
        assert pooling.is_causal or work.start == 0
        tokens = self._read(work.shard, self._tables[work.sequence], work.start + len(work.tokens) - 1)
        return PooledEmbedding(work.sequence, repr(tokens).encode())

    def _score(self, work: Work) -> PromptLogprobs:
        """From what the slots hold: the work has been computed."""
        last = self._read(work.shard, self._tables[work.sequence], work.start + len(work.targets) - 1)
        return PromptLogprobs(work.sequence, told_logprobs((*last, work.targets[-1]))[work.start :])

    def _slot(self, table: list[int], position: int) -> int:
        size = self._capacity.block_tokens
        return table[position // size] * size + position % size

    def _read(self, shard: int, table: list[int], position: int) -> tuple[int, ...]:
        return self._slots[shard, self._slot(table, position)]

    def _check_no_block_is_written_twice(self, plan: StepPlan) -> None:
        written: set[tuple[int, int]] = set()
        for work in plan.works:
            table = self._tables[work.sequence] + list(work.new_blocks)
            assert all(block < self._capacity.num_blocks for block in table)
            slots = {(work.shard, self._slot(table, position)) for position in range(work.start, work.start + len(work.tokens))}
            assert not slots & written, "two sequences write to the same slot"
            written |= slots


class FakeStep:
    def __init__(self, executor: FakeExecutor, index: int) -> None:
        self._executor, self._index = executor, index

    def result(self) -> StepResult:
        return self._executor.run(self._index)


class Recorder:
    """Gathers events and holds them against the law: offsets without gap or repeat, one end, nothing after it."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], str] = {}
        self.errors: dict[tuple[str, int], str | None] = {}
        self.cached: dict[tuple[str, int], int] = {}
        self.prompt_logprobs: dict[tuple[str, int], list[TokenLogprobs]] = {}
        self.embeddings: dict[tuple[str, int], bytes | None] = {}
        self._begun: dict[tuple[str, int], int] = {}

    def begin(self, key: tuple[str, int], num_committed: int = 0) -> None:
        self.tokens[key] = []
        self.prompt_logprobs[key] = []
        self._begun[key] = num_committed

    def take(self, events: Iterable[object]) -> None:
        for event in events:
            key = (event.request_id, event.choice)
            assert key not in self.ends, f"{key}: an event after the end"
            assert event.offset == self._begun[key] + len(self.tokens[key]), f"{key}: a gap or a repeat"
            self.tokens[key].extend(event.tokens)
            self.prompt_logprobs[key].extend(event.prompt_logprobs)
            self.cached[key] = event.num_cached
            if event.finish_reason is not None:
                self.ends[key] = event.finish_reason
                self.errors[key] = event.error_kind
                self.embeddings[key] = event.embedding


def run_to_end(engine, recorder: Recorder, turns: int = 10_000) -> None:
    """Turn until every request has ended; too many turns are a livelock."""
    for _ in range(turns):
        recorder.take(engine.turn())
        if not engine.scheduler.num_requests and not engine.is_recovering:
            return
    raise AssertionError(f"livelock: {engine.scheduler}")
