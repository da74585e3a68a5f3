"""The cost of steps is estimated from measured ones."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.step_cost import StepCost


def learnt(*steps: tuple[int, float]) -> tuple[float, float]:
    cost = StepCost()
    for tokens, seconds in steps:
        cost.note(tokens, seconds)
    return cost.line


def test_the_estimate_is_zero_before_the_first_step() -> None:
    assert StepCost().line == (0.0, 0.0)


def test_two_sizes_of_steps_give_the_line_through_them() -> None:
    assert learnt((1, 0.011), (100, 0.11), (1, 0.011)) == pytest.approx((0.01, 0.001))


def test_steps_of_one_size_have_no_slope() -> None:
    assert learnt(*[(8, 0.02)] * 50) == pytest.approx((0.02, 0.0))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4096), st.floats(0, 10)), min_size=1, max_size=60))
def test_no_coefficient_is_negative(steps: list[tuple[int, float]]) -> None:
    base_s, token_s = learnt(*steps)
    assert base_s >= 0
    assert token_s >= 0


@settings(deadline=None)
@given(base_s=st.floats(1e-4, 1), token_s=st.floats(1e-6, 1e-2), sizes=st.lists(st.integers(1, 2048), min_size=2, max_size=40))
def test_a_true_line_is_found(base_s: float, token_s: float, sizes: list[int]) -> None:
    sizes = [*sizes, min(sizes) + 2048]
    found = learnt(*[(size, base_s + token_s * size) for size in sizes])
    assert found[0] + found[1] * 1000 == pytest.approx(base_s + token_s * 1000, rel=1e-3, abs=1e-5)


def test_a_machine_that_became_slower_is_noticed() -> None:
    steps = [(size, 0.01 + 0.001 * size) for size in (1, 64) for _ in range(500)]
    slower = [(size, 0.03 + 0.002 * size) for _ in range(700) for size in (1, 64)]
    assert learnt(*steps, *slower) == pytest.approx((0.03, 0.002), rel=0.05)


def test_decode_steps_do_not_displace_what_prefill_steps_took() -> None:
    decoding = [(32 + number % 2, 0.1 + 0.01 * (number % 3)) for number in range(5000)]
    assert learnt(*[(2000, 4.1)] * 3, *decoding)[1] == pytest.approx(4.0 / 1968, rel=0.02)
