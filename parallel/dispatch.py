"""Token dispatch for expert parallelism: how tokens reach the ranks that hold their experts, and how results return. Holds no weights.

T tokens of this rank's sequences, S of them in its slice, R ranks that receive rows, N rows sent or received, A experts per token,
D model width.
"""

import hashlib
import socket
from pathlib import Path
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from parallel.axes import split
from parallel.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from parallel.expert_placement import ExpertPlacement, HolderTable
from parallel.groups import Group, ParallelGroups

DispatchName = Literal["local", "all_to_all"]

ELSEWHERE = -1
"""Replaces an expert id that another rank computes."""


class ComputeExperts(Protocol):
    """The contribution of this rank's experts to each row: the weighted sum over its assignments that are not `ELSEWHERE`.

    With ``expert_tp`` > 1 it is a partial sum, to be summed over that group.
    """

    def __call__(self, x_ND: Tensor, expert_ids_NA: Tensor, weights_NA: Tensor) -> Tensor: ...


class TokenDispatch(Protocol):
    """Sends rows to experts and collects the results. Every rank of a stage calls it in the same step, also with no tokens."""

    def __call__(self, x_TD: Tensor, expert_ids_TA: Tensor, weights_TA: Tensor, compute: ComputeExperts) -> Tensor:
        """(T, D): the complete weighted sum over the experts of each of this rank's tokens."""
        ...

    def set_placement(self, placement: ExpertPlacement) -> None:
        """Use ``placement`` from the next call on. All ranks must call this between the same two steps."""
        ...


def make_dispatch(name: DispatchName, groups: ParallelGroups, placement: ExpertPlacement) -> TokenDispatch:
    """The dispatch called ``name``.

    Raises:
        ValueError: there is none, or the placement is for another number of ranks.
    """
    if placement.num_ranks != groups.ep.size:
        raise ValueError(f"a placement over {placement.num_ranks} ranks does not fit an ep axis of {groups.ep.size}")
    match name:
        case "local":
            return LocalDispatch(groups, placement)
        case "all_to_all":
            return AllToAllDispatch(groups, placement)
    raise ValueError(f"no dispatch is called {name!r}; choose one of {get_args(DispatchName)}")


def choose_dispatch(groups: ParallelGroups, device: torch.device) -> DispatchName:
    """``local`` if all ranks of the stage are on one host, where an all-reduce is cheap. All of them must call this and get the same."""
    here = hashlib.blake2b(f"{_boot_id()}:{socket.gethostname()}".encode(), digest_size=7).digest()
    hosts = all_gather(torch.tensor([int.from_bytes(here)], dtype=torch.int64, device=device), groups.stage, dim=0)
    return "local" if len(set(hosts.tolist())) == 1 else "all_to_all"


def _boot_id() -> str:
    """Identifies the running kernel: different hosts may share a name, and containers of one host may have several."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


class LocalDispatch:
    """Every rank of the stage sees all tokens and computes the contribution of its own experts; an all-reduce combines them.

    Lowest latency for few tokens. Tokens are only gathered where ranks have different ones (dp > 1).
    """

    def __init__(self, groups: ParallelGroups, placement: ExpertPlacement) -> None:
        self.groups = groups
        self.set_placement(placement)

    def set_placement(self, placement: ExpertPlacement) -> None:
        self._holders = _Holders(placement)

    def __call__(self, x_TD: Tensor, expert_ids_TA: Tensor, weights_TA: Tensor, compute: ComputeExperts) -> Tensor:
        dp = self.groups.dp
        counts = _counts_of_all(x_TD, dp)
        x_ND = all_gather(x_TD, dp, dim=0, sizes=counts)
        expert_ids_NA, weights_NA = _gather_routing(expert_ids_TA, weights_TA, dp, counts)
        y_ND = compute(x_ND, self._computed_here(expert_ids_NA), weights_NA)
        return all_reduce(reduce_scatter(y_ND, dp, dim=0, sizes=counts), self.groups.tp)

    def _computed_here(self, expert_ids_NA: Tensor) -> Tensor:
        """Mask ids of other ranks with `ELSEWHERE`. Skipped if this rank holds all experts: on a GPU that saves three launches."""
        if self.groups.ep.size == 1:
            return expert_ids_NA
        mine_NA = self._holders.on(expert_ids_NA.device).choose(expert_ids_NA) == self.groups.ep.rank
        return expert_ids_NA.where(mine_NA, ELSEWHERE)


class AllToAllDispatch:
    """Every rank owns a distinct slice of the stage's tokens and sends each token once to every ep rank with one of its experts.

    The ranks of a tp group hold the same tokens: each takes its slice, and the results are gathered afterwards. Ranks that share
    experts (expert_tp) gather the rows that reached any of them.
    """

    def __init__(self, groups: ParallelGroups, placement: ExpertPlacement) -> None:
        self.groups = groups
        self.set_placement(placement)

    def set_placement(self, placement: ExpertPlacement) -> None:
        self._holders = _Holders(placement)

    def __call__(self, x_TD: Tensor, expert_ids_TA: Tensor, weights_TA: Tensor, compute: ComputeExperts) -> Tensor:
        tp = self.groups.tp
        slices = [split(x_TD.shape[0], rank, tp.size).spans[0] for rank in range(tp.size)]
        mine = slice(slices[tp.rank].start, slices[tp.rank].stop)
        y_SD = self._exchange(x_TD[mine], expert_ids_TA[mine], weights_TA[mine], compute)
        return all_gather(y_SD, tp, dim=0, sizes=[len(span) for span in slices])

    def _exchange(self, x_SD: Tensor, expert_ids_SA: Tensor, weights_SA: Tensor, compute: ComputeExperts) -> Tensor:
        ep = self.groups.ep
        holder_SA = self._holders.on(x_SD.device).choose(expert_ids_SA, first=ep.rank)
        wanted_RS = torch.zeros(ep.size, x_SD.shape[0], dtype=torch.bool, device=x_SD.device)
        wanted_RS.scatter_(0, holder_SA.T, True)
        rank_N, row_N = wanted_RS.nonzero(as_tuple=True)  # by receiver, then by token
        there_NA = holder_SA[row_N] == rank_N.unsqueeze(1)
        send_sizes, receive_sizes = _exchange_counts(wanted_RS.sum(dim=1), ep)

        routing = _pack(expert_ids_SA[row_N].where(there_NA, ELSEWHERE), weights_SA[row_N])
        arrived_x = all_to_all(x_SD[row_N], send_sizes, receive_sizes, ep)
        arrived_routing = all_to_all(routing, send_sizes, receive_sizes, ep)
        arrived_y = self._compute_together(arrived_x, arrived_routing, weights_SA.dtype, compute)
        y_ND = all_to_all(arrived_y, receive_sizes, send_sizes, ep)

        total_SD = torch.zeros(x_SD.shape, dtype=torch.promote_types(x_SD.dtype, torch.float32), device=x_SD.device)
        for rows, y in zip(row_N.split(send_sizes), y_ND.split(send_sizes), strict=True):
            total_SD[rows] += y.to(total_SD.dtype)  # a token is sent to a rank once, so ``rows`` has no duplicates
        return total_SD.to(x_SD.dtype)

    def _compute_together(self, x_ND: Tensor, routing_N: Tensor, weights_dtype: torch.dtype, compute: ComputeExperts) -> Tensor:
        """The complete contribution of the experts at this ep position to the rows that this rank received."""
        sharers = self.groups.expert_tp
        counts = _counts_of_all(x_ND, sharers)
        x_ND = all_gather(x_ND, sharers, dim=0, sizes=counts)
        expert_ids_NA, weights_NA = _unpack(all_gather(routing_N, sharers, dim=0, sizes=counts), weights_dtype)
        return reduce_scatter(compute(x_ND, expert_ids_NA, weights_NA), sharers, dim=0, sizes=counts)


class _Holders:
    """The placement's lookup table, created once on the tokens' device."""

    def __init__(self, placement: ExpertPlacement) -> None:
        self._placement = placement
        self._table: HolderTable | None = None

    def on(self, device: torch.device) -> HolderTable:
        if self._table is None or self._table.holders.device != device:
            self._table = self._placement.table(device)
        return self._table


def _counts_of_all(x: Tensor, group: Group) -> list[int]:
    """The number of rows of each member of the group."""
    if group.size == 1:
        return [x.shape[0]]
    counts: list[int] = all_gather(torch.tensor([x.shape[0]], device=x.device), group, dim=0).tolist()
    return counts


def _gather_routing(expert_ids: Tensor, weights: Tensor, group: Group, counts: list[int]) -> tuple[Tensor, Tensor]:
    if group.size == 1:
        return expert_ids, weights
    return _unpack(all_gather(_pack(expert_ids, weights), group, dim=0, sizes=counts), weights.dtype)


def _exchange_counts(counts_R: Tensor, group: Group) -> tuple[list[int], list[int]]:
    """The numbers of rows that this rank sends to each member and receives from each."""
    ones = [1] * group.size
    send, receive = torch.stack((counts_R, all_to_all(counts_R, ones, ones, group))).tolist()
    return send, receive


def _pack(expert_ids: Tensor, weights: Tensor) -> Tensor:
    """Ids and weights side by side in one int32 tensor (N, 2A), so that they need one message. Float32 holds every weight exactly."""
    return torch.cat((expert_ids.to(torch.int32), weights.to(torch.float32).contiguous().view(torch.int32)), dim=1)


def _unpack(packed: Tensor, weights_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    expert_ids, weights = packed.chunk(2, dim=1)
    return expert_ids.to(torch.int64), weights.contiguous().view(torch.float32).to(weights_dtype)
