"""Check random noise, sampling, rows that need the full distribution, and logit edits. R rows, V vocabulary, W words of 32 bits."""

import random
from dataclasses import replace

import numpy as np
import torch

from benchmarks.gpu.kernels.checks import Checks
from benchmarks.gpu.timing import median_s, replayed_s
from engine.plan import NewSequence
from engine.request import SamplingParams
from engine.run.noise import uniform
from engine.run.sampling.columns import CHOICE, DRAW_MODE, SEED, TEMPERATURE, TOP_K, SamplingColumns, graph_mode
from engine.run.sampling.edit_table import EditTable
from engine.run.sampling.filters import DrawParams, draw_filtered, total_weight
from engine.run.sampling.sampler import Sampler
from engine.run.sampling.state import Row, SamplingState
from parallel.aligned_rows import empty_rows

DRAWN = {
    "greedy": SamplingParams(temperature=0.0),
    "top-k 20": SamplingParams(top_k=20, top_p=0.8, temperature=0.7),
    "temperature 1": SamplingParams(),
    "top-p 0.5": SamplingParams(top_p=0.5, temperature=0.3),
    "large nuclei": SamplingParams(top_p=0.97, temperature=2.5),
}
"""Sampling parameters that are timed."""


def noise(checks: Checks) -> None:
    from parallel.cuda.noise import uniform as in_one_launch

    words = [torch.randint(-(2**63), 2**63 - 1, (1000,)), *(torch.randint(0, 2**32, (1000,)) for _ in range(2))]
    found = in_one_launch(*(some.to(checks.device) for some in words), 0)
    different = int((found.cpu() != uniform(*words)).sum())
    checks.results.add("kernels", "noise: rows that differ", float(different), "rows")
    checks.expect(not different, f"noise differs from its twin in {different} of 1000 rows")


def sampling(checks: Checks) -> None:
    """The device must sample the same tokens as a CPU from the same logits."""
    cpu, draw = torch.device("cpu"), random.Random()
    params = [SamplingParams(temperature=0.0), SamplingParams(top_k=20, top_p=0.8), SamplingParams(top_p=0.9), SamplingParams()]
    logits = (torch.randn(32, checks.sizes.vocab_size) * 3).to(checks.dtype)
    rows = [_row(checks, draw.choice(params), draw.randrange(1 << 31)) for _ in range(32)]
    wanted = Sampler(vocab_size=checks.sizes.vocab_size, device=cpu).sample(logits, rows)
    found = Sampler(vocab_size=checks.sizes.vocab_size, device=checks.device).sample(logits.to(checks.device), rows)
    different = sum(one.tokens != other.tokens for one, other in zip(found, wanted, strict=True))
    checks.results.add("kernels", "sampling: rows that differ from the CPU's, of 32", float(different), "rows")
    checks.expect(not different, f"sampling gives {different} other tokens of 32")
    if checks.device.type == "cuda":
        for name, one in DRAWN.items():
            for count in checks.sizes.rows:
                _time_drawing(checks, name, one, count)


def undecided(checks: Checks) -> None:
    """Rows that are sampled from the full distribution in place: compare with sorting on the CPU, and time them."""
    from parallel.cuda.sampling_full_vocab import draw_full_vocab

    count, width = checks.sizes.undecided, checks.sizes.vocab_size
    logits, uniform_R = torch.randn(count, width) * 3, torch.rand(count, dtype=torch.float64)
    draw = random.Random()
    rows = [(draw.choice([0.7, 1.0, 2.5]), draw.choice([width, width // 2]), draw.choice([0.9, 0.97, 1.0]), 0.0) for _ in range(count)]
    numbers = torch.tensor(rows, dtype=torch.float64).T
    params = DrawParams(numbers[0], numbers[1].long(), numbers[2], numbers[3], uniform_R)
    wanted, _ = draw_filtered(logits, params, width, total_weight(logits, params))
    none = torch.zeros(count, dtype=torch.int64)
    given = [
        x.contiguous().to(checks.device)
        for x in (none.clone(), logits, numbers[0], params.top_k_R, numbers[2], numbers[3], uniform_R, none)
    ]
    draw_full_vocab(*given)
    different = int((given[0].cpu() != wanted).sum())
    checks.results.add("kernels", f"undecided rows that differ from the CPU's, of {count}", float(different), "rows")
    checks.expect(not different, f"{different} of {count} undecided rows differ")
    for name, decided in (("undecided", 0), ("decided", 1)):
        given[-1] = none.to(checks.device) + decided
        seconds = median_s(lambda: draw_full_vocab(*given), checks.device, repeats=3)
        checks.results.add("kernels", f"{count} rows, {name}", seconds * 1000, "ms")


def edits(checks: Checks) -> None:
    """Logit edits must equal plain torch on a CPU bit for bit."""
    width, generator = checks.sizes.vocab_size, torch.Generator().manual_seed(random.getrandbits(32))
    params = SamplingParams(repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.3, logit_bias=((7, 3.0), (9, -100.0)))
    for count in checks.sizes.rows:
        logits = torch.randn(count, width, generator=generator).to(checks.dtype)
        tables = [EditTable(num_entries=count, vocab_size=width, device=one) for one in (checks.device, torch.device("cpu"))]
        for number in range(count):
            history = tuple(torch.randint(0, width, (100,), generator=generator).tolist()) * 2
            for table in tables:
                table.open(SamplingState(NewSequence(number, 0, 50, params, history), vocab_size=width))
        entries_R, none_R = torch.arange(count), torch.zeros(count, dtype=torch.int64)
        words_GW = torch.randint(-(2**31), 2**31, (1, -(-width // 32)), generator=generator).to(torch.int32)
        given = (entries_R, none_R, none_R - (entries_R % 2), words_GW)
        for table in tables:
            table.count_tokens(*(x.to(table.device) for x in (entries_R, entries_R * 3, none_R + 500)))
        wanted = tables[1].edit_torch(logits, *given)
        on_device = [x.to(checks.device) for x in (logits, *given)]
        found = tables[0].edit(*on_device).cpu()
        different = int((found != wanted).sum())
        checks.results.add("kernels", f"edited logits of {count} that differ", float(different), "numbers")
        checks.expect(not different, f"{different} edited logits of {count} rows differ")
        num_bytes = count * width * (logits.itemsize + 4 + 4)
        checks.timed(f"edits of {count}", lambda on_device=on_device, table=tables[0]: table.edit(*on_device), num_bytes)


def _time_drawing(checks: Checks, name: str, params: SamplingParams, count: int) -> None:
    """Time the sampling kernels of a captured step, with logits flatter than any model's."""
    from parallel.cuda.sampling import draw

    checks.results.go_on()
    columns = SamplingColumns()
    for at in range(count):
        columns.put(at, _row(checks, params, at).state)
    told = torch.from_numpy(columns.of(np.arange(count))).to(checks.device)
    logits_RV = empty_rows(count, checks.sizes.vocab_size, dtype=checks.dtype, device=checks.device).normal_() * 3
    report_3R, floats = torch.empty(3, count, dtype=torch.int64, device=checks.device), told[TEMPERATURE:].view(torch.float64)
    given = {
        "seed_R": told[SEED],
        "choice_R": told[CHOICE],
        "position_R": told[SEED] % 1000,
        "top_k_R": told[TOP_K],
        "mode_R": told[DRAW_MODE],
    }
    given |= {"temperature_R": floats[0], "top_p_R": floats[1], "min_p_R": floats[2]}
    hardest_mode = graph_mode(int(told[DRAW_MODE].max()))
    seconds = replayed_s(lambda: draw(logits_RV, report_3R, hardest_mode=hardest_mode, **given), checks.device, launches=5)
    checks.results.add("kernels", f"drawing {count}, {name}", seconds * 1e6, "us")


def _row(checks: Checks, params: SamplingParams, seed: int) -> Row:
    opening = NewSequence(0, 0, 1, replace(params, seed=seed))
    return Row(SamplingState(opening, vocab_size=checks.sizes.vocab_size), 3)
