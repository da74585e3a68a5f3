"""Check steps replayed from CUDA graphs against the same steps launched eagerly: the model's logits and the sampler's tokens."""

import random

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.models import ServedModel
from benchmarks.gpu.results import Results
from benchmarks.gpu.run_ahead import wrong_ahead, wrong_beside_prompts
from engine.plan import NewSequence, StepPlan, Work
from engine.request import SamplingParams
from engine.run.batch_builder import build_batch
from engine.run.block_tables import BlockTables
from engine.run.decode_graphs import DecodeGraphs
from engine.run.decode_rows import decode_rows
from engine.run.sampling.columns import SamplingColumns
from engine.run.sampling.sampler_graphs import SamplerGraphs, as_decided
from engine.run.sampling.state import Row, SamplingState
from parallel.quantised_format import QuantisedFormat

KINDS = (
    SamplingParams(temperature=0.0),
    SamplingParams(top_k=20, top_p=0.8, temperature=0.7),
    SamplingParams(top_p=0.9),
    SamplingParams(min_p=0.05),
    SamplingParams(),
    SamplingParams(top_k=20, top_p=0.8, temperature=0.7, repetition_penalty=1.05),
    SamplingParams(temperature=0.0, frequency_penalty=0.5, logit_bias=((5, 2.0),)),
    SamplingParams(top_p=0.97, temperature=2.5),
)
"""The last one is so flat that the fast path with few candidates cannot decide it."""
ROWS, ANSWERS = (1, 5, 9, 33), (1, 33)
"""Rows of replayed steps, and numbers of answers, that are compared."""
MOST, MOST_WITH_EXPERTS, MOST_IN_FP8 = 2e-2, 5e-2, 1e-1
"""Maximum relative error. A product with another number of rows may round differently (on an H200: no difference up to 10 rows; 1.1e-2
for 33 rows after four layers, replayed in a graph of 40). A token may then choose another of nearly equally likely experts, and one
rounding step of an FP8 activation is 6 %."""


@torch.inference_mode()
def check(results: Results, name: str, served: ServedModel) -> None:
    """
    Raises:
        AssertionError: a replay differs by more than rounding. Raised after everything was compared.
    """
    in_fp8 = isinstance(served.model.format, QuantisedFormat) and served.model.format.kind == "fp8"
    most, wrong = MOST_IN_FP8 if in_fp8 else MOST if served.model.config.moe is None else MOST_WITH_EXPERTS, list[str]()
    graphs, sampler_graphs = served.runner.decode_graphs, served.runner.sampler_graphs
    assert graphs is not None, "nothing was captured; the log says why"
    assert sampler_graphs is not None
    for cache in (*served.runner.cache.keys_NBGK, *served.runner.cache.values_NBGK):
        cache.normal_()
    for rows in ROWS:
        results.go_on()
        error = _error_of_logits(served, graphs, rows)
        results.add("replays", f"{name}: logits of {rows}, replayed and launched", error, "relative")
        if not error < most:  # as NaN is
            wrong.append(f"{name}: replayed logits of {rows} are off by {error:.2g}")
        different = _different_tokens(served, sampler_graphs, rows, graphs.size_for(rows))
        results.add("replays", f"{name}: tokens of {rows} that differ", float(different), "rows")
        if different:
            wrong.append(f"{name}: replayed sampling gives {different} other tokens of {rows}")
    for count in ANSWERS:
        results.go_on()
        wrong += wrong_ahead(results, name, served, kinds=KINDS, count=count)
    results.go_on()
    wrong += wrong_beside_prompts(results, name, served, kinds=KINDS, count=ANSWERS[-1])
    assert not wrong, "; ".join(wrong)


def _error_of_logits(served: ServedModel, graphs: DecodeGraphs, count: int) -> float:
    works, tables, replayed_RV = replayed_logits(served, graphs, count, random.Random())
    found = replayed_RV.double()
    built = build_batch(works, tables, served.runner.capacity.block_tokens, served.model.device)
    hidden_TD = served.model.hidden(built.forward, served.runner.cache)
    assert hidden_TD is not None
    wanted = served.model.logits(hidden_TD).double()[:, : found.shape[1]]
    return float((found - wanted).norm() / wanted.norm())


def replayed_logits(served: ServedModel, graphs: DecodeGraphs, count: int, draw: random.Random) -> tuple[list[Work], BlockTables, Tensor]:
    """Replay a decode step of ``count`` sequences with contexts of up to 300 tokens in separate blocks. Returns its works, block tables
    and logits (R, V), which are valid until the next replay."""
    tables, works = BlockTables(), []
    block_tokens = served.runner.capacity.block_tokens
    for number in range(count):
        start = draw.randrange(300)
        blocks = tuple(20 * number + at for at in range(start // block_tokens + 1))
        works.append(Work(number, start, (draw.randrange(served.model.config.vocab_size),), blocks, samples=True))
        tables.open(number)
    rows = decode_rows(StepPlan(0, tuple(works)), 0)
    assert rows is not None
    logits_RV = graphs.run(rows, rows.append_blocks(tables), tables)
    assert logits_RV is not None
    return works, tables, logits_RV


def _different_tokens(served: ServedModel, graphs: SamplerGraphs, count: int, size: int) -> int:
    """Number of tokens that differ between the sampler's graph and the eager sampler, with all kinds of parameters, on the logits of the
    last replay. Token counts for penalties are kept on the device by one, on the host by the other."""
    draw, columns, rows, states = random.Random(), SamplingColumns(), [], []
    vocab_size = served.sampler.vocab_size
    for at in range(count):
        history = tuple(draw.randrange(vocab_size) for _ in range(200))
        opening = NewSequence(at, at % 3, 0, draw.choice(KINDS), history)
        state, twin = (SamplingState(opening, vocab_size=vocab_size) for _ in range(2))
        if graphs.table is not None:
            graphs.table.open(state)
        columns.put(at, state)
        states.append(state)
        rows.append(Row(twin, draw.randrange(1 << 20)))
    decode_graphs = served.runner.decode_graphs
    assert decode_graphs is not None
    assert decode_graphs.logits is not None
    decode_graphs.positions_P.zero_()  # the tokens there are already counted
    logits_RV = decode_graphs.logits[:count]
    report = graphs.launch(columns.of(np.arange(count)), np.array([row.position for row in rows]), size).read()
    found = served.sampler.results(logits_RV, logits_RV, rows, as_decided(report))
    wanted = served.sampler.sample(logits_RV, rows)
    for state in states:
        if graphs.table is not None:
            graphs.table.close(state)
    return sum(one.tokens != other.tokens for one, other in zip(found, wanted, strict=True))
