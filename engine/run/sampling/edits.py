"""Edits logits before temperature: penalties, biases, and ids that may not be sampled now.

Rows with an entry in an `EditTable` are edited there.

R rows, V ids that can be sampled.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.run.sampling.edit_table import EditTable, edit_on_device, unpack_bits
from engine.run.sampling.state import Row
from engine.run.transfer import upload
from parallel.aligned_rows import empty_rows


def edit_logits(logits_RV: Tensor, rows: Sequence[Row], table: EditTable | None = None) -> Tensor:
    """The logits as each row's parameters change them, in float32. Returns the same tensor if no row changes anything."""
    here = [(at, row) for at, row in enumerate(rows) if row.state.entry < 0]
    penalised = [(at, row) for at, row in here if row.state.history is not None]
    biased = [(at, row) for at, row in here if len(row.state.bias_ids)]
    unfinished = [(at, row) for at, row in here if row.allowed is None and row.is_too_early_to_stop]
    guided = [at for at, row in enumerate(rows) if row.allowed is not None]
    if len(here) < len(rows):
        assert table is not None
        logits_RV = edit_on_device(table, logits_RV, rows)
    elif penalised or biased or unfinished or guided:
        logits_RV = empty_rows(*logits_RV.shape, dtype=torch.float32, device=logits_RV.device).copy_(logits_RV)
    if penalised:
        _penalise(logits_RV, penalised)
    if biased:
        _add_bias(logits_RV, biased)
    if unfinished:
        _forbid_stop_ids(logits_RV, unfinished)
    if guided:
        _forbid_unless_allowed(logits_RV, guided, np.stack([row.allowed for row in rows if row.allowed is not None]))
    return logits_RV


def _penalise(logits_RV: Tensor, rows: Sequence[tuple[int, Row]]) -> None:
    """Repetition (prompt and output), then presence and frequency (output), on the ids that a row has seen."""
    histories = [history for history in (row.history for _, row in rows) if history is not None]
    lengths = [len(history.ids) for history in histories]
    device = logits_RV.device
    at = _places(rows, lengths, np.concatenate([history.ids for history in histories]), device)
    counts = upload(np.concatenate([history.output_counts for history in histories]).astype(np.float32), device)

    def of_each(name: str) -> Tensor:
        values = np.array([getattr(row.state.sampling, name) for _, row in rows], np.float32)
        return upload(np.repeat(values, lengths), device)

    logits = logits_RV[at]
    repetition = of_each("repetition_penalty")
    logits = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = logits - of_each("presence_penalty") * (counts > 0)
    logits_RV[at] = logits - of_each("frequency_penalty") * counts


def _add_bias(logits_RV: Tensor, rows: Sequence[tuple[int, Row]]) -> None:
    ids = [row.state.bias_ids for _, row in rows]
    at = _places(rows, [len(i) for i in ids], np.concatenate(ids), logits_RV.device)
    logits_RV[at] = logits_RV[at] + upload(np.concatenate([row.state.bias_values for _, row in rows]), logits_RV.device)


def _forbid_stop_ids(logits_RV: Tensor, rows: Sequence[tuple[int, Row]]) -> None:
    ids = [row.state.stop_ids for _, row in rows]
    at = _places(rows, [len(i) for i in ids], np.concatenate(ids), logits_RV.device)
    # A tensor, not a number: assigning a number by index would wait for the device.
    logits_RV[at] = torch.full((), -torch.inf, device=logits_RV.device)


def _forbid_unless_allowed(logits_RV: Tensor, at: list[int], allowed_GW: np.ndarray) -> None:
    """``at``: the indices of the G rows that the words belong to."""
    at_G, words_GW = upload(np.array(at, np.int64), logits_RV.device), upload(allowed_GW, logits_RV.device)
    logits_RV[at_G] = logits_RV[at_G].masked_fill(~unpack_bits(words_GW, logits_RV.shape[1]), -torch.inf)


def _places(rows: Sequence[tuple[int, Row]], lengths: list[int], ids: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Index pairs (row, id) into the logits. Pairs are distinct, except for repeated stop ids, for which that does not matter."""
    numbers = np.repeat(np.array([at for at, _ in rows], np.int64), lengths)
    return upload(numbers, device), upload(ids, device)
