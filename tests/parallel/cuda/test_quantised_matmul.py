"""Products with quantised matrices against the same in plain torch."""

import pytest
import torch

from parallel.quantisation import quantise_fp8
from parallel.quantised_format import Kind, QuantisedFormat, multiply_reference, unpack

KINDS = ["int8", "int4", pytest.param("int4_zeros", marks=pytest.mark.slow), "fp8"]
"""For the third see also test_zero_points.py."""


@pytest.mark.usefixtures("exact_fp8")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_rows", "num_inputs", "num_outputs"), [(1, 128, 32), (5, 200, 70), (33, 64, 40), (70, 330, 150), (0, 8, 8)])
def test_a_product_equals_the_reference(
    num_rows: int, num_inputs: int, num_outputs: int, kind: Kind, dtype: torch.dtype, device: torch.device
) -> None:
    from parallel.cuda.quantised_matmul import multiply

    torch.manual_seed(num_rows)
    weight, bias = torch.randn(num_outputs, num_inputs, device=device), torch.randn(num_outputs, device=device).to(dtype)
    x = torch.randn(num_rows, num_inputs, device=device).to(dtype)
    tensors = QuantisedFormat(kind, torch.float32).prepare({"weight": weight})
    tolerance = {"atol": 5e-2, "rtol": 5e-3} if dtype == torch.float16 else {"atol": 1e-3, "rtol": 1e-4}
    for some_bias in (None, bias):
        found = multiply(x, tensors, some_bias)
        assert found.dtype == dtype
        torch.testing.assert_close(found, multiply_reference(x, tensors, some_bias), **tolerance)


SHAPES = [(1, 128, 32), (5, 200, 70), (33, 64, 40), (70, 330, 150)]


@pytest.mark.usefixtures("exact_fp8")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_rows", "num_inputs", "num_outputs"), SHAPES)
def test_each_way_equals_the_reference(
    num_rows: int, num_inputs: int, num_outputs: int, kind: Kind, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from parallel.cuda import quantised_matmul
    from parallel.cuda.autotune import LIBRARY, Tile

    torch.manual_seed(num_rows)
    weight, bias = torch.randn(num_outputs, num_inputs, device=device), torch.randn(num_outputs, device=device)
    x = torch.randn(num_rows, num_inputs, device=device)
    tensors = QuantisedFormat(kind, torch.float32).prepare({"weight": weight})
    ways = [Tile(16, 64, 4, 3, "swapped"), Tile(32, 64, 4, 3, "swapped", 2), Tile(16, 128, 4, 3, "swapped", 4)]
    if kind != "fp8":
        monkeypatch.setattr(quantised_matmul, "DEQUANTISED_BYTES", 4 * num_inputs * 32)
        ways.append(LIBRARY)
    for way in ways:
        monkeypatch.setattr(quantised_matmul, "_choice", lambda *_product, way=way: ("", (way,)))
        for some_bias in (None, bias):
            found = quantised_matmul.multiply(x, tensors, some_bias)
            torch.testing.assert_close(found, multiply_reference(x, tensors, some_bias), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "int4", pytest.param("int4_zeros", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dequantised_weights_are_rounded_once(kind: Kind, dtype: torch.dtype, device: torch.device) -> None:
    from parallel.cuda.quantised_matmul import dequantise_rows

    torch.manual_seed(0)
    tensors = QuantisedFormat(kind, torch.float32).prepare({"weight": torch.randn(50, 5000, device=device)})
    found = dequantise_rows(tensors, 20, torch.full((25, 5000), torch.nan, dtype=dtype, device=device))
    assert torch.equal(found, unpack(tensors)[20:45, :5000].to(dtype))


@pytest.mark.parametrize(("width", "block"), [(1, 32768), (100, 32768), (2048, 32768), (5000, 32768), (5000, 1024)])
def test_rows_are_quantised_to_fp8_like_torch(width: int, block: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from parallel.cuda import quantised_matmul
    from parallel.cuda.quantised_matmul import quantise_rows

    monkeypatch.setattr(quantised_matmul, "FP8_BLOCK", block)
    torch.manual_seed(width)
    x = torch.randn(4, width, device=device) * torch.tensor([1.0, 1e-3, 1e4, 0.0], device=device).unsqueeze(-1)
    numbers, scales = quantise_rows(x)
    wanted, wanted_scales = quantise_fp8(x)
    assert torch.equal(scales, wanted_scales)
    carried = wanted.float().abs().log2().frac() == 0  # see `exact_fp8`
    same = (numbers.float() == wanted.float()) | (carried if device.type == "cpu" else False)
    assert same.all()
    assert carried.sum() < max(2, 0.2 * wanted[:3].numel())
