"""Places 7 and 12 of a request: holds all sequences, has the planner plan steps, and records what they yielded."""

from array import array

import numpy as np

from engine.config import EngineConfig
from engine.deadlines import Deadlines
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
    PromptCannotBeCut,
    PromptTooLong,
    QueueFull,
)
from engine.executor import Capacity
from engine.isolation import next_suspect, record_loss
from engine.kv.block_pool import BlockListener
from engine.output import EngineOutput
from engine.plan import COLUMN, NO_TOKEN, FinishReason, PooledEmbedding, SampledTokens, StepPlan, StepResult, TokenEvent, Work
from engine.planner import Planner
from engine.policy import FirstComeFirstServed, Policy, QueuedRequest
from engine.prefill_budget import PrefillBudget
from engine.request import Request
from engine.request_trace import is_tracing, trace_place
from engine.sequence import Sequence
from engine.sequence_table import SequenceTable
from engine.shard import Shard

Key = tuple[str, int]


class Scheduler:
    """Owns all sequences of the engine. Plans steps and records their results; has no side effects outside.

    A sequence is either waiting (it has no blocks) or open (it has blocks of one shard, and a number that the ranks know). If nothing is in
    flight and any sequence could run, a step is planned: a sequence that finds no free block preempts the last of its shard in the policy's
    order, in the worst case itself, and a sequence alone on its shard always has room.

    Several steps may be in flight. A prompt may then have works in several of them, because its tokens are known. A decoding sequence can
    have only one, because its next token is not known; or two, if the ranks continue from what they sampled themselves.

    Sequences that only decode are planned and recorded together as a cohort (`engine.cohort`).
    """

    def __init__(
        self,
        config: EngineConfig,
        capacity: Capacity,
        *,
        policy: Policy | None = None,
        listener: BlockListener | None = None,
        speculator: Speculator | None = None,
        prefill_budget: PrefillBudget | None = None,
    ) -> None:
        self._config = config
        self._speculator = speculator
        self._policy = policy or FirstComeFirstServed()
        self._table = SequenceTable(config, capacity, self._policy, listener)
        self._planner = Planner(config, self._table, self._policy, speculator=speculator, prefill_budget=prefill_budget)
        self.num_finished = self.num_losses = 0
        self.computed_tokens = self.sampled_tokens = 0
        self._by_key: dict[Key, Sequence] = {}
        self._deadlines = Deadlines()
        self._suspects: list[Sequence] = []
        """Sequences that may still have to run in isolation."""
        self._num_arrived = 0

    # --- requests arrive and end

    def add(self, request: Request) -> list[TokenEvent]:
        """Take a request in. Returns its final event if ``request.committed`` is the whole answer already, otherwise nothing.

        Raises:
            EmptyPrompt, PromptTooLong, PromptCannotBeCut, KvCacheTooSmall, QueueFull, DuplicateRequest
        """
        if request.key in self._by_key:
            raise DuplicateRequest(request.id)
        if not request.prompt:
            raise EmptyPrompt
        # a later attempt is not refused: the request was accepted before
        if not (request.attempt or self._policy.may_queue(request, self._table.waiting.sequences, self._config.max_waiting)):
            raise QueueFull(limit=self._config.max_waiting)
        sequence = Sequence(request, self._num_arrived)
        reason, stop_token = self._finish_reason(sequence)
        if request.committed and reason is not None:
            return [sequence.event(finish_reason=reason, stop_token=stop_token)]
        self._check_length(request)
        array("i", sequence.tokens)  # a value that is no token id must raise here and not in the middle of a step
        self._num_arrived += 1
        self._by_key[request.key] = sequence
        self._table.waiting.add_new(sequence)
        self._deadlines.add(sequence)
        if sequence.isolation_tokens_left:
            self._suspects.append(sequence)
        return []

    def cancel(self, key: Key) -> list[TokenEvent]:
        """End a request. An unknown key is no error: the request may just have ended."""
        sequence = self._by_key.get(key)
        return [] if sequence is None else [self._end(sequence, sequence.event(finish_reason="cancelled"))]

    def expire(self, now: float) -> list[TokenEvent]:
        """End the requests whose deadline, in Unix time, has passed."""
        message = "the request's deadline passed before it was finished"
        return [self._fail(sequence, DeadlineExceeded(message)) for sequence in self._deadlines.pop_expired(now)]

    def fail_all(self, error: EngineError) -> list[TokenEvent]:
        """End every request with the same error."""
        return [self._fail(sequence, error) for sequence in list(self._by_key.values())]

    # --- plan a step

    def schedule(self, *, only_ahead: bool = False) -> StepPlan | None:
        """The plan of the next step, or None if nothing can run now. ``only_ahead``: see `engine.planner.Planner.plan`.

        A suspect of a worker loss runs alone: it is planned once nothing else is in flight, and waits if there is no room for it. Those
        that are open run on meanwhile, but none that comes after it is opened: they might leave it no room for ever.
        """
        self._suspects = [sequence for sequence in self._suspects if sequence.isolation_tokens_left and not sequence.ended]
        suspect = next_suspect(self._suspects, self._policy)
        if suspect is None:
            return self._planner.plan(only_ahead=only_ahead)
        if only_ahead or any(sequence.in_flight and sequence is not suspect for sequence in self._table.all_open()):
            return None
        plan = self._planner.plan(lambda sequence: sequence is suspect)
        if plan is not None or suspect.in_flight:  # nothing else starts while it is in flight: a loss would be blamed on both
            return plan
        sort_key, last = self._policy.sort_key, self._policy.sort_key(suspect)
        return self._planner.plan(lambda one: not one.isolation_tokens_left and (one.number is not None or sort_key(one) < last))

    # --- record a step

    def apply(self, plan: StepPlan, result: StepResult) -> EngineOutput:
        """Record what a step yielded. Sequences that were closed since the step was planned are skipped."""
        sampled = {answer.sequence: answer for answer in result.sampled}
        output = EngineOutput()
        for work, token in self._apply_cohorts(plan, result, output):
            answer = sampled.get(work.sequence) if token == NO_TOKEN else SampledTokens(work.sequence, (token,))
            output.events += self._apply_work(work, answer)
        self._apply_prompt_logprobs(plan, result)
        embeddings = {embedding.sequence: embedding for embedding in result.embeddings}
        for work in plan.other_works:
            output.events += self._apply_work(work, sampled.get(work.sequence), embeddings.get(work.sequence))
        return output

    def _apply_cohorts(self, plan: StepPlan, result: StepResult, output: EngineOutput) -> list[tuple[Work, int]]:
        """Record the tokens of all cohorts.

        Returns the works that must be recorded individually, because more happened than one more token, with their tokens.
        """
        individual: list[tuple[Work, int]] = []
        tokens = np.frombuffer(result.tokens, COLUMN) if result.tokens else np.full(len(plan.decodes), NO_TOKEN, COLUMN)
        begin = 0
        for shard, planned in self._planner.take_cohort_rows(plan.step):
            shard_tokens = tokens[begin : begin + len(planned.rows)]
            begin += len(planned.rows)
            recorded = shard.cohort.record(planned, shard_tokens)
            for sequence in recorded.filled:
                shard.cache.publish(sequence, since=sequence.num_computed - 1)
            for request, count in recorded.charges:
                self._policy.on_sampled(request, count)
            batch = recorded.token_batch
            self.computed_tokens += len(batch)
            self.sampled_tokens += len(batch)
            if is_tracing():
                for sequence in batch.sequences:
                    trace_place(12, sequence.request.id)
            if len(batch):
                output.token_batches.append(batch)
            individual += zip(planned.works(recorded.rest), shard_tokens[recorded.rest].tolist(), strict=True)
        return individual

    def _apply_prompt_logprobs(self, plan: StepPlan, result: StepResult) -> None:
        """To be called before the sequences may end: their last event carries the log-probabilities."""
        if not result.prompt_logprobs:
            return
        works = {work.sequence: work for work in plan.other_works}
        for scored in result.prompt_logprobs:
            work = works[scored.sequence]
            sequence = self.shards[work.shard].open.get(scored.sequence)
            if sequence is not None:
                sequence.add_prompt_logprobs(work.start, scored.logprobs)

    def _apply_work(self, work: Work, answer: SampledTokens | None, embedding: PooledEmbedding | None = None) -> list[TokenEvent]:
        """Record one work: ``answer`` if it sampled, ``embedding`` if it completed one."""
        shard = self.shards[work.shard]
        sequence = shard.open.get(work.sequence)
        if sequence is None:
            return []
        shard.leave_cohort(sequence)
        self.computed_tokens += len(work.tokens)
        if work.start >= len(sequence.tokens) and not sequence.ended:  # planned ahead for a token that was not sampled
            sequence.num_planned = sequence.num_computed
            return []
        sequence.num_computed = work.start + len(work.tokens) - work.num_draft
        if sequence.ended:
            if not sequence.in_flight:
                self._table.close(sequence)
            return []
        if work.pools:
            embedding = embedding or PooledEmbedding(work.sequence, b"", fault="the ranks gave no embedding")
            return [self._take_embedding(sequence, work, embedding)]
        if not work.samples:
            shard.cache.publish(sequence, since=work.start)
            return []
        answer = answer or SampledTokens(work.sequence, (), fault="the ranks gave no token")
        if answer.fault is not None:
            shard.cache.disown(sequence)
            return [self._fail(sequence, GrammarFailed(answer.fault) if answer.is_grammar_fault else InvalidLogits(answer.fault))]
        if answer.tokens:
            return [self._take_tokens(sequence, work, answer)]
        sequence.redo_last_token()  # its grammar is not ready yet
        shard.cache.publish(sequence, since=work.start)
        return []

    def _take_embedding(self, sequence: Sequence, work: Work, embedding: PooledEmbedding) -> TokenEvent:
        """The embedding is the whole answer."""
        cache = self.shards[work.shard].cache
        if embedding.fault is not None:
            cache.disown(sequence)
            return self._fail(sequence, InvalidLogits(embedding.fault))
        trace_place(12, sequence.request.id)
        cache.publish(sequence, since=work.start)
        return self._end(sequence, sequence.event(finish_reason="stop", embedding=embedding.vector))

    def _take_tokens(self, sequence: Sequence, work: Work, answer: SampledTokens) -> TokenEvent:
        """Append the sampled tokens, up to the one that ends the answer. All but the last were draft tokens and are computed already."""
        trace_place(12, sequence.request.id)
        taken, stop_token = 0, None
        # max_tokens 0: only the prompt's log-probabilities were wanted
        reason: FinishReason | None = None if sequence.request.sampling.max_tokens else "length"
        sequence.isolation_tokens_left = max(0, sequence.isolation_tokens_left - 1)
        while reason is None and taken < len(answer.tokens):
            sequence.tokens.append(answer.tokens[taken])
            taken += 1
            reason, stop_token = self._finish_reason(sequence)
        self.sampled_tokens += taken
        self._policy.on_sampled(sequence.request, taken)
        num_accepted = len(answer.tokens) - 1
        if num_accepted:
            sequence.accept_draft(min(num_accepted, taken))
        if self._speculator is not None and work.num_draft:
            self._speculator.note_verified(sequence, work.num_draft, num_accepted)
        self.shards[work.shard].cache.publish(sequence, since=work.start)
        event = sequence.event(answer.tokens[:taken], answer.logprobs[:taken], finish_reason=reason, stop_token=stop_token)
        if reason is not None:
            return self._end(sequence, event)
        if self._speculator is not None and answer.next_draft:
            self._speculator.store_draft(sequence, answer.next_draft)
        if self._speculator is None or self._speculator.is_paused:
            self._table.try_join_cohort(sequence)
        return event

    def _finish_reason(self, sequence: Sequence) -> tuple[FinishReason | None, int | None]:
        """Why the answer is complete with its last token, or None; and the stop token, if that is the reason."""
        sampling = sequence.request.sampling
        # The stop id itself does not count as output. A text that its grammar completes ends, however short.
        may_stop = sequence.num_output > sampling.min_tokens or sampling.grammar is not None
        if may_stop and sequence.tokens[-1] in sampling.stop_token_ids:
            return "stop", sequence.tokens[-1]
        if sequence.num_output >= sampling.max_tokens or len(sequence.tokens) >= self._table.capacity.max_context_tokens:
            return "length", None
        return None, None

    # --- the workers are lost

    def lose_workers(self, *, from_outside: bool = False) -> list[TokenEvent]:
        """All KV is lost, and with it every step in flight: open sequences go back to the waiting queue.

        Sequences that were in a step in flight become suspects (`engine.isolation`). Each of them gets an event with its number of losses,
        or ends with `PoisonedRequest` if it has had too many.
        """
        self.num_losses += 1
        events = []
        poisoned = record_loss(self._table.all_open(), from_outside=from_outside)
        for sequence in self._table.all_open():
            is_suspect = sequence.in_flight
            self._table.close(sequence)
            if sequence.ended:
                continue
            self._table.waiting.add(sequence)
            if sequence in poisoned:
                error = PoisonedRequest(f"the workers were lost {sequence.losses} times while computing this request")
                events.append(self._fail(sequence, error))
            elif is_suspect:
                events.append(sequence.event())
        self._suspects = [sequence for sequence in self._by_key.values() if sequence.isolation_tokens_left]
        self._planner.forget_steps()
        self._table.closed.clear()
        for shard in self.shards:
            shard.pool.clear()
        return events

    def use_new_workers(self, capacity: Capacity) -> list[TokenEvent]:
        """Go on with new workers, which are empty and may be smaller. To be called after `lose_workers`.

        A request that was promised more context than there is now fails, rather than getting a shorter answer.
        """
        assert not self.num_running
        promised = self._table.capacity.max_context_tokens
        self._table.set_capacity(capacity)
        events = []
        for sequence in list(self._table.waiting.sequences):
            max_length = min(sequence.num_prompt + sequence.request.sampling.max_tokens, promised)
            if max_length > capacity.max_context_tokens:
                events.append(self._fail(sequence, KvCacheTooSmall(num_tokens=max_length, limit_tokens=capacity.max_context_tokens)))
        return events

    # --- state and counters

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self._table.shards

    @property
    def num_running(self) -> int:
        return self._table.num_running

    @property
    def num_waiting(self) -> int:
        return len(self._table.waiting.sequences)

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._by_key)

    @property
    def num_preemptions(self) -> int:
        return self._table.num_preemptions

    @property
    def prefill_tokens(self) -> int:
        """Known tokens that no step has been planned for, not counting those of sequences that decode."""
        return self._table.prefill_tokens

    @property
    def prefix_queried_tokens(self) -> int:
        """Tokens looked up in the prefix caches at admission."""
        return self._table.prefix_queried_tokens

    @property
    def prefix_hit_tokens(self) -> int:
        """How many of `prefix_queried_tokens` were found."""
        return self._table.prefix_hit_tokens

    @property
    def drafted_tokens(self) -> int:
        return self._speculator.num_drafted if self._speculator else 0

    @property
    def accepted_tokens(self) -> int:
        return self._speculator.num_accepted if self._speculator else 0

    def next_step_number(self) -> int:
        """Take a number for the next step, also for one that this scheduler does not plan."""
        return self._planner.next_step_number()

    def queue(self) -> list[QueuedRequest]:
        """A copy of the waiting queue."""
        return list(self._table.waiting.sequences)

    # --- helpers

    def _check_length(self, request: Request) -> None:
        """At least one more token must fit into the context, and the KV of all tokens but the last into the block pool."""
        known = len(request.prompt) + len(request.committed)
        limit = self._table.capacity.max_context_tokens
        if known + (request.pooling is None) > limit:
            raise PromptTooLong(num_tokens=known, limit_tokens=limit)
        if request.pooling is not None and not request.pooling.is_causal and known > self._config.max_step_tokens:
            raise PromptCannotBeCut(num_tokens=known, limit_tokens=self._config.max_step_tokens)
        max_length = min(len(request.prompt) + request.sampling.max_tokens, limit) if request.pooling is None else known + 1
        room = self._table.capacity.num_blocks * self._table.capacity.block_tokens + 1
        if max_length > room:
            raise KvCacheTooSmall(num_tokens=max_length, limit_tokens=room)

    def _fail(self, sequence: Sequence, error: EngineError) -> TokenEvent:
        return self._end(sequence, sequence.event(finish_reason="error", error=error))

    def _end(self, sequence: Sequence, event: TokenEvent) -> TokenEvent:
        """End a request for its client at once. Blocks that a step in flight still writes to are kept until that step is recorded."""
        sequence.ended = True
        self.num_finished += 1
        del self._by_key[sequence.request.key]
        if sequence.number is None:
            self._table.waiting.remove(sequence)
        elif sequence.in_flight:
            self.shards[sequence.shard].leave_cohort(sequence)
        else:
            self._table.close(sequence)
        return event

    def __repr__(self) -> str:
        return f"<Scheduler [{self.num_running} running | {self.num_waiting} waiting] {list(self.shards)}>"
