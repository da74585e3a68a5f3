"""Chooses the next token of every row of logits. Place 11 of a request.

R rows, V ids that can be sampled, N parts of a row of logits (`parallel.cuda.logit_keys`). The token of a row depends only on its own
logits, parameters, seed, choice and position, never on the other rows of the batch.
"""

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from engine.plan import SampledTokens, TokenLogprobs
from engine.run.sampling.columns import draw_mode_code, graph_mode
from engine.run.sampling.edit_table import EditTable
from engine.run.sampling.edits import edit_logits
from engine.run.sampling.filters import MAX_VOCAB_SIZE, draw_filtered, draw_unfiltered, total_weight
from engine.run.sampling.groups import DrawGroup, draw_params, group_rows, top_k_of
from engine.run.sampling.kernels import cpu_kernels_for, sampling_kernels_for
from engine.run.sampling.logprobs import token_logprobs
from engine.run.sampling.report import DrawReport
from engine.run.sampling.state import Row
from engine.run.sampling.top_k import highest
from engine.run.transfer import upload
from parallel.native.library import Native
from parallel.native.sampling import draw

NOT_FINITE = "the model gave NaN or no finite logits"
NOTHING_LEFT = "the request's own rules leave no token that could be sampled"


class Sampler:
    """Samples tokens on one device."""

    def __init__(self, *, vocab_size: int, device: torch.device) -> None:
        """``vocab_size`` is the number of ids that can be sampled; further columns of the logits are padding.

        Raises:
            ValueError: the vocabulary is too large for exact sums of its probabilities.
        """
        if vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(f"a vocabulary of {vocab_size} ids cannot be sampled exactly; the limit is {MAX_VOCAB_SIZE}")
        self.vocab_size = vocab_size
        self.device = device

    def sample(self, logits: Tensor, rows: Sequence[Row], table: EditTable | None = None) -> list[SampledTokens]:
        """One result per row of ``logits`` (R, at least V, any floating dtype). ``table`` holds the rows' entries, if they have any."""
        if not rows:
            return []
        raw_RV = logits[:, : self.vocab_size]
        logits_RV = edit_logits(raw_RV, rows, table)
        if kernels := sampling_kernels_for(logits_RV):
            return self.results(raw_RV, logits_RV, rows, self._draw_with_kernels(kernels, raw_RV, logits_RV, rows))
        if library := cpu_kernels_for(logits_RV):
            return self.results(raw_RV, logits_RV, rows, self._draw_on_cpu(library, raw_RV, logits_RV, rows))
        highest_R, chosen_R = highest(logits_RV)  # greedy rows need nothing else
        decided_R = torch.ones_like(chosen_R)
        for group in group_rows(rows, self.vocab_size):
            self._draw(group, logits_RV, rows, chosen_R, decided_R)
        raw_highest_R = highest_R if logits_RV is raw_RV else raw_RV.amax(-1)
        report_4R = torch.stack([chosen_R, decided_R, raw_highest_R.isfinite().long(), highest_R.isfinite().long()])
        return self.results(raw_RV, logits_RV, rows, DrawReport(*report_4R.tolist()))  # the host waits for the device here, once per step

    def results(self, raw_RV: Tensor, logits_RV: Tensor, rows: Sequence[Row], report: DrawReport) -> list[SampledTokens]:
        """One result per row of ``report``. Rows that are not decided are drawn here."""
        chosen = list(report.tokens)
        faults = [
            None if raw and edited else NOTHING_LEFT if raw else NOT_FINITE
            for raw, edited in zip(report.raw_is_finite, report.is_finite, strict=True)
        ]
        for i, fault in enumerate(faults):
            if fault is None and not report.is_decided[i]:
                chosen[i] = self._draw_sorted(logits_RV[i : i + 1], rows[i])
        logprobs = self._logprobs(raw_RV, rows, chosen, faults)
        return [
            SampledTokens(row.state.sequence, () if fault else (token,), logprobs.get(i, ()), fault)
            for i, (row, token, fault) in enumerate(zip(rows, chosen, faults, strict=True))
        ]

    def _draw_with_kernels(self, kernels: ModuleType, raw_RV: Tensor, logits_RV: Tensor, rows: Sequence[Row]) -> DrawReport:
        """The report for `results`, from one kernel. Every row is decided."""
        params_R8 = self._params(rows)
        params_8R = upload(params_R8.T.copy(), self.device)
        temperature_R, top_p_R, min_p_R = params_8R[5:].view(torch.float64)
        report_3R = torch.empty(3, len(rows), dtype=torch.int64, device=self.device)
        kernels.draw(
            logits_RV, report_3R, hardest_mode=graph_mode(int(params_R8[:, 4].max())), seed_R=params_8R[0], choice_R=params_8R[1],
            position_R=params_8R[2], top_k_R=params_8R[3], mode_R=params_8R[4], temperature_R=temperature_R, top_p_R=top_p_R,
            min_p_R=min_p_R, raw_highest_RN=None if logits_RV is raw_RV else kernels.highest_of_parts(raw_RV),
        )  # fmt: skip
        chosen, raw_finite, finite = report_3R.tolist()  # the host waits for the device here, once per step
        return DrawReport(chosen, [1] * len(rows), raw_finite, finite)

    def _draw_on_cpu(self, library: Native, raw_RV: Tensor, logits_RV: Tensor, rows: Sequence[Row]) -> DrawReport:
        """The report for `results`, from one call. Every row is decided."""
        chosen, finite = draw(library, logits_RV, torch.from_numpy(self._params(rows))).tolist()
        raw_finite = finite if logits_RV is raw_RV else highest(raw_RV)[0].isfinite().tolist()
        return DrawReport(chosen, [1] * len(rows), raw_finite, finite)

    def _params(self, rows: Sequence[Row]) -> np.ndarray:
        """int64 (R, 8): seed, choice, position, top-k and draw mode; then temperature, top-p and min-p in the bits of float64."""
        states = [row.state for row in rows]
        integers = [
            (state.seed, state.choice, row.position, top_k_of(state.sampling, self.vocab_size), draw_mode_code(state))
            for state, row in zip(states, rows, strict=True)
        ]
        floats = np.array([(one.sampling.temperature, one.sampling.top_p, one.sampling.min_p) for one in states], np.float64)
        return np.concatenate([np.array(integers, np.int64), floats.view(np.int64)], 1)

    def _draw(self, group: DrawGroup, logits_RV: Tensor, rows: Sequence[Row], chosen_R: Tensor, decided_R: Tensor) -> None:
        """Draw the rows of one group, and write the results to the group's rows of ``chosen_R`` and ``decided_R``."""
        at = upload(np.array(group.at, np.int64), self.device)
        whole_step = len(group.at) == len(rows)
        group_logits_RV = logits_RV if whole_step else logits_RV[at]
        params = draw_params([rows[i] for i in group.at], self.vocab_size, self.device)
        if group.mode == "unfiltered":
            chosen_R[at], _ = draw_unfiltered(group_logits_RV, params)
            return
        total_weight_R = total_weight(group_logits_RV, params) if group.mode == "open" else None
        group_chosen_R, group_decided_R = draw_filtered(group_logits_RV, params, group.num_candidates, total_weight_R)
        chosen_R[at] = group_chosen_R
        decided_R[at] = group_decided_R.long()

    def _draw_sorted(self, logits_1V: Tensor, row: Row) -> int:
        """Draw one row whose filters keep more ids than there were candidates: exact and slow, by sorting the whole vocabulary."""
        params = draw_params([row], self.vocab_size, self.device)
        chosen, _ = draw_filtered(logits_1V, params, self.vocab_size, total_weight(logits_1V, params))
        return int(chosen)

    def _logprobs(
        self, raw_RV: Tensor, rows: Sequence[Row], chosen: list[int], faults: list[str | None]
    ) -> dict[int, tuple[TokenLogprobs, ...]]:
        """By row, for the rows that want log-probabilities and have a token."""
        asking = [i for i, row in enumerate(rows) if row.state.sampling.logprobs is not None and faults[i] is None]
        if not asking:
            return {}
        at, tokens = upload(np.array([asking, [chosen[i] for i in asking]], np.int64), self.device)
        num_top = [rows[i].state.sampling.logprobs or 0 for i in asking]
        return {i: (logprobs,) for i, logprobs in zip(asking, token_logprobs(raw_RV[at], tokens, num_top), strict=True)}
