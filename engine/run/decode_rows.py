"""A shard's works as columns of numbers, in a step that computes and samples one token per sequence. Place 9 of a request."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engine.plan import NO_BLOCK, NO_TOKEN, SampledTokens, StepPlan, Work
from engine.run.block_tables import BlockTables


@dataclass(frozen=True, eq=False)
class DecodeRows:
    """The works that the plan has as columns, then those that it has one by one."""

    columns: np.ndarray
    """int64 (4, S): sequence, start, token, new block or `NO_BLOCK`."""
    column_indices: np.ndarray
    """The indices of the former among all columns of the plan (`StepResult.tokens`)."""
    num_columns: int
    """How many columns the plan has, for all shards."""
    other_works: tuple[Work, ...]

    def __len__(self) -> int:
        return int(self.columns.shape[1])

    @property
    def starts(self) -> np.ndarray:
        """int64: the position of each token in its sequence."""
        starts: np.ndarray = self.columns[1]
        return starts

    @property
    def tokens(self) -> np.ndarray:
        """int64"""
        tokens: np.ndarray = self.columns[2]
        return tokens

    @property
    def sequences(self) -> list[int]:
        return self.columns[0].tolist()  # type: ignore[no-any-return]

    @property
    def unknown(self) -> np.ndarray:
        """The rows whose token is not known here."""
        unknown: np.ndarray = (self.columns[2] == NO_TOKEN).nonzero()[0]
        return unknown

    def fill_unknown(self, last_tokens: Mapping[int, int]) -> None:
        """Fill in the unknown tokens.

        A sequence that got none in the previous step gets an arbitrary one: nobody will read what follows.
        """
        unknown = self.unknown
        self.columns[2, unknown] = [last_tokens.get(sequence, 0) for sequence in self.columns[0, unknown].tolist()]

    def works(self) -> list[Work]:
        """All rows as works."""
        return [self.work(at) for at in range(len(self))]

    def work(self, at: int) -> Work:
        first_single = len(self) - len(self.other_works)
        if at >= first_single:
            return self.other_works[at - first_single]
        sequence, start, token, block = self.columns[:, at].tolist()
        return Work(sequence, start, (token,), () if block == NO_BLOCK else (block,), samples=True)

    def append_blocks(self, tables: BlockTables) -> np.ndarray:
        """Append the new blocks to the block tables. Returns the sequences' rows (S) there."""
        rows_S = tables.rows_of(self.columns[0])
        tables.append_to(rows_S, self.columns[3])
        for work in self.other_works:
            tables.append(work)
        return rows_S

    def results(self, tokens_S: np.ndarray) -> tuple[bytes, list[SampledTokens]]:
        """The results if there are only tokens to report: `StepResult.tokens`, and those of the works that were planned one by one."""
        if not self.other_works and len(tokens_S) == self.num_columns:
            return tokens_S.tobytes(), []
        columns = np.full(self.num_columns, NO_TOKEN, np.int64)
        columns[self.column_indices] = tokens_S[: len(self.column_indices)]
        singles = tokens_S[len(self.column_indices) :].tolist()
        return columns.tobytes(), [SampledTokens(work.sequence, (token,)) for work, token in zip(self.other_works, singles, strict=True)]


def decode_rows(plan: StepPlan, shard: int) -> DecodeRows | None:
    """A shard's part of a plan. None if it is empty, or if any work is more than one token that samples."""
    columns = plan.decodes.columns
    if not plan.other_works and columns.size and (columns[4] == shard).all():
        return DecodeRows(columns[:4].copy(), np.arange(columns.shape[1]), columns.shape[1], ())
    other_works = tuple(work for work in plan.other_works if work.shard == shard)
    if not all(map(_only_decodes, other_works)):
        return None
    column_indices = np.flatnonzero(columns[4] == shard)
    planned = columns[:4, column_indices]
    single = np.array([(work.sequence, work.start, work.tokens[0], NO_BLOCK) for work in other_works], np.int64).reshape(-1, 4).T
    rows = np.concatenate([planned, single], axis=1)
    return DecodeRows(rows, column_indices, columns.shape[1], other_works) if rows.shape[1] else None


def _only_decodes(work: Work) -> bool:
    return len(work.tokens) == 1 and work.samples and not (work.num_draft or work.targets or work.pools or work.num_next_draft)
