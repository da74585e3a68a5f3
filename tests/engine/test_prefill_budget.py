"""Steps with decoding sequences keep to their time, and prompts progress in any case."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.engine import Engine
from engine.executor import Capacity
from engine.plan import SampledTokens, StepPlan, StepResult
from engine.prefill_budget import MIN_TOKENS
from engine.request import Request, SamplingParams

SETTLING = 30
"""Steps after which the cost of steps is known."""
TRUSTED = 20
"""Steps after which the estimate is trusted again: the first with prompts may take four times its time, and 1.1 ** 13 > 3.4."""
LATE_AT_FIRST = 4
"""Steps that may be late however few there are (1,500 random lines: at most 3 among fewer than 30 steps)."""


class Timed:
    """Ranks whose steps cost what a line says, plus a part that grows with context length."""

    capacity = Capacity(num_blocks=4096, block_tokens=16, max_context_tokens=32_768)

    def __init__(self, base_s: float, token_s: float, curvature: float = 0.0) -> None:
        self._cost = (base_s, token_s, curvature)
        self.took: list[tuple[StepPlan, float]] = []

    def submit(self, plan: StepPlan) -> "Timed":
        base_s, token_s, curvature = self._cost
        self.took.append((plan, base_s + sum(token_s * len(w.tokens) * (1 + curvature * w.start / 1000) for w in plan.works)))
        return self

    def result(self) -> StepResult:
        plan, seconds = self.took[-1]
        return StepResult(plan.step, tuple(SampledTokens(work.sequence, (7,)) for work in plan.works if work.samples), seconds)

    def close(self) -> None:
        pass


def lived(
    ranks: Timed,
    *,
    streams: int = 4,
    prompts: int = 6,
    max_step_s: float | None = None,
    prompt_share: float = 1.0,
    prompt_wait_steps: float = 1e6,
    prompt_step_s: float = 1e6,
) -> list[tuple[int, int, float]]:
    """Streams that decode, and long prompts that come beside them: sequences that decode, prompt tokens and seconds of every step."""
    config = EngineConfig(
        max_step_s=max_step_s,
        prompt_share=prompt_share,
        prompt_wait_steps=prompt_wait_steps,
        prompt_step_s=prompt_step_s,
        max_step_tokens=2048,
    )
    engine = Engine(ranks, config)
    for number in range(streams):
        engine.submit(Request(id=f"stream {number}", prompt=(number,), sampling=SamplingParams(max_tokens=8000)))
    for _ in range(5):
        engine.turn()
    for number in range(prompts):
        engine.submit(Request(id=f"prompt {number}", prompt=(number,) * 3000, sampling=SamplingParams(max_tokens=1)))
    finished = engine.stats.num_finished
    while engine.stats.num_finished < finished + prompts:
        engine.turn()
        assert len(ranks.took) < 10_000, "prompts do not get on"
    steps = []
    for plan, seconds in ranks.took:
        decoding = sum(work.sequence < streams for work in plan.works)  # a prompt may end in a work of one token, too
        steps.append((decoding, plan.num_tokens - decoding, seconds))
    return steps


@settings(max_examples=15, deadline=None)
@given(st.floats(0.001, 0.05), st.floats(1e-5, 2e-3), st.floats(0, 0.3), st.floats(1.5, 20))
def test_steps_with_decoding_sequences_keep_their_time(base_s: float, token_s: float, curvature: float, times: float) -> None:
    ranks = Timed(base_s, token_s, curvature)
    max_step_s = base_s * times + 32 * token_s * (1 + 3 * curvature)  # so much that the least of a prompt has room in it
    steps = [step for step in lived(ranks, max_step_s=max_step_s)[SETTLING:] if step[0] and step[1]]
    late = [seconds for _, _, seconds in steps if seconds > 1.1 * max_step_s]
    # The line through past steps knows nothing of long contexts: where they cost more than it says, a step is late and the next smaller.
    assert len(late) <= max(LATE_AT_FIRST, 0.1 * len(steps)), (max_step_s, late)
    assert all(seconds <= 2 * max_step_s for _, _, seconds in steps)


@settings(max_examples=8, deadline=None)
@given(st.floats(0.001, 0.05), st.floats(1e-5, 1e-3), st.floats(2.5, 20))
def test_steps_come_near_the_time_limit(base_s: float, token_s: float, times: float) -> None:
    """Prompts are not cut smaller than necessary: without curvature, steps that do not finish them come near the limit."""
    max_step_s = base_s * times + 32 * token_s
    steps = lived(Timed(base_s, token_s), max_step_s=max_step_s)
    left = 6 * 3000
    for number, (decoding, tokens, seconds) in enumerate(steps):
        left -= tokens
        if number >= TRUSTED and decoding and tokens and left and tokens < 2000:
            assert seconds > 0.8 * max_step_s, (number, tokens, left)


def test_prompts_progress_however_short_the_time_limit() -> None:
    steps = lived(Timed(0.02, 1e-4), max_step_s=0.001, prompts=1)
    assert min(tokens for decoding, tokens, _ in steps[5:-1] if decoding and tokens) == MIN_TOKENS


def test_prompts_are_computed_at_full_rate_when_nothing_decodes() -> None:
    steps = lived(Timed(0.02, 1e-4), max_step_s=0.03, streams=0, prompts=1)
    assert max(tokens for _, tokens, _ in steps) == 2048


def test_without_the_settings_prompts_are_cut_by_max_step_tokens_only() -> None:
    steps = lived(Timed(0.02, 1e-4), max_step_s=None, prompts=1)
    assert max(tokens for _, tokens, _ in steps) == 2048 - 4


@settings(max_examples=10, deadline=None)
@given(st.floats(0.001, 0.05), st.floats(1e-5, 1e-3), st.floats(0.2, 0.8))
def test_prompts_take_only_their_share_of_a_step_while_few_wait(base_s: float, token_s: float, share: float) -> None:
    steps = lived(Timed(base_s, token_s), prompt_share=share)
    left = 6 * 3000
    for number, (decoding, tokens, seconds) in enumerate(steps):
        left -= tokens
        if number >= SETTLING and decoding and tokens and left > 2048:
            # A prompt of which one token is left is counted among those that decode.
            wanted = (base_s / token_s + decoding) * share / (1 - share)
            one_more = share / (1 - share)
            assert tokens == pytest.approx(min(max(wanted, MIN_TOKENS), 2048 - decoding), rel=0.02, abs=3 + one_more), number
            if MIN_TOKENS < tokens < 2000:
                assert token_s * tokens == pytest.approx(share * seconds, rel=0.1, abs=3 * token_s)


def test_the_share_grows_with_waiting_prompts_up_to_nine_tenths() -> None:
    """A step of 4 streams takes 24 ms without prompts, and 18,000 prompt tokens 18 s, 750 such steps."""
    steps = [
        (tokens, seconds) for decoding, tokens, seconds in lived(Timed(0.02, 1e-3), prompt_share=0.5, prompt_wait_steps=200) if decoding
    ]
    shares = [tokens * 1e-3 / seconds for tokens, seconds in steps if tokens][SETTLING:]
    assert shares[0] == pytest.approx(0.9, abs=0.02)
    assert all(share > 0.45 for share in shares[:-1])
    waits = [sum(tokens for tokens, _ in steps[place:]) * 1e-3 for place in range(len(steps))]
    lasts = [sum(seconds for _, seconds in steps[place:]) for place in range(len(steps))]
    assert all(last < 1.7 * 200 * 0.024 for wait, last in zip(waits, lasts, strict=True) if wait < 0.85 * 200 * 0.024)


@settings(max_examples=10, deadline=None)
@given(st.floats(0.001, 0.1), st.floats(1e-4, 2e-3), st.integers(1, 16))
@example(0.015625, 0.002, 1)  # a prompt of which one token is left decodes beside the only stream, and steps have room for ten tokens more
def test_the_share_grows_up_to_the_step_time_but_to_two_thirds_in_any_case(base_s: float, token_s: float, streams: int) -> None:
    """18,000 prompt tokens wait, which would be nine tenths of each step."""
    ranks = Timed(base_s, token_s)
    steps = lived(ranks, streams=streams, prompt_share=0.5, prompt_wait_steps=1, prompt_step_s=0.4)
    left = 6 * 3000
    for number, (decoding, tokens, seconds) in enumerate(steps):
        left -= tokens
        if number >= SETTLING and decoding and tokens and left > 3000:
            # A prompt of which one token is left is counted among those that decode: it waits for the whole step, too.
            counted = sum(work.samples and len(work.tokens) == 1 for work in ranks.took[number][0].works)
            alone_s = base_s + counted * token_s
            wanted_s = min(10 * alone_s, max(3 * alone_s, 0.4))
            if tokens < 2048 - decoding:
                assert seconds == pytest.approx(wanted_s, rel=0.03, abs=4 * token_s), number


def test_a_nonpositive_time_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt_step_s"):
        EngineConfig(prompt_step_s=0.0)
    with pytest.raises(ValueError, match="max_step_s"):
        EngineConfig(max_step_s=0.0)
    with pytest.raises(ValueError, match="prompt_wait_steps"):
        EngineConfig(prompt_wait_steps=0.0)
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="prompt_share"):
            EngineConfig(prompt_share=share)
