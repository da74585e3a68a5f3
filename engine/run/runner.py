"""Step 9 of a request: one rank turns a StepPlan into a forward batch, and a sampling rank its logits into tokens."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from engine.answers import packed
from engine.begun import Begun
from engine.executor import Capacity
from engine.failpoints import hit
from engine.places import is_asked_for, mark
from engine.plan import Pooled, Rebalanced, Sampled, Scored, StepPlan, StepResult, Work
from engine.run.batch_builder import BuiltBatch, build_batch
from engine.run.block_tables import BlockTables
from engine.run.cuda_graphs import Graphs
from engine.run.decode_graphs import MOST_ROWS, DecodeGraphs
from engine.run.decode_rows import DecodeRows, decode_rows
from engine.run.drafter import Drafter
from engine.run.grammar.guides import NONE_ALLOWED, Allowed, Guides, silent
from engine.run.launched_rows import launched_rows
from engine.run.pooling import Pools
from engine.run.prompt_graphs import PromptGraphs, hidden_of
from engine.run.rebalance import ExpertRebalancer
from engine.run.replayed import Replayed
from engine.run.sampling.columns import (
    LEARNS,
    NEEDS,
    SamplingColumns,
    are_edited_by_host,
    host_has_a_say,
    host_may_have_a_say,
    may_be_edited,
)
from engine.run.sampling.edit_table import EditTable
from engine.run.sampling.sampler import Sampler
from engine.run.sampling.sampler_graphs import SamplerGraphs, as_decided
from engine.run.sampling.state import Row, SamplingState
from engine.run.scoring import Scorer
from engine.run.tokens_said import TokensSaid, hand_on, num_with_unknown_tokens, with_known_tokens
from engine.run.transfer import upload
from engine.run.verification import rows_of, verified
from model.kv_cache import KvCache
from model.qwen2 import Qwen2
from parallel.last_collective import note_replay
from parallel.topology import Topology

ALL_IN_PLACE = -1 - np.arange(MOST_ROWS)
"""Tokens of rows each of which stands where it stood in the step before."""


def sampling_ranks(topology: Topology) -> tuple[int, ...]:
    """For each shard (dp position) the one rank that samples and answers: its first of the last stage, which has the logits."""
    return tuple(range(topology.size - topology.ranks_per_stage, topology.size, topology.tp))


@dataclass(frozen=True)
class _Given:
    """What a step gave on this rank; nothing where it does not answer."""

    sampled: list[Sampled] = field(default_factory=list)
    scored: tuple[Scored, ...] = ()
    pooled: tuple[Pooled, ...] = ()
    guessing_s: float = 0.0
    tokens: bytes | None = None
    """`StepResult.tokens`, where they are known as such already."""


class Runner:
    """One rank of a replica, ready to take steps. It knows the blocks of each open sequence of its shard, and no more than that
    but where it samples."""

    def __init__(
        self,
        *,
        model: Qwen2,
        cache: KvCache,
        capacity: Capacity,
        sampler: Sampler | None,
        device: torch.device,
        shard: int = 0,
        guides: Guides | None = None,
        drafter: Drafter | None = None,
        prompts_ahead: bool = False,
    ) -> None:
        """``sampler`` is None on all ranks but those that answer, and so may ``guides`` be (without, grammars are refused) and ``drafter``
        (without, nothing is guessed here). ``prompts_ahead``: see `RunnerConfig`."""
        self.capacity, self.shard = capacity, shard
        self.model, self.cache, self.device = model, cache, device
        self.rebalancer = ExpertRebalancer(model)
        self._sampler = sampler
        self._guides = guides or Guides(None, vocab_size=sampler.vocab_size if sampler else 0)
        self._drafter = drafter
        self.prompts_ahead = prompts_ahead
        self._pools = Pools(model)
        self._scorer = Scorer(model, sampler.vocab_size if sampler else None)
        self._tables = BlockTables()
        self._states: dict[int, SamplingState] = {}
        self._columns = SamplingColumns()
        self._left_alone: np.ndarray | None = None
        """Columns in which the host will never have a say: mostly they come again."""
        self._said = TokensSaid()
        """Where a plan may come that counts on it."""
        self._under_way: list[Replayed] = []
        """Steps that were begun and not read, in order."""
        self._answered_at = 0.0
        self.decode_graphs: DecodeGraphs | None = None
        """What `capture` recorded."""
        self.prompt_graphs: PromptGraphs | None = None
        self.sampler_graphs: SamplerGraphs | None = None
        self._table: EditTable | None = None

    def __repr__(self) -> str:
        return f"<Runner [{'samples' if self.is_sampling else 'computes'} on {self.device} | {self._tables} | {self.cache}]>"

    @property
    def is_sampling(self) -> bool:
        """Whether `run` returns results here: so on exactly one rank of each shard."""
        return self._sampler is not None

    def capture(
        self,
        graphs: Graphs,
        *,
        most_rows: int,
        most_tokens: int = 0,
        edits: bool = False,
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        """Record steps that only decode, so that `run` replays them from now on. All ranks of the replica must call this at the same time,
        when no sequence is open, and there must be no `engine.run.decode_graphs.capture_obstacle`. ``edits``: what sequences have seen is
        counted on the device from now on, so that their penalties are replayed too; not where anything is guessed. Other steps, as far as
        they are worth it and have no more than ``most_tokens``, are replayed in pieces. ``on_progress`` is told (done, total)."""
        self.decode_graphs = DecodeGraphs(
            self.model,
            self.cache,
            graphs,
            most_rows=min(most_rows, MOST_ROWS),
            most_blocks=self.capacity.blocks_for(self.capacity.max_context_tokens),
            vocab_size=self._sampler.vocab_size if self._sampler else None,
            hands_on=self.capacity.runs_ahead,
        )
        if self.decode_graphs.logits is not None and self._sampler is not None:
            assert not self._states
            sizes, vocab_size = self.decode_graphs.sizes, self._sampler.vocab_size
            self._table = EditTable(num_entries=sizes[-1], vocab_size=vocab_size, device=self.device) if edits else None
            self.sampler_graphs = SamplerGraphs(
                self.decode_graphs.logits,
                sizes,
                graphs,
                table=self._table,
                tokens_B=self.decode_graphs.tokens_B,
                positions_B=self.decode_graphs.positions_B,
                report=self.decode_graphs.report,
            )
        self.prompt_graphs = PromptGraphs(self.model, self.cache, graphs, most_tokens=most_tokens) if most_tokens else None
        total = len(self.decode_graphs.sizes) + (self.sampler_graphs.num_graphs if self.sampler_graphs else 0)
        total += len(self.prompt_graphs.sizes) if self.prompt_graphs else 0
        done = iter(range(1, total + 1))

        def count() -> None:
            on_progress(next(done), total)

        self.decode_graphs.capture(count)
        if self.sampler_graphs is not None:
            self.sampler_graphs.capture(count)
        if self.prompt_graphs is not None:
            self.prompt_graphs.capture(count)

    def close(self) -> None:
        """Let go of what was captured, before the groups are left: NCCL leaves none while a graph that has its collectives is alive, and
        waits for that without end."""
        for graphs in (self.decode_graphs, self.sampler_graphs, self.prompt_graphs):
            if graphs is not None:
                graphs.forget()
        self.decode_graphs = self.sampler_graphs = self.prompt_graphs = None

    def run(self, plan: StepPlan) -> StepResult | None:
        """Take one step together with all other ranks. Its shard's result on a sampling rank, None elsewhere.

        A rank without works of its shard computes too, with no tokens: those of other shards may need its experts.
        """
        return self.begin(plan).result()

    @torch.inference_mode()
    def begin(self, plan: StepPlan) -> Begun:
        """As `run`, but where ranks run ahead and the host has no say in what the step gives, it may go on while the next one is begun.

        Steps are asked for their results in the order in which they were begun; at most two are under way at the same time.
        """
        began = time.perf_counter()
        if plan.rebalance:
            self._settle_all()
        elif len(self._under_way) > 1:
            self._settle(self._under_way[0])
        rebalanced = self.rebalancer.run(plan.rebalance) if plan.rebalance else None
        if rebalanced is not None and rebalanced.num_moved and self.decode_graphs is not None:
            self.decode_graphs.capture()  # experts lie elsewhere now; steps with prompts of such a model are launched
            self.rebalancer.forget_latest()
        self._open_and_close(plan)
        rows = decode_rows(plan, self.shard) if self.decode_graphs is not None else None
        if rows is not None and self.decode_graphs is not None and self.decode_graphs.takes(len(rows)):
            note_replay(plan.step)
            table_rows_S = rows.enter(self._tables)
            columns = self._columns.of(table_rows_S) if self.sampler_graphs is not None else None  # only they read them
            if columns is not None and self.capacity.runs_ahead and not self._host_has_a_say(columns, rows):
                run = partial(self.decode_graphs.run, rows, table_rows_S, self._tables)
                return self._go_on(plan, rows, table_rows_S, columns, run)
            self._settle_all()
            rows.learn(self._said)
            given = self._replay(rows, table_rows_S, columns, self.decode_graphs)
        elif (begun := self._begin_launched(plan)) is not None:
            return begun
        else:
            self._settle_all()
            num_said = num_with_unknown_tokens(plan, self.shard)
            plan = with_known_tokens(plan, self._said)
            works = plan.works
            given = self._compute([work for work in works if work.shard == self.shard], num_said) if works else _Given()
        return Begun(self._answered(plan, given, began, rebalanced))

    def _begin_launched(self, plan: StepPlan) -> Replayed | None:
        """A step with prompts, if its sampling can be replayed; else None, and nothing has been done."""
        graphs, samplers = self.decode_graphs, self.sampler_graphs
        may = self.prompts_ahead and self.capacity.runs_ahead and self._drafter is None
        if not may or graphs is None or samplers is None:
            return None
        launched = launched_rows(plan, self.shard)
        if launched is None or not graphs.takes(len(launched.sampling)) or self._pools.want(launched.singly):
            return None
        rows = launched.sampling
        table_rows_S = self._tables.rows_of(rows.columns[0])
        columns = self._columns.of(table_rows_S)
        if self._host_has_a_say(columns, rows) or any(self._states[sequence].sampling.grammar for sequence in launched.silent):
            return None
        launched.enter(self._tables)
        num_said = num_with_unknown_tokens(plan, self.shard)
        counts = samplers.edits and may_be_edited(columns)
        prompts = self.prompt_graphs
        launch = partial(launched.launch, self._tables, graphs, self.model, self.cache, prompts, num_said=num_said, counts=counts)
        return self._go_on(plan, rows, table_rows_S, columns, launch)

    def _answered(self, plan: StepPlan, given: _Given, began: float, rebalanced: Rebalanced | None = None) -> StepResult | None:
        if not self.is_sampling:
            return None
        tokens, rest = packed(plan.decodes, given.sampled) if given.tokens is None else (given.tokens, tuple(given.sampled))
        if self.capacity.runs_ahead:
            self._said.note(plan.decodes, tokens, rest)
        now, began = time.perf_counter(), max(began, self._answered_at)  # before that the device was at the step before
        self._answered_at = now
        return StepResult(plan.step, rest, now - began, rebalanced, tokens, given.scored, given.pooled, given.guessing_s)

    def _host_has_a_say(self, columns: np.ndarray, rows: DecodeRows) -> bool:
        if columns is self._left_alone:
            return False
        if host_may_have_a_say(columns):
            return host_has_a_say(columns, rows.starts + 1)
        self._left_alone = columns
        return False

    def _go_on(
        self,
        plan: StepPlan,
        rows: DecodeRows,
        table_rows_S: np.ndarray,
        columns: np.ndarray,
        launch: Callable[[np.ndarray], Tensor | None],
    ) -> Replayed:
        """Have the device do it behind what it is at. ``launch`` begins to compute the logits; it is told the tokens of the rows, -1 - n
        for one that stands at place n of what the step before gives."""
        assert self.decode_graphs is not None
        assert self.sampler_graphs is not None
        step = Replayed(None, plan, rows, table_rows_S, columns, self.decode_graphs.size_for(len(rows)), self._settle)
        marked = rows.works() if is_asked_for() else []
        self._mark(9, marked)
        tokens_S = self._tokens_of(step)
        self._mark(10, marked)
        logits_SV = launch(tokens_S)
        assert logits_SV is not None
        if hit("rank.logits"):
            logits_SV.fill_(torch.nan)
        self._mark(11, marked)
        step.report = self.sampler_graphs.launch(columns, rows.starts + 1, step.size)
        self._under_way.append(step)
        return step

    def _tokens_of(self, step: Replayed) -> np.ndarray:
        """Those that are not known stand in what the step before gives; if not all of them do, the host waits and reads them."""
        rows, unknown = step.rows, step.rows.unknown
        if not len(unknown):
            return rows.tokens
        if self._under_way and self._under_way[-1].table_rows_S is step.table_rows_S and len(unknown) == len(rows):
            return ALL_IN_PLACE[: len(rows)]
        places = self._under_way[-1].places_of(step)[unknown] if self._under_way else unknown[:0]
        if not len(places) or places.min() < 0:
            self._settle_all()
            rows.learn(self._said)
            return rows.tokens
        tokens_S = rows.tokens.copy()
        tokens_S[unknown] = -1 - places
        return tokens_S

    def _settle_all(self) -> None:
        while self._under_way:
            self._settle(self._under_way[0])

    def _settle(self, step: Replayed) -> None:
        """Read what a step gave, if nobody has, and tell the one behind it."""
        if step.outcome is not None:
            return
        assert step is self._under_way[0]
        assert step.report is not None
        assert self._sampler is not None
        graphs = self.decode_graphs
        assert graphs is not None
        report = step.report.read()
        if report[1:].all():  # sound
            tokens, sampled = step.rows.told(report[0])
            given = _Given(sampled, tokens=tokens)
        else:
            assert graphs.logits is not None  # by now perhaps those of the step behind; nobody's log-probabilities are wanted
            step.rows.learn(self._said)
            with torch.inference_mode():
                given = self._told(self._sampler, step.rows, graphs.logits[: len(step.rows)], report)
        step.outcome = self._answered(step.plan, given, step.began)
        self._under_way.pop(0)

    def _open_and_close(self, plan: StepPlan) -> None:
        for sequence in plan.closed:
            self._tables.close(sequence)
            state = self._states.pop(sequence, None)
            if state is not None and self._table is not None:
                self._table.close(state)
            self._said.forget(sequence)
            self._guides.close(sequence)
            self._pools.close(sequence)
        for opening in plan.opened:
            if opening.shard != self.shard:
                continue
            row = self._tables.open(opening.sequence)
            if self._sampler is not None:
                state = SamplingState(opening, vocab_size=self._sampler.vocab_size)
                self._states[opening.sequence] = state
                if self._table is not None:
                    self._table.open(state)
                if self.sampler_graphs is not None:
                    self._columns.put(row, state)
                self._guides.open(opening)
            self._pools.open(opening)

    def _replay(self, rows: DecodeRows, table_rows_S: np.ndarray, columns: np.ndarray | None, graphs: DecodeGraphs) -> _Given:
        """A step that is over when this returns. ``columns`` are None on a rank that does not sample."""
        known_S = rows.starts + 1
        marked = rows.works() if is_asked_for() else []
        self._mark(9, marked)
        self._mark(10, marked)
        logits_SV = graphs.run(rows, table_rows_S, self._tables)  # the device has enough to do now
        if self._sampler is None or self.sampler_graphs is None or columns is None or logits_SV is None:
            return _Given()
        if hit("rank.logits"):
            logits_SV.fill_(torch.nan)
        self._mark(11, marked)
        for at in np.flatnonzero(columns[NEEDS] & LEARNS).tolist():
            work = rows.work(at)
            self._states[work.sequence].take(work)
            self._guides.take(work)
        looked_up = self._guides.begin(rows.sequences)
        allowed = looked_up.result() if looked_up else {}
        if are_edited_by_host(columns, known_S) or (allowed and not self.sampler_graphs.edits):
            works = rows.works()
            self._count(works)
            return _Given(self._sample(self._sampler, logits_SV, works, allowed))
        words = {at: one.words for at, number in enumerate(rows.sequences) if (one := allowed.get(number)) and one.words is not None}
        report = self.sampler_graphs.launch(columns, known_S, graphs.size_for(len(rows)), words).read()
        return self._told(self._sampler, rows, logits_SV, report, allowed)

    def _told(
        self, sampler: Sampler, rows: DecodeRows, logits_SV: Tensor, report_3S: np.ndarray, allowed: Mapping[int, Allowed] = NONE_ALLOWED
    ) -> _Given:
        """What a replay drew, row by row. Sequences whose grammar has no say yet get no token in this step."""
        each = [row for work in rows.works() for row in self._rows(work, None)]
        answers = sampler.answers(logits_SV, logits_SV, each, as_decided(report_3S))
        mute = silent(allowed)
        return _Given([mute.get(answer.sequence, answer) for answer in answers])

    def _count(self, works: Sequence[Work]) -> None:
        """On the device, the newest token of each work whose sequence has an entry there, if it is not counted yet: of a step that is
        launched, or whose logits the host edits."""
        if self._table is None:
            return
        newest = ((self._states[work.sequence].entry, work.tokens[-1], work.start + len(work.tokens) - 1) for work in works)
        counted = [one for one in newest if one[0] >= 0]
        if counted:
            entries_R, tokens_R, starts_R = upload(np.array(counted, np.int64).T.copy(), self.device)
            self._table.learn(entries_R, tokens_R, starts_R)

    def _compute(self, works: Sequence[Work], num_said: int) -> "_Given":
        """The tokens of the first ``num_said`` works are known to the rank that samples, and to no other."""
        for work in works:
            self._tables.append(work)
        self._mark(9, works)
        built = build_batch(works, self._tables, self.capacity.block_tokens, self.device)
        if num_said:
            hand_on(built.forward.tokens_T[:num_said], self.model.groups.tp)
        self._mark(10, works)
        compute = partial(hidden_of, self.model, self.cache, self.prompt_graphs, built.forward, self._kept(built))
        if self._sampler is None:
            hidden_TD, kept_R = compute()
            if hidden_TD is not None:  # this rank has a share of the vocabulary
                self._scorer.score(hidden_TD, built, {})
                self.model.logits(built.that_sample(hidden_TD, kept_R))
            return _Given()
        for work in works:
            self._states[work.sequence].take(work)
            self._guides.take(work)
        self._count(works)
        allowed = self._guides.begin([work.sequence for work in built.sampling_works])  # looked up while the model computes
        hidden_TD, kept_R = compute()
        assert hidden_TD is not None  # sampling ranks are of the last stage
        scored = self._scorer.score(hidden_TD, built, self._states)
        logits_RV = self.model.logits(built.that_sample(hidden_TD, kept_R))
        if hit("rank.logits"):
            logits_RV = torch.full_like(logits_RV, torch.nan)
        self._mark(11, built.sampling_works)
        sampled = self._sample(self._sampler, logits_RV, built.sampling_works, allowed.result() if allowed else {})
        del logits_RV  # as large as the draft model's, which come next
        pooled, guessing_s = self._pools.take(hidden_TD, built), 0.0
        if self._drafter is not None:
            sampled, guessing_s = self._drafter.follow(works, sampled, self._tables, self._states)
        return _Given(sampled, scored, pooled, guessing_s)

    def _kept(self, built: BuiltBatch) -> Tensor | None:
        """See `Qwen2.hidden`. Every rank finds the same, as they sum over these rows."""
        wants_all = any(work.targets for work in built.works) or self._pools.want(built.works)
        return None if wants_all else built.kept_rows

    def _sample(self, sampler: Sampler, logits_RV: Tensor, works: Sequence[Work], allowed: dict[int, Allowed]) -> list[Sampled]:
        """Sequences whose grammar has no say yet get no token in this step."""
        mute = silent(allowed)
        speaking = [work for work in works if work.sequence not in mute]
        if mute:
            logits_RV = logits_RV[[at for at, work in enumerate(_owners(works)) if work.sequence not in mute]]
        rows = [row for work in speaking for row in self._rows(work, allowed.get(work.sequence))]
        answers = iter(sampler.sample(logits_RV, rows, self._table))
        return [self._verified(work, list(islice(answers, work.num_draft + 1))) for work in speaking] + list(mute.values())

    def _rows(self, work: Work, allowed: Allowed | None) -> list[Row]:
        return rows_of(work, self._states[work.sequence], allowed.words if allowed else None)

    def _verified(self, work: Work, answers: list[Sampled]) -> Sampled:
        answer = verified(work, answers)
        self._states[work.sequence].hold(answer.tokens[:-1])
        return answer

    def _mark(self, place: int, works: Sequence[Work]) -> None:
        if self.is_sampling:  # one rank's word for each sequence is enough
            for work in works:
                mark(place, self._states[work.sequence].request_id)


def _owners(works: Sequence[Work]) -> Iterator[Work]:
    """Whose each row of logits is."""
    return (work for work in works for _ in range(work.num_draft + 1))
