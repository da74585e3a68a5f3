"""Penalties, logit biases and minimum lengths on the device, so that a captured step can edit its logits itself.

A sequence that needs them has an *entry* from its opening to its close. Its tokens are counted where they are sampled, so the host need
not know a token before the step that counts it. `engine.run.sampling.edits` does the same on the host: it is the reference, and serves
sequences without an entry. R rows, V ids that can be sampled, N entries, W = ceil(V / 32).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.run.sampling.state import Row, SamplingState
from engine.run.transfer import upload
from parallel.quantised_format import has_triton

MAX_BIASES = 1024
MAX_STOP_IDS = 64
"""A sequence with more gets no entry."""
NO_ENTRY = -1


class EditTable:
    """One rank's entries."""

    def __init__(self, *, num_entries: int, vocab_size: int, device: torch.device) -> None:
        self.device, self.vocab_size = device, vocab_size
        self._free = list(range(num_entries))

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_entries, *shape, dtype=dtype, device=device)

        self._counts_NV = zeros(vocab_size, dtype=torch.int32)
        """Twice the number of times that an id is in the output, plus one if it was seen before the opening; 0: never seen."""
        self._known_N = zeros(dtype=torch.int64)
        """How many tokens are counted."""
        self._penalties_N3 = zeros(3, dtype=torch.float32)
        """Repetition, presence, frequency."""
        self._bias_ids, self._biases = zeros(MAX_BIASES, dtype=torch.int64), zeros(MAX_BIASES, dtype=torch.float32)
        self._stop_ids = zeros(MAX_STOP_IDS, dtype=torch.int64)
        self._num_biases_N, self._num_stop_ids_N = zeros(dtype=torch.int64), zeros(dtype=torch.int64)

    def __repr__(self) -> str:
        return f"<EditTable [{len(self._free)} of {len(self._known_N)} entries free]>"

    def open(self, state: SamplingState) -> None:
        """Assign an entry to the sequence (`SamplingState.entry`) if it needs one, fits into it, and one is free."""
        unfinished = len(state.stop_ids) if state.sampling.min_tokens else 0
        wanted = state.history is not None or len(state.bias_ids) or unfinished
        if not wanted or not self._free or len(state.bias_ids) > MAX_BIASES or unfinished > MAX_STOP_IDS:
            return
        entry = state.entry = self._free.pop()
        if state.history is not None:
            sampling = state.sampling
            penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
            seen = upload(np.stack([state.history.ids, 2 * state.history.output_counts + 1]), self.device)
            self._counts_NV[entry].zero_().index_copy_(0, seen[0], seen[1].to(torch.int32))
            self._known_N[entry : entry + 1].fill_(state.history.num_tokens)
            self._penalties_N3[entry].copy_(upload(np.array(penalties, np.float32), self.device))
            state.history = None  # moved to the device
        else:
            self._counts_NV[entry].zero_()
            self._known_N[entry : entry + 1].fill_(torch.iinfo(torch.int64).max)  # nothing is counted
        self._num_biases_N[entry : entry + 1].fill_(len(state.bias_ids))
        self._bias_ids[entry, : len(state.bias_ids)].copy_(upload(state.bias_ids, self.device))
        self._biases[entry, : len(state.bias_ids)].copy_(upload(state.bias_values, self.device))
        self._num_stop_ids_N[entry : entry + 1].fill_(unfinished)
        self._stop_ids[entry, :unfinished].copy_(upload(state.stop_ids[:unfinished], self.device))

    def close(self, state: SamplingState) -> None:
        """Free the entry. Work in flight on the device reads it before its next owner is written there."""
        if state.entry != NO_ENTRY:
            self._free.append(state.entry)
            state.entry = NO_ENTRY

    def count_tokens(self, entries_R: Tensor, tokens_R: Tensor, starts_R: Tensor) -> None:
        """Count each row's token, at its position in the sequence, if it is not counted yet. int64; each entry in at most one row.

        Rows without an entry count nothing.
        """
        if tokens_R.device.type == "cuda" and has_triton():
            from parallel.cuda.logits_processing import (
                count_tokens as in_one_launch,  # imports triton, which exists only where there is a CUDA device
            )

            in_one_launch(entries_R, tokens_R, starts_R, self._counts_NV, self._known_N)
        else:
            self.count_tokens_torch(entries_R, tokens_R, starts_R)

    def count_tokens_torch(self, entries_R: Tensor, tokens_R: Tensor, starts_R: Tensor) -> None:
        """`count_tokens` in plain torch: the reference for the kernel."""
        has_entry_R, entries_R = entries_R >= 0, entries_R.clamp(min=0)
        is_new_R = has_entry_R & (starts_R >= self._known_N[entries_R]) & (tokens_R < self.vocab_size)
        places_R = entries_R * self.vocab_size + tokens_R.clamp(max=self.vocab_size - 1)
        self._counts_NV.view(-1).scatter_add_(0, places_R, 2 * is_new_R.to(torch.int32))
        self._known_N.scatter_reduce_(0, entries_R, torch.where(has_entry_R, starts_R + 1, 0), "amax")

    def edit(
        self,
        logits_RV: Tensor,
        entries_R: Tensor,
        stops_now_R: Tensor,
        word_rows_R: Tensor | None = None,
        words_GW: Tensor | None = None,
        raw_highest_RN: Tensor | None = None,
    ) -> Tensor:
        """The edited logits, float32 (R, V).

        ``stops_now_R`` is positive where stop ids may not be sampled yet. ``word_rows_R`` says which row of the words (a bit for each
        id, lowest first) restricts a row's ids; negative: none. All are int64 except the words, which are int32. ``raw_highest_RN``: see
        `parallel.cuda.logits_processing`; only used with the kernels.
        """
        if logits_RV.device.type == "cuda" and has_triton():
            from parallel.cuda.logits_processing import (
                process_logits as in_two_launches,  # imports triton, which exists only where there is a CUDA device
            )

            if word_rows_R is None or words_GW is None:
                word_rows_R, words_GW = torch.full_like(entries_R, -1), logits_RV.new_zeros((1, 1), dtype=torch.int32)
            return in_two_launches(
                logits_RV, entries_R=entries_R, stops_now_R=stops_now_R, word_rows_R=word_rows_R, words_GW=words_GW,
                raw_highest_RN=raw_highest_RN, **self.columns,
            )  # fmt: skip
        return self.edit_torch(logits_RV, entries_R, stops_now_R, word_rows_R, words_GW)

    @property
    def columns(self) -> dict[str, Tensor]:
        """The arguments of the kernel."""
        return {
            "counts_NV": self._counts_NV,
            "penalties_N3": self._penalties_N3,
            "bias_ids": self._bias_ids,
            "biases": self._biases,
            "num_biases_N": self._num_biases_N,
            "stop_ids": self._stop_ids,
            "num_stop_ids_N": self._num_stop_ids_N,
        }

    def edit_torch(
        self,
        logits_RV: Tensor,
        entries_R: Tensor,
        stops_now_R: Tensor,
        word_rows_R: Tensor | None = None,
        words_GW: Tensor | None = None,
    ) -> Tensor:
        """`edit` in plain torch: the reference for the kernels."""
        has_entry_R, entries_R = entries_R >= 0, entries_R.clamp(min=0)
        x_RV = logits_RV.to(torch.float32, copy=True)
        counts_RV = self._counts_NV[entries_R] * has_entry_R.unsqueeze(-1)
        repetition_R1, presence_R1, frequency_R1 = self._penalties_N3[entries_R].unsqueeze(-1).unbind(1)
        times_RV = (counts_RV >> 1).to(torch.float32)
        penalised_RV = torch.where(x_RV > 0, x_RV / repetition_R1, x_RV * repetition_R1)
        penalised_RV = penalised_RV - presence_R1 * (times_RV > 0) - frequency_R1 * times_RV
        x_RV = torch.where(counts_RV > 0, penalised_RV, x_RV)
        self._add_at(x_RV, self._bias_ids, self._biases, self._num_biases_N, entries_R, has_entry_R)
        never = torch.full_like(self._biases[:, :MAX_STOP_IDS], -torch.inf)
        self._add_at(x_RV, self._stop_ids, never, self._num_stop_ids_N, entries_R, has_entry_R & (stops_now_R > 0))
        if word_rows_R is None or words_GW is None:
            return x_RV
        bits_RV = unpack_bits(words_GW[word_rows_R.clamp(min=0)], x_RV.shape[1])
        return x_RV.masked_fill(~bits_RV & (word_rows_R >= 0).unsqueeze(-1), -torch.inf)

    @staticmethod
    def _add_at(x_RV: Tensor, ids: Tensor, values: Tensor, counts_N: Tensor, entries_R: Tensor, applies_R: Tensor) -> None:
        """Add the values of each row's entry at their ids."""
        places_E = torch.arange(ids.shape[1], device=ids.device)
        applies_RE = (places_E < counts_N[entries_R].unsqueeze(-1)) & applies_R.unsqueeze(-1)
        x_RV.scatter_add_(1, ids[entries_R] * applies_RE, torch.where(applies_RE, values[entries_R], 0.0))


def edit_on_device(table: EditTable, logits_RV: Tensor, rows: Sequence[Row]) -> Tensor:
    """The edited logits, float32 (R, V), of rows with entries, in a step whose sampling is not replayed."""
    stops_now = [row.allowed is None and row.is_too_early_to_stop for row in rows]
    numbers = upload(np.array([[row.state.entry for row in rows], stops_now], np.int64), logits_RV.device)
    return table.edit(logits_RV, numbers[0], numbers[1])


def unpack_bits(words_RW: Tensor, size: int) -> Tensor:
    """bool (R, size): bit i of a row is bit i % 32 of word i // 32."""
    shifts = torch.arange(32, dtype=torch.int32, device=words_RW.device)
    found = (words_RW.unsqueeze(-1) >> shifts) & 1
    return found.flatten(1)[:, :size].bool()
