"""Step 9 of a request, where a step computes one token of each of its sequences and samples behind each: all of it as columns."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engine.plan import NO_BLOCK, NO_TOKEN, Sampled, StepPlan, Work
from engine.run.block_tables import BlockTables


@dataclass(frozen=True, eq=False)
class DecodeRows:
    """A shard's works in such a step: those told as columns, then those told one by one."""

    columns: np.ndarray
    """int64 (4, S): sequence, start, token, new block or `NO_BLOCK`."""
    places: np.ndarray
    """Where those told as columns stand among all that are in the plan (`StepResult.tokens`)."""
    num_columns: int
    """How many are there, of all shards."""
    singly: tuple[Work, ...]

    def __len__(self) -> int:
        return int(self.columns.shape[1])

    @property
    def starts(self) -> np.ndarray:
        """int64: the place of each token in its sequence."""
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
        """Those whose token is not known here: places among the rows."""
        unknown: np.ndarray = (self.columns[2] == NO_TOKEN).nonzero()[0]
        return unknown

    def fill_unknown(self, said: Mapping[int, int]) -> None:
        """The unknown tokens. A sequence that got none in the step before gets any: nobody will ask for more."""
        unknown = self.unknown
        self.columns[2, unknown] = [said.get(sequence, 0) for sequence in self.columns[0, unknown].tolist()]

    def works(self) -> list[Work]:
        """All of them, one by one."""
        return [self.work(at) for at in range(len(self))]

    def work(self, at: int) -> Work:
        first_single = len(self) - len(self.singly)
        if at >= first_single:
            return self.singly[at - first_single]
        sequence, start, token, block = self.columns[:, at].tolist()
        return Work(sequence, start, (token,), () if block == NO_BLOCK else (block,), samples=True)

    def append_blocks(self, tables: BlockTables) -> np.ndarray:
        """Bring the new blocks. The rows (S) of the sequences' tables."""
        rows_S = tables.rows_of(self.columns[0])
        tables.append_to(rows_S, self.columns[3])
        for work in self.singly:
            tables.append(work)
        return rows_S

    def results(self, tokens_S: np.ndarray) -> tuple[bytes, list[Sampled]]:
        """The answer to all of them, where there is nothing to say but a token: `StepResult.tokens`, and those told one by one."""
        if not self.singly and len(tokens_S) == self.num_columns:
            return tokens_S.tobytes(), []
        columns = np.full(self.num_columns, NO_TOKEN, np.int64)
        columns[self.places] = tokens_S[: len(self.places)]
        singles = tokens_S[len(self.places) :].tolist()
        return columns.tobytes(), [Sampled(work.sequence, (token,)) for work, token in zip(self.singly, singles, strict=True)]


def decode_rows(plan: StepPlan, shard: int) -> DecodeRows | None:
    """A shard's part of a plan; None where it has none, or some of it is more than one token behind which one is sampled."""
    columns = plan.decodes.columns
    if not plan.singly and columns.size and (columns[4] == shard).all():
        return DecodeRows(columns[:4].copy(), np.arange(columns.shape[1]), columns.shape[1], ())
    singly = tuple(work for work in plan.singly if work.shard == shard)
    if not all(map(_only_decodes, singly)):
        return None
    places = np.flatnonzero(columns[4] == shard)
    told = columns[:4, places]
    single = np.array([(work.sequence, work.start, work.tokens[0], NO_BLOCK) for work in singly], np.int64).reshape(-1, 4).T
    rows = np.concatenate([told, single], axis=1)
    return DecodeRows(rows, places, columns.shape[1], singly) if rows.shape[1] else None


def _only_decodes(work: Work) -> bool:
    return len(work.tokens) == 1 and work.samples and not (work.num_draft or work.targets or work.pools or work.num_guesses)
