"""Launched and replayed steps, both sampled by kernels, against the sampler in plain torch."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.plan import NewSequence
from engine.request import SamplingParams
from engine.run.cuda_graphs import CudaGraphRecorder
from engine.run.sampling.columns import SamplingColumns
from engine.run.sampling.edit_table import EditTable
from engine.run.sampling.edits import edit_logits
from engine.run.sampling.sampler import Sampler
from engine.run.sampling.sampler_graphs import SamplerGraphs, as_decided
from engine.run.sampling.state import Row, SamplingState
from parallel.aligned_rows import ALIGNMENT, readable_columns
from tests.fakes.graphs import RecordedGraphs

VOCAB_SIZE = 1500
PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(top_k=20, top_p=0.8, temperature=0.7),
    SamplingParams(top_k=20, top_p=0.8, temperature=0.7, repetition_penalty=1.05),
    SamplingParams(top_p=0.97, temperature=2.5),
    SamplingParams(),
    SamplingParams(temperature=0.0, frequency_penalty=0.5, logit_bias=((5, 2.0),)),
    SamplingParams(stop_token_ids=(7, 9), min_tokens=100),
]


@contextmanager
def by_kernels(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also under Triton's interpreter."""
    from parallel.cuda import logits_processing, sampling

    def edited_by_kernel(table, logits_RV, entries_R, stops_R, word_rows_R=None, words_GW=None, *, raw_highest_RN=None):
        if word_rows_R is None:
            word_rows_R, words_GW = torch.full_like(entries_R, -1), torch.zeros(1, 1, dtype=torch.int32)
        given = {"entries_R": entries_R, "stops_now_R": stops_R, "word_rows_R": word_rows_R, "words_GW": words_GW}
        return logits_processing.process_logits(logits_RV, **given, **table.columns, raw_highest_RN=raw_highest_RN)

    with monkeypatch.context() as patch:
        if device.type == "cpu":
            for module in ("sampler", "sampler_graphs"):
                patch.setattr(f"engine.run.sampling.{module}.sampling_kernels_for", lambda _logits: sampling)
            patch.setattr(EditTable, "edit", edited_by_kernel)
            patch.setattr(
                EditTable, "count_tokens", lambda table, *rows: logits_processing.count_tokens(*rows, table._counts_NV, table._known_N)
            )
        yield


def opened(params: list[SamplingParams], draw: random.Random, table: EditTable | None) -> tuple[list[SamplingState], list[Row]]:
    """States with entries in the table, and rows of the same states without."""
    states, rows = [], []
    for number, one in enumerate(params):
        opening = NewSequence(
            number, number % 3, 0, replace(one, seed=draw.getrandbits(60)), tuple(draw.randrange(VOCAB_SIZE) for _ in range(30))
        )
        state, twin = (SamplingState(opening, vocab_size=VOCAB_SIZE) for _ in range(2))
        if table is not None:
            table.open(state)
        states.append(state)
        rows.append(Row(twin, 30))
    return states, rows


@pytest.mark.parametrize("kinds", [PARAMS, [one for one in PARAMS if one.temperature == 0]], ids=["all", "greedy"])
def test_a_launched_step_samples_like_plain_torch(
    kinds: list[SamplingParams], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, generator = random.Random(1), torch.Generator().manual_seed(1)
    _, rows = opened([draw.choice(kinds) for _ in range(7)], draw, None)
    logits_RV = torch.randn(7, VOCAB_SIZE + 4, generator=generator) * 3
    logits_RV[2, 5] = torch.nan
    logits_RV[3] = -torch.inf
    words = np.zeros(-(-VOCAB_SIZE // 32), np.int32)
    rows[4] = rows[4]._replace(allowed=words)
    wanted = Sampler(vocab_size=VOCAB_SIZE, device=torch.device("cpu")).sample(logits_RV, rows)
    with by_kernels(device, monkeypatch):
        found = Sampler(vocab_size=VOCAB_SIZE, device=device).sample(logits_RV.to(device), rows)
    assert found == wanted
    assert [one.fault is None for one in found] == [True, True, False, False, False, True, True]


def test_logits_edited_on_the_host_have_the_layout_of_those_edited_on_the_device() -> None:
    """Else the sampling kernels would be compiled a second time for them, without vectorised loads."""
    draw = random.Random(1)
    _, rows = opened([SamplingParams(repetition_penalty=1.1)] * 3, draw, None)
    raw_RV = torch.randn(3, VOCAB_SIZE + 4)[:, :VOCAB_SIZE]
    found = edit_logits(raw_RV, rows)
    assert found.stride(0) % ALIGNMENT == 0
    assert readable_columns(found) % ALIGNMENT == 0
    assert found.dtype == torch.float32
    assert found is not raw_RV


def test_a_replay_samples_like_the_sampler_after_any_previous_step(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, generator = random.Random(2), torch.Generator().manual_seed(2)
    logits_PV, told = torch.zeros(4, VOCAB_SIZE, device=device), torch.zeros(2, 4, dtype=torch.int64, device=device)
    table, sampler = EditTable(num_entries=4, vocab_size=VOCAB_SIZE, device=device), Sampler(vocab_size=VOCAB_SIZE, device=device)
    with by_kernels(device, monkeypatch):
        recorded = CudaGraphRecorder(device) if device.type == "cuda" else RecordedGraphs()
        graphs = SamplerGraphs(logits_PV, (4,), recorded, table=table, tokens_P=told[0], positions_P=told[1])
        graphs.capture()
        of_steps = [[PARAMS[at] for at in some] for some in ((2, 5, 3), (0, 0), (1, 0), (4, 3, 6, 1), (0,))]
        for params in of_steps:
            states, rows = opened(params, draw, table)
            logits_PV.copy_(torch.randn(4, VOCAB_SIZE, generator=generator) * 3)
            told[1] = 0  # counted already
            columns = SamplingColumns()
            for at, state in enumerate(states):
                columns.put(at, state)
            report = graphs.launch(columns.of(np.arange(len(rows))), np.full(len(rows), 30), 4).read()
            answers = sampler.results(logits_PV, logits_PV, rows, as_decided(report))
            with monkeypatch.context() as plain:
                plain.setattr("engine.run.sampling.sampler.sampling_kernels_for", lambda _logits: None)
                assert answers == sampler.sample(logits_PV[: len(rows)].clone(), rows)
            for state in states:
                table.close(state)
