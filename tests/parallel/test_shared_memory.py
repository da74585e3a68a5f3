"""The shared-memory all-reduce against gloo, and when ranks agree to use it."""

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel import shared_memory
from parallel.collectives import all_reduce
from parallel.groups import ParallelGroups
from parallel.topology import Topology
from tests.ranks import end_pools, run_ranks

CORES = shared_memory._cores()
HAS_AVX512 = "avx512bw" in Path("/proc/cpuinfo").read_text()
needs_avx512 = pytest.mark.skipif(not HAS_AVX512, reason=shared_memory.NEEDS_AVX512)


def usable(test: Callable[..., None]) -> Callable[..., None]:
    built = pytest.mark.skipif(not shared_memory.is_built(), reason="run `python -m parallel.shared_memory` to build it")
    return built(needs_avx512(test))


def needs_cores(ranks: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(ranks > CORES, reason=f"{ranks} ranks would wait busily on {CORES:g} cores")


def value(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def reduce_all(groups: ParallelGroups, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> tuple[bool, list[Tensor]]:
    assert groups.tp.transport is not None
    sums = [all_reduce(value(groups.rank, shape, dtype), groups.tp) for shape in shapes]
    strided = all_reduce(value(groups.rank, (32, 48), dtype).T, groups.tp)
    return groups.tp.transport.shared_memory is not None, [*sums, strided]


SHAPES = [(1, 16), (1, 896), (7, 5), (1,), (0, 16), (640, 1536), (333, 4080), (1100, 8192)]


@usable
@needs_cores(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64], ids=str)
def test_two_ranks_get_bit_for_bit_what_gloo_gives(dtype: torch.dtype) -> None:
    over_gloo = run_ranks(Topology(tp=2), reduce_all, SHAPES, dtype, transport="gloo")
    through_memory = run_ranks(Topology(tp=2), reduce_all, SHAPES, dtype, transport="auto")
    for (used_by_gloo, wanted), (used, found) in zip(over_gloo, through_memory, strict=True):
        assert (used_by_gloo, used) == (False, True)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def reduce_rows(groups: ParallelGroups) -> tuple[Tensor, Tensor]:
    x = value(groups.rank, (3000, 48), torch.float32)
    return all_reduce(x[1234:1235].clone(), groups.tp), all_reduce(x, groups.tp)[1234:1235]


@usable
@needs_cores(3)
def test_three_ranks_sum_a_row_the_same_way_in_any_company() -> None:
    for alone, among_others in run_ranks(Topology(tp=3), reduce_rows, transport="auto"):
        assert torch.equal(alone, among_others)
        torch.testing.assert_close(alone, sum(value(rank, (3000, 48), torch.float32)[1234:1235] for rank in range(3)))


@usable
@needs_cores(2)
def test_nothing_is_left_in_dev_shm() -> None:
    before = {path.name for path in Path("/dev/shm").iterdir()}
    run_ranks(Topology(tp=2), reduce_all, [(1, 16)], torch.float32, transport="auto")
    assert not [p.name for p in Path("/dev/shm").iterdir() if p.name not in before and p.name.startswith("deepspeed")]


@usable
@needs_cores(2)
def test_the_same_processes_can_leave_and_join_again() -> None:
    for _ in range(3):  # an odd number of calls in each: the buffers alternate
        results = run_ranks(Topology(tp=2), reduce_all, [(1, 16), (3, 32)], torch.float32, transport="auto")
        assert all(used for used, _ in results)


def uses(groups: ParallelGroups) -> dict[str, bool]:
    named = {"tp": groups.tp, "stage": groups.stage, "world": groups.world}
    return {name: group.transport is not None and group.transport.shared_memory is not None for name, group in named.items()}


@usable
@needs_cores(4)
def test_only_a_group_of_all_ranks_uses_it() -> None:
    assert run_ranks(Topology(tp=2, pp=2), uses, transport="auto") == [{"tp": False, "stage": False, "world": True}] * 4


@usable
@needs_cores(2)
def test_a_group_that_is_the_world_uses_it_whatever_its_axis() -> None:
    assert run_ranks(Topology(tp=2, ep=2), uses, transport="auto") == [{"tp": True, "stage": True, "world": True}] * 2


def hide_the_operator_on_rank_1(groups: ParallelGroups, folder: str) -> None:
    if groups.rank == 1:
        os.environ["XDG_CACHE_HOME"] = folder


@usable
@needs_cores(2)
def test_ranks_agree_on_gloo_when_one_of_them_has_no_operator(tmp_path: Path) -> None:
    end_pools()
    run_ranks(Topology(tp=2), hide_the_operator_on_rank_1, str(tmp_path))
    assert run_ranks(Topology(tp=2), uses, transport="auto") == [{"tp": False, "stage": False, "world": False}] * 2
    end_pools()


def offer(obstacle: str | None = None, host: str = "a", held: tuple[str, int, int, int] | None = None) -> shared_memory._Offer:
    return shared_memory._Offer(obstacle=obstacle, host=host, nonce="", held=held)


@pytest.mark.parametrize(
    ("offers", "reason"),
    [
        ([offer(), offer()], None),
        ([offer(held=("x", 0, 2, 5)), offer(held=("x", 1, 2, 5))], None),
        ([offer(), offer(obstacle="it is not built")], "rank 1: it is not built"),
        ([offer(), offer(host="b")], "rank 1 has not the same /dev/shm"),
        ([offer(), offer(held=("x", 1, 2, 5))], "in new processes"),
        ([offer(held=("x", 0, 2, 5)), offer(held=("x", 1, 2, 6))], "in new processes"),
        ([offer(held=("x", 1, 2, 5)), offer(held=("x", 0, 2, 5))], "in new processes"),
        ([offer(held=("x", 0, 3, 5)), offer(held=("x", 1, 3, 5))], "in new processes"),
    ],
)
def test_all_ranks_must_be_able_and_of_one_past(offers: list[shared_memory._Offer], reason: str | None) -> None:
    found = shared_memory._obstacle(offers)
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_without_a_compiler_the_build_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(shared_memory.Unavailable, match=r"install g\+\+"):
        shared_memory.build()
    assert not shared_memory.is_built()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "broken-compiler"
    compiler.write_text("#!/bin/sh\necho no space on this planet >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(shared_memory.Unavailable, match="no space on this planet"):
        shared_memory.build()
    assert not shared_memory.is_built()
    assert not list(shared_memory.built_path().parent.iterdir())


def test_without_deepspeed_it_is_not_built_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not shared_memory.is_built()
    with pytest.raises(shared_memory.Unavailable, match="DeepSpeed, whose source holds the operator, is not installed"):
        shared_memory.build()


def test_importing_parallel_brings_in_neither_deepspeed_nor_ray() -> None:
    folder = Path(shared_memory.__file__).parent
    modules = [f"parallel.{path.stem}" for path in folder.glob("[a-z]*.py")]
    code = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; print(*({{'deepspeed', 'ray'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder.parent)
    assert done.stdout.strip() == ""


def agreement_and_log(groups: ParallelGroups, folder: str) -> list[str]:
    os.environ["XDG_CACHE_HOME"] = folder
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    shared_memory.log.addHandler(handler)
    shared_memory.log.setLevel(logging.INFO)
    assert dist.group.WORLD is not None
    assert shared_memory.agree(dist.group.WORLD) is None
    return messages


@needs_avx512
@needs_cores(2)
def test_the_log_says_once_why_gloo_is_used_and_how_to_change_that(tmp_path: Path) -> None:
    end_pools()
    first, second = run_ranks(Topology(tp=2), agreement_and_log, str(tmp_path))
    end_pools()
    assert second == []
    assert len(first) == 1
    assert "over gloo, not shared memory: rank 0" in first[0]
    assert "`python -m parallel.shared_memory`" in first[0]


@pytest.mark.skipif(not shared_memory.is_built(), reason="there was no first one")
def test_a_second_build_is_instant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert shared_memory.build() == shared_memory.built_path()


def test_too_many_ranks_for_the_cores_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    with pytest.raises(shared_memory.Unavailable, match="2 ranks would wait busily for each other on 1 cores"):
        shared_memory._check_host(2)
