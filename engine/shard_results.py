"""Combines the results of a step's shards, for executors whose ranks answer each for its own shard."""

from collections.abc import Iterable

import numpy as np

from engine.plan import COLUMN, NO_TOKEN, Decodes, SampledTokens, StepResult


def pack_tokens(decodes: Decodes, sampled: Iterable[SampledTokens]) -> tuple[bytes, tuple[SampledTokens, ...]]:
    """`StepResult.tokens`, and those of ``sampled`` that are more than one token of a work in ``decodes``."""
    row_of = {sequence: row for row, sequence in enumerate(decodes.columns[0].tolist())} if len(decodes) else {}
    tokens, rest = np.full(len(decodes), NO_TOKEN, COLUMN), []
    for answer in sampled:
        row = row_of.get(answer.sequence)
        if row is None or len(answer.tokens) != 1 or answer.logprobs or answer.fault is not None or answer.next_draft:
            rest.append(answer)
        else:
            tokens[row] = answer.tokens[0]
    return tokens.tobytes(), tuple(rest)


class ShardResults:
    """Collects the results of shards, in any order, until all shards of a step have answered."""

    def __init__(self, num_shards: int) -> None:
        self._num_shards = num_shards
        self._parts: dict[int, list[StepResult]] = {}

    def put(self, part: StepResult) -> None:
        """Add the result of one shard's sampling rank."""
        self._parts.setdefault(part.step, []).append(part)

    def take(self, step: int) -> StepResult | None:
        """Remove and return the result of a whole step; None until all shards have answered."""
        if len(self._parts.get(step, ())) < self._num_shards:
            return None
        parts = self._parts.pop(step)
        if len(parts) == 1:
            return parts[0]
        return StepResult(
            step=step,
            sampled=tuple(sampled for part in parts for sampled in part.sampled),
            elapsed_s=max(part.elapsed_s for part in parts),
            rebalanced=parts[0].rebalanced,  # the same on every rank
            tokens=_merge([part.tokens for part in parts if part.tokens]),
            prompt_logprobs=tuple(logprobs for part in parts for logprobs in part.prompt_logprobs),
            embeddings=tuple(embedding for part in parts for embedding in part.embeddings),
            drafting_s=max(part.drafting_s for part in parts),
        )


def _merge(columns: list[bytes]) -> bytes:
    """Each row has a token in one shard's column only and `NO_TOKEN`, the smallest value, in the others."""
    if not columns:
        return b""
    merged: np.ndarray = np.maximum.reduce([np.frombuffer(column, COLUMN) for column in columns])
    return merged.tobytes()
