"""Memory taken when it is touched, and given back before it is freed."""

import psutil
import torch

from parallel.pages import give_back, zeros_when_touched

MIB = 2**20


def test_the_pages_within_go_and_what_lies_beside_stays() -> None:
    whole = torch.ones(64 * MIB, dtype=torch.uint8)
    process = psutil.Process()
    before = process.memory_info().rss
    give_back(whole[MIB + 5 : 33 * MIB + 7])
    assert before - process.memory_info().rss > 30 * MIB
    assert whole[: MIB + 5].all()
    assert whole[33 * MIB + 7 :].all()
    assert not whole[2 * MIB : 32 * MIB].any()


def test_less_than_a_page_is_left_alone() -> None:
    small = torch.ones(3000)
    give_back(small[100:200])
    assert small.all()


def test_zeros_take_memory_when_they_are_written_to() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    zeros = zeros_when_touched((64, MIB // 4), torch.float32)
    assert (zeros.shape, zeros.dtype) == ((64, MIB // 4), torch.float32)
    assert process.memory_info().rss - before < 8 * MIB
    zeros[8:16] = 1
    assert process.memory_info().rss - before >= 8 * MIB
    assert not zeros[:8].any()
    assert not zeros[16:].any()
    assert zeros[8:16].all()


def test_nothing_is_a_tensor_of_zeros_too() -> None:
    assert zeros_when_touched((0, 4), torch.bfloat16).shape == (0, 4)
