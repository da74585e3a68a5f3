"""Step 7 of a request: which tokens the next forward pass computes."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from engine.admission import Places
from engine.cohort import Planned
from engine.config import EngineConfig
from engine.draft.planning import plan_draft, plan_next_draft
from engine.draft.speculator import Speculator
from engine.plan import NO_DECODES, Decodes, NewSequence, StepPlan, Work
from engine.policy import Policy, Rank
from engine.prefill_budget import PrefillBudget
from engine.request_trace import is_tracing, trace_place
from engine.sequence import Sequence
from engine.sequence_table import SequenceTable
from engine.shard import Shard
from engine.shard_budget import ShardBudget, num_decoding, shard_budget

MayRun = Callable[[Sequence], bool]


def anyone(_sequence: Sequence) -> bool:
    return True


@dataclass
class PlanBuilder:
    """A plan in the making."""

    may_run: MayRun
    works: list[Work] = field(default_factory=list)
    opened: list[NewSequence] = field(default_factory=list)
    ahead: bool = False
    """Whether members of cohorts may be planned behind a step that was not answered yet."""
    together: list[tuple[Shard, Planned]] = field(default_factory=list)
    """Members of cohorts, with one token each."""

    def decodes(self) -> Decodes:
        columns = [planned.columns for _, planned in self.together]
        if not columns:
            return NO_DECODES
        return Decodes.of(columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1))


class Planner:
    """On each shard sequences that decode come first, then prompts, begun and new, each in rank order."""

    def __init__(
        self,
        config: EngineConfig,
        table: SequenceTable,
        policy: Policy,
        *,
        speculator: Speculator | None = None,
        pace: PrefillBudget | None = None,
    ) -> None:
        self._config, self._table, self._policy, self._speculator, self._pace = config, table, policy, speculator, pace
        self._num_steps = 0
        self._together: dict[int, list[tuple[Shard, Planned]]] = {}

    def number_step(self) -> int:
        """A number for the next step, also for one that this scheduler does not plan."""
        self._num_steps += 1
        return self._num_steps - 1

    def take_together(self, step: int) -> list[tuple[Shard, Planned]]:
        """The members of cohorts in a step that was planned, once, in the order of the plan's `decodes`."""
        return self._together.pop(step, [])

    def forget_steps(self) -> None:
        """None of those in flight will be answered."""
        self._together.clear()

    def plan(self, may_run: MayRun = anyone, *, only_ahead: bool = False) -> StepPlan | None:
        """The next step's plan with those who may run, or None when none of them can.

        With ``only_ahead`` also None where not everybody who decodes can go on behind the step under way: whoever could not would miss
        this step, as it leaves before he is answered.
        """
        if may_run is anyone and (plan := self._plan_cohorts_alone()) is not None:
            return plan
        building = PlanBuilder(may_run, ahead=self._may_run_ahead())
        if only_ahead and not building.ahead:
            return None
        if self._speculator is not None:
            self._speculator.rest_or_wake(self._table.num_running // len(self._table.shards))
            if not self._speculator.is_resting:
                for shard in self._table.shards:
                    shard.loosen_all()
        budgets = [self._config.max_step_tokens] * len(self._table.shards) if self._pace is None else self._paced(self._pace)
        portions = [self._portion(shard, budget) for shard, budget in zip(self._table.shards, budgets, strict=True)]
        if only_ahead and not all(self._has_room_ahead(portion) for portion in portions if len(portion.shard.cohort)):
            return None
        for portion in portions:
            self._continue_decoding(portion, building)
        self._take_prompts(portions, building)
        if not (building.works or building.together):
            return None
        return self._planned(building)

    def _planned(self, building: PlanBuilder) -> StepPlan:
        plan = StepPlan(
            self.number_step(), tuple(building.works), tuple(building.opened), tuple(self._table.closed), decodes=building.decodes()
        )
        if building.together:
            self._together[plan.step] = building.together
        self._table.closed.clear()
        return plan

    def _plan_cohorts_alone(self) -> StepPlan | None:
        """As `plan` does it, in a third of the time, where nobody waits or is loose, and all of every cohort can go on; else None."""
        table, config, shards = self._table, self._config, self._table.shards
        if table.admission.waiting or table.capacity.num_stages > 1 or self._speculator is not None:
            return None
        ahead = config.run_ahead and table.capacity.runs_ahead
        for shard in shards:
            if shard.loose or len(shard.cohort) > config.max_step_tokens:
                return None
            due = shard.cohort.due(ahead)
            if len(due) < len(shard.cohort) or len(due.short) > shard.pool.num_available:
                return None
        building = PlanBuilder(anyone, together=[(shard, shard.cohort.plan(shard.pool, ahead)) for shard in shards if len(shard.cohort)])
        if not building.together:
            return None
        if is_tracing():
            self._mark(building)
        return self._planned(building)

    def _mark(self, building: PlanBuilder) -> None:
        for shard, planned in building.together:
            for sequence in shard.cohort.sequences(planned):
                trace_place(7, sequence.request.id)

    def _may_run_ahead(self) -> bool:
        """Where ranks can, and everybody who waits for a next token would be in that step: who has to be answered first would miss it."""
        if not (self._config.run_ahead and self._table.capacity.runs_ahead) or self._speculator is not None:
            return False
        return not any(s.num_pending < 1 and not s.ended for shard in self._table.shards for s in shard.loose.values())

    def _paced(self, pace: PrefillBudget) -> list[int]:
        """Tokens for each shard, where some sequences decode: they wait for the prompts of all shards."""
        decoding, most = [num_decoding(shard) for shard in self._table.shards], self._config.max_step_tokens
        if not any(decoding):
            return [most for _ in decoding]
        prompt_tokens = max(1, pace.prompt_tokens(sum(decoding), self._table.prefill_tokens) // len(decoding))
        return [min(most, number + prompt_tokens) for number in decoding]

    def _portion(self, shard: Shard, budget: int) -> ShardBudget:
        return shard_budget(
            shard,
            budget=budget,
            max_tokens=self._config.max_step_tokens,
            max_running=self._config.max_running,
            num_stages=self._table.capacity.num_stages,
            num_shards=len(self._table.shards),
            waiting_tokens=self._table.admission.num_tokens // len(self._table.shards),
        )

    def _continue_decoding(self, portion: ShardBudget, building: PlanBuilder) -> None:
        together = self._decode_together(portion, building)
        candidates = portion.shard.loose if together else portion.shard.open
        runnable = [s for s in candidates.values() if s.num_pending == 1 and not s.ended and building.may_run(s)]
        for sequence in sorted(runnable, key=self._policy.rank):
            if portion.budget == 0 or portion.max_decodes == 0:
                return
            if sequence.number is None:  # preempted by one before it
                continue
            portion.max_decodes -= 1
            if self._make_room(sequence, portion):
                self._plan_work(sequence, portion, building)

    def _decode_together(self, portion: ShardBudget, building: PlanBuilder) -> bool:
        """Plan all of the shard's cohort, if all that decode here find room: then it does not matter in what order."""
        if building.may_run is not anyone:
            return False
        shard, cohort = portion.shard, portion.shard.cohort
        others = _num_others(portion)
        ahead = building.ahead and self._has_room_ahead(portion)
        due = cohort.due(ahead)
        count = len(due)
        if count + others > min(portion.budget, portion.max_decodes) or len(due.short) + others > shard.pool.num_available:
            return False
        if count:
            planned = cohort.plan(shard.pool, ahead)
            building.together.append((shard, planned))
            portion.take(count)
            portion.max_decodes -= count
            if is_tracing():
                for sequence in cohort.sequences(planned):
                    trace_place(7, sequence.request.id)
        return True

    def _has_room_ahead(self, portion: ShardBudget) -> bool:
        """Whether all of the cohort can go on behind the step under way. If not for want of blocks, nobody new may have what they lack:
        they take it, or give way, when they have been answered."""
        cohort, others = portion.shard.cohort, _num_others(portion)
        due = cohort.due(True)
        lacks = len(due.short)
        if lacks + others > portion.shard.pool.num_available:
            portion.has_preempted |= lacks > len(cohort.due(False).short)
            return False
        return len(due) + others <= min(portion.budget, portion.max_decodes)

    def _take_prompts(self, portions: list[ShardBudget], building: PlanBuilder) -> None:
        """Begun ones have their blocks; beside them a new one of a lower rank goes first, or a tenant's long prompt kept others waiting."""
        begun = [
            (sequence, portion)
            for portion in portions
            for sequence in portion.shard.loose.values()
            if sequence.num_pending > 1 and not sequence.ended and building.may_run(sequence)
        ]
        begun.sort(key=lambda one: self._policy.rank(one[0]), reverse=True)

        def continue_before(rank: Rank | None) -> None:
            while begun and (rank is None or self._policy.rank(begun[-1][0]) < rank):
                sequence, portion = begun.pop()
                if portion.budget and sequence.number is not None and self._make_room(sequence, portion):
                    self._plan_work(sequence, portion, building)

        free = [portion for portion in portions if not portion.has_preempted]
        for sequence, choice in self._table.admission.admit(free, self._table.capacity, building.may_run, self._places, continue_before):
            self._table.open(sequence, choice)
            building.opened.append(sequence.opening())
            self._plan_work(sequence, choice.portion, building)
        continue_before(None)

    def _places(self) -> Places:
        return Places(total=self._config.max_running, taken=self._table.num_running)

    def _plan_work(self, sequence: Sequence, portion: ShardBudget, building: PlanBuilder) -> None:
        assert sequence.number is not None
        portion.shard.loosen(sequence)
        count = sequence.num_pending if sequence.is_whole else min(sequence.num_pending, portion.budget)
        is_last, pools = count == sequence.num_pending, sequence.request.pooling is not None
        start = sequence.num_planned
        wants_draft = self._speculator is not None and sequence.num_pending == 1
        draft = plan_draft(sequence, portion, self._table.capacity, self._speculator) if self._speculator and wants_draft else ()
        asks = self._speculator is not None and is_last and not pools
        guesses = plan_next_draft(sequence, len(draft), portion, self._table.capacity, self._speculator) if self._speculator and asks else 0
        work = Work(
            sequence=sequence.number,
            start=start,
            tokens=(*sequence.tokens[start : start + count], *draft),
            new_blocks=tuple(sequence.blocks[sequence.num_blocks_sent :]),
            samples=is_last and not pools,
            num_draft=len(draft),
            shard=portion.shard.index,
            targets=sequence.targets(start, start + count),
            pools=is_last and pools,
            num_next_draft=guesses,
        )
        sequence.num_blocks_sent = len(sequence.blocks)
        sequence.num_planned += count
        building.works.append(work)
        portion.take(len(work.tokens))
        trace_place(7, sequence.request.id)

    def _make_room(self, sequence: Sequence, portion: ShardBudget) -> bool:
        """Give an open sequence the blocks for its next tokens, preempting from the last in rank. False if it must sit this step out."""
        pool = portion.shard.pool
        count = min(sequence.num_pending, portion.budget)
        missing = self._table.capacity.blocks_for(sequence.num_planned + count) - len(sequence.blocks)
        while missing > pool.num_available:
            # One in flight has had room for all its known tokens since it was opened: whoever comes here is movable itself.
            movable = [s for s in portion.shard.open.values() if not s.in_flight]
            last = max(movable, key=self._policy.rank)
            self._table.preempt(last)
            portion.has_preempted = True
            if last is sequence:
                return False
        if missing > 0:
            sequence.blocks += pool.allocate(missing)
        return True


def _num_others(portion: ShardBudget) -> int:
    """Of a shard's sequences those that decode beside the cohort."""
    return sum(sequence.num_pending == 1 for sequence in portion.shard.loose.values())
