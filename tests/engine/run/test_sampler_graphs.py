"""Replayed sampling against the eager sampler, and the columns that it reads."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.plan import NO_BLOCK, Decodes, NewSequence, StepPlan, Work
from engine.request import SamplingParams
from engine.run.block_tables import BlockTables
from engine.run.decode_rows import decode_rows
from engine.run.sampling.columns import (
    DRAW_MODE,
    EDITS,
    ENTRY,
    FEW,
    FILTERED,
    GRAMMAR,
    GREEDY,
    LOGPROBS,
    NEEDS,
    TRACKS_TOKENS,
    UNFILTERED,
    SamplingColumns,
    are_edited,
    are_edited_by_host,
)
from engine.run.sampling.edit_table import NO_ENTRY, EditTable
from engine.run.sampling.sampler import Sampler
from engine.run.sampling.sampler_graphs import SamplerGraphs, as_decided
from engine.run.sampling.state import Row, SamplingState
from tests.engine.run.sampling_reference import row
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
    logits_PV, sampler = torch.zeros(16, VOCAB_SIZE), Sampler(vocab_size=VOCAB_SIZE, device=CPU)
    graphs = SamplerGraphs(logits_PV, (4, 16), RecordedGraphs())
    graphs.capture()
    draw = random.Random(1)
    for count in (1, 3, 4, 11, 16):
        rows = [
            row(draw.choice(chosen), vocab_size=VOCAB_SIZE, position=draw.randrange(99), choice=draw.randrange(3)) for _ in range(count)
        ]
        logits_PV[:count] = make_logits(count, VOCAB_SIZE, seed=count, ties=ties)
        columns = SamplingColumns()
        for at, one in enumerate(rows):
            columns.put(at, one.state)
        known = np.array([one.position for one in rows])
        report = graphs.launch(columns.of(np.arange(count)), known, 4 if count <= 4 else 16).read()
        found = sampler.results(logits_PV[:count], logits_PV[:count], rows, as_decided(report))
        assert found == sampler.sample(logits_PV[:count].clone(), rows)
        assert report[2].all()


def test_a_row_that_few_candidates_do_not_decide_is_drawn_from_all_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.run.sampling.sampler_graphs.MAX_CANDIDATES", 5)
    monkeypatch.setattr("engine.run.sampling.sampler_graphs.MORE_CANDIDATES", 0)
    logits_PV, sampler = make_logits(8, VOCAB_SIZE, seed=3, ties=True), Sampler(vocab_size=VOCAB_SIZE, device=CPU)
    for params in ([SamplingParams(top_k=64), SamplingParams(top_k=3)], FILTERS):
        graphs, columns = SamplerGraphs(logits_PV, (8,), RecordedGraphs()), SamplingColumns()
        graphs.capture()
        rows = [row(params[at % len(params)], vocab_size=VOCAB_SIZE, position=at) for at in range(8)]
        for at, one in enumerate(rows):
            columns.put(at, one.state)
        report = graphs.launch(columns.of(np.arange(8)), np.arange(8), 8).read()
        assert sampler.results(logits_PV, logits_PV, rows, as_decided(report)) == sampler.sample(logits_PV.clone(), rows)


RULES = [
    SamplingParams(repetition_penalty=1.3, top_k=20, temperature=0.7, top_p=0.8),
    SamplingParams(repetition_penalty=0.8, presence_penalty=0.7, frequency_penalty=-0.4, temperature=0.0),
    SamplingParams(frequency_penalty=2.0, logit_bias=((3, 2.5), (7, -100.0), (1990, 5.0)), seed=4),
    SamplingParams(logit_bias=((8, 3.0),), temperature=0.0),
    SamplingParams(presence_penalty=1.5, stop_token_ids=(0, 5, 5), min_tokens=3, top_p=0.9),
    SamplingParams(stop_token_ids=tuple(range(40)), min_tokens=2, temperature=0.0),
    SamplingParams(temperature=0.0),
    SamplingParams(top_k=30),
]


def test_tokens_are_counted_and_logits_edited_on_the_device_as_on_the_host() -> None:
    """Steps of changing sequences: some end and others take their entries, some steps are computed twice, some rows have masks."""
    draw, generator = random.Random(5), np.random.default_rng(5)
    logits_PV, numbers = torch.zeros(8, VOCAB_SIZE), torch.zeros(2, 8, dtype=torch.int64)
    table, sampler = EditTable(num_entries=6, vocab_size=VOCAB_SIZE, device=CPU), Sampler(vocab_size=VOCAB_SIZE, device=CPU)
    graphs = SamplerGraphs(logits_PV, (8,), RecordedGraphs(), table=table, tokens_P=numbers[0], positions_P=numbers[1])
    graphs.capture()
    running: list[tuple[SamplingState, SamplingState, list[int]]] = []
    num_edited = num_entered = 0
    for step in range(40):
        if len(running) == 5 or (running and draw.random() < 0.15):
            table.close(running.pop(draw.randrange(len(running)))[0])
        prompt = [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 9))]
        output = [draw.randrange(12) for _ in range(draw.choice([0, 0, 4]))]  # of a sequence that was preempted
        params = replace(draw.choice(RULES), seed=step)
        opening = NewSequence(step, 0, len(prompt), params, tuple(prompt + output) if params.needs_history else ())
        ours, theirs = (SamplingState(opening, vocab_size=VOCAB_SIZE) for _ in range(2))
        table.open(ours)
        running.append((ours, theirs, prompt + output))
        logits_PV[:] = make_logits(8, VOCAB_SIZE, seed=step, ties=step % 2 > 0)
        words = {
            at: generator.integers(-(2**31), 2**31, -(-VOCAB_SIZE // 32), np.int32) for at in range(len(running)) if draw.random() < 0.2
        }
        columns, rows = SamplingColumns(), []
        for at, (state, twin, tokens) in enumerate(running):
            columns.put(at, state)
            twin.add_tokens(Work(0, len(tokens) - 1, (tokens[-1],), (), True))
            numbers[0, at], numbers[1, at] = tokens[-1], len(tokens) - 1
            rows.append(Row(twin, len(tokens) - state.num_prompt, words.get(at)))
        of_step = columns.of(np.arange(len(running)))
        of_step[NEEDS, list(words)] |= GRAMMAR
        known = np.array([len(tokens) for *_, tokens in running])
        for _ in range(draw.choice([1, 2])):
            report = graphs.launch(of_step, known, 8, words).read()
        found = sampler.results(logits_PV, logits_PV, rows, as_decided(report))
        assert found == sampler.sample(logits_PV[: len(running)].clone(), rows)
        assert not are_edited_by_host(of_step, known)
        num_edited += are_edited(of_step, known)
        num_entered += int((of_step[ENTRY] != NO_ENTRY).sum())
        for (*_, tokens), answer in zip(running, found, strict=True):
            tokens.extend(answer.tokens if draw.random() < 0.7 else ())  # otherwise it is sampled again
    assert num_edited > 30
    assert num_entered > 60


def test_sequences_without_an_entry_are_edited_by_the_host() -> None:
    table = EditTable(num_entries=1, vocab_size=VOCAB_SIZE, device=CPU)
    much, first, second, plain = (
        row(params, vocab_size=VOCAB_SIZE).state
        for params in (SamplingParams(logit_bias=tuple((at, 1.0) for at in range(1025))), RULES[0], RULES[0], SamplingParams())
    )
    for state in (much, plain, first, second):
        table.open(state)
    assert [state.entry for state in (much, plain, first, second)] == [NO_ENTRY, NO_ENTRY, 0, NO_ENTRY]
    assert (first.history is None, second.history is None) == (True, False)
    table.close(first)
    table.open(second)
    assert second.entry == 0


def test_a_row_without_finite_logits_is_reported() -> None:
    logits_PV = make_logits(2, VOCAB_SIZE, seed=1)
    graphs = SamplerGraphs(logits_PV, (2,), RecordedGraphs())
    graphs.capture()
    logits_PV[1, 7] = torch.nan
    columns = SamplingColumns()
    for at, params in enumerate((FILTERS[0], FILTERS[5])):
        columns.put(at, row(params, vocab_size=VOCAB_SIZE).state)
    assert graphs.launch(columns.of(np.arange(2)), np.array([1, 1]), 2).read()[1:].tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize(
    ("params", "mode", "needs"),
    [
        (SamplingParams(temperature=0.0), GREEDY, 0),
        (SamplingParams(top_k=64), FEW, 0),
        (SamplingParams(top_k=65, top_p=0.5), FILTERED, 0),
        (SamplingParams(top_p=0.5), FILTERED, 0),
        (SamplingParams(min_p=0.5), FILTERED, 0),
        (SamplingParams(logprobs=0), UNFILTERED, LOGPROBS),
        (SamplingParams(repetition_penalty=1.1), UNFILTERED, EDITS | TRACKS_TOKENS),
        (SamplingParams(logit_bias=((3, 1.0),)), UNFILTERED, EDITS),
        (SamplingParams(grammar='start: "a"', temperature=0.0), GREEDY, GRAMMAR | TRACKS_TOKENS),
    ],
    ids=repr,
)
def test_the_draw_mode_and_needs_of_a_row(params: SamplingParams, mode: int, needs: int) -> None:
    columns = SamplingColumns()
    columns.put(40, row(params, vocab_size=VOCAB_SIZE).state)
    found = columns.of(np.array([40]))
    assert (found[DRAW_MODE].item(), found[NEEDS].item()) == (mode, needs)
    assert are_edited(found, np.array([1])) == bool(needs & (EDITS | GRAMMAR))
    assert are_edited_by_host(found, np.array([1])) == bool(needs & EDITS), "it has no entry"


def test_stop_ids_are_forbidden_until_min_tokens() -> None:
    columns = SamplingColumns()
    state = row(SamplingParams(min_tokens=3, stop_token_ids=(5,)), vocab_size=VOCAB_SIZE, prompt=(1, 2)).state
    columns.put(0, state)
    known = [2, 3, 4, 5, 6]  # the first output token follows two
    assert [are_edited(columns.of(np.array([0])), np.array([count])) for count in known] == [True, True, True, False, False]


def test_a_decode_only_plan_is_recognised_by_its_columns() -> None:
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
    found, held = tables.of(rows.append_blocks(tables))
    assert found.tolist() == [[1, 2], [3, 13], [2, 5]]
    assert held.tolist() == [2, 2, 2]
    columns, singles = rows.results(np.array([100, 101, 102]))
    assert np.frombuffer(columns, np.int64).tolist() == [100, -1, 101]
    assert [(one.sequence, one.tokens) for one in singles] == [(4, (102,))]
    assert decode_rows(plan, 1) is None, "three tokens of a prompt"
    assert decode_rows(plan, 2) is None, "nothing to do"


@pytest.mark.parametrize(
    "change",
    [{"tokens": (1, 2)}, {"samples": False}, {"tokens": (1, 2), "num_draft": 1}, {"targets": (4,)}, {"pools": True}, {"num_next_draft": 2}],
    ids=repr,
)
def test_a_step_with_anything_else_is_launched(change: dict[str, object]) -> None:
    plain = Work(1, 5, (9,), (), samples=True)
    assert decode_rows(StepPlan(0, (plain,)), 0) is not None
    assert decode_rows(StepPlan(0, (plain, plain._replace(sequence=2, **change))), 0) is None
