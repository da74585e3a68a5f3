"""The sequences of a shard that only go on decoding, as columns: planned and recorded together, some operations for all of them.

Whatever happens to one of them takes it out (`leave`): it is then planned and recorded alone, as every sequence is that is not in
here, and comes back with its next token. The slow twin of this file is `engine.scheduler` without it: an answer is the same.
"""

from dataclasses import dataclass

import numpy as np

from engine.kv.block_pool import BlockPool
from engine.output import TokenBatch
from engine.plan import NO_BLOCK, NO_TOKEN, Decodes, Work
from engine.request import Request
from engine.sequence import Sequence

NUMBER, LENGTH, HELD, TOKEN, END, STOPS_FROM, FIRST, TAG, PAYER, UNDER_WAY = range(10)
"""Columns: the ranks' number; known tokens; tokens that its blocks hold; the last known token; the length at which the answer is over;
the length from which a stop id ends it; tokens of the prompt; `Request.tag`; who is charged; steps that were not answered yet."""
NOBODY = 1 << 40
"""Steps under way where a row is nobody's: too many to plan another."""
NO_STOP = -1
FEW_STOP_IDS = 8


@dataclass(frozen=True, eq=False)
class Due:
    """Members of which one token each can be planned, as they are now."""

    rows: np.ndarray
    columns: np.ndarray
    length: np.ndarray
    """Known tokens, and those that steps under way give."""
    short: np.ndarray
    """Those, by their places among the rows, that need a block."""

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class Planned:
    """Rows of a step."""

    rows: np.ndarray
    columns: np.ndarray
    """As `Decodes.columns`."""

    def works(self, places: list[int]) -> list[Work]:
        """Some of them, one by one."""
        return list(Decodes.of(self.columns[:, places]).works()) if places else []


@dataclass(frozen=True, eq=False)
class Recorded:
    """What came of a step."""

    rest: list[int]
    """Works, by their places among the planned, that are to be recorded one by one."""
    token_batch: TokenBatch
    full: list[Sequence]
    """Sequences whose last block has become full."""
    charges: list[tuple[Request, int]]
    """Tokens sampled for each who pays, with a request of theirs."""


class Cohort:
    """Rows stay where they are; those that were left are taken again."""

    def __init__(self, shard: int, block_tokens: int) -> None:
        self._shard, self._block_tokens = shard, block_tokens
        self._row: dict[int, int] = {}
        self._free: list[int] = []
        self._columns = np.zeros((UNDER_WAY + 1, 0), np.int64)
        self._stop_ids = np.zeros((0, 1), np.int64)
        self._sequences = np.zeros(0, object)
        self._payers = _Payers()
        self._due: dict[bool, Due] = {}
        """What was asked for since anything changed."""
        self._num_that_stop = 0
        """Members with stop ids."""

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.number in self._row

    @property
    def num_tokens(self) -> int:
        """Known tokens of all members."""
        return int(self._columns[LENGTH].sum())

    def join(self, sequence: Sequence, *, end: int) -> None:
        """It has one known token that is not computed, no step under way, and is over with ``end`` known tokens."""
        assert sequence.number is not None
        assert not sequence.in_flight
        if not self._free:
            self._grow()
        row = self._free.pop()
        self._row[sequence.number] = row
        sampling, length = sequence.request.sampling, len(sequence.tokens)
        self._columns[:, row] = (
            sequence.number,
            length,
            len(sequence.blocks) * self._block_tokens,
            sequence.tokens[-1],
            end,
            sequence.num_prompt + sampling.min_tokens,
            sequence.num_prompt,
            sequence.request.tag,
            self._payers.enter(sequence.request),
            0,
        )
        self._set_stop_ids(row, sampling.stop_token_ids)
        self._num_that_stop += bool(sampling.stop_token_ids)
        self._sequences[row] = sequence
        self._due.clear()

    def leave(self, sequence: Sequence) -> None:
        """It is to be planned and recorded by itself, or is no more. One that is not in here is left alone."""
        row = self._row.pop(sequence.number, None)  # type: ignore[arg-type]
        if row is not None:
            self._payers.leave(int(self._columns[PAYER, row]))
            self._num_that_stop -= bool(sequence.request.sampling.stop_token_ids)
            self._columns[:, row] = 0
            self._columns[NUMBER, row], self._columns[UNDER_WAY, row] = -1, NOBODY
            self._sequences[row] = None
            self._free.append(row)
            self._due.clear()

    def members(self) -> list[Sequence]:
        """All of them, by their numbers."""
        return [self._sequences[row] for _, row in sorted(self._row.items())]

    def sequences(self, planned: Planned) -> list[Sequence]:
        """Whose rows are planned."""
        return self._sequences[planned.rows].tolist()  # type: ignore[no-any-return]

    def due(self, ahead: bool) -> Due:
        """Each member that has no step under way; with ``ahead`` also each that has one, where its answer goes on behind it: nothing is
        computed behind an answer's last token."""
        found = self._due.get(ahead)
        if found is None:
            columns = self._columns
            length, due = columns[LENGTH] + columns[UNDER_WAY], columns[UNDER_WAY] <= ahead
            if ahead:
                due &= length < columns[END]
            rows = due.nonzero()[0]
            taken = columns.take(rows, axis=1)  # half the time of an index
            length = length[rows]
            found = self._due[ahead] = Due(rows, taken, length, (length > taken[HELD]).nonzero()[0])
        return found

    def plan(self, pool: BlockPool, ahead: bool) -> Planned:
        """One token of each member that is due. The pool has the blocks for them.

        Of each that has a step under way, the step computes the token which that one is going to give, and which only the ranks will know.
        """
        due = self.due(ahead)
        rows, columns, length, short = due.rows, due.columns, due.length, due.short
        decodes = np.empty((5, len(rows)), np.int64)
        decodes[0], decodes[1], decodes[3], decodes[4] = columns[NUMBER], length - 1, NO_BLOCK, self._shard
        decodes[2] = np.where(columns[UNDER_WAY] == 0, columns[TOKEN], NO_TOKEN)
        sequences: list[Sequence] = self._sequences[rows].tolist()
        if len(short):
            blocks = pool.allocate(len(short))
            decodes[3, short] = blocks
            for place, block in zip(short.tolist(), blocks, strict=True):
                sequences[place].add_sent_block(block)
            self._columns[HELD, rows[short]] += self._block_tokens
        for sequence in sequences:
            sequence.num_planned += 1
        self._columns[UNDER_WAY, rows] += 1
        self._due.clear()
        return Planned(rows, decodes)

    def record(self, planned: Planned, tokens: np.ndarray) -> Recorded:
        """``tokens`` (S), or `NO_TOKEN`, came of the planned works. What ends an answer, or has left since, is not recorded here."""
        rows, columns = planned.rows, self._columns.take(planned.rows, axis=1)
        length = columns[LENGTH] + 1
        plain = (columns[NUMBER] == planned.columns[0]) & (tokens != NO_TOKEN) & (length < columns[END])
        if self._num_that_stop and (stops := self._are_stop_ids(rows, tokens)).any():
            plain &= ~stops | (length <= columns[STOPS_FROM])
        rest = [] if plain.all() else np.flatnonzero(~plain).tolist()
        if rest:
            rows, columns, length, tokens = rows[plain], columns[:, plain], length[plain], tokens[plain]
        sequences: list[Sequence] = self._sequences[rows].tolist()
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.num_computed += 1
            sequence.tokens.append(token)
        self._columns[LENGTH, rows] = length
        self._columns[TOKEN, rows] = tokens
        self._columns[UNDER_WAY, rows] -= 1
        self._due.clear()
        full = ((length - 1) % self._block_tokens == 0).nonzero()[0].tolist()
        return Recorded(
            rest=rest,
            token_batch=TokenBatch(columns[TAG], length - 1 - columns[FIRST], tokens, sequences),
            full=[sequences[place] for place in full],
            charges=[(self._payers.request(payer), count) for payer, count in enumerate(np.bincount(columns[PAYER]).tolist()) if count],
        )

    def _are_stop_ids(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """bool (S): which of the tokens are stop ids of their rows. Id by id where rows have few, which takes a quarter of the time."""
        if self._stop_ids.shape[1] > FEW_STOP_IDS:
            return (self._stop_ids.take(rows, axis=0) == tokens[:, None]).any(1)  # type: ignore[no-any-return]
        found = np.zeros(len(rows), bool)
        for ids in self._stop_ids.T:
            found |= ids.take(rows) == tokens
        return found

    def _set_stop_ids(self, row: int, ids: tuple[int, ...]) -> None:
        if len(ids) > self._stop_ids.shape[1]:
            wider = np.full((len(self._stop_ids), len(ids)), NO_STOP, np.int64)
            wider[:, : self._stop_ids.shape[1]] = self._stop_ids
            self._stop_ids = wider
        self._stop_ids[row] = NO_STOP
        self._stop_ids[row, : len(ids)] = ids

    def _grow(self) -> None:
        old = self._columns.shape[1]
        new = max(16, 2 * old)
        self._free = list(range(new - 1, old - 1, -1))
        self._columns = np.pad(self._columns, ((0, 0), (0, new - old)))
        self._columns[NUMBER, old:], self._columns[UNDER_WAY, old:] = -1, NOBODY
        self._stop_ids = np.pad(self._stop_ids, ((0, new - old), (0, 0)), constant_values=NO_STOP)
        self._sequences = np.concatenate([self._sequences, np.full(new - old, None, object)])


class _Payers:
    """A small number for each tenant and share among the members."""

    def __init__(self) -> None:
        self._number: dict[tuple[str, float], int] = {}
        self._requests: list[Request] = []
        self._counts: list[int] = []

    def enter(self, request: Request) -> int:
        payer = (request.tenant, request.share)
        number = self._number.get(payer)
        if number is None:
            number = self._counts.index(0) if 0 in self._counts else self._add()
            self._number[payer], self._requests[number] = number, request
        self._counts[number] += 1
        return number

    def leave(self, number: int) -> None:
        self._counts[number] -= 1
        if not self._counts[number]:
            request = self._requests[number]
            del self._number[request.tenant, request.share]

    def request(self, number: int) -> Request:
        """One of theirs."""
        return self._requests[number]

    def _add(self) -> int:
        self._counts.append(0)
        self._requests.append(Request(id="", prompt=()))
        return len(self._counts) - 1
