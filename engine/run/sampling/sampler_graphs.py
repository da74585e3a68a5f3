"""CUDA graphs of the sampler: the next token of each row of a captured step. Place 11 of a request.

The eager sampler's launches depend on the rows of a step. Here they are one of three fixed sequences, with or without edits of the
logits, and each row's filters and edits are read on the device. The results equal the eager sampler's: filters and draws use integer
arithmetic, so the number of candidates does not matter. A row that is undecided among its candidates is redrawn from all ids at once,
because the next step may use the token before the host has read it. R rows, P rows of the largest captured step (padding
included), V ids that can be sampled, W 32-bit words of a mask over them, N parts of a row of logits.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from engine.run.cuda_graphs import GraphRecorder, Replay
from engine.run.noise import uniform
from engine.run.sampling.columns import (
    CHOICE,
    DRAW_MODE,
    ENTRY,
    FEW,
    GRAPH_MODES,
    GREEDY,
    MIN_P,
    NUM_PROMPT,
    SEED,
    TEMPERATURE,
    TOP_K,
    UNFILTERED,
    are_edited,
    graph_mode,
    may_be_edited,
    stop_ids_forbidden,
)
from engine.run.sampling.edit_table import NO_ENTRY, EditTable
from engine.run.sampling.filters import DrawParams, draw_filtered, draw_undecided, draw_unfiltered
from engine.run.sampling.groups import FEW_TOP_K, MAX_CANDIDATES, MORE_CANDIDATES
from engine.run.sampling.kernels import sampling_kernels_for
from engine.run.sampling.report import DrawReport
from engine.run.sampling.top_k import highest
from engine.run.transfer import PinnedBuffer, Readback, Staging, refill

NO_MASKS: Mapping[int, np.ndarray] = MappingProxyType({})
IN_SEED, IN_CHOICE, IN_POSITION, IN_TOP_K, IN_DRAW_MODE, IN_ENTRY, IN_STOPS, IN_MASK, IN_TEMPERATURE, IN_TOP_P, IN_MIN_P = range(11)


class SamplerGraphs:
    """`CapturedGraphs` that sample from the logits of `engine.run.decode_graphs.DecodeGraphs`."""

    def __init__(
        self,
        logits_PV: Tensor,
        sizes: tuple[int, ...],
        graphs: GraphRecorder,
        *,
        table: EditTable | None = None,
        tokens_P: Tensor | None = None,
        positions_P: Tensor | None = None,
        report: Tensor | None = None,
    ) -> None:
        """With a ``table`` logits are edited too, and the input tokens of the step, ``tokens_P`` at ``positions_P`` in their sequences,
        are counted. A replay writes its output to ``report`` (int64, three numbers for each row), tokens first."""
        self._logits_PV, self._sizes, self._graphs = logits_PV, sizes, graphs
        self.table, self._tokens_P, self._positions_P = table, tokens_P, positions_P
        device, num_rows = logits_PV.device, logits_PV.shape[0]
        self._staged = Staging(11, num_rows, device=device)
        self._inputs = self._staged.on_device
        self._inputs.copy_(torch.from_numpy(_greedy_inputs(num_rows)))
        self._mask_words_PW = torch.zeros(num_rows, -(-logits_PV.shape[1] // 32), dtype=torch.int32, device=device)
        report = torch.zeros(3 * num_rows, dtype=torch.int64, device=device) if report is None else report
        self._reports = {size: report[: 3 * size].view(3, size) for size in sizes}
        """All start at the same address: reading a token from there does not depend on the step's number of rows."""
        self._readback = Readback(report)
        self._replays: dict[tuple[int, int, bool], Replay] = {}
        self._cached_for: tuple[np.ndarray | None, int, bool] = None, GREEDY, False
        """Columns, their hardest draw mode, and whether they can ever be edited. Most steps have the same array again."""

    def __repr__(self) -> str:
        return f"<SamplerGraphs [{len(self._replays)} captured]>"

    @property
    def edits(self) -> bool:
        """Whether rows with entries or masks are supported."""
        return self.table is not None

    @property
    def num_graphs(self) -> int:
        return len(self._sizes) * len(GRAPH_MODES) * (1 + self.edits)

    @torch.inference_mode()
    def capture(self, after_each: Callable[[], None] = lambda: None) -> None:
        self._replays.clear()
        for size in reversed(self._sizes):
            for mode in reversed(GRAPH_MODES):
                for is_edited in (True, False) if self.edits else (False,):
                    self._replays[size, mode, is_edited] = self._graphs.capture(partial(self._compute, size, mode, is_edited))
                    after_each()

    def release(self) -> None:
        self._replays.clear()

    def launch(self, columns: np.ndarray, known_S: np.ndarray, size: int, mask_words: Mapping[int, np.ndarray] = NO_MASKS) -> "Report":
        """Launch the sampler without waiting for it.

        ``columns`` are those of `SamplingColumns`, of sequences with so many known tokens. ``mask_words`` has, by row of the step, the ids
        that the row is restricted to: int32 (W), a bit for each id, lowest first.
        """
        if mask_words or columns is not self._cached_for[0]:
            self._cached_for = columns, int(columns[DRAW_MODE].max()), self.edits and may_be_edited(columns)
        _, hardest_mode, may_be = self._cached_for
        is_edited = may_be and are_edited(columns, known_S)
        if is_edited or hardest_mode > GREEDY:  # otherwise no input is read
            self._upload_inputs(columns, known_S, size, is_edited, mask_words)
        self._replays[size, graph_mode(hardest_mode), is_edited]()
        return Report(self._readback.start_copy(), size, columns.shape[1])

    def _upload_inputs(
        self, columns: np.ndarray, known_S: np.ndarray, size: int, is_edited: bool, mask_words: Mapping[int, np.ndarray]
    ) -> None:
        count, inputs = columns.shape[1], self._staged.next_host_array()
        inputs[:, :size] = _greedy_inputs(size)  # padding rows are greedy, and nobody reads them
        inputs[IN_SEED, :count], inputs[IN_CHOICE, :count], inputs[IN_POSITION, :count] = (
            columns[SEED],
            columns[CHOICE],
            known_S - columns[NUM_PROMPT],
        )
        inputs[IN_TOP_K, :count], inputs[IN_DRAW_MODE, :count] = columns[TOP_K], columns[DRAW_MODE]
        inputs[IN_TEMPERATURE:, :count] = columns[TEMPERATURE : MIN_P + 1]
        if is_edited:
            inputs[IN_ENTRY, :count], inputs[IN_STOPS, :count] = columns[ENTRY], stop_ids_forbidden(columns, known_S)
            if mask_words:
                inputs[IN_MASK, list(mask_words)] = np.arange(len(mask_words))
                refill(self._mask_words_PW[: len(mask_words)], np.stack(list(mask_words.values())))
        self._staged.upload()

    def _compute(self, size: int, hardest_mode: int, is_edited: bool) -> None:
        raw_RV = logits_RV = self._logits_PV[:size]
        inputs, raw_highest_RN = self._inputs[:, :size], None
        kernels = sampling_kernels_for(raw_RV)
        if is_edited:
            assert self.table is not None
            assert self._tokens_P is not None
            assert self._positions_P is not None
            self.table.count_tokens(inputs[IN_ENTRY], self._tokens_P[:size], self._positions_P[:size])
            raw_highest_RN = kernels.empty_parts(raw_RV) if kernels else None
            logits_RV = self.table.edit(
                raw_RV, inputs[IN_ENTRY], inputs[IN_STOPS], inputs[IN_MASK], self._mask_words_PW, raw_highest_RN=raw_highest_RN
            )
        if kernels:
            temperature_R, top_p_R, min_p_R = inputs[IN_TEMPERATURE:].view(torch.float64)
            kernels.draw(
                logits_RV, self._reports[size], hardest_mode=hardest_mode, mode_R=inputs[IN_DRAW_MODE], seed_R=inputs[IN_SEED],
                choice_R=inputs[IN_CHOICE], position_R=inputs[IN_POSITION], top_k_R=inputs[IN_TOP_K], temperature_R=temperature_R,
                top_p_R=top_p_R, min_p_R=min_p_R, raw_highest_RN=raw_highest_RN,
            )  # fmt: skip
        else:
            self._draw_by_torch(size, hardest_mode, raw_RV, logits_RV)

    def _draw_by_torch(self, size: int, hardest_mode: int, raw_RV: Tensor, logits_RV: Tensor) -> None:
        """The reference for the kernels."""
        highest_R, chosen_R = highest(logits_RV)
        raw_highest_R = highest_R if raw_RV is logits_RV else highest(raw_RV)[0]
        if hardest_mode > GREEDY:
            chosen_R = self._draw(logits_RV, self._params(size), self._inputs[IN_DRAW_MODE, :size], chosen_R, hardest_mode)
        self._reports[size].copy_(torch.stack((chosen_R, raw_highest_R.isfinite().long(), highest_R.isfinite().long())))

    def _draw(self, logits_RV: Tensor, params: DrawParams, mode_R: Tensor, greedy_R: Tensor, hardest_mode: int) -> Tensor:
        if hardest_mode == FEW:
            drawn_R, decided_R = draw_filtered(logits_RV, params, FEW_TOP_K + MORE_CANDIDATES, None)
            others_R, is_other_R = greedy_R, mode_R == GREEDY
        else:
            unfiltered_R, total_weight_R = draw_unfiltered(logits_RV, params)
            drawn_R, decided_R = draw_filtered(logits_RV, params, MAX_CANDIDATES, total_weight_R)
            others_R, is_other_R = torch.where(mode_R == GREEDY, greedy_R, unfiltered_R), (mode_R == GREEDY) | (mode_R == UNFILTERED)
        return draw_undecided(logits_RV, params, torch.where(is_other_R, others_R, drawn_R), (decided_R | is_other_R).long())

    def _params(self, size: int) -> DrawParams:
        inputs = self._inputs[:, :size]
        temperature_R, top_p_R, min_p_R = inputs[IN_TEMPERATURE:].view(torch.float64)
        uniform_R = uniform(inputs[IN_SEED], inputs[IN_CHOICE], inputs[IN_POSITION])
        return DrawParams(temperature_R, inputs[IN_TOP_K], top_p_R, min_p_R, uniform_R)


class Report:
    """The output of a replay, on its way to the host. The next step may start before it is read."""

    def __init__(self, buffer: PinnedBuffer, size: int, count: int) -> None:
        self._buffer, self._size, self._count = buffer, size, count

    def is_ready(self) -> bool:
        return self._buffer.is_done()

    def read(self) -> np.ndarray:
        """int64 (3, S): the drawn token, and whether the model's and the edited logits are finite.

        Waits for the device. Must be called before the step after the next is launched.
        """
        self._buffer.wait()
        report: np.ndarray = self._buffer.array[: 3 * self._size].reshape(3, self._size)[:, : self._count]
        return report


def as_decided(report_3S: np.ndarray) -> DrawReport:
    """The output of `Report.read` in the form that `Sampler.results` takes. Replays decide every row."""
    chosen, raw_finite, finite = report_3S.tolist()
    return DrawReport(chosen, [1] * len(chosen), raw_finite, finite)


def _greedy_inputs(num_rows: int) -> np.ndarray:
    inputs = np.zeros((11, num_rows), np.int64)
    inputs[IN_TOP_K], inputs[IN_ENTRY], inputs[IN_MASK] = 1, NO_ENTRY, -1
    return inputs
