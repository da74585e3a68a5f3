"""Replayed sampling against the sampler, and the columns that it reads."""

import random

import numpy as np
import pytest
import torch

from engine.plan import NO_BLOCK, Decodes, StepPlan, Work
from engine.request import SamplingParams
from engine.run.block_tables import BlockTables
from engine.run.decode_rows import decode_rows
from engine.run.sampling.columns import EDITED, FEW, FILTERED, GREEDY, KIND, LEARNS, NEEDS, TELLS, UNFILTERED, SamplingColumns, are_edited
from engine.run.sampling.sampler import Sampler
from engine.run.sampling.sampler_graphs import SamplerGraphs
from tests.engine.run.sampling_twin import row
from tests.engine.run.test_sampler import FILTERS, make_logits
from tests.fakes.graphs import RecordedGraphs

VOCAB_SIZE = 2000
CPU = torch.device("cpu")


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "chosen",
    [[SamplingParams(temperature=0.0)], [p for p in FILTERS if 0 < p.top_k <= 64], FILTERS],
    ids=["greedy", "few candidates", "all kinds"],
)
def test_a_replay_draws_what_the_sampler_draws(chosen: list[SamplingParams], ties: bool) -> None:
    logits_BV, sampler = torch.zeros(16, VOCAB_SIZE), Sampler(vocab_size=VOCAB_SIZE, device=CPU)
    graphs = SamplerGraphs(logits_BV, (4, 16), RecordedGraphs())
    graphs.capture()
    draw = random.Random(1)
    for count in (1, 3, 4, 11, 16):
        rows = [
            row(draw.choice(chosen), vocab_size=VOCAB_SIZE, position=draw.randrange(99), choice=draw.randrange(3)) for _ in range(count)
        ]
        logits_BV[:count] = make_logits(count, VOCAB_SIZE, seed=count, ties=ties)
        columns = SamplingColumns()
        for at, one in enumerate(rows):
            columns.put(at, one.state)
        known = np.array([one.position for one in rows])
        report = graphs.launch(columns.of(np.arange(count)), known, 4 if count <= 4 else 16).read()
        found = sampler.answers(logits_BV[:count], logits_BV[:count], rows, [*report.tolist(), report[2].tolist()])
        assert found == sampler.sample(logits_BV[:count].clone(), rows)
        assert report[2].all()


def test_a_row_without_sound_logits_is_told() -> None:
    logits_BV = make_logits(2, VOCAB_SIZE, seed=1)
    graphs = SamplerGraphs(logits_BV, (2,), RecordedGraphs())
    graphs.capture()
    logits_BV[1, 7] = torch.nan
    columns = SamplingColumns()
    for at, params in enumerate((FILTERS[0], FILTERS[5])):
        columns.put(at, row(params, vocab_size=VOCAB_SIZE).state)
    assert graphs.launch(columns.of(np.arange(2)), np.array([1, 1]), 2).read()[2].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("params", "kind", "needs"),
    [
        (SamplingParams(temperature=0.0), GREEDY, 0),
        (SamplingParams(top_k=64), FEW, 0),
        (SamplingParams(top_k=65, top_p=0.5), FILTERED, 0),
        (SamplingParams(top_p=0.5), FILTERED, 0),
        (SamplingParams(min_p=0.5), FILTERED, 0),
        (SamplingParams(logprobs=0), UNFILTERED, TELLS),
        (SamplingParams(repetition_penalty=1.1), UNFILTERED, EDITED | LEARNS),
        (SamplingParams(logit_bias=((3, 1.0),)), UNFILTERED, EDITED),
        (SamplingParams(grammar='start: "a"', temperature=0.0), GREEDY, EDITED | LEARNS),
    ],
    ids=repr,
)
def test_what_a_row_is_and_needs(params: SamplingParams, kind: int, needs: int) -> None:
    columns = SamplingColumns()
    columns.put(40, row(params, vocab_size=VOCAB_SIZE).state)
    found = columns.of(np.array([40]))
    assert (found[KIND].item(), found[NEEDS].item()) == (kind, needs)
    assert are_edited(found, np.array([1])) == bool(needs & EDITED)


def test_stop_ids_are_forbidden_until_so_many_tokens_are_there() -> None:
    columns = SamplingColumns()
    state = row(SamplingParams(min_tokens=3, stop_token_ids=(5,)), vocab_size=VOCAB_SIZE, prompt=(1, 2)).state
    columns.put(0, state)
    known = [2, 3, 4, 5, 6]  # the first output token stands behind two
    assert [are_edited(columns.of(np.array([0])), np.array([count])) for count in known] == [True, True, True, False, False]


def test_a_plan_that_only_decodes_is_known_by_its_columns() -> None:
    told = Decodes.of(np.array([(7, 20, 3, NO_BLOCK, 0), (8, 31, 4, 12, 1), (9, 16, 5, 13, 0)]).T)
    single = Work(4, 8, (6,), (2, 5), samples=True, shard=0)
    plan = StepPlan(1, (single, Work(5, 0, (1, 2, 3), (8,), samples=False, shard=1)), decodes=told)
    rows = decode_rows(plan, 0)
    assert rows is not None
    assert rows.works() == [Work(7, 20, (3,), (), True), Work(9, 16, (5,), (13,), True), single]
    tables = BlockTables()
    for number, blocks in ((7, (1, 2)), (9, (3,)), (4, ())):
        tables.open(number)
        tables.append(Work(number, 0, (), blocks, False))
    found, held = tables.of(rows.enter(tables))
    assert found.tolist() == [[1, 2], [3, 13], [2, 5]]
    assert held.tolist() == [2, 2, 2]
    columns, singles = rows.told(np.array([100, 101, 102]))
    assert np.frombuffer(columns, np.int64).tolist() == [100, -1, 101]
    assert [(one.sequence, one.tokens) for one in singles] == [(4, (102,))]
    assert decode_rows(plan, 1) is None, "three tokens of a prompt"
    assert decode_rows(plan, 2) is None, "nothing to do"


@pytest.mark.parametrize(
    "change",
    [{"tokens": (1, 2)}, {"samples": False}, {"tokens": (1, 2), "num_draft": 1}, {"targets": (4,)}, {"pools": True}, {"num_guesses": 2}],
    ids=repr,
)
def test_a_step_with_anything_else_is_launched(change: dict[str, object]) -> None:
    plain = Work(1, 5, (9,), (), samples=True)
    assert decode_rows(StepPlan(0, (plain,)), 0) is not None
    assert decode_rows(StepPlan(0, (plain, plain._replace(sequence=2, **change))), 0) is None
