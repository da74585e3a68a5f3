"""Memory given back before it is freed."""

import psutil
import torch

from parallel.pages import give_back

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
