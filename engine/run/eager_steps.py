"""Executes any step without CUDA graphs of the whole step. Place 9 of a request: the plan becomes a forward batch, and that logits."""

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
from parallel.native.screened import TopLogits


class EagerSteps:
    """Steps with any mix of works. A step is finished when `run` returns."""

    def __init__(
        self,
        forward: Forward,
        sequences: OpenSequences,
        result_builder: ResultBuilder,
        *,
        scorer: PromptScorer,
        drafter: Drafter | None = None,
    ) -> None:
        """Without a ``drafter`` this rank proposes no drafts."""
        self._forward, self._sequences, self._result_builder = forward, sequences, result_builder
        self._scorer, self._drafter = scorer, drafter

    def run(self, plan: StepPlan) -> RankOutput:
        """Execute the step together with all other ranks.

        A rank whose shard has no works computes an empty batch, because other shards may need its experts.
        """
        shard = self._sequences.shard
        num_to_broadcast = num_decodes_to_broadcast(plan, shard)
        works = with_known_tokens(plan, self._sequences.last_tokens).works
        if not works:
            return RankOutput()
        mine = [work for work in works if work.shard == shard]
        built = self._build(mine, num_to_broadcast)
        return self._compute(built) if self._result_builder.sampler is None else self._compute_and_sample(mine, built)

    def _build(self, works: Sequence[Work], num_to_broadcast: int) -> BuiltBatch:
        """Only the sampling rank knows the tokens of the first ``num_to_broadcast`` works, and broadcasts them."""
        for work in works:
            self._sequences.tables.append(work)
        self._sequences.trace(9, works)
        model, layout = self._forward.model, self._forward.cache.layout
        built = build_batch(works, self._sequences.tables, layout.block_tokens, model.device)
        if num_to_broadcast:
            broadcast_tokens(built.forward.tokens_T[:num_to_broadcast], model.groups.tp)
        self._sequences.trace(10, works)
        return built

    def _compute(self, built: BuiltBatch) -> RankOutput:
        """Compute this rank's part of the model for the ranks that sample."""
        hidden_TD, kept_R = self._forward.hidden(built.forward, self._kept(built))
        if hidden_TD is not None:  # the last stage: this rank has a share of the vocabulary
            self._scorer.score(hidden_TD, built, {})
            self._forward.model.logits(built.sampled_rows(hidden_TD, kept_R))
        return RankOutput()

    def _compute_and_sample(self, works: Sequence[Work], built: BuiltBatch) -> RankOutput:
        sequences, model = self._sequences, self._forward.model
        for work in works:
            sequences.add_tokens(work)
        sequences.count_on_device(works)
        allowed = sequences.guides.begin([work.sequence for work in built.sampling_works])  # runs in a thread while the model computes
        hidden_TD, kept_R = self._forward.hidden(built.forward, self._kept(built))
        assert hidden_TD is not None  # sampling ranks are in the last stage
        prompt_logprobs = self._scorer.score(hidden_TD, built, sequences.states)
        top_logits = self._needed_top_logits(built) if model.begin_top_logits() else None
        logits_RV = model.logits(built.sampled_rows(hidden_TD, kept_R), top_logits)
        if hit("rank.logits"):
            logits_RV = torch.full_like(logits_RV, torch.nan)
        sequences.trace(11, built.sampling_works)
        sampled = self._result_builder.sample(logits_RV, built.sampling_works, allowed.result() if allowed else {})
        del logits_RV  # the draft model needs as much memory for its own logits
        embeddings, drafting_s = sequences.pooler.pool(hidden_TD, built), 0.0
        if self._drafter is not None:
            sampled, drafting_s = self._drafter.propose(works, sampled, sequences.tables, sequences.states)
        return RankOutput(sampled, prompt_logprobs, embeddings, drafting_s)

    def _needed_top_logits(self, built: BuiltBatch) -> TopLogits | None:
        assert self._result_builder.sampler is not None
        rows = [row for work in built.sampling_works for row in self._sequences.rows(work)]
        return needed_top_logits(rows, self._result_builder.sampler.vocab_size)

    def _kept(self, built: BuiltBatch) -> torch.Tensor | None:
        """See `Qwen2.hidden`. All ranks of the tp group must agree, because they sum over these rows."""
        wants_all = any(work.targets for work in built.works) or self._sequences.pooler.needs_all_tokens(built.works)
        return None if wants_all else built.kept_rows
