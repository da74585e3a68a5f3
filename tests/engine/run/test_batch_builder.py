"""The batch of a step against a reference that goes token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.plan import Work
from engine.run.batch_builder import build_batch
from engine.run.block_tables import BlockTables

CPU = torch.device("cpu")
BLOCK_TOKENS = 4


@st.composite
def sequences(draw):
    """(start, number of tokens, samples) of each work, with enough blocks, none of them shared."""
    shares = draw(st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 1, 2, 5, 23]), st.booleans()), min_size=1, max_size=40))
    blocks = draw(st.permutations(range(1, 17 * len(shares))))
    return shares, blocks


@settings(max_examples=50, deadline=None)
@given(given_sequences=sequences())
def test_the_batch_is_what_walking_token_by_token_gives(given_sequences):
    shares, blocks = given_sequences
    tables, works, table_of = BlockTables(), [], {}
    for number, (start, count, samples) in enumerate(shares):
        num_blocks = -(-(start + count) // BLOCK_TOKENS)
        table_of[number] = [blocks.pop() for _ in range(num_blocks)]
        cached = start // BLOCK_TOKENS
        tables.open(number)
        tables.append(Work(number, 0, (), tuple(table_of[number][:cached]), False))
        tokens = tuple(1000 * number + start + i for i in range(count))
        works.append(Work(number, start, tokens, tuple(table_of[number][cached:]), samples))
        tables.append(works[-1])
    built = build_batch(works, tables, BLOCK_TOKENS, CPU)
    batch = built.forward

    in_order = [w for w in works if len(w.tokens) == 1] + [w for w in works if len(w.tokens) > 1]
    tokens, positions, slots, logit_rows, sampling = [], [], [], [], []
    for work in in_order:
        for offset, token in enumerate(work.tokens):
            position = work.start + offset
            tokens.append(token)
            positions.append(position)
            slots.append(table_of[work.sequence][position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS)
        if work.samples:
            logit_rows.append(len(tokens) - 1)
            sampling.append(work)
    assert batch.tokens_T.tolist() == tokens
    assert batch.positions_T.tolist() == positions
    assert batch.slots_T.tolist() == slots
    assert batch.logit_rows_R.tolist() == logit_rows
    assert built.sampling_works == tuple(sampling)
    assert batch.num_decodes == sum(len(w.tokens) == 1 for w in works)
    assert batch.context_lengths == tuple(w.start + len(w.tokens) for w in in_order)
    assert batch.query_starts == (0, *(sum(len(w.tokens) for w in in_order[: i + 1]) for i in range(len(in_order))))
    longest = max(map(len, table_of.values()))
    assert batch.block_tables_SM.tolist() == [table_of[w.sequence] + [0] * (longest - len(table_of[w.sequence])) for w in in_order]
    dtypes = {batch.tokens_T.dtype, batch.positions_T.dtype, batch.slots_T.dtype, batch.logit_rows_R.dtype}
    assert dtypes == {torch.int64}
    assert batch.block_tables_SM.dtype == torch.int32


def test_a_row_taken_over_shows_nothing_of_its_last_owner():
    tables = BlockTables()
    tables.open(1)
    tables.append(Work(1, 0, (), (7, 8, 9), False))
    tables.close(1)
    tables.close(1)
    tables.close(99)
    for number, blocks in ((2, (3,)), (3, (4, 5))):
        tables.open(number)
        tables.append(Work(number, 0, (), blocks, False))
    table, lengths = tables.of(tables.rows([2, 3]))
    assert table.tolist() == [[3, 0], [4, 5]]
    assert lengths.tolist() == [1, 2]


def test_a_sequence_cannot_be_opened_twice():
    tables = BlockTables()
    tables.open(1)
    with pytest.raises(ValueError, match="open already"):
        tables.open(1)


def test_a_work_beyond_its_blocks_is_refused_before_it_writes_to_another_sequences():
    tables = BlockTables()
    tables.open(5)
    work = Work(5, 0, (1, 2, 3, 4, 5), (1,), True)
    tables.append(work)
    with pytest.raises(ValueError, match="sequence 5 computes up to token 5 and its blocks hold 4"):
        build_batch([work], tables, BLOCK_TOKENS, CPU)
