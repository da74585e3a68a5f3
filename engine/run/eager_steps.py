"""Step 9 of a request, where its step is neither replayed nor begun ahead: any plan becomes a forward batch, and that logits."""

from collections.abc import Sequence

import torch

from engine.failpoints import hit
from engine.plan import StepPlan, Work
from engine.run.batch_builder import BuiltBatch, build_batch
from engine.run.drafter import Drafter
from engine.run.forward import Forward
from engine.run.last_tokens import broadcast_tokens, num_decodes_to_broadcast, with_known_tokens
from engine.run.open_sequences import OpenSequences
from engine.run.prompt_logprobs import PromptScorer
from engine.run.result_builder import RankOutput, ResultBuilder
from engine.run.sampling.top_logits import needed_top_logits
from parallel.native.screened import Sought


class EagerSteps:
    """Steps of whatever works, over when they return."""

    def __init__(
        self,
        forward: Forward,
        sequences: OpenSequences,
        result_builder: ResultBuilder,
        *,
        scorer: PromptScorer,
        drafter: Drafter | None = None,
    ) -> None:
        """Without a ``drafter`` nothing is guessed here."""
        self._forward, self._sequences, self._result_builder = forward, sequences, result_builder
        self._scorer, self._drafter = scorer, drafter

    def run(self, plan: StepPlan) -> RankOutput:
        """With all other ranks. One without works of its shard computes too, with no tokens: those of other shards may need its experts."""
        shard = self._sequences.shard
        num_to_broadcast = num_decodes_to_broadcast(plan, shard)
        works = with_known_tokens(plan, self._sequences.last_tokens).works
        if not works:
            return RankOutput()
        mine = [work for work in works if work.shard == shard]
        built = self._build(mine, num_to_broadcast)
        return self._compute(built) if self._result_builder.sampler is None else self._compute_and_sample(mine, built)

    def _build(self, works: Sequence[Work], num_to_broadcast: int) -> BuiltBatch:
        """The tokens of the first ``num_to_broadcast`` works are known to the rank that samples, and to no other."""
        for work in works:
            self._sequences.tables.append(work)
        self._sequences.mark(9, works)
        model, layout = self._forward.model, self._forward.cache.layout
        built = build_batch(works, self._sequences.tables, layout.block_tokens, model.device)
        if num_to_broadcast:
            broadcast_tokens(built.forward.tokens_T[:num_to_broadcast], model.groups.tp)
        self._sequences.mark(10, works)
        return built

    def _compute(self, built: BuiltBatch) -> RankOutput:
        """Those that answer need this rank's part of the model."""
        hidden_TD, kept_R = self._forward.hidden(built.forward, self._kept(built))
        if hidden_TD is not None:  # this rank has a share of the vocabulary
            self._scorer.score(hidden_TD, built, {})
            self._forward.model.logits(built.sampled_rows(hidden_TD, kept_R))
        return RankOutput()

    def _compute_and_sample(self, works: Sequence[Work], built: BuiltBatch) -> RankOutput:
        sequences, model = self._sequences, self._forward.model
        for work in works:
            sequences.add_tokens(work)
        sequences.count_on_device(works)
        allowed = sequences.guides.begin([work.sequence for work in built.sampling_works])  # looked up while the model computes
        hidden_TD, kept_R = self._forward.hidden(built.forward, self._kept(built))
        assert hidden_TD is not None  # sampling ranks are of the last stage
        scored = self._scorer.score(hidden_TD, built, sequences.states)
        logits_RV = model.logits(built.sampled_rows(hidden_TD, kept_R), self._needed_top_logits(built) if model.uses_top_logits() else None)
        if hit("rank.logits"):
            logits_RV = torch.full_like(logits_RV, torch.nan)
        sequences.mark(11, built.sampling_works)
        sampled = self._result_builder.sample(logits_RV, built.sampling_works, allowed.result() if allowed else {})
        del logits_RV  # as large as the draft model's, which come next
        pooled, guessing_s = sequences.pooler.pool(hidden_TD, built), 0.0
        if self._drafter is not None:
            sampled, guessing_s = self._drafter.propose(works, sampled, sequences.tables, sequences.states)
        return RankOutput(sampled, scored, pooled, guessing_s)

    def _needed_top_logits(self, built: BuiltBatch) -> Sought | None:
        assert self._result_builder.sampler is not None
        rows = [row for work in built.sampling_works for row in self._sequences.rows(work)]
        return needed_top_logits(rows, self._result_builder.sampler.vocab_size)

    def _kept(self, built: BuiltBatch) -> torch.Tensor | None:
        """See `Qwen2.hidden`. Every rank finds the same, as they sum over these rows."""
        wants_all = any(work.targets for work in built.works) or self._sequences.pooler.needs_all_tokens(built.works)
        return None if wants_all else built.kept_rows
