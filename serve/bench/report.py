"""The figures of a benchmark, compared with the floors of the machine it ran on."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from serve.bench.ceiling import Ceiling
from serve.bench.workload import Round, Workload
from serve.terminal import Column, ColumnTable


@dataclass(frozen=True, kw_only=True)
class WeightBytes:
    """Weight bytes that a step reads at least, and multiply-adds per token."""

    per_step: int
    """Bytes of all weights, except embedding rows that no token of the step uses."""
    multiply_adds_per_prompt_token: int
    """Of a token after which nothing is sampled: without the head, and of the last layer only keys and values."""
    multiply_adds_per_token: int
    """Of a token after which one is sampled."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One workload's result: medians over the rounds."""

    workload: Workload
    tokens_per_s: float
    """Prompt tokens per second for a workload with one output token; otherwise output tokens per second, prefill included."""
    spread: float
    """(fastest - slowest) / median, over the rounds."""
    ttft_s: float
    itl_s: float
    floor_s: float
    elapsed_s: float

    @property
    def of_floor(self) -> float:
        """Fraction of the machine's best possible speed that was reached."""
        return self.floor_s / self.elapsed_s


def summarise(workload: Workload, rounds: Sequence[Round], weights: WeightBytes, ceiling: Ceiling) -> Figure:
    rates = [(r.prompt_tokens if workload.tokens_out == 1 else r.output_tokens) / r.elapsed_s for r in rounds]
    rate = statistics.median(rates)
    return Figure(
        workload=workload,
        tokens_per_s=rate,
        spread=(max(rates) - min(rates)) / rate,
        ttft_s=statistics.median(r.ttft_s for r in rounds),
        itl_s=statistics.median(r.itl_s for r in rounds),
        floor_s=floor_s(workload, weights, ceiling),
        elapsed_s=statistics.median(r.elapsed_s for r in rounds),
    )


def floor_s(workload: Workload, weights: WeightBytes, ceiling: Ceiling) -> float:
    """Lower bound in seconds on this machine: every step reads the weights or multiplies for all its tokens, whichever takes longer.
    Attention, KV and everything else is not counted, so this is a bound, not a forecast."""
    read_s = weights.per_step / ceiling.read_bytes_per_s
    prompt_tokens = workload.shared_prefix + workload.streams * (workload.tokens_in - 1)
    step_flop = 2 * weights.multiply_adds_per_token * workload.streams
    prefill_flop = 2 * weights.multiply_adds_per_prompt_token * prompt_tokens + step_flop
    prefill_s, step_s = (max(read_s, flop / ceiling.flop_per_s) for flop in (prefill_flop, step_flop))
    return prefill_s + (workload.tokens_out - 1) * step_s


def as_json(figures: Sequence[Figure]) -> list[dict[str, object]]:
    """One JSON object per workload."""
    return [
        {
            "name": figure.workload.name,
            "tokens_per_s": figure.tokens_per_s,
            "spread": figure.spread,
            "ttft_s": figure.ttft_s,
            "itl_s": figure.itl_s,
            "elapsed_s": figure.elapsed_s,
            "floor_s": figure.floor_s,
            "of_floor": figure.of_floor,
        }
        for figure in figures
    ]


TITLE = "Engine in process: closed loop, token ids in, greedy"


def table_of(figures: Sequence[Figure]) -> ColumnTable:
    headings = ("workload", "tokens/s", "spread", "TTFT ms", "ITL ms", "took s", "floor s", "of floor")
    columns = [Column(heading=heading, is_text=heading == "workload", is_key=heading == "workload") for heading in headings]
    rows = [
        (
            figure.workload.name,
            f"{figure.tokens_per_s:,.1f}",
            f"{figure.spread:.0%}",
            f"{figure.ttft_s * 1000:,.0f}",
            f"{figure.itl_s * 1000:,.1f}" if figure.itl_s else "",
            f"{figure.elapsed_s:,.2f}",
            f"{figure.floor_s:,.2f}",
            f"{figure.of_floor:.0%}",
        )
        for figure in figures
    ]
    return ColumnTable(columns, rows)
