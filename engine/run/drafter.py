"""Runs a draft model: it reads what the step computed and proposes the next draft. Place 11 of a request.

The draft model is whole on the rank that samples. Its KV cache uses the same block numbers as the model's, so prefix caching, preemption
and shared blocks apply to both. Its proposals are verified (`engine.run.verification`), so it cannot make an answer wrong.
"""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.draft.catch_up import tokens_to_catch_up
from engine.plan import SampledTokens, Work
from engine.run.batch_builder import build_batch
from engine.run.block_tables import BlockTables
from engine.run.sampling.sampler import Sampler
from engine.run.sampling.state import Row, SamplingState
from engine.run.sampling.top_logits import needed_top_logits
from model.kv_cache import KvCache
from model.qwen2 import Qwen2


class Drafter:
    """A draft model with its KV cache."""

    def __init__(self, *, model: Qwen2, cache: KvCache, sampler: Sampler) -> None:
        """``sampler`` is the model's own: a draft token is drawn with the noise of its output position, so it is the token that the model
        would sample if its logits were the same."""
        self.model, self.cache, self._sampler = model, cache, sampler

    def __repr__(self) -> str:
        return f"<Drafter [{self.model.config.num_layers} layers | {self.cache}]>"

    def propose(
        self, works: Sequence[Work], sampled: Sequence[SampledTokens], tables: BlockTables, states: Mapping[int, SamplingState]
    ) -> tuple[list[SampledTokens], float]:
        """The results with the next drafts that were asked for, and the seconds that all tokens but the first of each draft took."""
        sampled_tokens = {result.sequence: result.tokens for result in sampled}
        drafting = {work.sequence: work for work in works if work.num_next_draft and sampled_tokens.get(work.sequence)}
        catch_up_works = [self._catch_up_work(work, sampled_tokens.get(work.sequence, ()), work.sequence in drafting) for work in works]
        drafts: dict[int, tuple[int, ...]] = dict.fromkeys(drafting, ())
        next_works = self._step([work for work in catch_up_works if work.tokens], drafting, sampled_tokens, drafts, tables, states)
        began = time.perf_counter()
        while next_works:
            next_works = self._step(next_works, drafting, sampled_tokens, drafts, tables, states)
        return [result._replace(next_draft=drafts.get(result.sequence, ())) for result in sampled], time.perf_counter() - began

    def _catch_up_work(self, work: Work, sampled_tokens: tuple[int, ...], samples: bool) -> Work:
        start, tokens = tokens_to_catch_up(work, sampled_tokens)
        return Work(work.sequence, start, self._clamped(tokens), (), samples=samples, shard=work.shard)

    def _step(
        self,
        works: Sequence[Work],
        drafting: Mapping[int, Work],
        sampled_tokens: Mapping[int, tuple[int, ...]],
        drafts: dict[int, tuple[int, ...]],
        tables: BlockTables,
        states: Mapping[int, SamplingState],
    ) -> list[Work]:
        """Compute the works and record the token that follows each that samples. Returns the works of the next step."""
        if not works:
            return []
        built = build_batch(works, tables, self.cache.layout.block_tokens, self.cache.device)
        hidden_RD = self.model.hidden(built.forward, self.cache, built.kept_rows)
        assert hidden_RD is not None  # there is only one stage
        if not built.sampling_works:
            return []
        rows = [
            self._row(drafting[work.sequence], sampled_tokens[work.sequence], drafts[work.sequence], states)
            for work in built.sampling_works
        ]
        wanted = needed_top_logits(rows, self._sampler.vocab_size) if self.model.begin_top_logits() else None
        logits_RV = self.model.logits(built.sampled_rows(hidden_RD, built.kept_rows), wanted)
        results = self._sampler.sample(self._padded(logits_RV), rows)
        next_works = []
        for work, result in zip(built.sampling_works, results, strict=True):
            drafts[work.sequence] += result.tokens
            if result.tokens and len(drafts[work.sequence]) < drafting[work.sequence].num_next_draft:
                start = work.start + len(work.tokens)
                next_works.append(Work(work.sequence, start, self._clamped(result.tokens), (), samples=True, shard=work.shard))
        return next_works

    def _row(self, work: Work, sampled_tokens: tuple[int, ...], draft: tuple[int, ...], states: Mapping[int, SamplingState]) -> Row:
        """The state has seen all tokens but the last of ``sampled_tokens``."""
        state = states[work.sequence]
        return Row(state, state.next_position(work) + len(sampled_tokens) + len(draft), None, (sampled_tokens[-1], *draft))

    def _padded(self, logits_RV: Tensor) -> Tensor:
        """Logits as wide as the model's vocabulary: ids that the draft model lacks are never drafted."""
        missing = self._sampler.vocab_size - logits_RV.shape[1]
        return pad(logits_RV, (0, missing), value=-torch.inf) if missing > 0 else logits_RV

    def _clamped(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """The draft model reads an id that it lacks as its last one."""
        last = self.model.config.vocab_size - 1
        return tokens if max(tokens, default=0) <= last else tuple(min(token, last) for token in tokens)


def open_drafter(model: Qwen2 | None, sampler: Sampler | None, num_blocks: int) -> Drafter | None:
    """A drafter with as many KV blocks as the model has; None without a draft model."""
    if model is None:
        return None
    assert sampler is not None  # it is loaded only on ranks that sample
    return Drafter(model=model, cache=KvCache(model.kv_layout, num_blocks, model.device), sampler=sampler)
