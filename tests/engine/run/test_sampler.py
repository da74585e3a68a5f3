"""The sampler against its reference, against statistics, and with other rows in the batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.request import SamplingParams
from engine.run.sampling import filters, groups, sampler
from engine.run.sampling.sampler import Sampler
from tests.engine.run.sampling_reference import edited_logits, probabilities, row, slow_sample

CPU = torch.device("cpu")


def tokens_of(answers) -> list[int]:
    assert all(answer.fault is None for answer in answers)
    return [answer.tokens[0] for answer in answers]


def make_logits(rows: int, vocab_size: int, *, seed: int, spread: float = 3.0, ties: bool = False) -> torch.Tensor:
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
    return (logits * 2).round() / 2 if ties else logits


@pytest.fixture
def plain_torch(monkeypatch):
    """Samples without kernels."""
    monkeypatch.setattr(sampler, "cpu_kernels_for", lambda _logits: None)


FILTERS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=1.7),
    SamplingParams(temperature=5e-324),
    SamplingParams(top_k=1),
    SamplingParams(top_k=20, temperature=0.7),
    SamplingParams(top_p=0.8),
    SamplingParams(top_p=1e-9),
    SamplingParams(top_p=0.999, temperature=2.0),
    SamplingParams(min_p=0.05),
    SamplingParams(min_p=1.0),
    SamplingParams(top_k=50, top_p=0.9, min_p=0.02),
    SamplingParams(top_k=1500, temperature=2.0),
    SamplingParams(top_k=1500, top_p=0.5, temperature=2.0),
    SamplingParams(temperature=0.0),
]


@pytest.mark.parametrize("params", FILTERS, ids=repr)
@pytest.mark.parametrize("ties", [False, True])
def test_every_filter_draws_what_its_definition_draws(params, ties):
    vocab_size, count = 2000, 40
    logits = make_logits(count, vocab_size, seed=1, ties=ties)
    rows = [row(params, vocab_size=vocab_size, position=i) for i in range(count)]
    expected = [slow_sample(logits[i].numpy(), params, position=i) for i in range(count)]
    assert tokens_of(Sampler(vocab_size=vocab_size, device=CPU).sample(logits, rows)) == expected


@pytest.mark.parametrize("params", FILTERS, ids=repr)
@pytest.mark.parametrize("ties", [False, True])
def test_every_filter_draws_in_plain_torch_what_its_definition_draws(plain_torch, params, ties):
    test_every_filter_draws_what_its_definition_draws(params, ties)


@pytest.mark.parametrize("vocab_size", [1, 7, 130, 5003, 151_646])
@pytest.mark.parametrize("spread", [0.02, 1.0, 6.0])
def test_kernels_draw_what_plain_torch_draws(vocab_size, spread, monkeypatch):
    """Also from flat distributions, of which filters keep most ids, from ties, and in rows with faults."""
    rows = [row(params, vocab_size=vocab_size, position=position) for params in FILTERS for position in (0, 5)]
    logits = make_logits(len(rows), vocab_size + 3, seed=3, spread=spread)
    logits[::4] = logits[::4].round()
    logits[3, vocab_size // 2], logits[4, vocab_size // 2] = torch.nan, torch.inf
    logits[5], logits[6, : vocab_size - 1] = -torch.inf, -torch.inf
    found = Sampler(vocab_size=vocab_size, device=CPU).sample(logits, rows)
    monkeypatch.setattr(sampler, "cpu_kernels_for", lambda _logits: None)
    assert found == Sampler(vocab_size=vocab_size, device=CPU).sample(logits, rows)


params_anyhow = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.2, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 3, 20, 300, 5000]),
    top_p=st.sampled_from([1.0, 1.0, 0.1, 0.8, 0.99]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.8, -0.5]),
    logit_bias=st.sampled_from([(), (), ((3, 4.0), (7, -100.0))]),
    seed=st.integers(0, 2**64 - 1),
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.sampled_from([(), (0, 5)]),
    logprobs=st.sampled_from([None, None, 0, 5]),
)


@settings(max_examples=60, deadline=None)
@given(
    params=st.lists(params_anyhow, min_size=1, max_size=6),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
    num_padding=st.sampled_from([0, 7]),
    data=st.data(),
)
def test_a_mixed_batch_gives_each_row_what_its_definition_gives(params, ties, seed, num_padding, data):
    vocab_size = 1300
    logits = make_logits(len(params), vocab_size + num_padding, seed=seed, ties=ties)
    logits[:, vocab_size:] += 100
    token = st.integers(0, 30)
    told = [(data.draw(st.lists(token, max_size=8)), data.draw(st.lists(token, max_size=8)), data.draw(st.integers(0, 3))) for _ in params]
    rows = [
        row(p, vocab_size=vocab_size, prompt=prompt, output=output, choice=choice)
        for p, (prompt, output, choice) in zip(params, told, strict=True)
    ]
    expected = [
        slow_sample(logits[i, :vocab_size].numpy(), p, prompt=prompt, output=output, choice=choice)
        for i, (p, (prompt, output, choice)) in enumerate(zip(params, told, strict=True))
    ]
    assert tokens_of(Sampler(vocab_size=vocab_size, device=CPU).sample(logits, rows)) == expected


STATISTICS = {
    "temperature": SamplingParams(temperature=1.6),
    "top_k": SamplingParams(top_k=5),
    "top_p": SamplingParams(top_p=0.7),
    "min_p": SamplingParams(min_p=0.2),
    "repetition": SamplingParams(repetition_penalty=1.8),
    "presence": SamplingParams(presence_penalty=1.2),
    "frequency": SamplingParams(frequency_penalty=0.6),
    "logit_bias": SamplingParams(logit_bias=((2, 1.5), (4, -1.0))),
}


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("over", ["positions", "choices", "seeds"])
def test_frequencies_over_many_draws_are_the_defined_probabilities(name, over):
    count, params = 6000, STATISTICS[name]
    logits = torch.tensor([1.0, 0.5, -0.5, 2.0, 1.5, 0.0, -1.0, 0.8, 1.2, -2.0])
    prompt, output = (0, 3, 3), (3, 4, 4, 2)
    defined = probabilities(edited_logits(logits.numpy(), params, prompt=prompt, output=output), params)
    shared = row(params, vocab_size=10, prompt=prompt, output=output)
    match over:
        case "positions":
            rows = [shared._replace(position=i) for i in range(count)]
        case "choices":
            rows = [row(params, vocab_size=10, prompt=prompt, output=output, choice=i) for i in range(count)]
        case _:
            rows = [row(replace(params, seed=i), vocab_size=10, prompt=prompt, output=output) for i in range(count)]
    drawn = tokens_of(Sampler(vocab_size=10, device=CPU).sample(logits.expand(count, -1), rows))
    observed = np.bincount(drawn, minlength=10)
    possible = defined > 0
    assert observed[~possible].sum() == 0
    chi_square = ((observed - count * defined)[possible] ** 2 / (count * defined[possible])).sum()
    assert chi_square < 33  # 9 degrees of freedom at most: 1 in 10,000


def test_a_row_does_not_depend_on_other_rows_or_their_order():
    vocab_size = 4000
    params = [*FILTERS, SamplingParams(repetition_penalty=1.2, top_p=0.9), SamplingParams(logprobs=3, min_p=0.001)]
    logits = make_logits(len(params), vocab_size, seed=3)
    rows = [row(p, vocab_size=vocab_size, position=9, prompt=(1, 2), sequence=i) for i, p in enumerate(params)]
    draw = Sampler(vocab_size=vocab_size, device=CPU).sample
    together = draw(logits, rows)
    assert [draw(logits[i : i + 1], rows[i : i + 1])[0].tokens for i in range(len(rows))] == [a.tokens for a in together]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    assert [a.tokens for a in draw(logits[order], [rows[i] for i in order])] == [together[i].tokens for i in order]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_draw_as_their_float32_values(dtype):
    vocab_size = 3000
    logits = make_logits(len(FILTERS), vocab_size, seed=5).to(dtype)
    rows = [row(p, vocab_size=vocab_size, position=2) for p in FILTERS]
    draw = Sampler(vocab_size=vocab_size, device=CPU).sample
    assert draw(logits, rows) == draw(logits.float(), rows)


def test_a_filter_that_reaches_beyond_the_candidates_is_decided_by_sorting(plain_torch, monkeypatch):
    vocab_size = 5000
    params = [SamplingParams(top_p=0.95, temperature=1.5), SamplingParams(min_p=0.001), SamplingParams(top_k=2000), SamplingParams(top_k=4)]
    logits = make_logits(4, vocab_size, seed=6, spread=0.5)
    logits[3] = 0.0  # all equal: which 4 of the candidates are meant is undecided until all are seen
    rows = [row(p, vocab_size=vocab_size, position=1) for p in params]
    draw = Sampler(vocab_size=vocab_size, device=CPU)
    sorted_rows = []
    slow_way = draw._draw_sorted
    monkeypatch.setattr(draw, "_draw_sorted", lambda logits, row: sorted_rows.append(row) or slow_way(logits, row))
    expected = [slow_sample(logits[i].numpy(), p, position=1) for i, p in enumerate(params)]
    assert tokens_of(draw.sample(logits, rows)) == expected
    assert sorted_rows == rows
    assert expected[3] < 4


def test_a_top_k_beyond_the_candidates_is_decided_among_them_where_min_p_keeps_fewer_and_top_p_is_off(plain_torch, monkeypatch):
    vocab_size = 5000
    off = SamplingParams(top_k=2000, min_p=0.3)
    params = [off, replace(off, top_p=0.9), replace(off, min_p=0.01)]
    logits = make_logits(3, vocab_size, seed=6, spread=0.5)
    rows = [row(p, vocab_size=vocab_size, position=1) for p in params]
    draw = Sampler(vocab_size=vocab_size, device=CPU)
    sorted_rows = []
    slow_way = draw._draw_sorted
    monkeypatch.setattr(draw, "_draw_sorted", lambda logits, row: sorted_rows.append(row) or slow_way(logits, row))
    assert tokens_of(draw.sample(logits, rows)) == [slow_sample(logits[i].numpy(), p, position=1) for i, p in enumerate(params)]
    assert sorted_rows == rows[1:], "of the second nobody knows the whole weight, and the third keeps more than the candidates"


def test_the_usual_filters_never_sort_the_vocabulary(plain_torch, monkeypatch):
    vocab_size = 151_646
    params = [SamplingParams(temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05), SamplingParams(), SamplingParams(top_p=0.9)]
    logits = make_logits(3, vocab_size, seed=7, spread=4.0)
    rows = [row(p, vocab_size=vocab_size, prompt=(1, 2)) for p in params]
    draw = Sampler(vocab_size=vocab_size, device=CPU)
    monkeypatch.setattr(draw, "_draw_sorted", lambda *_: pytest.fail("sorted"))
    assert tokens_of(draw.sample(logits, rows)) == [slow_sample(logits[i].numpy(), p, prompt=(1, 2)) for i, p in enumerate(params)]


def test_greedy_takes_the_lowest_id_of_equal_logits():
    logits = torch.zeros(2, 3000)
    logits[0, [70, 900, 2999]] = 5.0
    rows = [row(SamplingParams(temperature=0.0), vocab_size=3000)] * 2
    assert tokens_of(Sampler(vocab_size=3000, device=CPU).sample(logits, rows)) == [70, 0]


def test_padding_columns_are_never_sampled():
    logits = torch.full((300, 40), 50.0)
    logits[:, :30] = 0.0
    rows = [row(SamplingParams(temperature=i % 2, logprobs=40), vocab_size=30, position=i) for i in range(300)]
    answers = Sampler(vocab_size=30, device=CPU).sample(logits, rows)
    assert max(tokens_of(answers)) < 30
    assert all(len(answer.logprobs[0].top) == 30 for answer in answers)


def test_stop_ids_wait_for_min_tokens():
    params = SamplingParams(temperature=0.0, stop_token_ids=(1, 2, 9_999), min_tokens=3)
    logits = torch.tensor([[0.0, 5.0, 4.0, 1.0]]).expand(5, -1)
    rows = [row(params, vocab_size=4, position=i) for i in range(5)]
    assert tokens_of(Sampler(vocab_size=4, device=CPU).sample(logits, rows)) == [3, 3, 3, 1, 1]


def test_a_mask_of_allowed_ids_applies_only_to_its_row():
    logits = make_logits(3, 100, seed=8)
    best = logits.argmax(-1).tolist()
    only_67, nothing = np.zeros((2, 4), np.int32)
    only_67[2] = 1 << 3
    rows = [row(SamplingParams(temperature=t), vocab_size=100) for t in (0.0, 1.0, 0.0)]
    rows = [rows[0], rows[1]._replace(allowed=only_67), rows[2]._replace(allowed=nothing)]
    answers = Sampler(vocab_size=100, device=CPU).sample(logits, rows)
    assert [a.tokens for a in answers] == [(best[0],), (67,), ()]
    assert answers[2].fault == sampler.NOTHING_LEFT


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf, torch.inf])
def test_a_row_without_finite_logits_is_a_fault_of_that_row(bad):
    params = [*FILTERS, SamplingParams(repetition_penalty=1.3, logprobs=2)]
    logits = make_logits(2 * len(params), 2000, seed=9)
    rows = [row(params[i // 2], vocab_size=2000, position=4, sequence=i) for i in range(2 * len(params))]
    draw = Sampler(vocab_size=2000, device=CPU).sample
    sound = draw(logits, rows)
    logits[::2] = bad
    mixed = draw(logits, rows)
    assert [a.fault for a in mixed[::2]] == [sampler.NOT_FINITE] * len(params)
    assert all(a.tokens == () and a.logprobs == () for a in mixed[::2])
    assert mixed[1::2] == sound[1::2]


def test_one_nan_among_finite_logits_is_a_fault():
    logits = make_logits(2, 2000, seed=10)
    logits[0, 1234] = torch.nan
    rows = [row(SamplingParams(temperature=0.0), vocab_size=2000)] * 2
    assert [a.fault for a in Sampler(vocab_size=2000, device=CPU).sample(logits, rows)] == [sampler.NOT_FINITE, None]


def test_logprobs_are_of_the_raw_logits():
    vocab_size = 500
    params = SamplingParams(temperature=0.0, logit_bias=((7, 100.0),), repetition_penalty=1.5, logprobs=4)
    logits = make_logits(1, vocab_size, seed=11)
    (answer,) = Sampler(vocab_size=vocab_size, device=CPU).sample(logits, [row(params, vocab_size=vocab_size, prompt=(3, 4))])
    expected = torch.log_softmax(logits[0].double(), -1)
    (logprobs,) = answer.logprobs
    assert answer.tokens == (7,)
    assert logprobs.logprob == pytest.approx(expected[7].item(), abs=1e-5)
    values, ids = expected.topk(4)
    assert [token for token, _ in logprobs.top] == ids.tolist()
    assert [value for _, value in logprobs.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_equal_alternatives_are_sorted_by_id():
    logits = torch.zeros(1, 2000)
    logits[0, 1500] = 1.0
    params = SamplingParams(temperature=0.0, logprobs=4)
    (answer,) = Sampler(vocab_size=2000, device=CPU).sample(logits, [row(params, vocab_size=2000)])
    assert [token for token, _ in answer.logprobs[0].top] == [1500, 0, 1, 2]


def test_rows_ask_for_different_numbers_of_alternatives():
    rows = [row(SamplingParams(temperature=0.0, logprobs=n), vocab_size=300) for n in (None, 0, 2, 20)]
    answers = Sampler(vocab_size=300, device=CPU).sample(make_logits(4, 300, seed=12), rows)
    assert [[len(position.top) for position in answer.logprobs] for answer in answers] == [[], [0], [2], [20]]


def test_large_batches_are_drawn_in_parts_with_the_same_answers(plain_torch, monkeypatch):
    logits = make_logits(20, 2000, seed=13)
    rows = [row(SamplingParams(top_p=0.5 if i % 2 else 1.0), vocab_size=2000, position=i) for i in range(20)]
    draw = Sampler(vocab_size=2000, device=CPU).sample
    whole = draw(logits, rows)
    monkeypatch.setattr("engine.run.sampling.filters._WHOLE_ELEMENTS", 6000)
    assert draw(logits, rows) == whole


def test_extreme_uniforms_never_give_an_id_without_weight():
    weights = torch.tensor([0, 3, 0, 1, 0]).expand(5, -1)
    uniforms = torch.tensor([2.0**-53, 0.75 - 2.0**-20, 0.75, 0.75 + 2.0**-20, 1 - 2.0**-53], dtype=torch.float64)
    assert filters._invert_cdf(weights, uniforms)[0].tolist() == [1, 1, 3, 3, 3]


def test_candidates_grow_with_top_k_and_stay_bounded():
    rows = [row(SamplingParams(top_k=k), vocab_size=5000) for k in (3, 20)]
    assert groups.group_rows(rows, 5000)[0].num_candidates < 100
    rows.append(row(SamplingParams(top_k=4000), vocab_size=5000))
    assert groups.group_rows(rows, 5000)[0].num_candidates == groups.MAX_CANDIDATES
