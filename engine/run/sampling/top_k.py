"""The highest logits of a row, found by way of the highest of each stretch: several times faster than torch on a CPU, by kernels where
there are some.

R rows, V ids that can be sampled, C candidates, N stretches.
"""

import torch
from torch import Tensor

from parallel.native.library import Native, native
from parallel.native.small import candidates as candidates_by
from parallel.native.small import highest as highest_by

_STRETCH = 64
"""Ids per stretch where few are sought."""

_MANY = 256
"""From this number of candidates on, stretches are half as long: what is left to search is their product."""

_LONG_STRETCH = 512
"""Where a single one is sought."""


def highest(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The highest logit of each row and its id, of equal ones the lowest; NaN, and any id, where a row holds a NaN."""
    library = _kernels(logits_RV)
    return highest_of_stretches(logits_RV) if library is None else highest_by(library, logits_RV)


def highest_of_stretches(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """`highest` without a kernel."""
    stretches_RN = _highest_of_stretches(logits_RV, _LONG_STRETCH)
    stretch_R1 = stretches_RN.argmax(-1, keepdim=True)  # of equal ones the first
    ids_RC = _ids_of(stretch_R1, _LONG_STRETCH).clamp(max=logits_RV.shape[1] - 1)
    id_R1 = ids_RC.gather(-1, logits_RV.gather(-1, ids_RC).argmax(-1, keepdim=True))
    return stretches_RN.gather(-1, stretch_R1).squeeze(-1), id_R1.squeeze(-1)


def candidates(logits_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` highest logits and their ids, both (R, count), by rising id. Which of equal ones at the end is open.

    Only the ``count`` stretches with the highest maxima are searched. An id outside of them is no higher than any of those
    maxima, so ``count`` ids at least as high have been found.
    """
    vocab_size = logits_RV.shape[1]
    if count >= vocab_size:
        return logits_RV, torch.arange(vocab_size, device=logits_RV.device).expand(logits_RV.shape)
    library = _kernels(logits_RV)
    return candidates_of_stretches(logits_RV, count) if library is None else candidates_by(library, logits_RV, count, _stretch(count))


def candidates_of_stretches(logits_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`candidates`, fewer than all ids, without a kernel."""
    vocab_size, length = logits_RV.shape[1], _stretch(count)
    if count * length * 2 > vocab_size:
        values_RC, ids_RC = logits_RV.topk(count, dim=-1, sorted=False)
        return _by_id(values_RC, ids_RC)
    stretches_RC = _highest_of_stretches(logits_RV, length).topk(count, dim=-1, sorted=False).indices
    searched_RX = _ids_of(stretches_RC, length)
    values_RX = logits_RV.gather(-1, searched_RX.clamp(max=vocab_size - 1))
    values_RX.masked_fill_(searched_RX >= vocab_size, -torch.inf)  # else the last id would be found twice
    values_RC, places_RC = values_RX.topk(count, dim=-1, sorted=False)
    return _by_id(values_RC, searched_RX.gather(-1, places_RC))


def _stretch(count: int) -> int:
    return _STRETCH if count < _MANY else _STRETCH // 2


def _kernels(logits_RV: Tensor) -> Native | None:
    takes = logits_RV.device.type == "cpu" and logits_RV.dtype == torch.float32 and logits_RV.stride(1) == 1
    return native() if takes else None


def num_certain(ordered_RC: Tensor, vocab_size: int) -> Tensor:
    """How long a beginning of the candidates, ordered by falling logit, is surely one of the whole vocabulary.

    Ids tied with the last candidate may be missing.
    """
    if ordered_RC.shape[1] == vocab_size:
        return torch.full_like(ordered_RC[:, 0], vocab_size, dtype=torch.int64)
    return (ordered_RC > ordered_RC[:, -1:]).sum(-1)


def _highest_of_stretches(logits_RV: Tensor, length: int) -> Tensor:
    """(R, N): the highest logit of every ``length`` ids; the last stretch may be short."""
    whole = logits_RV.shape[1] // length * length
    stretches_RN: Tensor = logits_RV[:, :whole].unflatten(-1, (-1, length)).amax(-1)
    if whole == logits_RV.shape[1]:
        return stretches_RN
    return torch.cat((stretches_RN, logits_RV[:, whole:].amax(-1, keepdim=True)), dim=-1)


def _ids_of(stretches_RC: Tensor, length: int) -> Tensor:
    """(R, C * length): the ids in the stretches, counted on beyond the end where the last one is short."""
    ids_RCX: Tensor = stretches_RC.unsqueeze(-1) * length + torch.arange(length, device=stretches_RC.device)
    return ids_RCX.flatten(1)


def _by_id(values_RC: Tensor, ids_RC: Tensor) -> tuple[Tensor, Tensor]:
    ids_RC, order_RC = ids_RC.sort(dim=-1)
    return values_RC.gather(-1, order_RC), ids_RC
