"""The real engine on a real rank: the same tokens as transformers, and as a request that is served alone."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch

from engine.engine import Engine
from engine.errors import WorkersLost
from engine.plan import TokenEvent
from engine.request import Request, SamplingParams
from engine.run.local_executor import LocalExecutor
from tests.engine.run.tiny_models import NUM_REAL_TOKENS, engine_config, float32_config, greedy

COUNT = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=COUNT)


def make_prompts() -> list[tuple[int, ...]]:
    """Prompts with lengths around the boundaries of blocks and steps; some share a prefix."""
    generator = torch.Generator().manual_seed(7)
    common = torch.randint(0, NUM_REAL_TOKENS, (16,), generator=generator).tolist()
    own = [torch.randint(0, NUM_REAL_TOKENS, (length,), generator=generator).tolist() for length in (1, 3, 4, 5, 17, 33, 64)]
    return [tuple(prompt) for prompt in own] + [tuple(common + prompt[:9]) for prompt in own[2:5]] + [tuple(common)]


PROMPTS = make_prompts()


def serve(engine: Engine, requests: Iterable[Request], *, at_once: bool = True) -> dict[tuple[str, int], list[TokenEvent]]:
    """All events of the requests, served together or one after the other."""
    events: dict[tuple[str, int], list[TokenEvent]] = {}
    batches = [list(requests)] if at_once else [[request] for request in requests]
    for batch in batches:
        for request in batch:
            engine.submit(request)
        for _ in range(5000):
            for event in engine.turn():
                events.setdefault((event.request_id, event.choice), []).append(event)
            if engine.scheduler.num_requests == 0:
                break
        else:
            pytest.fail(f"the engine does not come to an end: {engine.scheduler}")
    return events


def answer(events: list[TokenEvent]) -> tuple[int, ...]:
    """The tokens of one choice, which must arrive in order and finish exactly once."""
    tokens: list[int] = []
    for event in events:
        assert event.offset == len(tokens)
        assert (event.finish_reason is not None) == (event is events[-1])
        tokens += event.tokens
    assert events[-1].finish_reason in ("stop", "length"), events[-1]
    return tuple(tokens)


def open_engine(
    folder, *, num_blocks: int = 400, quantize: str | None = None, runner: Mapping[str, object] = MappingProxyType({}), **changes: object
) -> Engine:
    config = engine_config(**changes)
    runner_config = float32_config(num_blocks=num_blocks, block_tokens=config.block_tokens, quantize=quantize, **runner)
    return Engine(LocalExecutor.open(folder, runner_config=runner_config, engine_config=config), config)


@pytest.fixture(scope="module")
def expected(oracle) -> list[tuple[int, ...]]:
    return [greedy(oracle, prompt, COUNT) for prompt in PROMPTS]


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("max_step_tokens", [512, 5])
@pytest.mark.parametrize("num_blocks", [400, 21])
def test_greedy_answers_are_those_of_transformers(folder, expected, prefix_cache, max_step_tokens, num_blocks):
    engine = open_engine(folder, num_blocks=num_blocks, max_step_tokens=max_step_tokens, prefix_cache=prefix_cache)
    requests = [Request(id=str(i), prompt=prompt, sampling=GREEDY) for i, prompt in enumerate(PROMPTS)]
    for _ in range(2):  # the second time with what the first left in the cache
        events = serve(engine, requests)
        assert [answer(events[str(i), 0]) for i in range(len(PROMPTS))] == expected
    if num_blocks == 21:
        assert engine.stats.num_preemptions > 0
    elif prefix_cache:
        assert sum(events[str(i), 0][0].num_cached for i in range(len(PROMPTS))) > 0
    assert engine.stats.blocks_used == 0


def test_a_cache_in_fp8_answers_alike_however_it_was_filled(folder):
    requests = [Request(id=str(i), prompt=prompt, sampling=GREEDY) for i, prompt in enumerate(PROMPTS)]
    found = []
    for num_blocks, changes in ((400, {}), (6, {"max_step_tokens": 5}), (400, {"max_step_tokens": 7, "prefix_cache": False})):
        fp8 = {"kv_dtype": "fp8", "attention_backend": "reference"}  # a quarter of the bytes: four times as many blocks
        engine = open_engine(folder, num_blocks=num_blocks, runner=fp8, **changes)
        events = serve(engine, requests)
        found.append([answer(events[str(i), 0]) for i in range(len(PROMPTS))])
        assert num_blocks == 400 or engine.stats.num_preemptions > 0
    assert found[0] == found[1] == found[2]


SAMPLING = [
    SamplingParams(seed=1, max_tokens=COUNT),
    SamplingParams(seed=2**63 + 5, temperature=0.8, top_k=20, top_p=0.8, max_tokens=COUNT),
    SamplingParams(seed=3, temperature=1.5, min_p=0.02, max_tokens=COUNT),
    SamplingParams(seed=4, temperature=1.2, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.7, max_tokens=COUNT),
    SamplingParams(seed=5, top_p=0.9, logit_bias=((11, 3.0), (12, -50.0)), stop_token_ids=(11,), min_tokens=6, max_tokens=COUNT),
    SamplingParams(temperature=0.0, repetition_penalty=1.4, logprobs=3, max_tokens=COUNT),
]


def sampled_requests() -> list[Request]:
    return [
        Request(id=str(i), choice=choice, prompt=prompt, sampling=SAMPLING[i % len(SAMPLING)])
        for i, prompt in enumerate(PROMPTS)
        for choice in range(2)
    ]


@pytest.fixture(scope="module")
def alone(folder) -> dict[tuple[str, int], tuple[int, ...]]:
    """Each request served alone."""
    return {key: answer(events) for key, events in serve(open_engine(folder), sampled_requests(), at_once=False).items()}


@pytest.mark.parametrize(
    ("num_blocks", "changes"),
    [(400, {}), (21, {}), (21, {"max_step_tokens": 7, "prefix_cache": False}), (60, {"max_running": 3})],
    ids=["roomy", "preempted", "preempted-in-pieces", "few-at-a-time"],
)
def test_sampled_answers_do_not_depend_on_the_batch_or_preemption(folder, alone, num_blocks, changes):
    engine = open_engine(folder, num_blocks=num_blocks, **changes)
    together = {key: answer(events) for key, events in serve(engine, sampled_requests()).items()}
    assert together == alone
    if num_blocks == 21:
        assert engine.stats.num_preemptions > 0


def test_choices_of_one_request_differ_and_the_same_seed_repeats(folder, alone):
    drawn = [request.id for request in sampled_requests() if request.sampling.temperature > 0]
    assert sum(alone[id_, 0] != alone[id_, 1] for id_ in drawn) > len(drawn) / 2
    again = serve(open_engine(folder), sampled_requests()[:6])
    assert all(answer(events) == alone[key] for key, events in again.items())


def test_an_answer_continues_after_what_a_lost_replica_delivered(folder, alone):
    requests = [request for request in sampled_requests() if len(alone[request.key]) > 5]
    resumed = [replace(request, committed=alone[request.key][:5], attempt=1) for request in requests]
    for key, events in serve(open_engine(folder), resumed).items():
        assert events[0].offset == 5
        assert alone[key][:5] + tuple(token for event in events for token in event.tokens) == alone[key]


def test_logprobs_come_with_every_token(folder, oracle):
    sampling = SamplingParams(temperature=0.0, max_tokens=4, logprobs=2)
    events = serve(open_engine(folder, max_step_tokens=5), [Request(id="a", prompt=PROMPTS[5], sampling=sampling)])["a", 0]
    tokens = answer(events)
    with torch.no_grad():
        logits = oracle(torch.tensor([PROMPTS[5] + tokens])).logits[0, len(PROMPTS[5]) - 1 : -1, :NUM_REAL_TOKENS]
    expected = torch.log_softmax(logits, -1)
    for position, (token, logprobs) in enumerate(zip(tokens, [each for event in events for each in event.logprobs], strict=True)):
        assert logprobs.logprob == pytest.approx(expected[position, token].item(), abs=1e-4)
        values, ids = expected[position].topk(2)
        assert [id_ for id_, _ in logprobs.top] == ids.tolist()
        assert [value for _, value in logprobs.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_nan_logits_fail_only_one_request(folder, expected, monkeypatch):
    engine = open_engine(folder)
    sampler = engine.executor._runner.result_builder.sampler
    sample = sampler.sample

    def poisoned(logits, rows, table):
        for at, row in enumerate(rows):
            if row.state.sampling.seed == 666:
                logits[at] = torch.nan
        return sample(logits, rows, table)

    monkeypatch.setattr(sampler, "sample", poisoned)
    requests = [Request(id=str(i), prompt=p, sampling=replace(GREEDY, seed=666 if i == 4 else 0)) for i, p in enumerate(PROMPTS)]
    events = serve(engine, requests)
    assert (events["4", 0][-1].finish_reason, events["4", 0][-1].error_kind) == ("error", "InvalidLogits")
    assert [answer(events[str(i), 0]) for i in range(len(PROMPTS)) if i != 4] == [e for i, e in enumerate(expected) if i != 4]


def test_a_lost_rank_is_replaced_and_no_answer_changes(folder, alone):
    config = engine_config()
    runner_config = float32_config(num_blocks=400, block_tokens=4)

    def start(_loss: WorkersLost | None = None) -> LocalExecutor:
        return LocalExecutor.open(folder, runner_config=runner_config, engine_config=config)

    engine = Engine(start(), config, recover=start)
    requests = sampled_requests()
    for request in requests:
        engine.submit(request)
    events: dict[tuple[str, int], list[TokenEvent]] = {}
    for turn in range(2000):
        if turn == 6:
            engine.executor._runner.forward.model = None  # makes the next step raise
        for event in engine.turn():
            events.setdefault((event.request_id, event.choice), []).append(event)
        if turn > 6 and engine.scheduler.num_requests == 0:
            break
    assert engine.stats.num_losses == 1
    assert {key: answer(found) for key, found in events.items()} == alone


def test_a_request_passes_its_places_in_order(dense_folder, caplog):
    engine = open_engine(dense_folder)
    with caplog.at_level(logging.DEBUG, logger="manta.places"):
        serve(engine, [Request(id="the-one", prompt=PROMPTS[3], sampling=replace(GREEDY, max_tokens=1))])
    told = [record.args[:2] for record in caplog.records if record.name == "manta.places"]
    assert told == [(place, "the-one") for place in (6, 7, 9, 10, 11, 12)]
