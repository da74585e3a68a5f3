"""The state of a sequence on the sampling rank."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.plan import NewSequence, Work
from engine.request import SamplingParams
from engine.run.sampling.state import SamplingState, TokenHistory

tokens = st.lists(st.integers(0, 400), max_size=500)


@given(prompt=tokens, output=tokens, vocab_size=st.sampled_from([100, 401]))
def test_history_is_the_set_of_all_and_the_counts_of_the_output(prompt, output, vocab_size):
    history = TokenHistory(num_prompt=len(prompt), vocab_size=vocab_size)
    for start in range(0, len(prompt + output), 7):
        history.extend((prompt + output)[start : start + 7])
    counts = Counter(output)
    expected = {token: counts[token] for token in prompt + output if token < vocab_size}
    assert dict(zip(history.ids.tolist(), history.output_counts.tolist(), strict=True)) == expected
    assert history.num_tokens == len(prompt + output)


def state(params: SamplingParams, history: tuple[int, ...] = (), num_prompt: int = 3) -> SamplingState:
    return SamplingState(NewSequence(1, 0, num_prompt, params, history), vocab_size=100)


def test_works_that_repeat_known_tokens_are_not_counted_again():
    sequence = state(SamplingParams(frequency_penalty=1.0), history=(5, 6, 7, 8))
    for start, computed in ((0, (5, 6)), (2, (7, 8)), (4, (8,)), (5, (9,))):
        sequence.add_tokens(Work(1, start, computed, (), True))
    assert dict(zip(sequence.history.ids.tolist(), sequence.history.output_counts.tolist(), strict=True)) == {5: 0, 6: 0, 7: 0, 8: 2, 9: 1}


def test_the_output_position_counts_from_the_end_of_the_prompt():
    sequence = state(SamplingParams(), num_prompt=10)
    assert sequence.next_position(Work(1, 4, (1,) * 6, (), True)) == 0
    assert sequence.next_position(Work(1, 15, (1,), (), True)) == 6


def test_a_sequence_that_needs_no_history_keeps_none():
    sequence = state(SamplingParams(temperature=0.5))
    sequence.add_tokens(Work(1, 0, (1, 2, 3), (), True))
    assert sequence.history is None


def test_rules_about_ids_that_do_not_exist_have_no_effect_and_repeated_biases_add_up():
    sequence = state(SamplingParams(logit_bias=((3, 1.0), (500, 9.0), (3, 0.5)), stop_token_ids=(7, 500)))
    assert sequence.bias_ids.tolist() == [3]
    assert sequence.bias_values.tolist() == [1.5]
    assert sequence.stop_ids.tolist() == [7]


def test_a_seed_of_more_than_64_bits_is_refused():
    with pytest.raises(ValueError, match="64 bits"):
        state(SamplingParams(seed=2**64))
