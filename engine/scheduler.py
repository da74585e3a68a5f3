"""Steps 7 and 12 of a request: decide which tokens the next forward pass computes, and record what it gave."""

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
from engine.policy import FirstCome, Policy, Waits
from engine.prefill_budget import PrefillBudget
from engine.request import Request
from engine.request_trace import is_tracing, trace_place
from engine.sequence import Sequence
from engine.sequence_table import SequenceTable
from engine.shard import Shard

Key = tuple[str, int]


class Scheduler:
    """Every sequence is waiting (no blocks) or open (blocks of one shard, and a number that the ranks know).

    Deciding changes nothing outside. Something is always planned when something could run and nothing is in flight: a
    sequence that finds no block preempts the last in rank of its shard, itself at worst, and one that is alone always has room.

    Several steps may be planned before the first is answered. A prompt's works may then be in flight together, as its tokens
    are known; of a sequence that decodes only one, as the next token is not; or two, where the ranks know it themselves.

    Sequences about which there is nothing but their next token are planned and recorded together (`engine.cohort`).
    """

    def __init__(
        self,
        config: EngineConfig,
        capacity: Capacity,
        *,
        policy: Policy | None = None,
        listener: BlockListener | None = None,
        speculator: Speculator | None = None,
        pace: PrefillBudget | None = None,
    ) -> None:
        self._config = config
        self._speculator = speculator
        self._policy = policy or FirstCome()
        self._table = SequenceTable(config, capacity, self._policy, listener)
        self._planner = Planner(config, self._table, self._policy, speculator=speculator, pace=pace)
        self.num_finished = self.num_losses = 0
        self.computed_tokens = self.sampled_tokens = 0
        self._by_key: dict[Key, Sequence] = {}
        self._deadlines = Deadlines()
        self._suspects: list[Sequence] = []
        """Whoever may have something left to be tried."""
        self._num_arrived = 0

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
        if not (request.attempt or self._policy.may_wait(request, self._table.admission.waiting, self._config.max_waiting)):
            raise QueueFull(limit=self._config.max_waiting)
        sequence = Sequence(request, self._num_arrived)
        reason, stop_token = self._ending(sequence)
        if request.committed and reason is not None:
            return [sequence.event(finish_reason=reason, stop_token=stop_token)]
        self._check_length(request)
        array("i", sequence.tokens)  # what is no token id must raise here, at its own door, and not in the midst of a step
        self._num_arrived += 1
        self._by_key[request.key] = sequence
        self._table.admission.arrive(sequence)
        self._deadlines.add(sequence)
        if sequence.isolation_tokens_left:
            self._suspects.append(sequence)
        return []

    def cancel(self, key: Key) -> list[TokenEvent]:
        """End a request. An unknown key (it has just ended) is no error."""
        sequence = self._by_key.get(key)
        return [] if sequence is None else [self._end(sequence, sequence.event(finish_reason="cancelled"))]

    def expire(self, now: float) -> list[TokenEvent]:
        """End the requests whose deadline, in Unix time, has passed."""
        late = self._deadlines.passed(now)
        return [self._fail(sequence, DeadlineExceeded("the request's deadline passed before it was finished")) for sequence in late]

    def fail_all(self, error: EngineError) -> list[TokenEvent]:
        """End every request with the same error."""
        return [self._fail(sequence, error) for sequence in list(self._by_key.values())]

    # --- one step

    def schedule(self, *, only_ahead: bool = False) -> StepPlan | None:
        """The next step's plan, or None when nothing can run now. For ``only_ahead`` see `engine.planner.Planner.plan`.

        A suspect of a loss is planned alone, once nothing else is in flight, or has to wait until there is room for it.
        """
        self._suspects = [sequence for sequence in self._suspects if sequence.isolation_tokens_left and not sequence.ended]
        trial = next_suspect(self._suspects, self._policy)
        if trial is None:
            return self._planner.plan(only_ahead=only_ahead)
        if only_ahead or any(sequence.in_flight and sequence is not trial for sequence in self._table.all_open()):
            return None
        plan = self._planner.plan(lambda sequence: sequence is trial)
        if plan is not None or trial.in_flight:  # while its answer is out nobody else is begun either: a loss would be blamed on both
            return plan
        return self._planner.plan(lambda sequence: not sequence.isolation_tokens_left)

    def apply(self, plan: StepPlan, result: StepResult) -> EngineOutput:
        """Record what a step gave. Sequences that were closed since it was planned are passed over."""
        sampled = {answer.sequence: answer for answer in result.sampled}
        output = EngineOutput()
        for work, token in self._apply_together(plan, result, output):
            answer = sampled.get(work.sequence) if token == NO_TOKEN else SampledTokens(work.sequence, (token,))
            output.events += self._apply_work(work, answer)
        self._score(plan, result)
        pooled = {answer.sequence: answer for answer in result.embeddings}
        for work in plan.other_works:
            output.events += self._apply_work(work, sampled.get(work.sequence), pooled.get(work.sequence))
        return output

    def _score(self, plan: StepPlan, result: StepResult) -> None:
        """Note log-probabilities of prompts, before their sequences may end."""
        starts = {work.sequence: (work.start, self.shards[work.shard]) for work in plan.other_works} if result.prompt_logprobs else {}
        for scored in result.prompt_logprobs:
            start, shard = starts[scored.sequence]
            if (sequence := shard.open.get(scored.sequence)) is not None:
                sequence.score(start, scored.logprobs)

    def _apply_together(self, plan: StepPlan, result: StepResult, output: EngineOutput) -> list[tuple[Work, int]]:
        """Record the tokens of cohorts. The works of which more than a next token is to be recorded, and their tokens."""
        rest: list[tuple[Work, int]] = []
        tokens = np.frombuffer(result.tokens, COLUMN) if result.tokens else np.full(len(plan.decodes), NO_TOKEN, COLUMN)
        begin = 0
        for shard, planned in self._planner.take_together(plan.step):
            of_shard = tokens[begin : begin + len(planned.rows)]
            begin += len(planned.rows)
            recorded = shard.cohort.record(planned, of_shard)
            for sequence in recorded.full:
                shard.cache.publish(sequence, since=sequence.num_computed - 1)
            for request, count in recorded.charges:
                self._policy.sampled(request, count)
            self.computed_tokens += len(recorded.token_batch)
            self.sampled_tokens += len(recorded.token_batch)
            if is_tracing():
                for sequence in recorded.token_batch.sequences:
                    trace_place(12, sequence.request.id)
            if len(recorded.token_batch):
                output.token_batches.append(recorded.token_batch)
            rest += zip(planned.works(recorded.rest), of_shard[recorded.rest].tolist(), strict=True)
        return rest

    def _apply_work(self, work: Work, answer: SampledTokens | None, pooled: PooledEmbedding | None = None) -> list[TokenEvent]:
        shard = self.shards[work.shard]
        sequence = shard.open.get(work.sequence)
        if sequence is None:
            return []
        shard.loosen(sequence)
        self.computed_tokens += len(work.tokens)
        if work.start >= len(sequence.tokens) and not sequence.ended:  # planned ahead on a token that did not come
            sequence.num_planned = sequence.num_computed
            return []
        sequence.num_computed = work.start + len(work.tokens) - work.num_draft
        if sequence.ended:
            if not sequence.in_flight:
                self._table.close(sequence)
            return []
        if work.pools:
            return [
                self._take_embedding(sequence, work, pooled or PooledEmbedding(work.sequence, b"", fault="the ranks gave no embedding"))
            ]
        if not work.samples:
            shard.cache.publish(sequence, since=work.start)
            return []
        answer = answer or SampledTokens(work.sequence, (), fault="the ranks gave no token")
        if answer.fault is not None:
            shard.cache.disown(sequence)
            return [self._fail(sequence, GrammarFailed(answer.fault) if answer.is_grammar_fault else InvalidLogits(answer.fault))]
        if answer.tokens:
            return [self._take(sequence, work, answer)]
        sequence.step_back()
        shard.cache.publish(sequence, since=work.start)
        return []

    def _take_embedding(self, sequence: Sequence, work: Work, pooled: PooledEmbedding) -> TokenEvent:
        """All that was wanted of it."""
        cache = self.shards[work.shard].cache
        if pooled.fault is not None:
            cache.disown(sequence)
            return self._fail(sequence, InvalidLogits(pooled.fault))
        trace_place(12, sequence.request.id)
        cache.publish(sequence, since=work.start)
        return self._end(sequence, sequence.event(finish_reason="stop", embedding=pooled.vector))

    def _take(self, sequence: Sequence, work: Work, answer: SampledTokens) -> TokenEvent:
        """Append what was sampled, up to what ends the answer. All of it but the last was guessed, and so is computed already."""
        trace_place(12, sequence.request.id)
        taken, stop_token = 0, None
        reason: FinishReason | None = None if sequence.request.sampling.max_tokens else "length"
        sequence.isolation_tokens_left = max(0, sequence.isolation_tokens_left - 1)
        while reason is None and taken < len(answer.tokens):
            sequence.tokens.append(answer.tokens[taken])
            taken += 1
            reason, stop_token = self._ending(sequence)
        self.sampled_tokens += taken
        self._policy.sampled(sequence.request, taken)
        held = len(answer.tokens) - 1
        if held:
            sequence.hold(min(held, taken))
        if self._speculator is not None and work.num_draft:
            self._speculator.judge(sequence, work.num_draft, held)
        self.shards[work.shard].cache.publish(sequence, since=work.start)
        event = sequence.event(answer.tokens[:taken], answer.logprobs[:taken], finish_reason=reason, stop_token=stop_token)
        if reason is not None:
            return self._end(sequence, event)
        if self._speculator is not None and answer.next_draft:
            self._speculator.told(sequence, answer.next_draft)
        if self._speculator is None or self._speculator.is_resting:
            self._table.try_join_cohort(sequence)
        return event

    def _ending(self, sequence: Sequence) -> tuple[FinishReason | None, int | None]:
        """Why the answer is complete with its last token, if it is, and the token if that is why."""
        sampling = sequence.request.sampling
        may_stop = sequence.num_output > sampling.min_tokens or sampling.grammar is not None  # a whole text ends, however short
        if may_stop and sequence.tokens[-1] in sampling.stop_token_ids:
            return "stop", sequence.tokens[-1]
        if sequence.num_output >= sampling.max_tokens or len(sequence.tokens) >= self._table.capacity.max_context_tokens:
            return "length", None
        return None, None

    # --- the workers are gone

    def lose_workers(self, *, from_outside: bool = False) -> list[TokenEvent]:
        """All KV is lost, and every step in flight with it: whatever was open waits again, at its old rank.

        Of each sequence of which a step was in flight it is told that it may be what ended the workers; see `engine.isolation`.
        """
        self.num_losses += 1
        events = []
        poisoned = record_loss(self._table.all_open(), from_outside=from_outside)
        for sequence in self._table.all_open():
            is_suspect = sequence.in_flight
            self._table.close(sequence)
            if sequence.ended:
                continue
            self._table.admission.put(sequence)
            if is_suspect and sequence not in poisoned:
                events.append(sequence.event())
            if sequence in poisoned:
                events.append(
                    self._fail(sequence, PoisonedRequest(f"the workers were lost {sequence.losses} times while computing this request"))
                )
        self._suspects = [sequence for sequence in self._by_key.values() if sequence.isolation_tokens_left]
        self._planner.forget_steps()
        self._table.closed.clear()
        for shard in self.shards:
            shard.pool.clear()
        return events

    def adopt(self, capacity: Capacity) -> list[TokenEvent]:
        """New workers, empty, perhaps smaller. To be called after `lose_workers`.

        A request that was promised more room than there is now ends with an error rather than with a shorter answer.
        """
        assert not self.num_running
        promised = self._table.capacity.max_context_tokens
        self._table.set_capacity(capacity)
        events = []
        for sequence in list(self._table.admission.waiting):
            most = min(sequence.num_prompt + sequence.request.sampling.max_tokens, promised)
            if most > capacity.max_context_tokens:
                events.append(self._fail(sequence, KvCacheTooSmall(num_tokens=most, limit_tokens=capacity.max_context_tokens)))
        return events

    # --- small parts

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self._table.shards

    @property
    def num_running(self) -> int:
        return self._table.num_running

    @property
    def num_preemptions(self) -> int:
        return self._table.num_preemptions

    @property
    def prefix_queried_tokens(self) -> int:
        """Tokens looked up in prefix caches at admissions."""
        return self._table.prefix_queried_tokens

    @property
    def prefix_hit_tokens(self) -> int:
        """How many of `prefix_queried_tokens` were found."""
        return self._table.prefix_hit_tokens

    def number_step(self) -> int:
        """A number for the next step, also for one that this scheduler does not plan."""
        return self._planner.number_step()

    def queue(self) -> list[Waits]:
        """Who waits, now: a list of its own."""
        return list(self._table.admission.waiting)

    @property
    def num_waiting(self) -> int:
        return len(self._table.admission.waiting)

    @property
    def prefill_tokens(self) -> int:
        """Known tokens that no step has been planned for, but for those of sequences that decode."""
        return self._table.prefill_tokens

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._by_key)

    @property
    def drafted_tokens(self) -> int:
        return self._speculator.num_drafted if self._speculator else 0

    @property
    def accepted_tokens(self) -> int:
        return self._speculator.num_accepted if self._speculator else 0

    def _check_length(self, request: Request) -> None:
        """At least one more token must fit into the context, and the KV of all tokens but the last into the pool."""
        known = len(request.prompt) + len(request.committed)
        limit = self._table.capacity.max_context_tokens
        if known + (request.pooling is None) > limit:
            raise PromptTooLong(num_tokens=known, limit_tokens=limit)
        if request.pooling is not None and not request.pooling.is_causal and known > self._config.max_step_tokens:
            raise PromptCannotBeCut(num_tokens=known, limit_tokens=self._config.max_step_tokens)
        most = min(len(request.prompt) + request.sampling.max_tokens, limit) if request.pooling is None else known + 1
        room = self._table.capacity.num_blocks * self._table.capacity.block_tokens + 1
        if most > room:
            raise KvCacheTooSmall(num_tokens=most, limit_tokens=room)

    def _fail(self, sequence: Sequence, error: EngineError) -> TokenEvent:
        return self._end(sequence, sequence.event(finish_reason="error", error=error))

    def _end(self, sequence: Sequence, event: TokenEvent) -> TokenEvent:
        """The request is over for its client at once; blocks that a step in flight still writes to are kept until it is applied."""
        sequence.ended = True
        self.num_finished += 1
        del self._by_key[sequence.request.key]
        if sequence.number is None:
            self._table.admission.remove(sequence)
        elif sequence.in_flight:
            self.shards[sequence.shard].loosen(sequence)
        else:
            self._table.close(sequence)
        return event

    def __repr__(self) -> str:
        return f"<Scheduler [{self.num_running} running | {self.num_waiting} waiting] {list(self.shards)}>"
