"""Logits processing kernels against the reference, bit for bit."""

import pytest
import torch

from engine.plan import NewSequence
from engine.request import SamplingParams
from engine.run.sampling.edit_table import EditTable
from engine.run.sampling.state import SamplingState
from tests.parallel.cuda.aligned import aligned

VOCAB_SIZE = 2500
RULES = [
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.3, frequency_penalty=0.7),
    SamplingParams(frequency_penalty=-0.3, logit_bias=tuple((at * 11, at / 7) for at in range(200))),
    SamplingParams(stop_token_ids=(3, 2499, 100), min_tokens=5, logit_bias=((3, 50.0), (4, -3.0))),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lies_at_whole_units", [False, True])
def test_results_are_bit_identical_to_the_reference(lies_at_whole_units: bool, dtype: torch.dtype, device: torch.device) -> None:
    from parallel.cuda.logit_keys import empty_parts
    from parallel.cuda.logits_processing import process_logits

    generator = torch.Generator().manual_seed(1)
    table = EditTable(num_entries=4, vocab_size=VOCAB_SIZE, device=device)
    states = []
    for number, params in enumerate(RULES):
        history = torch.randint(0, VOCAB_SIZE, (300,), generator=generator).tolist() if params.needs_history else []
        states.append(SamplingState(NewSequence(number, 0, 100, params, (*history, *history[-50:])), vocab_size=VOCAB_SIZE))
        table.open(states[-1])
    entries_R = torch.tensor([states[1].entry, -1, states[0].entry, states[2].entry, -1], device=device)
    for repeated in (7, 7, 2499):
        table.count_tokens(entries_R, torch.full_like(entries_R, repeated), torch.full_like(entries_R, 400 + repeated))
    stops_R, word_rows_R = torch.tensor([0, 0, 0, 1, 0], device=device), torch.tensor([-1, 1, 0, -1, -1], device=device)
    words_GW = torch.randint(-(2**31), 2**31, (2, -(-VOCAB_SIZE // 32)), generator=generator).to(torch.int32).to(device)
    logits_RV = (torch.randn(5, VOCAB_SIZE + 9, generator=generator) * 3).to(dtype).to(device)[:, :VOCAB_SIZE]
    logits_RV = aligned(logits_RV) if lies_at_whole_units else logits_RV
    raw_highest_RN = empty_parts(logits_RV)
    found = process_logits(
        logits_RV, entries_R=entries_R, stops_now_R=stops_R, word_rows_R=word_rows_R, words_GW=words_GW, raw_highest_RN=raw_highest_RN,
        **table.columns,
    )  # fmt: skip
    wanted = table.edit_torch(logits_RV, entries_R, stops_R, word_rows_R, words_GW)
    assert torch.equal(found, wanted)
    bits_RN = raw_highest_RN.cpu()
    highest_R = (bits_RN ^ ((bits_RN >> 31) & 0x7FFFFFFF)).view(torch.float32).amax(-1)
    assert torch.equal(highest_R, logits_RV.float().amax(-1).cpu())
    assert torch.equal(wanted[4], logits_RV[4].float())
    assert wanted[3, [3, 100, 2499]].isneginf().all()
    assert (wanted[0] != logits_RV[0].float()).sum() > 300, "penalties and biases do something"


def test_a_token_is_counted_once_and_no_other_entry_is_touched(device: torch.device) -> None:
    from parallel.cuda.logits_processing import count_tokens

    generator = torch.Generator().manual_seed(2)
    ours, reference = (EditTable(num_entries=200, vocab_size=50, device=device) for _ in range(2))
    for table in (ours, reference):
        table._known_N[::3] = torch.iinfo(torch.int64).max
    for step in range(6):
        entries_R = torch.randperm(200, generator=generator)[:150].to(device)
        entries_R[::7] = -1
        tokens_R = torch.randint(0, 53, (150,), generator=generator).to(device)  # some are beyond the vocabulary
        starts_R = torch.randint(0, 3, (150,), generator=generator).to(device) + step
        reference.count_tokens_torch(entries_R, tokens_R, starts_R)
        count_tokens(entries_R, tokens_R, starts_R, ours._counts_NV, ours._known_N)
        assert torch.equal(ours._counts_NV, reference._counts_NV)
        assert torch.equal(ours._known_N, reference._known_N)
    assert 100 < int(reference._counts_NV.sum()) // 2 < 700
