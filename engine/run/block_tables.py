"""The block tables of all open sequences of a rank, in one matrix from which a step takes its rows in one operation."""

import numpy as np

from engine.plan import NO_BLOCK, Work


class BlockTables:
    """Each open sequence has a row. The matrix grows when needed and never shrinks."""

    def __init__(self) -> None:
        self._blocks = np.zeros((16, 16), np.int32)
        self._lengths = np.zeros(16, np.int64)
        self._row: dict[int, int] = {}
        self._free = list(range(16))
        self._cached_for: tuple[np.ndarray, np.ndarray] | None = None
        """The last argument of `rows_of` and its result. Most steps ask for the same sequences again."""

    def __repr__(self) -> str:
        return f"<BlockTables [{len(self._row)} open | {len(self._free)} rows free]>"

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._row

    def open(self, sequence: int) -> int:
        """Assign an empty table to a new sequence. Returns its row, which belongs to it until it is closed."""
        if sequence in self._row:
            raise ValueError(f"sequence {sequence} is open already")
        if not self._free:
            self._add_rows()
        row = self._free.pop()
        self._row[sequence] = row
        self._lengths[row] = 0
        return row

    def close(self, sequence: int) -> None:
        """Forget a sequence. Ignored if it is not open."""
        row = self._row.pop(sequence, None)
        if row is not None:
            self._free.append(row)
            self._cached_for = None

    def append(self, work: Work) -> None:
        """Append the work's new blocks."""
        if not work.new_blocks:
            return
        row = self._row[work.sequence]
        start = int(self._lengths[row])
        stop = start + len(work.new_blocks)
        if stop > self._blocks.shape[1]:
            self._add_columns(stop)
        self._blocks[row, start:stop] = work.new_blocks
        self._lengths[row] = stop

    def append_to(self, rows_S: np.ndarray, new_blocks_S: np.ndarray) -> None:
        """Append one new block to each of these rows, or none where it is `NO_BLOCK`."""
        longer = (new_blocks_S != NO_BLOCK).nonzero()[0]
        if not len(longer):
            return
        rows = rows_S[longer]
        ends = self._lengths[rows]
        if int(ends.max()) >= self._blocks.shape[1]:
            self._add_columns(int(ends.max()) + 1)
        self._blocks[rows, ends] = new_blocks_S[longer]
        self._lengths[rows] = ends + 1

    def rows(self, sequences: list[int]) -> np.ndarray:
        """The rows of open sequences (S), int64."""
        return np.fromiter((self._row[sequence] for sequence in sequences), np.int64, len(sequences))

    def rows_of(self, sequences_S: np.ndarray) -> np.ndarray:
        """Like `rows`, for an array, which must not be changed afterwards. Returns the same array for the same sequences."""
        if self._cached_for is None or not np.array_equal(self._cached_for[0], sequences_S):
            self._cached_for = sequences_S, self.rows(sequences_S.tolist())
        return self._cached_for[1]

    def at(self, rows_S: np.ndarray, positions_S: np.ndarray, block_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """The block (S) that holds each row's position, arbitrary where the row has none for it, and for how many tokens each row has
        blocks (S)."""
        columns_S = np.minimum(positions_S // block_tokens, self._blocks.shape[1] - 1)
        return self._blocks[rows_S, columns_S], self._lengths[rows_S] * block_tokens

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The blocks of these rows (S, M), int32, padded with 0, and the number of blocks of each (S)."""
        lengths = self._lengths[rows]
        most = int(lengths.max(initial=0))
        table = self._blocks[rows, :most]
        table[np.arange(most) >= lengths[:, None]] = 0  # a row keeps the blocks of its previous owner
        return table, lengths

    def _add_rows(self) -> None:
        num_rows = len(self._lengths)
        self._free = list(range(num_rows, 2 * num_rows))
        self._blocks = np.concatenate([self._blocks, np.zeros_like(self._blocks)])
        self._lengths = np.concatenate([self._lengths, np.zeros_like(self._lengths)])

    def _add_columns(self, wanted: int) -> None:
        num_rows, num_columns = self._blocks.shape
        wider = np.zeros((num_rows, max(wanted, 2 * num_columns)), np.int32)
        wider[:, :num_columns] = self._blocks
        self._blocks = wider
