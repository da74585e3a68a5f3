"""The law of the first round: who came before any answer had begun has a first token before anybody has a second one."""

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.engine import Engine
from engine.executor import Capacity
from engine.fair_share import FairShare
from engine.plan import Sampled, StepPlan, StepResult
from engine.request import Request, SamplingParams

STEP_S, TOKEN_S = 0.01, 0.001


class Ranks:
    """Steps of a hundredth of a second and a thousandth a token."""

    def __init__(self, **capacity: int) -> None:
        self.capacity = Capacity(**({"num_blocks": 4096, "block_tokens": 16, "max_context_tokens": 4096} | capacity))
        self.plans: list[StepPlan] = []

    def submit(self, plan: StepPlan) -> "Answer":
        self.plans.append(plan)
        return Answer(plan)

    def close(self) -> None:
        pass


class Answer:
    def __init__(self, plan: StepPlan) -> None:
        self._plan = plan

    def result(self) -> StepResult:
        sampled = tuple(Sampled(work.sequence, (7,)) for work in self._plan.works if work.samples)
        return StepResult(self._plan.step, sampled, STEP_S + TOKEN_S * self._plan.num_tokens)


class Served:
    """An engine that knows what steps cost, and at the turn of what each token came."""

    def __init__(self, ranks: Ranks | None = None, **config: float) -> None:
        self.ranks = ranks or Ranks()
        self.engine = Engine(self.ranks, EngineConfig(**config), policy=FairShare())
        self.tokens: dict[str, list[int]] = {}
        self.num_turns = 0
        for length in (30, 60):
            self.ask(f"before {length}", length, max_tokens=2)
            self.end()

    def ask(self, name: str, length: int, *, max_tokens: int = 8, **rest: object) -> None:
        prompt = (*name.encode(), *range(length - len(name)))  # nobody's prefix is another's
        self.engine.submit(Request(id=name, prompt=prompt, sampling=SamplingParams(max_tokens=max_tokens), **rest))

    def turn(self) -> None:
        self.num_turns += 1
        for event in self.engine.turn():
            self.tokens.setdefault(event.request_id, []).extend([self.num_turns] * len(event.tokens))

    def end(self) -> None:
        while self.engine.stats.num_running + self.engine.stats.num_waiting:
            self.turn()
            assert self.num_turns < 10_000, "nobody gets on"


LENGTHS = st.lists(st.integers(3, 250), min_size=2, max_size=12)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 12), st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.sampled_from([0.05, 0.4]))
def test_all_who_came_together_have_a_first_token_before_anybody_has_a_second(
    lengths: list[int], ahead: int, num_shards: int, num_stages: int, prompt_step_s: float
) -> None:
    """The first few come a step sooner, as over a network."""
    served = Served(Ranks(num_shards=num_shards, num_stages=num_stages), prompt_step_s=prompt_step_s)
    names = [str(number) for number in range(len(lengths))]
    for number, (name, length) in enumerate(zip(names, lengths, strict=True)):
        if number == ahead:
            served.turn()
        served.ask(name, length)
    served.end()
    assert all(len(served.tokens[name]) == 8 for name in names)
    if num_stages == 1:  # with stages the first may be asked for its next token while the others' prompts are not there yet
        assert max(served.tokens[name][0] for name in names) < min(served.tokens[name][1] for name in names)


def test_who_comes_when_an_answer_has_begun_is_computed_beside_it() -> None:
    served = Served()
    served.ask("running", 100, max_tokens=40)
    served.turn()
    served.turn()
    served.ask("later", 300)
    served.end()
    turns = served.tokens["running"]
    assert turns == list(range(turns[0], turns[0] + 40))


def test_who_comes_during_the_round_is_not_waited_for() -> None:
    served = Served(prompt_step_s=0.05)
    for number in range(4):
        served.ask(str(number), 100)
        if number == 0:
            served.turn()
    served.turn()
    served.ask("later", 100)
    served.end()
    assert all(served.tokens[str(number)][1] < served.tokens["later"][0] for number in range(4))


def test_nobody_waits_for_more_than_that_takes_or_for_a_hundred_and_fifty_steps() -> None:
    for first_round_s, length in ((0.0, 40), (0.3, 120), (20.0, 2000)):
        served = Served(first_round_s=first_round_s)
        for number in range(4):
            served.ask(str(number), length)
            if number == 0:
                served.turn()
        while "0" not in served.tokens:
            served.turn()
        served.end()
        assert served.tokens["0"][1] == served.tokens["0"][0] + 1


def test_the_more_urgent_do_not_wait_for_others() -> None:
    served = Served()
    served.ask("urgent", 100)
    served.turn()
    served.ask("other", 300, priority=1)
    served.end()
    assert served.tokens["urgent"] == list(range(served.tokens["urgent"][0], served.tokens["urgent"][0] + 8))


def test_where_the_others_find_no_room_who_has_begun_goes_on() -> None:
    served = Served(Ranks(num_blocks=16))
    for number in range(3):
        served.ask(str(number), 100)
    served.end()
    assert all(len(served.tokens[str(number)]) == 8 for number in range(3))


def test_prompts_alone_are_computed_some_at_a_time_and_a_long_one_at_once() -> None:
    served = Served(prompt_step_s=0.125)
    num_before = len(served.ranks.plans)
    for number, length in enumerate((100, 100, 100, 100, 1000)):
        served.ask(str(number), length, max_tokens=1)
    served.end()
    assert [plan.num_tokens for plan in served.ranks.plans[num_before:]] == [300, 1100]
