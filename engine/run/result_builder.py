"""Turns the logits of a step into its StepResult. Place 11 of a request. R rows with logits, S sequences, V vocabulary."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from torch import Tensor

from engine.plan import PooledEmbedding, PromptLogprobs, RebalanceResult, SampledTokens, StepPlan, StepResult, Work
from engine.run.decode_rows import DecodeRows
from engine.run.grammar.guides import NO_CONSTRAINTS, AllowedTokens, blocked_results
from engine.run.open_sequences import OpenSequences
from engine.run.sampling.sampler import Sampler
from engine.run.sampling.sampler_graphs import as_decided
from engine.run.verification import verify_draft
from engine.shard_results import pack_tokens


@dataclass(frozen=True)
class RankOutput:
    """The output of one step on this rank; empty on ranks that do not answer."""

    sampled: list[SampledTokens] = field(default_factory=list)
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    embeddings: tuple[PooledEmbedding, ...] = ()
    drafting_s: float = 0.0
    tokens: bytes | None = None
    """`StepResult.tokens`, if the tokens are already in that form."""


class ResultBuilder:
    """Builds one rank's results; on a rank that does not sample they are None."""

    def __init__(self, sampler: Sampler | None, sequences: OpenSequences, *, runs_ahead: bool) -> None:
        """``runs_ahead``: later plans may rely on tokens that only this rank knows (`Capacity.runs_ahead`)."""
        self.sampler, self._sequences, self._runs_ahead = sampler, sequences, runs_ahead
        self._last_result_at = 0.0

    def sample(self, logits_RV: Tensor, works: Sequence[Work], allowed: Mapping[int, AllowedTokens]) -> list[SampledTokens]:
        """Sample after each of the works. A sequence whose grammar is not ready gets no token in this step."""
        assert self.sampler is not None
        blocked = blocked_results(allowed)
        sampling = [work for work in works if work.sequence not in blocked]
        if blocked:
            logits_RV = logits_RV[[at for at, work in enumerate(_work_of_each_row(works)) if work.sequence not in blocked]]
        rows = [row for work in sampling for row in self._sequences.rows(work, allowed.get(work.sequence))]
        results = iter(self.sampler.sample(logits_RV, rows, self._sequences.edit_table))
        return [self._verify_draft(work, list(islice(results, work.num_draft + 1))) for work in sampling] + list(blocked.values())

    def from_report(
        self, rows: DecodeRows, logits_SV: Tensor, report_3S: np.ndarray, allowed: Mapping[int, AllowedTokens] = NO_CONSTRAINTS
    ) -> list[SampledTokens]:
        """The results of a replayed step, from its report. A sequence whose grammar is not ready gets no token in this step."""
        assert self.sampler is not None
        each = [row for work in rows.works() for row in self._sequences.rows(work)]
        results = self.sampler.results(logits_SV, logits_SV, each, as_decided(report_3S))
        blocked = blocked_results(allowed)
        return [blocked.get(result.sequence, result) for result in results]

    def build(self, plan: StepPlan, output: RankOutput, began: float, rebalanced: RebalanceResult | None = None) -> StepResult | None:
        """The result of a step that began at ``began`` (`time.perf_counter`). None on a rank that does not sample."""
        if self.sampler is None:
            return None
        tokens, rest = pack_tokens(plan.decodes, output.sampled) if output.tokens is None else (output.tokens, tuple(output.sampled))
        if self._runs_ahead:
            self._sequences.last_tokens.record(plan.decodes, tokens, rest)
        now, began = time.perf_counter(), max(began, self._last_result_at)  # until then the device was busy with the step before
        self._last_result_at = now
        return StepResult(plan.step, rest, now - began, rebalanced, tokens, output.prompt_logprobs, output.embeddings, output.drafting_s)

    def _verify_draft(self, work: Work, results: list[SampledTokens]) -> SampledTokens:
        if not work.num_draft:
            return results[0]
        result = verify_draft(work, results)
        self._sequences.states[work.sequence].accept_draft(result.tokens[:-1])
        return result


def _work_of_each_row(works: Sequence[Work]) -> Iterator[Work]:
    """The work that each row of logits belongs to."""
    return (work for work in works for _ in range(work.num_draft + 1))
