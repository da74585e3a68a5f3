"""Replayed steps against the same steps launched: every answer, and all keys and values in the cache."""

import random
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine.executor import Capacity
from engine.plan import NewSequence, Rebalance, RebalanceResult, StepPlan, TokenEvent, Work
from engine.request import Request, SamplingParams
from engine.run.cuda_graphs import Compute, Replay
from engine.run.decode_graphs import capture_sizes
from engine.run.local_executor import LocalExecutor
from engine.run.runner import Runner
from engine.run.sampling.sampler import Sampler
from engine.run.start import start_rank
from engine.run.warm_up import capture
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.kv_cache import KvCache
from model.load import load_model
from parallel.groups import ParallelGroups, single_rank_groups
from parallel.topology import Topology
from tests.engine.run.capturable_ranks import capture_steps, engine_over, open_executor, record_collectives, runner_of, use_capturable_parts
from tests.engine.run.test_end_to_end import PROMPTS, SAMPLING, answer, serve
from tests.engine.run.tiny_models import NUM_REAL_TOKENS, engine_config, float32_config
from tests.fakes.graphs import Gone, NotCapturable, RecordedGraphs
from tests.ranks import run_ranks

Pair = tuple[LocalExecutor, LocalExecutor, RecordedGraphs]
CONFIG = engine_config(max_running=6, prompt_share=1.0)
CPU = torch.device("cpu")
PLAIN = [
    SamplingParams(temperature=0.0, max_tokens=14),
    SamplingParams(seed=1, max_tokens=14),
    SamplingParams(seed=2, temperature=0.8, top_k=20, top_p=0.8, max_tokens=9),
    SamplingParams(seed=3, temperature=1.5, min_p=0.02, max_tokens=14),
    SamplingParams(seed=4, temperature=1.2, top_p=0.7, max_tokens=11),
    SamplingParams(seed=5, temperature=1.1, stop_token_ids=tuple(range(0, 290, 3)), min_tokens=5, max_tokens=20),
    SamplingParams(seed=6, temperature=0.9, logprobs=3, max_tokens=8),
]


def random_requests(seed: int) -> list[Request]:
    draw = random.Random(seed)
    kinds = draw.choice([[PLAIN[0]], PLAIN[:3], PLAIN, PLAIN + SAMPLING])
    return [
        Request(id=str(number), choice=choice, prompt=draw.choice(PROMPTS)[: draw.choice([1, 5, 99])], sampling=draw.choice(kinds))
        for number in range(draw.randint(1, 9))
        for choice in range(draw.choice([1, 1, 2]))
    ]


def told(events: list[TokenEvent]) -> list[float]:
    return [value for event in events for one in event.logprobs for value in (one.logprob, *(logprob for _, logprob in one.top))]


@pytest.fixture(scope="module", params=["dense", pytest.param("moe", marks=pytest.mark.slow)])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """The same model twice, once launched and once replayed, with so few blocks that sequences are preempted."""
    folder: Path = request.getfixturevalue(f"{request.param}_folder")
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_capturable_parts(monkeypatch)
        launched, replayed = (open_executor(folder, num_blocks=40, max_running=6) for _ in range(2))
        yield launched, replayed, capture_steps(replayed, CONFIG, prompts=True)
        launched.close()
        replayed.close()


def check_same(pair: Pair, seed: int) -> None:
    launched, replayed, _ = pair
    draw = random.Random(~seed)
    config = replace(CONFIG, max_step_tokens=draw.choice([64, 9]), prefix_cache=draw.random() < 0.5)
    requests = random_requests(seed)
    wanted, found = (serve(engine_over(executor, config), requests) for executor in (launched, replayed))
    assert {key: answer(events) for key, events in found.items()} == {key: answer(events) for key, events in wanted.items()}
    for key, events in found.items():
        assert told(events) == pytest.approx(told(wanted[key]), abs=1e-4)
        assert events[-1].finish_reason == wanted[key][-1].finish_reason
    for ours, theirs in zip(_kv(replayed), _kv(launched), strict=True):  # all blocks, even those of no sequence
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def _kv(executor: LocalExecutor) -> list[torch.Tensor]:
    cache = runner_of(executor).cache
    return [*cache.keys_NBGK, *cache.values_NBGK]


@pytest.mark.parametrize("seed", range(3))
def test_replayed_steps_answer_as_launched_ones(pair: Pair, seed: int) -> None:
    before = pair[2].num_replays
    check_same(pair, seed)
    assert pair[2].num_replays > before


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 200))
def test_replayed_steps_answer_as_launched_ones_for_many_schedules(pair: Pair, seed: int) -> None:
    check_same(pair, seed)


@pytest.mark.parametrize("max_rows", [1, 2, 3, 7, 9, 100, 256, 512])
def test_at_most_a_fifth_of_a_step_is_padding(max_rows: int) -> None:
    sizes = list(capture_sizes(max_rows))
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_rows
    for count in range(1, max_rows + 1):
        size = next(size for size in sizes if size >= count)
        assert size - count <= size / 5


def test_a_step_that_writes_beyond_its_blocks_is_refused(pair: Pair) -> None:
    runner = runner_of(pair[1])
    plan = StepPlan(0, (Work(900, 4, (1,), (3,), True),), (NewSequence(900, 0, 5, PLAIN[0]),))
    with pytest.raises(ValueError, match="sequence 900 computes up to token 5 and its blocks hold 4"):
        runner.run(plan)
    runner.run(StepPlan(1, (), closed=(900,)))


def test_nan_logits_fail_one_sequence_and_not_its_neighbours(pair: Pair) -> None:
    """In a replayed step: the other sequences get the tokens that they would have got."""
    launched, replayed, _ = pair
    requests = [Request(id=str(number), prompt=PROMPTS[number], sampling=PLAIN[0]) for number in range(3)]
    wanted = serve(engine_over(launched, CONFIG), requests)
    runner = runner_of(replayed)
    graphs = runner.decode_graphs
    assert graphs is not None
    run, count = graphs.run, 0

    def poisoned(*args: object) -> torch.Tensor | None:
        nonlocal count
        logits = run(*args)  # type: ignore[arg-type]
        count += 1
        if count == 2 and logits is not None:
            logits[0] = torch.nan
        return logits

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(graphs, "run", poisoned)
        found = serve(engine_over(replayed, CONFIG), requests)
    failed = [key for key, events in found.items() if events[-1].finish_reason == "error"]
    assert len(failed) == 1
    assert all(answer(events) == answer(wanted[key]) for key, events in found.items() if key not in failed)


def test_a_rank_that_does_not_sample_replays_whatever_number_of_sequences_is_open(pair: Pair) -> None:
    """As ranks beside a sampling one, which know nothing about sampling."""
    model, capacity = runner_of(pair[1]).model, runner_of(pair[1]).capacity
    runner = Runner(model=model, cache=KvCache(model.kv_layout, 40, CPU), capacity=capacity, sampler=None, device=CPU)
    graphs = RecordedGraphs()
    capture(runner, graphs, CONFIG)
    runner.run(
        StepPlan(0, tuple(Work(n, 0, (1, 2), (n,), True) for n in range(17)), tuple(NewSequence(n, 0, 2, PLAIN[0]) for n in range(17)))
    )
    before = graphs.num_replays
    assert runner.run(StepPlan(1, tuple(Work(n, 2, (1,), (), True) for n in range(12, 17)))) is None
    assert graphs.num_replays == before + 1


class Lost:
    """A replay on a device that was lost."""

    def __call__(self) -> None:
        raise RuntimeError("lost")


class Losing(RecordedGraphs):
    """A recorder whose replays fail, or the capture of the ``last`` graph."""

    def __init__(self, last: int | None = None) -> None:
        super().__init__()
        self.last, self.replays = last, list[weakref.ref[Replay]]()

    def capture(self, compute: Compute) -> Replay:
        super().capture(compute)
        replay = Lost()
        self.replays.append(weakref.ref(replay))
        if len(self.replays) == self.last:
            replay()
        return replay


@pytest.mark.parametrize("fails", ["in a step", "in a capture"])
def test_no_graph_is_alive_when_a_rank_leaves_its_groups_for_a_failure(
    dense_folder: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """The exception holds the variables of all functions that it passed through."""
    use_capturable_parts(monkeypatch)
    graphs = Losing(last=5 if fails == "in a capture" else None)
    alive: list[int] = []

    @contextmanager
    def joined(*_: object) -> Iterator[ParallelGroups]:
        try:
            yield single_rank_groups()
        finally:
            alive.append(sum(replay() is not None for replay in graphs.replays))

    monkeypatch.setattr("engine.run.start._join_groups", joined)
    settings = float32_config(num_blocks=40, block_tokens=4)

    def serve_until_lost() -> None:
        with start_rank(
            checkpoint_folder=dense_folder, topology=Topology(), rank=0, rendezvous=None, runner_config=settings, engine_config=CONFIG
        ) as runner:
            capture(runner, graphs, CONFIG)
            runner.run(StepPlan(0, (Work(0, 0, (1, 2), (0,), True),), (NewSequence(0, 0, 2, PLAIN[0]),)))
            runner.run(StepPlan(1, (Work(0, 2, (1,), (), True),)))

    with pytest.raises(RuntimeError, match="lost"):
        serve_until_lost()
    assert graphs.replays
    assert alive == [0]


def test_no_graph_is_alive_when_a_rank_leaves_its_groups(dense_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would wait for graphs that contain its collectives."""
    use_capturable_parts(monkeypatch)
    replays: list[weakref.ref[Replay]] = []
    alive: list[int] = []

    @contextmanager
    def joined(*_: object) -> Iterator[ParallelGroups]:
        yield single_rank_groups()
        alive.append(sum(replay() is not None for replay in replays))

    monkeypatch.setattr("engine.run.start._join_groups", joined)
    settings = float32_config(num_blocks=40, block_tokens=4)
    with start_rank(
        checkpoint_folder=dense_folder, topology=Topology(), rank=0, rendezvous=None, runner_config=settings, engine_config=CONFIG
    ) as runner:
        capture(runner, RecordedGraphs(), CONFIG)
        assert runner.decode_graphs is not None
        assert runner.sampler_graphs is not None
        replays += [weakref.ref(replay) for replay in (*runner.decode_graphs.replays.values(), *runner.sampler_graphs._replays.values())]
        assert all(replay() is not None for replay in replays)
    assert replays
    assert alive == [0]


def _runner_of_rank(groups: ParallelGroups, folder: Path, *, runs_ahead: bool = False) -> Runner:
    """The first rank samples."""
    with Checkpoint(folder) as checkpoint:
        config = ModelConfig.from_checkpoint(folder)
        model, _ = load_model(checkpoint, config, groups, device=CPU, dtype=torch.float32, block_tokens=4)
    capacity = Capacity(num_blocks=40, block_tokens=4, max_context_tokens=80, runs_ahead=runs_ahead)
    sampler = Sampler(vocab_size=NUM_REAL_TOKENS, device=CPU) if groups.rank == 0 else None
    return Runner(model=model, cache=KvCache(model.kv_layout, 40, CPU), capacity=capacity, sampler=sampler, device=CPU)


def _tokens_of_rank(groups: ParallelGroups, folder: Path, replays: bool) -> tuple[list[list[tuple[int, ...]]], int]:
    """One rank of two: a prompt of two sequences each, then decodes. One of them ends earlier."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_capturable_parts(monkeypatch)
        record_collectives(monkeypatch)
        runner = _runner_of_rank(groups, folder)
        graphs = RecordedGraphs()
        if replays:
            capture(runner, graphs, CONFIG)
        given: list[list[tuple[int, ...]]] = []
        for plan in _plans(given, groups):
            result = runner.run(plan)
            said = [[]] if result is None else [[(one.sequence, *one.tokens) for one in result.sampled]]
            given.append(broadcast_said(said, groups))
        return given, graphs.num_replays


def _plans(given: list[list[tuple[int, ...]]], groups: ParallelGroups) -> Iterator[StepPlan]:
    prompts, blocks = (PROMPTS[5], PROMPTS[3]), ((3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16), (20, 21, 22, 23, 24))
    opened = tuple(NewSequence(n, 0, len(prompt), PLAIN[n]) for n, prompt in enumerate(prompts))
    yield StepPlan(0, tuple(Work(n, 0, prompt, blocks[n], True) for n, prompt in enumerate(prompts)), opened)
    for step in range(1, 8):
        last = dict(given[-1])
        alive = [n for n in last if n == 0 or step < 5]
        yield StepPlan(step, tuple(Work(n, len(prompts[n]) + step - 1, (last[n],), (), True) for n in alive))


def broadcast_said(said: list[list[tuple[int, ...]]], groups: ParallelGroups) -> list[tuple[int, ...]]:
    """The sampling rank's tokens, on both ranks."""
    assert groups.tp.transport is not None
    dist.broadcast_object_list(said, group=groups.tp.transport.process_group, group_src=0)
    return said[0]


@pytest.mark.slow
def test_ranks_that_share_a_model_replay_the_same_steps(dense_folder: Path) -> None:
    wanted = run_ranks(Topology(tp=2), _tokens_of_rank, dense_folder, False)
    found = run_ranks(Topology(tp=2), _tokens_of_rank, dense_folder, True)
    assert [given for given, _ in found] == [given for given, _ in wanted]
    assert len(found[0][0]) == 8
    assert found[0][1] > found[1][1] > 6, "one of them samples, too"


def _measured_twice(groups: ParallelGroups, folder: Path) -> list[RebalanceResult | None]:
    """One rank of two that share experts: after a prompt the experts are moved, and their load is measured again."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_capturable_parts(monkeypatch)
        record_collectives(monkeypatch)
        runner = _runner_of_rank(groups, folder)
        capture(runner, RecordedGraphs(), replace(CONFIG, max_running=2))
        assert runner.decode_graphs is not None
        runner.rebalancer.reset()
        work, opening = Work(0, 0, PROMPTS[3][:7], (3, 4), True), NewSequence(0, 0, 7, PLAIN[0])
        runner.run(StepPlan(0, (work,), (opening,)))
        results = [runner.run(StepPlan(step, (), rebalance=Rebalance(threshold=1.0))) for step in (1, 2)]
        return [None if result is None else result.rebalanced for result in results]


@pytest.mark.slow
def test_a_capture_after_moving_experts_does_not_count_as_load(moe_folder: Path) -> None:
    first, second = run_ranks(Topology(tp=2, ep=2), _measured_twice, moe_folder)[0]
    assert first.num_moved > 0
    assert sum(map(sum, first.loads)) > 0
    assert second.loads == tuple(tuple(load / 2 for load in loads) for loads in first.loads)


# --- tests of the fake graphs


def test_memory_that_existed_before_a_capture_must_exist_at_a_replay() -> None:
    holder, out = [torch.ones(4)], torch.zeros(4)
    replay = RecordedGraphs().capture(lambda: out.copy_(holder[0] * 2))
    holder[0].fill_(3)
    replay()
    assert out.tolist() == [6.0] * 4
    holder[0] = torch.ones(4)
    with pytest.raises(Gone):
        replay()


def test_nothing_is_left_over_from_an_earlier_replay() -> None:
    made: list[torch.Tensor] = []
    out = torch.zeros(4)

    def compute() -> None:
        made.append(torch.ones(4))
        out.copy_(made[0])  # the result of the run before the capture

    replay = RecordedGraphs().capture(compute)
    made.clear()
    with pytest.raises(Gone):
        replay()


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.long().bincount(),
        lambda _x: torch.tensor([1.0, 2.0]),
    ],
)
def test_a_capture_may_neither_read_from_the_device_nor_upload(compute) -> None:
    with pytest.raises(NotCapturable):
        RecordedGraphs().capture(lambda: compute(torch.ones(3)))


def test_ids_that_are_padding_are_never_sampled(pair: Pair) -> None:
    requests = [Request(id=str(number), prompt=PROMPTS[number], sampling=replace(PLAIN[1], temperature=9.0)) for number in range(6)]
    found = serve(engine_over(pair[1], CONFIG), requests)
    assert max(token for events in found.values() for token in answer(events)) < NUM_REAL_TOKENS
