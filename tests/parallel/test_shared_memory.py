"""Shared-memory collectives against gloo, when ranks agree to use them, and what the loss of a rank means for the others."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel import shared_memory
from parallel.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from parallel.cpp_build import Unavailable
from parallel.groups import ParallelGroups
from parallel.native.library import native
from parallel.native.shared_memory_collectives import BUFFER_BYTES, CollectiveFailed, SharedMemoryCollectives
from parallel.topology import Topology
from tests.ranks import RankFailed, end_pools, run_ranks

pytestmark = pytest.mark.skipif(native() is None, reason="run `python -m parallel.native.library` to build the kernels")

MANY = BUFFER_BYTES // 4 + 1234
"""Float32 elements that need more than one piece."""


def value(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(rank)) * 8).to(dtype)


def memory_of(groups: ParallelGroups) -> SharedMemoryCollectives:
    assert groups.world.transport is not None
    assert groups.world.transport.shared_memory is not None
    return groups.world.transport.shared_memory


def used(groups: ParallelGroups) -> bool:
    return groups.world.transport is not None and groups.world.transport.shared_memory is not None


Collective = Callable[[ParallelGroups, torch.dtype], list[Tensor]]


def sums(groups: ParallelGroups, dtype: torch.dtype) -> list[Tensor]:
    shapes = [(1, 16), (1, 896), (7, 5), (1,), (0, 16), (5000, 3), (MANY,), (3, MANY)]
    special = value(groups.rank, (4,), dtype)
    if dtype.is_floating_point:
        special[groups.rank % 2] = torch.nan
        special[2] = torch.inf
    strided = value(groups.rank, (32, 48), dtype).T
    return [all_reduce(x, groups.world) for x in [*(value(groups.rank, shape, dtype) for shape in shapes), special, strided]]


def gathered(groups: ParallelGroups, dtype: torch.dtype) -> list[Tensor]:
    size, rank = groups.world.size, groups.rank
    uneven, one_empty, large = [1 + r for r in range(size)], [3 * (r != 1) for r in range(size)], [MANY // 2 + 7 * r for r in range(size)]
    return [
        all_gather(value(rank, (4, uneven[rank], 3), dtype), groups.world, dim=1, sizes=uneven),
        all_gather(value(rank, (one_empty[rank], 5), dtype), groups.world, dim=0, sizes=one_empty),
        all_gather(value(rank, (3, large[rank]), dtype), groups.world, dim=-1, sizes=large),
        all_gather(value(rank, (2, 6), dtype).T, groups.world, dim=0),
        all_gather(value(rank, (2, 0), dtype), groups.world, dim=1),
    ]


def exchanged(groups: ParallelGroups, dtype: torch.dtype) -> list[Tensor]:
    size, rank = groups.world.size, groups.rank
    results = []
    for rows in ([[(r + 2 * s) % 4 for s in range(size)] for r in range(size)], [[700 * (r == 0)] * size for r in range(size)]):
        x = value(rank, (sum(rows[rank]), 333), dtype)
        results.append(all_to_all(x, rows[rank], [row[rank] for row in rows], groups.world))
    results.append(reduce_scatter(value(rank, (9, 5 * size), dtype), groups.world, dim=1))
    return results


def both(groups: ParallelGroups, collective: Collective, dtype: torch.dtype) -> tuple[bool, list[Tensor]]:
    return used(groups), collective(groups, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64], ids=str)
@pytest.mark.parametrize("collective", [sums, gathered, exchanged])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_get_bit_for_bit_what_gloo_gives(ranks: int, collective: Collective, dtype: torch.dtype) -> None:
    over_gloo = run_ranks(Topology(tp=ranks), both, collective, dtype, transport="gloo")
    through_memory = run_ranks(Topology(tp=ranks), both, collective, dtype, transport="auto")
    for (by_gloo, wanted), (by_memory, found) in zip(over_gloo, through_memory, strict=True):
        assert (by_gloo, by_memory) == (False, True)
        for a, b in zip(wanted, found, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)


def many_in_a_row(groups: ParallelGroups) -> None:
    """Back to back, with changing kind and length: overwriting a buffer too early would show."""
    draw = torch.Generator().manual_seed(5)
    for number in range(400):
        length = int(torch.randint(1, 40_000 if number % 50 else 400_000, (), generator=draw))
        mine = torch.full((length,), float(groups.rank + number))
        if number % 3:
            total = float(sum(rank + number for rank in range(groups.world.size)))
            assert torch.equal(all_reduce(mine, groups.world), torch.full((length,), total))
        else:
            joined = all_gather(mine, groups.world, dim=0)
            assert torch.equal(joined[::length], torch.arange(number, number + groups.world.size).float())
            assert bool((joined.view(-1, length) == joined[::length].unsqueeze(1)).all())


@pytest.mark.parametrize("ranks", [2, 3])
def test_hundreds_of_collectives_in_a_row_are_correct(ranks: int) -> None:
    run_ranks(Topology(tp=ranks), many_in_a_row, transport="auto")


def test_nothing_is_left_in_dev_shm() -> None:
    before = {path.name for path in shared_memory.SHARED.iterdir()}
    run_ranks(Topology(tp=2), both, sums, torch.float32, transport="auto")
    assert not [p.name for p in shared_memory.SHARED.iterdir() if p.name not in before and p.name.startswith("manta")]


def groups_with_memory(groups: ParallelGroups) -> tuple[str, ...]:
    all_reduce(torch.ones(3), groups.tp)
    every = (groups.tp, groups.pp, groups.world)
    return tuple(group.axis for group in every if group.transport is not None and group.transport.shared_memory is not None)


def test_every_group_of_one_host_has_memory_of_its_own() -> None:
    assert run_ranks(Topology(tp=2, pp=2), groups_with_memory, transport="auto") == [("tp", "pp", "world")] * 4


def lose_rank_1(groups: ParallelGroups, told: str) -> None:
    if groups.rank == 1:
        os._exit(3)
    try:
        all_reduce(torch.ones(8), groups.world)
    except CollectiveFailed as error:
        with pytest.raises(CollectiveFailed):  # and so is every later one, at once
            all_reduce(torch.ones(8), groups.world)
        Path(told).with_suffix(".part").write_text(str(error))
        Path(told).with_suffix(".part").rename(told)


def test_a_lost_rank_raises_an_error_without_waiting(tmp_path: Path) -> None:
    told = tmp_path / "told"
    with pytest.raises(RankFailed, match="rank 1 ended"):
        run_ranks(Topology(tp=2), lose_rank_1, str(told), transport="auto", timeout_s=600)
    end_pools()
    # The pool ends rank 0 two seconds after rank 1 at the latest: it knew before that.
    assert told.read_text() == "rank 1 of the group has ended without a word"


def wait_in_vain(groups: ParallelGroups, flag: str) -> str:
    if groups.rank == 1:
        while not Path(flag).exists():  # slow, but alive
            time.sleep(0.01)
        all_reduce(torch.ones(8), groups.world)  # what rank 0 had written before it gave up
        with pytest.raises(CollectiveFailed, match="rank 0 of the group has left it"):
            all_reduce(torch.ones(8), groups.world)
        return ""
    memory_of(groups).timeout_s = 0.2
    with pytest.raises(CollectiveFailed) as caught:
        all_reduce(torch.ones(8), groups.world)
    Path(flag).touch()
    return str(caught.value)


def test_a_rank_that_does_not_arrive_raises_an_error_after_the_timeout(tmp_path: Path) -> None:
    first, _ = run_ranks(Topology(tp=2), wait_in_vain, str(tmp_path / "flag"), transport="auto")
    assert first == "rank 1 of the group did not come within 0.2 s"


def disagree(groups: ParallelGroups) -> str:
    if groups.rank == 0:
        with pytest.raises(CollectiveFailed) as caught:
            all_to_all(torch.ones(3, 2), [1, 2], [1, 1], groups.world)
        return str(caught.value)
    all_to_all(torch.ones(4, 2), [2, 2], [2, 2], groups.world)  # to this rank what rank 0 sends is right
    with pytest.raises(CollectiveFailed):
        all_reduce(torch.ones(3), groups.world)
    return ""


def test_mismatched_sizes_are_an_error() -> None:
    first, _ = run_ranks(Topology(tp=2), disagree, transport="auto")
    assert first == "rank 1 of the group sends another number of bytes than is expected of it"


def hide_the_kernels_on_rank_1(groups: ParallelGroups, folder: str) -> None:
    if groups.rank == 1:
        os.environ["XDG_CACHE_HOME"] = os.environ["MANTA_CACHE"] = folder
        native.cache_clear()


def test_ranks_agree_on_gloo_when_one_of_them_has_no_kernels(tmp_path: Path) -> None:
    end_pools()
    run_ranks(Topology(tp=2), hide_the_kernels_on_rank_1, str(tmp_path))
    found = run_ranks(Topology(tp=2), both, sums, torch.float32, transport="auto")
    end_pools()
    assert [by_memory for by_memory, _ in found] == [False, False]


def test_too_little_shared_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "memory_bytes", lambda size: 2**60)
    with pytest.raises(Unavailable, match="MiB free and 2 ranks need"):
        shared_memory._check_host(2)


def offer(obstacle: str | None = None, host: str = "a") -> shared_memory._Offer:
    return shared_memory._Offer(obstacle=obstacle, host=host, process=("n", 1), nonce="")


@pytest.mark.parametrize(
    ("offers", "reason"),
    [
        ([offer(), offer()], None),
        ([offer(), offer(obstacle="it is not built")], "rank 1: it is not built"),
        ([offer(), offer(host="b")], "rank 1 has not the same /dev/shm"),
    ],
)
def test_shared_memory_needs_all_ranks(offers: list[shared_memory._Offer], reason: str | None) -> None:
    found = shared_memory._obstacle(offers)
    assert (found is None) if reason is None else (found is not None and reason in found)
