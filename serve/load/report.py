"""Summarise what clients saw: latencies, gaps between tokens, throughput, and goodput (requests that met the objective)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np

from engine.counted import counted
from serve.load.client import Answer
from serve.terminal import Column, ColumnTable

PERCENTILES = (50, 90, 99, 100)
"""100 is the maximum."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Service level objective: the latencies within which a request counts as good."""

    ttft_s: float
    itl_s: float
    """Mean gap between its tokens."""

    def met_by(self, answer: Answer) -> bool:
        if answer.ending != "done" or not answer.token_s:
            return False
        gaps = _gaps(answer)
        return ttft_s(answer) <= self.ttft_s and (not gaps or sum(gaps) / len(gaps) <= self.itl_s)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Summary of one run; percentiles by name (``p50``), in seconds."""

    requests: int
    done: int
    cancelled: int
    failed: int
    elapsed_s: float
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    good: int
    goodput_per_s: float
    """Requests per second that met the objective."""
    late_s: float
    """Maximum delay of the load generator behind its own schedule. More than a few milliseconds distort the figures."""
    ttft_s: dict[str, float]
    itl_s: dict[str, float]
    """Percentiles of all gaps of all requests."""
    pause_s: dict[str, float]
    """Percentiles of each request's longest gap: users notice it, but percentiles of all gaps hide it."""
    e2e_s: dict[str, float]
    errors: dict[str, int]


def ttft_s(answer: Answer) -> float:
    """Time to the first token, from the scheduled time."""
    return answer.token_s[0] - answer.due_s


def _gaps(answer: Answer) -> list[float]:
    return [later - earlier for earlier, later in pairwise(answer.token_s)]


def summarise(answers: Sequence[Answer], objective: Objective) -> Summary:
    done = [answer for answer in answers if answer.ending == "done"]
    begun = [answer for answer in answers if answer.token_s]
    elapsed_s = max((answer.end_s for answer in answers), default=0.0) or 1e-9
    output = sum(answer.output_tokens if answer.output_tokens is not None else len(answer.token_s) for answer in answers)
    good = sum(objective.met_by(answer) for answer in answers)
    errors: dict[str, int] = {}
    for answer in answers:
        if answer.ending == "failed":
            errors[answer.error] = errors.get(answer.error, 0) + 1
    return Summary(
        requests=len(answers),
        done=len(done),
        cancelled=sum(answer.ending == "cancelled" for answer in answers),
        failed=sum(answer.ending == "failed" for answer in answers),
        elapsed_s=elapsed_s,
        prompt_tokens=sum(answer.prompt_tokens or 0 for answer in answers),
        output_tokens=output,
        output_tokens_per_s=output / elapsed_s,
        requests_per_s=len(done) / elapsed_s,
        good=good,
        goodput_per_s=good / elapsed_s,
        late_s=max((answer.sent_s - answer.due_s for answer in answers), default=0.0),
        ttft_s=_percentiles([ttft_s(answer) for answer in begun]),
        itl_s=_percentiles([gap for answer in begun for gap in _gaps(answer)]),
        pause_s=_percentiles([max(gaps) for answer in begun if (gaps := _gaps(answer))]),
        e2e_s=_percentiles([answer.end_s - answer.due_s for answer in done]),
        errors=errors,
    )


def as_json(summary: Summary, answers: Sequence[Answer]) -> dict[str, object]:
    """The summary, and the times of each request for further analysis."""
    requests = [{name: value for name, value in asdict(answer).items() if name != "text"} for answer in answers]
    return {"summary": asdict(summary), "requests": requests}


def table_of(summary: Summary) -> ColumnTable:
    columns = [Column(heading="seconds", is_text=True, is_key=True)]
    columns += [Column(heading="most" if percentile == 100 else f"p{percentile}") for percentile in PERCENTILES]
    rows = {
        "to the first token": summary.ttft_s,
        "between tokens": summary.itl_s,
        "longest pause of a stream": summary.pause_s,
        "to the end": summary.e2e_s,
    }
    return ColumnTable(
        columns, [(name, *(f"{values[f'p{p}']:.3f}" if values else "" for p in PERCENTILES)) for name, values in rows.items()]
    )


def lines_of(summary: Summary, objective: Objective) -> list[str]:
    lines = [
        f"{counted(summary.requests, 'request')} in {summary.elapsed_s:.1f} s: "
        f"{summary.done} done, {summary.cancelled} cancelled, {summary.failed} failed",
        f"{summary.output_tokens_per_s:,.1f} tokens/s out, {summary.requests_per_s:.2f} requests/s",
        f"goodput {summary.goodput_per_s:.2f} requests/s: {summary.good} kept {objective.ttft_s:g} s to the first token "
        f"and {objective.itl_s:g} s between tokens",
    ]
    if summary.late_s > 0.05:
        lines.append(f"the load generator was up to {summary.late_s:.2f} s behind schedule (counted as latency): it has too little CPU")
    return lines + [f"{count} failed: {error}" for error, count in sorted(summary.errors.items(), key=lambda item: -item[1])[:5]]


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
