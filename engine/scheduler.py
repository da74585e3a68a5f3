"""Steps 7 and 12 of a request: decide which tokens the next forward pass computes, and record what it gave."""

import bisect
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.config import EngineConfig
from engine.draft.room import room_for_draft
from engine.draft.speculator import Speculator
from engine.errors import (
    DeadlineExceeded,
    DuplicateRequest,
    EmptyPrompt,
    EngineError,
    GrammarFailed,
    InvalidLogits,
    KvCacheTooSmall,
    PoisonedRequest,
    PromptTooLong,
    QueueFull,
)
from engine.executor import Capacity
from engine.kv.block_pool import BlockListener
from engine.places import mark
from engine.plan import FinishReason, Opening, Sampled, StepPlan, StepResult, TokenEvent, Work
from engine.policy import FirstCome, Policy
from engine.request import Request
from engine.sequence import Sequence
from engine.shard import Choice, Portion, Shard, choices
from engine.trial import accuse, next_trial

Key = tuple[str, int]
MICRO_STEP_TOKENS = 128
"""With pipeline stages prompts are cut so that every stage has a part; smaller parts than this would take hardly less time,
as every step reads all weights."""


@dataclass
class PlanBuilder:
    """A plan in the making."""

    may_run: Callable[[Sequence], bool]
    works: list[Work] = field(default_factory=list)
    opened: list[Opening] = field(default_factory=list)


class Scheduler:
    """Every sequence is waiting (no blocks) or open (blocks of one shard, and a number that the ranks know).

    Deciding changes nothing outside. Something is always planned when something could run and nothing is in flight: a
    sequence that finds no block preempts the last in rank of its shard, itself at worst, and one that is alone always has room.

    Several steps may be planned before the first is answered. A prompt's works may then be in flight together, as its tokens
    are known; of a sequence that decodes only one, as the next token is not.
    """

    def __init__(
        self,
        config: EngineConfig,
        capacity: Capacity,
        *,
        policy: Policy | None = None,
        listener: BlockListener | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        self._config = config
        self._speculator = speculator
        self._policy = policy or FirstCome()
        self._listener = listener
        self.num_finished = self.num_preemptions = self.num_losses = 0
        self.computed_tokens = self.sampled_tokens = 0
        self._by_key: dict[Key, Sequence] = {}
        self._waiting: list[Sequence] = []
        self._closed: list[int] = []
        """Numbers that the ranks must still be told to forget."""
        self._num_steps = self._num_opened = self._num_arrived = 0
        self._counted_before = (0, 0)
        """Prefix tokens queried and found in caches that were lost."""
        self._set_capacity(capacity)

    # --- arriving and leaving

    def add(self, request: Request) -> list[TokenEvent]:
        """Take a request in. Its end, if `committed` is the whole answer already; otherwise nothing.

        Raises:
            EmptyPrompt, PromptTooLong, KvCacheTooSmall, QueueFull, DuplicateRequest
        """
        if request.key in self._by_key:
            raise DuplicateRequest(request.id)
        if not request.prompt:
            raise EmptyPrompt
        # one that was accepted before is not refused now
        if not (request.attempt or self._policy.may_wait(request, self._waiting, self._config.max_waiting)):
            raise QueueFull(limit=self._config.max_waiting)
        sequence = Sequence(request, self._num_arrived)
        reason, stop_token = self._ending(sequence)
        if request.committed and reason is not None:
            return [sequence.event(finish_reason=reason, stop_token=stop_token)]
        self._check_length(request)
        array("i", sequence.tokens)  # what is no token id must raise here, at its own door, and not in the midst of a step
        self._num_arrived += 1
        self._by_key[request.key] = sequence
        self._policy.arrived(sequence, self._waiting)
        self._wait(sequence)
        return []

    def cancel(self, key: Key) -> list[TokenEvent]:
        """End a request. An unknown key (it has just ended) is no error."""
        sequence = self._by_key.get(key)
        return [] if sequence is None else [self._end(sequence, sequence.event(finish_reason="cancelled"))]

    def expire(self, now: float) -> list[TokenEvent]:
        """End the requests whose deadline, in Unix time, has passed."""
        late = [s for s in self._by_key.values() if s.request.deadline_s is not None and s.request.deadline_s <= now]
        return [self._fail(sequence, DeadlineExceeded("the request's deadline passed before it was finished")) for sequence in late]

    def fail_all(self, error: EngineError) -> list[TokenEvent]:
        """End every request with the same error."""
        return [self._fail(sequence, error) for sequence in list(self._by_key.values())]

    # --- one step

    def schedule(self) -> StepPlan | None:
        """The next step's plan, or None when nothing can run now.

        On each shard sequences that decode come first, then prompts that were begun, then new ones, each in rank order. A suspect
        of a loss is planned alone, once nothing else is in flight, or has to wait until there is room for it.
        """
        trial = next_trial(self._by_key.values(), self._policy)
        if trial is None:
            return self._plan(lambda _sequence: True)
        if any(sequence.in_flight and sequence is not trial for sequence in self._all_open()):
            return None
        return self._plan(lambda sequence: sequence is trial) or self._plan(lambda sequence: not sequence.trial_left)

    def _plan(self, may_run: Callable[[Sequence], bool]) -> StepPlan | None:
        building = PlanBuilder(may_run)
        portions = [self._portion(shard) for shard in self.shards]
        for portion in portions:
            self._continue_open(portion, building)
        self._admit_waiting([portion for portion in portions if not portion.has_preempted], building)
        if not building.works:
            return None
        plan = StepPlan(self.number_step(), tuple(building.works), tuple(building.opened), tuple(self._closed))
        self._closed.clear()
        return plan

    def number_step(self) -> int:
        """A number for the next step, also for one that this scheduler does not plan."""
        self._num_steps += 1
        return self._num_steps - 1

    def apply(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        """Record what a step gave. Sequences that were closed since it was planned are passed over."""
        sampled = {answer.sequence: answer for answer in result.sampled}
        events = []
        for work in plan.works:
            shard = self.shards[work.shard]
            sequence = shard.open.get(work.sequence)
            if sequence is None:
                continue
            self.computed_tokens += len(work.tokens)
            sequence.num_computed = work.start + len(work.tokens) - work.num_draft
            if sequence.ended:
                if not sequence.in_flight:
                    self._close(sequence)
                continue
            if not work.samples:
                shard.cache.publish(sequence, since=work.start)
                continue
            answer = sampled.get(work.sequence, Sampled(work.sequence, (), fault="the ranks gave no token"))
            if answer.fault is not None:
                shard.cache.disown(sequence)
                events.append(self._fail(sequence, GrammarFailed(answer.fault) if answer.of_grammar else InvalidLogits(answer.fault)))
                continue
            if answer.tokens:
                events.append(self._take(sequence, work, answer))
            else:
                sequence.step_back()
                shard.cache.publish(sequence, since=work.start)
        return events

    def _portion(self, shard: Shard) -> Portion:
        """What a shard may do in one step, so that as many steps as there are stages have about equal parts of what is to do."""
        stages, budget = self._capacity.num_stages, self._config.max_step_tokens
        alive = [sequence for sequence in shard.open.values() if not sequence.ended]
        if stages > 1:
            unanswered = sum(len(sequence.tokens) - sequence.num_computed for sequence in alive)
            waiting = sum(len(sequence.tokens) for sequence in self._waiting) // len(self.shards)
            budget = min(budget, max(MICRO_STEP_TOKENS, -(-(unanswered + waiting) // stages)))
        decoding = sum(sequence.num_pending <= 1 for sequence in alive)
        load_tokens = sum(len(sequence.tokens) for sequence in alive)
        return Portion(
            shard,
            budget=budget,
            max_decodes=-(-decoding // stages),
            load_tokens=load_tokens,
            max_drafted=self._config.max_running - len(alive),
        )

    def _continue_open(self, portion: Portion, building: PlanBuilder) -> None:
        runnable = [s for s in portion.shard.open.values() if s.num_pending and not s.ended and building.may_run(s)]
        for sequence in sorted(runnable, key=lambda s: (s.num_pending > 1, self._policy.rank(s))):
            if portion.budget == 0:
                return
            if sequence.number is None:  # preempted by one before it
                continue
            if sequence.num_pending == 1:
                if portion.max_decodes == 0:
                    continue
                portion.max_decodes -= 1
            if self._make_room(sequence, portion):
                self._plan_work(sequence, portion, building)

    def _admit_waiting(self, portions: list[Portion], building: PlanBuilder) -> None:
        """Open waiting sequences in the policy's order until one finds no room. Each gets blocks for all its known tokens at once, so
        that no prompt is preempted half way; one whose next block another sequence is computing right now waits for it."""
        for sequence in filter(building.may_run, self._policy.order(self._waiting)):
            if not any(portion.budget for portion in portions) or self.num_running >= self._config.max_running:
                return
            wanted = choices(sequence, portions, self._capacity.block_tokens)
            first = wanted[0]
            if first.portion.budget == 0 or first.portion.shard.cache.is_on_its_way(sequence, len(first.found)):
                continue  # waiting a little costs less than computing its prefix again elsewhere
            choice = next((choice for choice in wanted if choice.portion.budget and self._has_room(sequence, choice)), None)
            if choice is None:
                return
            self._open_sequence(sequence, choice)
            building.opened.append(sequence.opening())
            self._plan_work(sequence, choice.portion, building)

    def _has_room(self, sequence: Sequence, choice: Choice) -> bool:
        pool = choice.portion.shard.pool
        missing = self._blocks_for(len(sequence.tokens)) - len(choice.found)
        return missing <= pool.num_available - pool.num_cached_of(choice.found)

    def _open_sequence(self, sequence: Sequence, choice: Choice) -> None:
        shard, found = choice.portion.shard, choice.found
        self._waiting.remove(sequence)
        shard.pool.share(found)
        sequence.shard = shard.index
        sequence.blocks = found + shard.pool.allocate(self._blocks_for(len(sequence.tokens)) - len(found))
        sequence.num_computed = sequence.num_planned = len(found) * self._config.block_tokens
        sequence.number = self._num_opened
        self._num_opened += 1
        shard.open[sequence.number] = sequence
        choice.portion.load_tokens += len(sequence.tokens)
        if sequence.num_cached_prompt is None:
            sequence.num_cached_prompt = min(sequence.num_computed, sequence.num_prompt)
            self._policy.opened(sequence)
        shard.cache.begin(sequence, len(found))

    def _plan_work(self, sequence: Sequence, portion: Portion, building: PlanBuilder) -> None:
        assert sequence.number is not None
        count = min(sequence.num_pending, portion.budget)
        start = sequence.num_planned
        draft = self._draft(sequence, portion) if sequence.num_pending == 1 else ()
        work = Work(
            sequence=sequence.number,
            start=start,
            tokens=(*sequence.tokens[start : start + count], *draft),
            new_blocks=tuple(sequence.blocks[sequence.num_blocks_sent :]),
            samples=count == sequence.num_pending,
            num_draft=len(draft),
            shard=portion.shard.index,
        )
        sequence.num_blocks_sent = len(sequence.blocks)
        sequence.num_planned += count
        building.works.append(work)
        portion.budget -= len(work.tokens)
        mark(7, sequence.request.id)

    def _draft(self, sequence: Sequence, portion: Portion) -> tuple[int, ...]:
        """Guesses behind its last known token, and blocks for them. (A grammar's state knows no guesses yet.)"""
        if self._speculator is None or sequence.request.sampling.grammar is not None:
            return ()
        room = room_for_draft(sequence, portion, self._capacity)
        draft = self._speculator.draft(sequence, room=room, num_sequences=len(portion.shard.open)) if room > 0 else ()
        missing = self._blocks_for(len(sequence.tokens) + len(draft)) - len(sequence.blocks)
        if missing > 0:
            sequence.blocks += portion.shard.pool.allocate(missing)
        portion.max_drafted -= len(draft)
        return draft

    def _make_room(self, sequence: Sequence, portion: Portion) -> bool:
        """Give an open sequence the blocks for its next tokens, preempting from the last in rank. False if it must sit this step out."""
        pool = portion.shard.pool
        count = min(sequence.num_pending, portion.budget)
        missing = self._blocks_for(sequence.num_planned + count) - len(sequence.blocks)
        while missing > pool.num_available:
            # One in flight has had room for all its known tokens since it was opened: whoever comes here is movable itself.
            movable = [s for s in portion.shard.open.values() if not s.in_flight]
            last = max(movable, key=self._policy.rank)
            self._preempt(last)
            portion.has_preempted = True
            if last is sequence:
                return False
        if missing > 0:
            sequence.blocks += pool.allocate(missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take its blocks away; it waits at its old rank, and what of it stays cached is found again."""
        self.num_preemptions += 1
        self._close(sequence)
        self._wait(sequence)

    def _take(self, sequence: Sequence, work: Work, answer: Sampled) -> TokenEvent:
        """Append what was sampled, up to what ends the answer. All of it but the last was guessed, and so is computed already."""
        mark(12, sequence.request.id)
        taken, reason, stop_token = 0, None, None
        sequence.trial_left = max(0, sequence.trial_left - 1)
        while reason is None and taken < len(answer.tokens):
            sequence.tokens.append(answer.tokens[taken])
            taken += 1
            reason, stop_token = self._ending(sequence)
        self.sampled_tokens += taken
        self._policy.sampled(sequence, taken)
        held = len(answer.tokens) - 1
        sequence.hold(min(held, taken))
        if self._speculator is not None and work.num_draft:
            self._speculator.judge(sequence, work.num_draft, held)
        self.shards[work.shard].cache.publish(sequence, since=work.start)
        event = sequence.event(answer.tokens[:taken], answer.logprobs[:taken], finish_reason=reason, stop_token=stop_token)
        return event if reason is None else self._end(sequence, event)

    def _ending(self, sequence: Sequence) -> tuple[FinishReason | None, int | None]:
        """Why the answer is complete with its last token, if it is, and the token if that is why."""
        sampling = sequence.request.sampling
        may_stop = sequence.num_output > sampling.min_tokens or sampling.grammar is not None  # a whole text ends, however short
        if may_stop and sequence.tokens[-1] in sampling.stop_token_ids:
            return "stop", sequence.tokens[-1]
        if sequence.num_output >= sampling.max_tokens or len(sequence.tokens) >= self._capacity.max_context_tokens:
            return "length", None
        return None, None

    # --- the workers are gone

    def lose_workers(self) -> list[TokenEvent]:
        """All KV is lost, and every step in flight with it: whatever was open waits again, at its old rank.

        Of each sequence of which a step was in flight it is told that it may be what ended the workers; see `engine.trial`.
        """
        self.num_losses += 1
        events = []
        poisoned = accuse(self._all_open())
        for sequence in self._all_open():
            is_suspect = sequence.in_flight
            self._close(sequence)
            if sequence.ended:
                continue
            self._wait(sequence)
            if is_suspect and sequence not in poisoned:
                events.append(sequence.event())
            if sequence in poisoned:
                events.append(
                    self._fail(sequence, PoisonedRequest(f"the workers were lost {sequence.losses} times while computing this request"))
                )
        self._closed.clear()
        for shard in self.shards:
            shard.pool.clear()
        return events

    def adopt(self, capacity: Capacity) -> list[TokenEvent]:
        """New workers, empty, perhaps smaller. To be called after `lose_workers`.

        A request that was promised more room than there is now ends with an error rather than with a shorter answer.
        """
        assert not self.num_running
        promised = self._capacity.max_context_tokens
        self._counted_before = (self.prefix_queried_tokens, self.prefix_found_tokens)  # counters never go back
        self._set_capacity(capacity)
        events = []
        for sequence in list(self._waiting):
            most = min(sequence.num_prompt + sequence.request.sampling.max_tokens, promised)
            if most > capacity.max_context_tokens:
                events.append(self._fail(sequence, KvCacheTooSmall(num_tokens=most, limit_tokens=capacity.max_context_tokens)))
        return events

    # --- small parts

    @property
    def num_running(self) -> int:
        return sum(len(shard.open) for shard in self.shards)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def prefill_tokens(self) -> int:
        """Known tokens that no step has been planned for, but for those of sequences that decode."""
        waiting = sum(len(sequence.tokens) for sequence in self._waiting)
        return waiting + sum(s.num_pending for shard in self.shards for s in shard.open.values() if s.num_pending > 1)

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._by_key)

    @property
    def prefix_queried_tokens(self) -> int:
        """Tokens looked up in prefix caches at admissions."""
        return self._counted_before[0] + sum(shard.cache.num_queried for shard in self.shards)

    @property
    def drafted_tokens(self) -> int:
        return self._speculator.num_drafted if self._speculator else 0

    @property
    def held_tokens(self) -> int:
        return self._speculator.num_held if self._speculator else 0

    @property
    def prefix_found_tokens(self) -> int:
        """How many of `prefix_queried_tokens` were found."""
        return self._counted_before[1] + sum(shard.cache.num_found for shard in self.shards)

    def _set_capacity(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self.shards = tuple(
            Shard(index, capacity, prefix_cache=self._config.prefix_cache, listener=self._listener) for index in range(capacity.num_shards)
        )

    def _all_open(self) -> list[Sequence]:
        return [sequence for shard in self.shards for sequence in shard.open.values()]

    def _check_length(self, request: Request) -> None:
        """At least one more token must fit into the context, and the KV of all tokens but the last into the pool."""
        known = len(request.prompt) + len(request.committed)
        limit = self._capacity.max_context_tokens
        if known >= limit:
            raise PromptTooLong(num_tokens=known, limit_tokens=limit)
        most = min(len(request.prompt) + request.sampling.max_tokens, limit)
        room = self._capacity.num_blocks * self._capacity.block_tokens + 1
        if most > room:
            raise KvCacheTooSmall(num_tokens=most, limit_tokens=room)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._capacity.block_tokens)

    def _wait(self, sequence: Sequence) -> None:
        bisect.insort(self._waiting, sequence, key=self._policy.rank)

    def _close(self, sequence: Sequence) -> None:
        """Take an open sequence from the ranks and its blocks from it."""
        assert sequence.number is not None
        shard = self.shards[sequence.shard]
        shard.cache.abandon(sequence)
        del shard.open[sequence.number]
        self._closed.append(sequence.number)
        shard.pool.release(sequence.rewind())

    def _fail(self, sequence: Sequence, error: EngineError) -> TokenEvent:
        return self._end(sequence, sequence.event(finish_reason="error", error=error))

    def _end(self, sequence: Sequence, event: TokenEvent) -> TokenEvent:
        """The request is over for its client at once; blocks that a step in flight still writes to are kept until it is applied."""
        sequence.ended = True
        self.num_finished += 1
        del self._by_key[sequence.request.key]
        if sequence.number is None:
            self._waiting.remove(sequence)
        elif not sequence.in_flight:
            self._close(sequence)
        return event

    def __repr__(self) -> str:
        return f"<Scheduler [{self.num_running} running | {self.num_waiting} waiting] {list(self.shards)}>"
