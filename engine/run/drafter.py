"""Runs a draft model: it reads what the step computed and guesses what comes next. Step 11 of a request.

The draft model is whole on the rank that samples. Its KV cache uses the same block numbers as the model's, so prefix caching, preemption
and shared blocks apply to both. Its guesses are verified (`engine.run.verification`), so nothing in it can make an answer wrong.
"""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from engine.draft.catch_up import tokens_to_catch_up
from engine.plan import Sampled, Work
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
        """``sampler`` is the model's own: a guess is drawn with the noise of its output position, so it is the token that the model
        would sample if its logits were the same."""
        self.model, self.cache, self._sampler = model, cache, sampler

    def __repr__(self) -> str:
        return f"<Drafter [{self.model.config.num_layers} layers | {self.cache}]>"

    def propose(
        self, works: Sequence[Work], sampled: Sequence[Sampled], tables: BlockTables, states: Mapping[int, SamplingState]
    ) -> tuple[list[Sampled], float]:
        """The results with guesses where they were asked for, and the seconds that all guesses but the first of each sequence took."""
        said = {answer.sequence: answer.tokens for answer in sampled}
        asking = {work.sequence: work for work in works if work.num_guesses and said.get(work.sequence)}
        reading = [self._reading(work, said.get(work.sequence, ()), work.sequence in asking) for work in works]
        guesses: dict[int, tuple[int, ...]] = dict.fromkeys(asking, ())
        going = self._step([work for work in reading if work.tokens], asking, said, guesses, tables, states)
        began = time.perf_counter()
        while going:
            going = self._step(going, asking, said, guesses, tables, states)
        return [answer._replace(guesses=guesses.get(answer.sequence, ())) for answer in sampled], time.perf_counter() - began

    def _reading(self, work: Work, said: tuple[int, ...], asks: bool) -> Work:
        start, tokens = tokens_to_catch_up(work, said)
        return Work(work.sequence, start, self._known(tokens), (), samples=asks, shard=work.shard)

    def _step(
        self,
        works: Sequence[Work],
        asking: Mapping[int, Work],
        said: Mapping[int, tuple[int, ...]],
        guesses: dict[int, tuple[int, ...]],
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
        rows = [self._row(asking[work.sequence], said[work.sequence], guesses[work.sequence], states) for work in built.sampling_works]
        wanted = needed_top_logits(rows, self._sampler.vocab_size) if self.model.uses_top_logits() else None
        logits_RV = self.model.logits(built.sampled_rows(hidden_RD, built.kept_rows), wanted)
        answers = self._sampler.sample(self._joined(logits_RV), rows)
        going = []
        for work, answer in zip(built.sampling_works, answers, strict=True):
            guesses[work.sequence] += answer.tokens
            if answer.tokens and len(guesses[work.sequence]) < asking[work.sequence].num_guesses:
                start = work.start + len(work.tokens)
                going.append(Work(work.sequence, start, self._known(answer.tokens), (), samples=True, shard=work.shard))
        return going

    def _row(self, work: Work, said: tuple[int, ...], guesses: tuple[int, ...], states: Mapping[int, SamplingState]) -> Row:
        """The state has seen all tokens but the last of ``said``."""
        state = states[work.sequence]
        return Row(state, state.next_position(work) + len(said) + len(guesses), None, (said[-1], *guesses))

    def _joined(self, logits_RV: Tensor) -> Tensor:
        """Logits as wide as the model's vocabulary: ids that the draft model lacks are never guessed."""
        missing = self._sampler.vocab_size - logits_RV.shape[1]
        return pad(logits_RV, (0, missing), value=-torch.inf) if missing > 0 else logits_RV

    def _known(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """The draft model reads an id that it lacks as its last one."""
        last = self.model.config.vocab_size - 1
        return tokens if max(tokens, default=0) <= last else tuple(min(token, last) for token in tokens)


def open_drafter(model: Qwen2 | None, sampler: Sampler | None, num_blocks: int) -> Drafter | None:
    """A drafter with as many KV blocks as the model has; None without a draft model."""
    if model is None:
        return None
    assert sampler is not None  # it is loaded only on ranks that sample
    return Drafter(model=model, cache=KvCache(model.kv_layout, num_blocks, model.device), sampler=sampler)
