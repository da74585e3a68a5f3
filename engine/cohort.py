"""The sequences of a shard that only decode, stored as columns: planned and recorded together by a few numpy operations for all of them.

Whatever else happens to one of them takes it out (`Cohort.leave`). It is then planned and recorded individually, like every sequence
outside, and joins again with its next token. `engine.scheduler` without this file is its reference: the answers are the same.
"""

from dataclasses import dataclass

import numpy as np

from engine.kv.block_pool import BlockPool
from engine.output import TokenBatch
from engine.plan import NO_BLOCK, NO_TOKEN, Decodes, Work
from engine.request import Request
from engine.sequence import Sequence

NUMBER, LENGTH, BLOCK_CAPACITY, LAST_TOKEN, END, MIN_STOP_LENGTH, NUM_PROMPT, TAG, ACCOUNT, IN_FLIGHT = range(10)
"""The columns: the sequence's number; known tokens; tokens that its blocks have room for; the last known token; the length at which the
answer ends; the length above which a stop id ends it; prompt tokens; `Request.tag`; who is charged for it; unanswered steps."""
EMPTY = 1 << 40
"""`IN_FLIGHT` of an empty row: so large that no step is ever planned for it."""
NO_STOP = -1
FEW_STOP_IDS = 8


@dataclass(frozen=True, eq=False)
class ReadyRows:
    """The members for which one token each can be planned now."""

    rows: np.ndarray
    columns: np.ndarray
    length: np.ndarray
    """Known tokens, plus those that steps in flight will yield."""
    needs_block: np.ndarray
    """Indices into `rows` of those whose next token needs another block."""

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class PlannedRows:
    """The members that take part in a step."""

    rows: np.ndarray
    columns: np.ndarray
    """As `Decodes.columns`."""

    def works(self, indices: list[int]) -> list[Work]:
        """Some of them as `Work` objects."""
        return list(Decodes.of(self.columns[:, indices]).works()) if indices else []


@dataclass(frozen=True, eq=False)
class RecordedRows:
    """What `Cohort.record` did with a step's tokens."""

    rest: list[int]
    """Indices into the planned rows of those it did not record: they must be recorded individually."""
    token_batch: TokenBatch
    filled: list[Sequence]
    """Sequences whose last block has become full."""
    charges: list[tuple[Request, int]]
    """For each tenant and share, one of its requests and the number of tokens sampled for all of them."""


class Cohort:
    """A table with one row per member. Rows never move; rows of sequences that left are reused."""

    def __init__(self, shard: int, block_tokens: int) -> None:
        self._shard, self._block_tokens = shard, block_tokens
        self._row: dict[int, int] = {}
        self._free: list[int] = []
        self._columns = np.zeros((IN_FLIGHT + 1, 0), np.int64)
        self._stop_ids = np.zeros((0, 1), np.int64)
        self._sequences = np.zeros(0, object)
        self._accounts = _Accounts()
        self._ready: dict[bool, ReadyRows] = {}
        """Results of `ready` since the last change."""
        self._num_with_stop_ids = 0

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.number in self._row

    @property
    def num_tokens(self) -> int:
        """Known tokens of all members."""
        return int(self._columns[LENGTH].sum())

    def join(self, sequence: Sequence, *, end: int) -> None:
        """Add a sequence that has exactly one known token left to compute and no step in flight. It ends with ``end`` known tokens."""
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
            self._accounts.enter(sequence.request),
            0,
        )
        self._set_stop_ids(row, sampling.stop_token_ids)
        self._num_with_stop_ids += bool(sampling.stop_token_ids)
        self._sequences[row] = sequence
        self._ready.clear()

    def leave(self, sequence: Sequence) -> None:
        """Remove a sequence that ended or is to be handled individually. Does nothing if it is no member."""
        row = self._row.pop(sequence.number, None)  # type: ignore[arg-type]
        if row is not None:
            self._accounts.leave(int(self._columns[ACCOUNT, row]))
            self._num_with_stop_ids -= bool(sequence.request.sampling.stop_token_ids)
            self._columns[:, row] = 0
            self._columns[NUMBER, row], self._columns[IN_FLIGHT, row] = -1, EMPTY
            self._sequences[row] = None
            self._free.append(row)
            self._ready.clear()

    def members(self) -> list[Sequence]:
        """All members, by number."""
        return [self._sequences[row] for _, row in sorted(self._row.items())]

    def sequences(self, planned: PlannedRows) -> list[Sequence]:
        """The sequences of the planned rows."""
        return self._sequences[planned.rows].tolist()  # type: ignore[no-any-return]

    def ready(self, ahead: bool) -> ReadyRows:
        """The members without a step in flight. With ``ahead`` also those with one step in flight whose answer goes on after it: nothing is
        computed behind the last token of an answer."""
        found = self._ready.get(ahead)
        if found is None:
            columns = self._columns
            length, is_ready = columns[LENGTH] + columns[IN_FLIGHT], columns[IN_FLIGHT] <= ahead
            if ahead:
                is_ready &= length < columns[END]
            rows = is_ready.nonzero()[0]
            taken = columns.take(rows, axis=1)  # takes half the time of indexing
            length = length[rows]
            found = self._ready[ahead] = ReadyRows(rows, taken, length, (length > taken[BLOCK_CAPACITY]).nonzero()[0])
        return found

    def plan(self, pool: BlockPool, ahead: bool) -> PlannedRows:
        """Plan one token of each ready member. The pool must have the blocks for them.

        For a member with a step in flight, the new step computes the token that the step in flight will yield. Only the ranks will know it
        in time.
        """
        ready = self.ready(ahead)
        rows, columns, length, needs_block = ready.rows, ready.columns, ready.length, ready.needs_block
        decodes = np.empty((5, len(rows)), np.int64)
        decodes[0], decodes[1], decodes[3], decodes[4] = columns[NUMBER], length - 1, NO_BLOCK, self._shard
        decodes[2] = np.where(columns[IN_FLIGHT] == 0, columns[LAST_TOKEN], NO_TOKEN)
        sequences: list[Sequence] = self._sequences[rows].tolist()
        if len(needs_block):
            blocks = pool.allocate(len(needs_block))
            decodes[3, needs_block] = blocks
            for index, block in zip(needs_block.tolist(), blocks, strict=True):
                sequences[index].add_sent_block(block)
            self._columns[BLOCK_CAPACITY, rows[needs_block]] += self._block_tokens
        for sequence in sequences:
            sequence.num_planned += 1
        self._columns[IN_FLIGHT, rows] += 1
        self._ready.clear()
        return PlannedRows(rows, decodes)

    def record(self, planned: PlannedRows, tokens: np.ndarray) -> RecordedRows:
        """Append a step's ``tokens`` (S), each a token id or `NO_TOKEN`, to the planned rows.

        Rows whose answer ends, whose sequence has left since, or that have no token are not recorded here; see `RecordedRows.rest`.
        """
        rows, columns = planned.rows, self._columns.take(planned.rows, axis=1)
        length = columns[LENGTH] + 1
        goes_on = (columns[NUMBER] == planned.columns[0]) & (tokens != NO_TOKEN) & (length < columns[END])
        if self._num_with_stop_ids and (stops := self._are_stop_ids(rows, tokens)).any():
            goes_on &= ~stops | (length <= columns[MIN_STOP_LENGTH])
        rest = [] if goes_on.all() else np.flatnonzero(~goes_on).tolist()
        if rest:
            rows, columns, length, tokens = rows[goes_on], columns[:, goes_on], length[goes_on], tokens[goes_on]
        sequences: list[Sequence] = self._sequences[rows].tolist()
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.num_computed += 1
            sequence.tokens.append(token)
        self._columns[LENGTH, rows] = length
        self._columns[LAST_TOKEN, rows] = tokens
        self._columns[IN_FLIGHT, rows] -= 1
        self._ready.clear()
        filled = ((length - 1) % self._block_tokens == 0).nonzero()[0].tolist()
        charges = [(self._accounts.request(number), count) for number, count in enumerate(np.bincount(columns[ACCOUNT]).tolist()) if count]
        return RecordedRows(
            rest=rest,
            token_batch=TokenBatch(columns[TAG], length - 1 - columns[NUM_PROMPT], tokens, sequences),
            filled=[sequences[index] for index in filled],
            charges=charges,
        )

    def _are_stop_ids(self, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """bool (S): which tokens are stop ids of their rows. Where rows have few ids, comparing id by id takes a quarter of the time."""
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
        self._columns[NUMBER, old:], self._columns[IN_FLIGHT, old:] = -1, EMPTY
        self._stop_ids = np.pad(self._stop_ids, ((0, new - old), (0, 0)), constant_values=NO_STOP)
        self._sequences = np.concatenate([self._sequences, np.full(new - old, None, object)])


class _Accounts:
    """A small number for each (tenant, share) among the members, so that their tokens can be counted with `bincount`."""

    def __init__(self) -> None:
        self._number: dict[tuple[str, float], int] = {}
        self._requests: list[Request] = []
        self._num_members: list[int] = []

    def enter(self, request: Request) -> int:
        account = (request.tenant, request.share)
        number = self._number.get(account)
        if number is None:
            number = self._num_members.index(0) if 0 in self._num_members else self._add()
            self._number[account], self._requests[number] = number, request
        self._num_members[number] += 1
        return number

    def leave(self, number: int) -> None:
        self._num_members[number] -= 1
        if not self._num_members[number]:
            request = self._requests[number]
            del self._number[request.tenant, request.share]

    def request(self, number: int) -> Request:
        """One request of the account."""
        return self._requests[number]

    def _add(self) -> int:
        self._num_members.append(0)
        self._requests.append(Request(id="", prompt=()))
        return len(self._num_members) - 1
