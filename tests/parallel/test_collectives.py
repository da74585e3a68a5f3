"""Every collective against the same computed in one process."""

import pytest
import torch
from torch import Tensor

from parallel import collectives
from parallel.groups import ParallelGroups, single_rank_group
from parallel.topology import Topology
from tests.ranks import run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64]


def value(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(shape, generator=generator) * 8).to(dtype)


def sum_in_rank_order(parts: list[Tensor]) -> Tensor:
    total = parts[0].double()
    for part in parts[1:]:
        total = total + part.double()
    return total


def reduce_all(groups: ParallelGroups, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return collectives.all_reduce(value(groups.rank, shape, dtype), groups.world)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (1,), (7, 5), (301, 101)], ids=str)
def test_all_reduce_gives_everyone_the_sum(ranks: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    results = run_ranks(Topology(tp=ranks), reduce_all, shape, dtype)
    exact = sum_in_rank_order([value(rank, shape, dtype) for rank in range(ranks)])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.13, torch.float16: 0.016}.get(dtype, 0.0)
    for result in results:
        assert result.dtype == dtype
        assert torch.equal(result, results[0])
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=tolerance)


def reduce_rows(groups: ParallelGroups, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = value(groups.rank, (3000, 24), dtype)
    alone = collectives.all_reduce(x[1234:1235].clone(), groups.world)
    return alone, collectives.all_reduce(x, groups.world)[1234:1235]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_sum_of_a_row_does_not_depend_on_the_rows_beside_it(ranks: int, dtype: torch.dtype) -> None:
    for alone, among_others in run_ranks(Topology(tp=ranks), reduce_rows, dtype):
        assert torch.equal(alone, among_others)


def gather(groups: ParallelGroups, sizes: list[int], dim: int, dtype: torch.dtype) -> Tensor:
    shape = [3, 4]
    shape[dim] = sizes[groups.rank]
    return collectives.all_gather(value(groups.rank, tuple(shape), dtype), groups.world, dim=dim, sizes=sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("sizes", [[2, 2], [5, 0], [1, 4, 2], [0, 0, 0], [3, 3, 3, 2]], ids=str)
def test_all_gather_joins_uneven_parts_in_rank_order(sizes: list[int], dim: int, dtype: torch.dtype) -> None:
    parts = []
    for rank, size in enumerate(sizes):
        shape = [3, 4]
        shape[dim] = size
        parts.append(value(rank, tuple(shape), dtype))
    for result in run_ranks(Topology(tp=len(sizes)), gather, sizes, dim, dtype):
        assert torch.equal(result, torch.cat(parts, dim=dim))


def scatter(groups: ParallelGroups, sizes: list[int], dim: int, dtype: torch.dtype) -> Tensor:
    shape = [3, 4]
    shape[dim] = sum(sizes)
    return collectives.reduce_scatter(value(groups.rank, tuple(shape), dtype), groups.world, dim=dim, sizes=sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("sizes", [[2, 2], [5, 0], [1, 4, 2], [3, 3, 0, 2]], ids=str)
def test_reduce_scatter_gives_each_its_uneven_part_of_the_sum(sizes: list[int], dim: int, dtype: torch.dtype) -> None:
    shape = [3, 4]
    shape[dim] = sum(sizes)
    whole = sum_in_rank_order([value(rank, tuple(shape), dtype) for rank in range(len(sizes))])
    results = run_ranks(Topology(tp=len(sizes)), scatter, sizes, dim, dtype)
    for result, part in zip(results, whole.split(sizes, dim=dim), strict=True):
        torch.testing.assert_close(result.double(), part, rtol=0, atol=0.13 if dtype == torch.bfloat16 else 1e-5)


ROWS = {2: [[1, 3], [0, 2]], 3: [[0, 2, 1], [4, 0, 0], [0, 0, 0]], 4: [[1, 2, 3, 4], [0] * 4, [5, 0, 0, 1], [0, 0, 0, 2]]}


def exchange(groups: ParallelGroups, rows: list[list[int]], dtype: torch.dtype) -> Tensor:
    x = value(groups.rank, (sum(rows[groups.rank]), 3), dtype)
    return collectives.all_to_all(x, rows[groups.rank], [row[groups.rank] for row in rows], groups.world)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_all_to_all_delivers_every_row_to_its_receiver(ranks: int, dtype: torch.dtype) -> None:
    rows = ROWS[ranks]
    sent = [value(rank, (sum(rows[rank]), 3), dtype).split(rows[rank]) for rank in range(ranks)]
    for receiver, result in enumerate(run_ranks(Topology(tp=ranks), exchange, rows, dtype)):
        assert torch.equal(result, torch.cat([sent[sender][receiver] for sender in range(ranks)]))


def broadcast_and_pass_on(groups: ParallelGroups, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    told = collectives.broadcast(value(groups.rank, (3, 2), dtype), 1, groups.tp)
    mine = value(groups.rank + 10, (2, 3), dtype)
    if groups.pp.rank == 0:
        collectives.send(mine, 1, groups.pp)
    else:
        mine = collectives.receive((2, 3), 0, groups.pp, dtype=dtype, device=torch.device("cpu"))
    collectives.barrier(groups.world)
    return told, mine


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_broadcast_and_send_stay_within_their_groups(dtype: torch.dtype) -> None:
    results = run_ranks(Topology(tp=2, pp=2), broadcast_and_pass_on, dtype)
    for rank, (told, passed) in enumerate(results):
        assert torch.equal(told, value(1 if rank < 2 else 3, (3, 2), dtype))
        assert torch.equal(passed, value(rank % 2 + 10, (2, 3), dtype))


def test_on_a_group_of_one_nothing_is_copied() -> None:
    x, alone = torch.arange(6.0).view(2, 3), single_rank_group("tp")
    for result in (
        collectives.all_reduce(x, alone),
        collectives.all_gather(x, alone, dim=-1),
        collectives.reduce_scatter(x, alone, dim=0),
        collectives.all_to_all(x, [2], [2], alone),
        collectives.broadcast(x, 0, alone),
    ):
        assert result is x
    collectives.barrier(alone)
    with pytest.raises(ValueError, match="no peer to send to"):
        collectives.send(x, 0, alone)


def gather_with_wrong_sizes(groups: ParallelGroups) -> None:
    collectives.all_gather(torch.zeros(2), groups.world, dim=0, sizes=[1, 1])


def test_invalid_sizes_are_rejected_at_once() -> None:
    with pytest.raises(ValueError, match="has 2 elements, and the sizes say 1"):
        run_ranks(Topology(tp=2), gather_with_wrong_sizes)
