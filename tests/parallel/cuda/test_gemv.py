"""Products of one and two rows against the same in plain torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from parallel.quantised_format import QuantisedFormat, multiply_reference

KindOrPlain = Literal["plain", "int8", "int4", "int4_zeros"]
KINDS = ["plain", "int8", "int4", pytest.param("int4_zeros", marks=pytest.mark.slow)]


def never() -> Tensor:
    raise AssertionError("not by this kernel")


@contextmanager
def only(tile: object) -> Iterator[None]:
    from parallel.cuda import gemv

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemv, "autotuner_for", lambda _device: SimpleNamespace(best=lambda *_: tile))
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_rows", "num_inputs", "num_outputs"), [(1, 896, 10), (2, 128, 5), (2, 1000, 7), (1, 328, 9)])
def test_a_product_equals_the_reference(
    num_rows: int, num_inputs: int, num_outputs: int, kind: KindOrPlain, dtype: torch.dtype, device: torch.device
) -> None:
    from parallel.cuda.autotune import Tile
    from parallel.cuda.gemv import multiply

    torch.manual_seed(num_rows)
    weight, bias = torch.randn(num_outputs, num_inputs, device=device), torch.randn(num_outputs, device=device).to(dtype)
    x = torch.randn(num_rows, num_inputs, device=device).to(dtype)
    tensors = {"weight": weight.to(dtype)} if kind == "plain" else QuantisedFormat(kind, torch.float32).prepare({"weight": weight})
    tolerance = {"atol": 5e-2, "rtol": 5e-3} if dtype == torch.float16 else {"atol": 1e-3, "rtol": 1e-4}
    for tile in (Tile(2, 2, 2, 1), Tile(2, 4, 1, 2)):
        for some_bias in (None, bias):
            if kind == "plain":
                wanted = F.linear(x.float(), tensors["weight"].float(), None if some_bias is None else some_bias.float()).to(dtype)
            else:
                wanted = multiply_reference(x, tensors, some_bias)
            with only(tile):
                found = multiply(x, tensors, some_bias, never)
            assert found.dtype == dtype
            torch.testing.assert_close(found, wanted, **tolerance)


def test_a_row_does_not_depend_on_the_other_row(device: torch.device) -> None:
    from parallel.cuda.autotune import Tile
    from parallel.cuda.gemv import multiply

    weight, x = torch.randn(6, 300, device=device), torch.randn(2, 300, device=device)
    with only(Tile(2, 2, 2, 1)):
        whole = multiply(x, {"weight": weight}, None, never)
        x[1] = float("nan")
        found = multiply(x, {"weight": weight}, None, never)
    assert found[1].isnan().all()
    assert torch.equal(found[0], whole[0])


def test_unmeasured_products_do_not_use_gemv(device: torch.device) -> None:
    from parallel.cuda.gemv import multiply

    weight, x, other = torch.randn(6, 300, device=device), torch.randn(2, 300, device=device), torch.empty(2, 6)
    assert multiply(x, {"weight": weight}, None, lambda: other) is other
