"""Products with int4 matrices that have a zero point per group, each kernel once; more shapes are slow tests beside those of int4."""

import pytest
import torch
from torch import Tensor

from parallel.quantised_format import QuantisedFormat, multiply_reference, unpack


def stored(num_outputs: int, num_inputs: int, device: torch.device) -> Tensor:
    """As in AWQ: numbers from 0 to 15 minus a zero point, times a scale, for each 128 inputs."""
    groups = (num_outputs, -(-num_inputs // 128), 1)
    scales, zeros = (torch.rand(groups) * 0.1 + 0.01).half().float(), torch.randint(0, 16, groups)
    numbers = torch.randint(0, 16, (*groups[:2], 128)) - zeros
    return (numbers * scales).flatten(1)[:, :num_inputs].contiguous().to(device)


@pytest.mark.parametrize("num_rows", [2, 5])
def test_each_way_equals_the_reference(num_rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from parallel.cuda import gemv, quantised_matmul
    from parallel.cuda.autotune import LIBRARY, Tile

    torch.manual_seed(0)
    weight, x, bias = stored(70, 200, device), torch.randn(num_rows, 200, device=device), torch.randn(70, device=device)
    tensors = QuantisedFormat("int4_zeros", torch.float32).prepare({"weight": weight.clone()})
    assert torch.equal(unpack(tensors)[:, :200], weight), "nothing is lost"
    wanted = multiply_reference(x, tensors, bias)
    for way in (Tile(16, 64), Tile(16, 64, 4, 3, "swapped"), Tile(16, 64, 4, 3, "swapped", 2), LIBRARY):
        monkeypatch.setattr(quantised_matmul, "_choice", lambda *_product, way=way: ("", (way,)))
        torch.testing.assert_close(quantised_matmul.multiply_by_tensor_cores(x, tensors, bias), wanted, atol=1e-3, rtol=1e-4)
    if num_rows == 2:
        monkeypatch.setattr(gemv, "autotuner_for", lambda _device: type("Two", (), {"best": lambda *_: Tile(2, 2, 2, 1)})())
        torch.testing.assert_close(gemv.multiply(x, tensors, bias, pytest.fail), wanted, atol=1e-3, rtol=1e-4)
