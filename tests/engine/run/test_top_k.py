"""Searching by segments finds what searching everything finds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.run.sampling.top_k import candidates, candidates_torch, highest, highest_torch, num_certain


@st.composite
def rows_of_logits(draw):
    """Any number of columns, from a wider matrix like that of a padded vocabulary; sometimes rounded, so that many are equal."""
    vocab_size = draw(st.sampled_from([1, 2, 63, 64, 65, 511, 512, 513, 1000, 5000, 20_001]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(draw(st.integers(1, 4)), vocab_size + 3, generator=generator)
    if draw(st.booleans()):
        logits = (logits * draw(st.sampled_from([1, 4]))).round()
    if draw(st.booleans()):
        logits[torch.rand(logits.shape, generator=generator) < 0.99] = -torch.inf
    return logits.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))[:, :vocab_size]


@settings(max_examples=150, deadline=None)
@given(logits=rows_of_logits(), find=st.sampled_from([highest, highest_torch]))
def test_the_highest_is_the_first_of_the_highest(logits, find):
    values, ids = find(logits)
    assert torch.equal(values, logits.amax(-1))
    for row in range(len(logits)):
        if values[row] > -torch.inf:
            assert ids[row] == (logits[row] == values[row]).nonzero()[0]


@settings(max_examples=150, deadline=None)
@given(logits=rows_of_logits(), count=st.sampled_from([1, 5, 84, 300, 1024]), find=st.sampled_from([candidates, candidates_torch]))
def test_candidates_are_the_highest_and_what_is_called_certain_is(logits, count, find):
    vocab_size = logits.shape[1]
    values, ids = find(logits, count) if count < vocab_size else candidates(logits, count)
    assert (ids.diff(dim=-1) > 0).all()
    assert values.shape == ids.shape == (len(logits), min(count, vocab_size))
    ordered, order = values.sort(dim=-1, descending=True, stable=True)
    expected = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(ordered, expected.values[:, : ordered.shape[1]])
    for row, certain in enumerate(num_certain(ordered, vocab_size).tolist()):
        finite = min(certain, int((ordered[row] > -torch.inf).sum()))
        assert torch.equal(ids[row][order[row]][:finite], expected.indices[row][:finite])


@pytest.mark.parametrize("find", [highest, highest_torch])
@pytest.mark.parametrize("vocab_size", [10, 700, 5000])
def test_a_nan_is_the_highest(vocab_size, find):
    logits = torch.zeros(4, vocab_size)
    logits[1, vocab_size - 1] = logits[3, 0] = torch.nan
    logits[2, vocab_size // 2] = torch.inf
    values, ids = find(logits)
    assert values.isnan().tolist() == [False, True, False, True]
    assert values[2] == torch.inf
    assert ids[2] == vocab_size // 2


@pytest.mark.parametrize("count", [1, 84, 1024])
def test_a_row_with_nan_has_valid_candidate_ids_and_affects_no_other(count):
    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))
    logits[1, 7] = logits[3, 4999] = torch.nan
    logits[2] = torch.nan
    values, ids = candidates(logits, count)
    assert ((ids >= 0) & (ids < 5000)).all()
    alone, alone_ids = candidates(logits[:1], count)
    assert torch.equal(values[:1], alone)
    assert torch.equal(ids[:1], alone_ids)
