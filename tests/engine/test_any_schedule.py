"""The invariant of the engine: an answer does not depend on the schedule."""

import random
from dataclasses import dataclass, replace

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.draft.draft_model import DraftModelProposer
from engine.draft.speculator import Speculator
from engine.engine import Engine
from engine.fair_share import FairShare
from engine.request import Pooling, Request, SamplingParams
from engine.sequence import Sequence
from tests.fakes.executor import FakeExecutor, Recorder, next_token, told_logprobs, undisturbed

BLOCK_TOKENS = 4


@dataclass
class Happened:
    preemptions: int = 0
    losses: int = 0
    found: int = 0
    cancelled: int = 0
    resumed: int = 0
    poisoned: int = 0
    moved: int = 0
    """Sequences that were preempted and reopened on another shard."""
    reluctant: int = 0
    """Steps that yielded no token."""
    overlapped: int = 0
    """Works planned while an earlier one of the same sequence was in flight."""
    held: int = 0
    """Accepted draft tokens."""
    refuted: int = 0
    """Rejected draft tokens."""
    guessed: int = 0
    """Tokens that the ranks' draft model proposed."""
    scored: int = 0
    """Prompts with log-probabilities."""
    pooled: int = 0
    """Embeddings."""
    promised: int = 0
    """Works planned ahead for a token that was not known yet."""
    broken: int = 0
    """Those whose token was never sampled."""
    uncut: int = 0
    """Embeddings whose prompt had to be computed in one step, and was."""


class Guesser:
    """A proposer whose tokens are each right with a fixed probability."""

    def __init__(self, draw: random.Random) -> None:
        self._draw, self._chance = draw, draw.random()

    def propose(self, sequence: Sequence, max_tokens: int) -> tuple[int, ...]:
        guesses: list[int] = []
        for _ in range(self._draw.randint(0, max_tokens)):
            right = next_token((*sequence.tokens, *guesses), sequence.request.sampling.seed, sequence.request.choice)
            guesses.append(right if self._draw.random() < self._chance else right + 1)
        return tuple(guesses)


def random_speculator(draw: random.Random) -> Speculator | None:
    if draw.random() < 0.4:
        return None
    proposer = Guesser(draw) if draw.random() < 0.5 else DraftModelProposer()
    return Speculator(proposer, max_tokens=draw.randint(1, 6), step_line=lambda: (draw.random(), draw.random()))


def disturbed(seed: int, happened: Happened) -> None:
    """One random run of an engine, compared with the undisturbed answers."""
    draw, reluctance = random.Random(seed), random.Random(~seed)
    executors: list[FakeExecutor] = []
    speculator = random_speculator(random.Random(f"guesses {seed}"))
    num_shards, num_stages = draw.choice([1, 2, 2, 3]), draw.choice([1, 1, 2, 3])

    runs_ahead = num_stages == 1 and random.Random(f"ahead {seed}").random() < 0.6

    def new_executor(loss: object = None) -> FakeExecutor:
        executor = FakeExecutor(draw.randint(12, 24), BLOCK_TOKENS, num_shards=num_shards, num_stages=num_stages, runs_ahead=runs_ahead)
        if draw.random() < 0.5:
            executor.lose_at_step = {draw.randint(0, 40)}
        if speculator is not None and speculator.uses_draft_model:
            executor.draft_model = random.Random(f"draft model {seed} {len(executors)}")
        if reluctance.random() < 0.2:
            executor.reluctant = {step for step in range(60) if reluctance.random() < 0.3}
        executors.append(executor)
        return executor

    config = EngineConfig(
        block_tokens=BLOCK_TOKENS,
        max_step_tokens=draw.randint(1, 24),
        max_running=draw.randint(1, 8),
        max_in_flight=draw.randint(1, 3),
        prefix_cache=draw.random() < 0.8,
        max_step_s=random.Random(f"pace {seed}").choice([None, None, 0.0005, 0.01]),
        prompt_share=random.Random(f"share {seed}").choice([0.1, 0.5, 1.0]),
    )
    tenants = random.Random(seed + 1)
    policy = FairShare() if tenants.random() < 0.5 else None
    engine = Engine(new_executor(), config, recover=new_executor, policy=policy, speculator=speculator)
    recorder, requests = Recorder(), [of_some_tenant(tenants, random_request(draw, index)) for index in range(draw.randint(1, 10))]
    requests = [for_its_embedding(random.Random(f"pools {seed} {index}"), request) for index, request in enumerate(requests)]
    arriving, cancelled = list(requests), set()
    for _ in range(20_000):
        while arriving and draw.random() < 0.3:
            request = arriving.pop()
            recorder.begin(request.key, len(request.committed))
            happened.resumed += bool(request.committed)
            engine.submit(request)
        if draw.random() < 0.02:
            victim = draw.choice(requests)
            engine.cancel(*victim.key)
            cancelled.add(victim.key)
        recorder.take(engine.turn())
        for shard in engine.scheduler.shards:
            assert shard.pool.num_used + shard.pool.num_cached + shard.pool.num_free == shard.pool.num_blocks
        if not arriving and not engine.scheduler.num_requests and not engine.is_recovering:
            break
    else:
        raise AssertionError(f"livelock: {engine.scheduler}")
    while engine.scheduler.num_running:  # steps in flight of sequences that have ended
        recorder.take(engine.turn())
    assert not any(shard.pool.num_used for shard in engine.scheduler.shards), "blocks were left behind"
    judge([request for request in requests if request.pooling is None], recorder, cancelled, happened)
    judge_embeddings([request for request in requests if request.pooling is not None], recorder, cancelled, config, happened)
    happened.preemptions += engine.stats.num_preemptions
    happened.losses += engine.stats.num_losses
    happened.found += engine.stats.prefix_hit_tokens
    happened.held += engine.stats.accepted_tokens
    happened.refuted += engine.stats.drafted_tokens - engine.stats.accepted_tokens
    happened.guessed += sum(executor.num_guessed for executor in executors)
    happened.promised += sum(executor.num_promised for executor in executors)
    happened.broken += sum(executor.num_broken for executor in executors)
    happened.moved += sum(num_moved(executor) for executor in executors)
    happened.overlapped += sum(executor.num_overlapping for executor in executors)
    happened.reluctant += sum(len(executor.reluctant & set(range(len(executor.plans)))) for executor in executors)
    happened.cancelled += sum(end == "cancelled" for end in recorder.ends.values())


def num_moved(executor: FakeExecutor) -> int:
    shards: dict[tuple[str, int], set[int]] = {}
    for opening in (opening for plan in executor.plans for opening in plan.opened):
        shards.setdefault((opening.request_id, opening.choice), set()).add(opening.shard)
    return sum(len(each) > 1 for each in shards.values())


def random_request(draw: random.Random, index: int) -> Request:
    """Few distinct prompts, so that prefixes are shared, also up to the middle of a block."""
    prompt = tuple(range(draw.choice([1, 3, 4, 9, 16, 21]))) + tuple(draw.randrange(3) for _ in range(draw.randint(0, 3)))
    max_tokens = draw.randint(1, 16)
    seed, choice = draw.randrange(2), draw.randrange(2)
    full = undisturbed(prompt, seed, choice, max_tokens)
    wants = random.Random(f"a {seed} {index} {prompt}")
    scoring = {"prompt_logprobs": 1, "max_tokens": wants.choice([0, max_tokens])} if wants.random() < 0.15 else {"max_tokens": max_tokens}
    committed = full[: draw.randrange(len(full))] if draw.random() < 0.2 else ()
    scoring |= {"max_tokens": max_tokens} if committed else {}
    return Request(
        id=str(index),
        choice=choice,
        prompt=prompt,
        committed=committed,
        sampling=SamplingParams(seed=seed, presence_penalty=draw.choice([0.0, 0.5]), **scoring),
        salt=draw.choice(["", "", "other"]),
        priority=draw.choice([0, 0, 0, 1]),
    )


def of_some_tenant(draw: random.Random, request: Request) -> Request:
    return replace(request, tenant=draw.choice(["", "a", "b"]), share=draw.choice([0.5, 1.0, 3.0]))


def for_its_embedding(draw: random.Random, request: Request) -> Request:
    """One in six requests wants an embedding, half of these with non-causal attention."""
    if draw.random() >= 1 / 6:
        return request
    pooling = Pooling(kind=draw.choice(["last", "mean", "first"]), is_causal=draw.random() < 0.5)
    return replace(request, sampling=SamplingParams(max_tokens=0), committed=(), pooling=pooling)


def judge_embeddings(
    requests: list[Request], recorder: Recorder, cancelled: set[tuple[str, int]], config: EngineConfig, happened: Happened
) -> None:
    for request in requests:
        assert request.pooling is not None
        assert not recorder.tokens[request.key]
        match recorder.ends[request.key], recorder.errors[request.key]:
            case "stop", None:
                assert recorder.embeddings[request.key] == repr(request.prompt).encode()
                happened.pooled += 1
                happened.uncut += not request.pooling.is_causal
            case "error", "PoisonedRequest":
                happened.poisoned += 1
            case "error", "PromptCannotBeCut":
                assert not request.pooling.is_causal
                assert len(request.prompt) > config.max_step_tokens
            case _:
                assert request.key in cancelled


def judge(requests: list[Request], recorder: Recorder, cancelled: set[tuple[str, int]], happened: Happened) -> None:
    for request in requests:
        expected = undisturbed(request.prompt, request.sampling.seed, request.choice, request.sampling.max_tokens)
        got = [*request.committed, *recorder.tokens[request.key]]
        if recorder.errors[request.key] == "PoisonedRequest":
            happened.poisoned += 1
        else:
            assert recorder.ends[request.key] == "length" or request.key in cancelled
        complete = recorder.ends[request.key] == "length"
        told = tuple(recorder.prompt_logprobs[request.key])
        happened.scored += bool(told)
        wanted = request.sampling.prompt_logprobs is not None and not request.committed
        if complete or told:
            assert told == (told_logprobs(request.prompt) if wanted else ())
        assert got == list(expected) if complete else got == list(expected[: len(got)])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_the_answer_does_not_depend_on_the_schedule(seed):
    happened = Happened()
    disturbed(seed, happened)
    for what, count in vars(happened).items():
        if count:
            event(what)


def test_a_fixed_sweep_disturbs_in_every_way_and_answers_the_same():
    happened = Happened()
    for seed in range(300):
        disturbed(seed, happened)
    assert all(vars(happened).values()), happened
