"""Tensors in the arena are adjacent, and when their memory is freed."""

import gc
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch

from parallel.arena import LINE_BYTES, REGION_BYTES, Arena
from parallel.host_memory import HUGE_PAGE_BYTES, MIB


def held() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def test_tensors_are_adjacent_from_a_2_mib_page_on() -> None:
    arena = Arena()
    first, second = arena.allocate((5, 7), torch.float32), arena.allocate((3, 1000), torch.bfloat16)
    assert (first.shape, first.dtype, second.shape, second.dtype) == ((5, 7), torch.float32, (3, 1000), torch.bfloat16)
    assert first.data_ptr() % HUGE_PAGE_BYTES == 0
    assert second.data_ptr() - first.data_ptr() == -(-5 * 7 * 4 // LINE_BYTES) * LINE_BYTES
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all()
    assert (second == 2).all()


def test_a_large_tensor_gets_its_own_region_and_small_ones_continue() -> None:
    arena = Arena()
    small, large, next_small = (arena.allocate((size,), torch.uint8) for size in (LINE_BYTES, REGION_BYTES, LINE_BYTES))
    assert next_small.data_ptr() - small.data_ptr() == LINE_BYTES
    assert large.data_ptr() % HUGE_PAGE_BYTES == 0


def test_an_empty_tensor_can_be_allocated() -> None:
    assert Arena().allocate((0, 4), torch.bfloat16).shape == (0, 4)


def test_a_tensors_memory_is_freed_with_it_whatever_is_beside() -> None:
    arena, before = Arena(), held()
    kept, *others = (arena.allocate((16 * MIB,), torch.uint8).fill_(1) for _ in range(3))
    view = others.pop()[5:]
    assert held() - before > 44 * MIB
    others.clear()
    assert held() - before < 36 * MIB, "a view of one is still there, and another"
    del view
    assert held() - before < 20 * MIB
    assert kept.all()
    del kept
    assert held() - before < 4 * MIB, "the arena keeps nothing"


def test_threads_never_get_overlapping_memory() -> None:
    arena = Arena()
    with ThreadPoolExecutor(8) as threads:
        tensors = list(threads.map(lambda number: arena.allocate((1000,), torch.int64).fill_(number), range(2000)))
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))
