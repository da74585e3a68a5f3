"""Step 9 of a request, where its step is neither replayed nor begun ahead: any plan becomes a forward batch, and that logits."""

from collections.abc import Sequence

import torch

from engine.failpoints import hit
from engine.plan import StepPlan, Work
from engine.run.answering import Answering, Given
from engine.run.batch_builder import BuiltBatch, build_batch
from engine.run.drafter import Drafter
from engine.run.forward import Forward
from engine.run.open_sequences import OpenSequences
from engine.run.sampling.sought import sought
from engine.run.scoring import Scorer
from engine.run.tokens_said import hand_on, num_with_unknown_tokens, with_known_tokens
from parallel.native.screened import Sought


class ComputedSteps:
    """Steps of whatever works, over when they return."""

    def __init__(
        self, forward: Forward, sequences: OpenSequences, answering: Answering, *, scorer: Scorer, drafter: Drafter | None = None
    ) -> None:
        """Without a ``drafter`` nothing is guessed here."""
        self._forward, self._sequences, self._answering = forward, sequences, answering
        self._scorer, self._drafter = scorer, drafter

    def run(self, plan: StepPlan) -> Given:
        """With all other ranks. One without works of its shard computes too, with no tokens: those of other shards may need its experts."""
        shard = self._sequences.shard
        num_said = num_with_unknown_tokens(plan, shard)
        works = with_known_tokens(plan, self._sequences.said).works
        if not works:
            return Given()
        mine = [work for work in works if work.shard == shard]
        built = self._build(mine, num_said)
        return self._help(built) if self._answering.sampler is None else self._answer(mine, built)

    def _build(self, works: Sequence[Work], num_said: int) -> BuiltBatch:
        """The tokens of the first ``num_said`` works are known to the rank that samples, and to no other."""
        for work in works:
            self._sequences.tables.append(work)
        self._sequences.mark(9, works)
        model, layout = self._forward.model, self._forward.cache.layout
        built = build_batch(works, self._sequences.tables, layout.block_tokens, model.device)
        if num_said:
            hand_on(built.forward.tokens_T[:num_said], model.groups.tp)
        self._sequences.mark(10, works)
        return built

    def _help(self, built: BuiltBatch) -> Given:
        """Those that answer need this rank's part of the model."""
        hidden_TD, kept_R = self._forward.hidden(built.forward, self._kept(built))
        if hidden_TD is not None:  # this rank has a share of the vocabulary
            self._scorer.score(hidden_TD, built, {})
            self._forward.model.logits(built.that_sample(hidden_TD, kept_R))
        return Given()

    def _answer(self, works: Sequence[Work], built: BuiltBatch) -> Given:
        sequences, model = self._sequences, self._forward.model
        for work in works:
            sequences.take(work)
        sequences.count(works)
        allowed = sequences.guides.begin([work.sequence for work in built.sampling_works])  # looked up while the model computes
        hidden_TD, kept_R = self._forward.hidden(built.forward, self._kept(built))
        assert hidden_TD is not None  # sampling ranks are of the last stage
        scored = self._scorer.score(hidden_TD, built, sequences.states)
        logits_RV = model.logits(built.that_sample(hidden_TD, kept_R), self._sought(built) if model.screens() else None)
        if hit("rank.logits"):
            logits_RV = torch.full_like(logits_RV, torch.nan)
        sequences.mark(11, built.sampling_works)
        sampled = self._answering.sample(logits_RV, built.sampling_works, allowed.result() if allowed else {})
        del logits_RV  # as large as the draft model's, which come next
        pooled, guessing_s = sequences.pools.take(hidden_TD, built), 0.0
        if self._drafter is not None:
            sampled, guessing_s = self._drafter.follow(works, sampled, sequences.tables, sequences.states)
        return Given(sampled, scored, pooled, guessing_s)

    def _sought(self, built: BuiltBatch) -> Sought | None:
        assert self._answering.sampler is not None
        rows = [row for work in built.sampling_works for row in self._sequences.rows(work)]
        return sought(rows, self._answering.sampler.vocab_size)

    def _kept(self, built: BuiltBatch) -> torch.Tensor | None:
        """See `Qwen2.hidden`. Every rank finds the same, as they sum over these rows."""
        wants_all = any(work.targets for work in built.works) or self._sequences.pools.want(built.works)
        return None if wants_all else built.kept_rows
