"""Step 11 of a request, replayed: the next token of each row of a captured step, where nothing but filters and noise decides.

What the sampler launches depends on who is in a step. Here it is one of three sequences of launches, and which filters a row has is
read on the device. The answers are the sampler's: filters and draws are in whole numbers, so it does not matter among how many
candidates a row is drawn. R rows, B rows of the largest captured step, V ids that can be sampled.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.run.cuda_graphs import Graphs, Replay
from engine.run.noise import uniform
from engine.run.sampling.columns import (
    CHOICE,
    FEW,
    FIRST,
    GREEDY,
    KIND,
    MIN_P,
    SEED,
    TEMPERATURE,
    TOP_K,
    UNFILTERED,
)
from engine.run.sampling.filters import DrawParams, draw_filtered, draw_unfiltered
from engine.run.sampling.groups import FEW_TOP_K, MAX_CANDIDATES, MORE_CANDIDATES
from engine.run.sampling.search import highest
from engine.run.transfer import refill

MOST_KINDS = (GREEDY, FEW, UNFILTERED)
"""The hardest kind of row that each of the three takes."""
IN_SEED, IN_CHOICE, IN_POSITION, IN_TOP_K, IN_KIND, IN_TEMPERATURE, IN_TOP_P, IN_MIN_P = range(8)


class SamplerGraphs:
    """Of the logits that `engine.run.decode_graphs.DecodeGraphs` leaves."""

    def __init__(self, logits_BV: Tensor, sizes: tuple[int, ...], graphs: Graphs) -> None:
        self._logits_BV, self._sizes, self._graphs = logits_BV, sizes, graphs
        self._inputs = torch.from_numpy(_greedy_inputs(logits_BV.shape[0])).to(logits_BV.device)
        self._reports = {size: torch.zeros(3, size, dtype=torch.int64, device=logits_BV.device) for size in sizes}
        self._replays: dict[tuple[int, int], Replay] = {}

    def __repr__(self) -> str:
        return f"<SamplerGraphs [{len(self._replays)} captured]>"

    @property
    def num_graphs(self) -> int:
        return len(self._sizes) * len(MOST_KINDS)

    @torch.inference_mode()
    def capture(self, after_each: Callable[[], None] = lambda: None) -> None:
        self._replays.clear()
        for size in reversed(self._sizes):
            for most in reversed(MOST_KINDS):
                self._replays[size, most] = self._graphs.capture(partial(self._compute, size, most))
                after_each()

    def launch(self, columns: np.ndarray, known_S: np.ndarray, size: int) -> "Report":
        """Begin to sample, without waiting for it. ``columns`` are those of `SamplingColumns`, of sequences with so many known tokens."""
        count = columns.shape[1]
        inputs = _greedy_inputs(self._inputs.shape[1])  # what fills the step up is greedy, and nobody looks at it
        inputs[IN_SEED, :count], inputs[IN_CHOICE, :count], inputs[IN_POSITION, :count] = (
            columns[SEED],
            columns[CHOICE],
            known_S - columns[FIRST],
        )
        inputs[IN_TOP_K, :count], inputs[IN_KIND, :count] = columns[TOP_K], columns[KIND]
        inputs[IN_TEMPERATURE:, :count] = columns[TEMPERATURE : MIN_P + 1]
        refill(self._inputs, inputs)
        hardest = int(columns[KIND].max())
        self._replays[size, next(most for most in MOST_KINDS if most >= hardest)]()
        return Report(self._reports[size], count)

    def _compute(self, size: int, most: int) -> None:
        logits_RV = self._logits_BV[:size]
        highest_R, chosen_R = highest(logits_RV)
        decided_R = torch.ones_like(chosen_R)
        if most > GREEDY:
            chosen_R, decided_R = self._draw(logits_RV, self._params(size), self._inputs[IN_KIND, :size], chosen_R, most)
        self._reports[size].copy_(torch.stack((chosen_R, decided_R, highest_R.isfinite().long())))

    def _draw(self, logits_RV: Tensor, params: DrawParams, kind_R: Tensor, greedy_R: Tensor, most: int) -> tuple[Tensor, Tensor]:
        is_greedy_R = kind_R == GREEDY
        if most == FEW:
            drawn_R, decided_R = draw_filtered(logits_RV, params, FEW_TOP_K + MORE_CANDIDATES, None)
            return torch.where(is_greedy_R, greedy_R, drawn_R), (decided_R | is_greedy_R).long()
        unfiltered_R, whole_weight_R = draw_unfiltered(logits_RV, params)
        drawn_R, decided_R = draw_filtered(logits_RV, params, MAX_CANDIDATES, whole_weight_R)
        is_unfiltered_R = kind_R == UNFILTERED
        drawn_R = torch.where(is_greedy_R, greedy_R, torch.where(is_unfiltered_R, unfiltered_R, drawn_R))
        return drawn_R, (decided_R | is_greedy_R | is_unfiltered_R).long()

    def _params(self, size: int) -> DrawParams:
        inputs = self._inputs[:, :size]
        temperature_R, top_p_R, min_p_R = inputs[IN_TEMPERATURE:].view(torch.float64)
        uniform_R = uniform(inputs[IN_SEED], inputs[IN_CHOICE], inputs[IN_POSITION])
        return DrawParams(temperature_R, inputs[IN_TOP_K], top_p_R, min_p_R, uniform_R)


class Report:
    """What a replay drew, on its way to the host. The next step may begin before it is read."""

    def __init__(self, report_3R: Tensor, count: int) -> None:
        self._count, self._event = count, None
        self.chosen_R = report_3R[0]
        """On the device, until the next replay of as many rows."""
        if report_3R.device.type == "cuda":
            self._host = torch.empty(report_3R.shape, dtype=report_3R.dtype, pin_memory=True)
            self._host.copy_(report_3R, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = report_3R.clone()

    def is_there(self) -> bool:
        return self._event is None or bool(self._event.query())

    def read(self) -> np.ndarray:
        """int64 (3, S): what was drawn, whether that is decided, whether the logits are sound. Waits for the device."""
        if self._event is not None:
            self._event.synchronize()
        report: np.ndarray = self._host.numpy()[:, : self._count]
        return report


def _greedy_inputs(num_rows: int) -> np.ndarray:
    inputs = np.zeros((8, num_rows), np.int64)
    inputs[IN_TOP_K] = 1
    return inputs
