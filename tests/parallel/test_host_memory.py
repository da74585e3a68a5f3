"""Memory that is allocated when it is first written to."""

import psutil
import torch

from parallel.host_memory import lazy_zeros

MIB = 2**20


def test_lazy_zeros_take_memory_only_when_written_to() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    zeros = lazy_zeros((64, MIB // 4), torch.float32)
    assert (zeros.shape, zeros.dtype) == ((64, MIB // 4), torch.float32)
    assert process.memory_info().rss - before < 8 * MIB
    zeros[8:16] = 1
    assert process.memory_info().rss - before >= 8 * MIB
    assert not zeros[:8].any()
    assert not zeros[16:].any()
    assert zeros[8:16].all()


def test_an_empty_shape_gives_an_empty_tensor() -> None:
    assert lazy_zeros((0, 4), torch.bfloat16).shape == (0, 4)
