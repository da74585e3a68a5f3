"""Groups the rows of a step by how much of the vocabulary their filters may need to see."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from engine.request import SamplingParams
from engine.run.noise import uniform
from engine.run.sampling.filters import DrawParams
from engine.run.sampling.state import Row
from engine.run.transfer import upload

MAX_CANDIDATES = 1024
"""Rows whose filters keep more are sorted whole."""

MORE_CANDIDATES = 64
"""Candidates beyond top-k, so that all ids that tie with the last one are included."""

FEW_TOP_K = 64
"""Common values of top-k. Up to here a captured step looks at few candidates."""

DrawMode = Literal["greedy", "unfiltered", "bounded", "open"]


@dataclass(frozen=True)
class DrawGroup:
    """Rows that are drawn by the same operations."""

    mode: DrawMode
    at: tuple[int, ...]
    """Indices of the rows in the step."""
    num_candidates: int


def group_rows(rows: Sequence[Row], vocab_size: int) -> list[DrawGroup]:
    """The groups of rows that are drawn; greedy rows are in none."""
    modes = [draw_mode_of(row.state.sampling, vocab_size) for row in rows]
    groups = []
    drawn: tuple[DrawMode, ...] = ("unfiltered", "bounded", "open")
    for mode in drawn:
        at = tuple(i for i, its_mode in enumerate(modes) if its_mode == mode)
        if at:
            wanted = max(_num_candidates(rows[i].state.sampling) for i in at)
            groups.append(DrawGroup(mode=mode, at=at, num_candidates=min(wanted, MAX_CANDIDATES)))
    return groups


def draw_params(rows: Sequence[Row], vocab_size: int, device: torch.device) -> DrawParams:
    """The rows' parameters and noise as tensors."""
    sampling = [row.state.sampling for row in rows]
    floats = np.array([(p.temperature, p.top_p, p.min_p) for p in sampling], np.float64)
    integers = [(row.state.seed, row.state.choice, row.position, top_k_of(row.state.sampling, vocab_size)) for row in rows]
    temperature_R, top_p_R, min_p_R = upload(floats, device).T.contiguous()
    seed_R, choice_R, position_R, top_k_R = upload(np.array(integers, np.int64), device).T.contiguous()
    return DrawParams(temperature_R, top_k_R, top_p_R, min_p_R, uniform(seed_R, choice_R, position_R))


def draw_mode_of(sampling: SamplingParams, vocab_size: int) -> DrawMode:
    """How a row with these parameters is drawn."""
    if sampling.temperature == 0:
        return "greedy"
    if top_k_of(sampling, vocab_size) < vocab_size:
        return "bounded"
    if sampling.top_p < 1:
        return "open"
    return "bounded" if sampling.min_p > 0 else "unfiltered"


def top_k_of(sampling: SamplingParams, vocab_size: int) -> int:
    """Top-k, or the whole vocabulary if it is off."""
    return min(sampling.top_k, vocab_size) if sampling.top_k > 0 else vocab_size


def _num_candidates(sampling: SamplingParams) -> int:
    return sampling.top_k + MORE_CANDIDATES if sampling.top_k > 0 else MAX_CANDIDATES
