"""Argmax and top-k of logits, from the maxima of segments.

Several times as fast as torch on a CPU. Uses our CPU kernels if they are built.

R rows, V ids that can be sampled, C candidates, N segments.
"""

import torch
from torch import Tensor

from engine.run.sampling.kernels import cpu_kernels_for
from parallel.native.elementwise import candidates as candidates_by
from parallel.native.elementwise import highest as highest_by

_SEGMENT = 64
"""Ids per segment for few candidates."""

_MANY = 256
"""From this number of candidates on segments are half as long: the number of logits left to search is their product."""

_LONG_SEGMENT = 512
"""Ids per segment for an argmax."""


def highest(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The highest logit of each row and its id, the lowest id if several are equal. A row with NaN gives NaN and an arbitrary id."""
    library = cpu_kernels_for(logits_RV)
    return highest_torch(logits_RV) if library is None else highest_by(library, logits_RV)


def highest_torch(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """`highest` in plain torch."""
    segments_RN = _segment_maxima(logits_RV, _LONG_SEGMENT)
    segment_R1 = segments_RN.argmax(-1, keepdim=True)  # the first of equal ones
    ids_RC = _ids_of(segment_R1, _LONG_SEGMENT).clamp(max=logits_RV.shape[1] - 1)
    id_R1 = ids_RC.gather(-1, logits_RV.gather(-1, ids_RC).argmax(-1, keepdim=True))
    return segments_RN.gather(-1, segment_R1).squeeze(-1), id_R1.squeeze(-1)


def candidates(logits_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` highest logits and their ids, both (R, count), by ascending id.

    Which ids are included among those equal to the lowest is unspecified.

    Only the ``count`` segments with the highest maxima are searched. An id outside of them is no higher than any of those maxima, so
    ``count`` ids at least as high have been found.
    """
    vocab_size = logits_RV.shape[1]
    if count >= vocab_size:
        return logits_RV, torch.arange(vocab_size, device=logits_RV.device).expand(logits_RV.shape)
    library = cpu_kernels_for(logits_RV)
    return candidates_torch(logits_RV, count) if library is None else candidates_by(library, logits_RV, count, _segment_length(count))


def candidates_torch(logits_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`candidates` in plain torch, for fewer than all ids."""
    vocab_size, length = logits_RV.shape[1], _segment_length(count)
    if count * length * 2 > vocab_size:
        values_RC, ids_RC = logits_RV.topk(count, dim=-1, sorted=False)
        return _by_id(values_RC, ids_RC)
    segments_RC = _segment_maxima(logits_RV, length).topk(count, dim=-1, sorted=False).indices
    searched_RX = _ids_of(segments_RC, length)
    values_RX = logits_RV.gather(-1, searched_RX.clamp(max=vocab_size - 1))
    values_RX.masked_fill_(searched_RX >= vocab_size, -torch.inf)  # otherwise the last id would be found twice
    values_RC, places_RC = values_RX.topk(count, dim=-1, sorted=False)
    return _by_id(values_RC, searched_RX.gather(-1, places_RC))


def _segment_length(count: int) -> int:
    return _SEGMENT if count < _MANY else _SEGMENT // 2


def num_certain(ordered_RC: Tensor, vocab_size: int) -> Tensor:
    """The length of the prefix of the candidates, in descending order, that is certainly a prefix of the whole vocabulary's.

    Ids equal to the last candidate may be missing.
    """
    if ordered_RC.shape[1] == vocab_size:
        return torch.full_like(ordered_RC[:, 0], vocab_size, dtype=torch.int64)
    return (ordered_RC > ordered_RC[:, -1:]).sum(-1)


def _segment_maxima(logits_RV: Tensor, length: int) -> Tensor:
    """(R, N): the maximum of every ``length`` logits; the last segment may be shorter."""
    whole = logits_RV.shape[1] // length * length
    segments_RN: Tensor = logits_RV[:, :whole].unflatten(-1, (-1, length)).amax(-1)
    if whole == logits_RV.shape[1]:
        return segments_RN
    return torch.cat((segments_RN, logits_RV[:, whole:].amax(-1, keepdim=True)), dim=-1)


def _ids_of(segments_RC: Tensor, length: int) -> Tensor:
    """(R, C * length): the ids of the segments. They exceed the vocabulary if the last segment is short."""
    ids_RCX: Tensor = segments_RC.unsqueeze(-1) * length + torch.arange(length, device=segments_RC.device)
    return ids_RCX.flatten(1)


def _by_id(values_RC: Tensor, ids_RC: Tensor) -> tuple[Tensor, Tensor]:
    ids_RC, order_RC = ids_RC.sort(dim=-1)
    return values_RC.gather(-1, order_RC), ids_RC
