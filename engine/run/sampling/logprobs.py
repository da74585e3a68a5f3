"""Log-probabilities of the chosen tokens and of their most probable alternatives. R rows, V ids that can be sampled."""

import torch
from torch import Tensor

from engine.plan import TokenLogprobs
from engine.run.sampling.top_k import candidates, num_certain

_MORE_CANDIDATES = 32
"""Candidates beyond the alternatives asked for, so that ties at the end rarely leave the order undecided."""


def token_logprobs(logits_RV: Tensor, chosen_R: Tensor, num_top: list[int]) -> list[TokenLogprobs]:
    """One result per row, from the float32 log-softmax of the raw logits over the ids that can be sampled.

    ``num_top``: how many alternatives each row wants, most probable first and lowest id first among equal ones. The chosen token is
    among them if it belongs there.
    """
    logprobs_RV = torch.log_softmax(logits_RV.to(torch.float32), dim=-1)
    of_chosen = logprobs_RV.gather(-1, chosen_R.unsqueeze(-1)).squeeze(-1).tolist()
    most = min(max(num_top), logits_RV.shape[1])
    if most == 0:
        return [TokenLogprobs(logprob) for logprob in of_chosen]
    ids_RK = _leading(logits_RV, most)
    values = logprobs_RV.gather(-1, ids_RK).tolist()
    ids = ids_RK.tolist()
    return [
        TokenLogprobs(of_chosen[row], tuple(zip(ids[row][:count], values[row][:count], strict=True))) for row, count in enumerate(num_top)
    ]


def _leading(logits_RV: Tensor, count: int) -> Tensor:
    """Ids (R, count) of the highest logits, exactly, in canonical order."""
    values_RC, ids_RC = candidates(logits_RV, count + _MORE_CANDIDATES)
    ordered_RC, order_RC = values_RC.sort(dim=-1, descending=True, stable=True)
    if bool((num_certain(ordered_RC, logits_RV.shape[1]) < count).any()):
        return logits_RV.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return ids_RC.gather(-1, order_RC)[:, :count]
