"""Gate, up and SwiGLU in one kernel against the two kernels, to the bit."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.layers import Mlp
from parallel.groups import single_rank_groups
from parallel.quantisation import quantise_fp8
from parallel.quantised_format import QuantisedFormat
from parallel.weight_format import MAX_GEMV_ROWS, Dense
from tests.parallel.cuda.test_gemv import KINDS, KindOrPlain, never


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    from parallel.cuda import gated_gemv

    gated_gemv.enable(True)
    yield
    gated_gemv.enable(False)


def use(tile: object, patch: pytest.MonkeyPatch) -> None:
    """Both kernels use this tile, without measuring."""
    for module in ("gemv", "gated_gemv"):
        patch.setattr(f"parallel.cuda.{module}.autotuner_for", lambda _device: SimpleNamespace(best=lambda *_product: tile))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_rows", "num_inputs", "width"), [(1, 896, 5), (2, 128, 4), (2, 1000, 7), (1, 328, 1)])
def test_one_kernel_gives_the_bits_of_two(
    num_rows: int, num_inputs: int, width: int, kind: KindOrPlain, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from parallel.cuda import gated_gemv, gemv
    from parallel.cuda.autotune import Tile
    from parallel.cuda.elementwise import swiglu

    torch.manual_seed(num_rows)
    weight = torch.randn(2 * width, num_inputs, device=device) / num_inputs**0.5
    x = torch.randn(num_rows, num_inputs, device=device).to(dtype)
    tensors = {"weight": weight.to(dtype)} if kind == "plain" else QuantisedFormat(kind, torch.float32).prepare({"weight": weight})
    for tile in (Tile(num_rows, 2, 2, 1), Tile(num_rows, 4, 1, 2)):
        use(tile, monkeypatch)
        found = gated_gemv.multiply(x, tensors, never)
        assert found.dtype == dtype
        assert torch.equal(found, swiglu(gemv.multiply(x, tensors, None, never)))
    if kind == "plain":
        gate, up = F.linear(x.float(), tensors["weight"].float()).chunk(2, dim=-1)
        torch.testing.assert_close(found.float(), F.silu(gate) * up, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_an_mlp_gives_the_same_bits_with_it(num_rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from parallel.cuda import gated_gemv
    from parallel.cuda.autotune import Tile
    from parallel.cuda.elementwise import CudaElementwise

    apart: list[bool] = []

    class Observed(CudaElementwise):
        def swiglu(self, gate_up_TX: Tensor) -> Tensor:
            apart.append(gated_gemv._is_enabled)
            return super().swiglu(gate_up_TX)

    mlp = Mlp(hidden_size=64, inner_size=10, tp=single_rank_groups().tp, format=Dense(torch.float32), dtype=torch.float32)
    for layer in (mlp.up, mlp.down):
        layer.allocate(device)
        layer.tensors["weight"].normal_()
    monkeypatch.setattr("model.layers.elementwise_kernels_for", lambda _x: Observed())
    for module in ("model.layers", "parallel.weight_format"):
        monkeypatch.setattr(f"{module}.uses_gemv", lambda x: len(x) <= MAX_GEMV_ROWS)
    use(Tile(num_rows, 2, 1, 1), monkeypatch)
    x = torch.randn(num_rows, 64, device=device)
    found = mlp(x)
    gated_gemv.enable(False)
    assert torch.equal(found, mlp(x))
    assert apart == ([False] if num_rows <= MAX_GEMV_ROWS else [True, False])


@pytest.mark.parametrize("why", ["off", "not measured", "fp8", "a share of nothing"])
def test_the_two_kernels_are_used(why: str, device: torch.device) -> None:
    from parallel.cuda import gated_gemv

    if why == "off":
        gated_gemv.enable(False)
    weight, x, other = torch.randn(0 if why == "a share of nothing" else 6, 300, device=device), torch.randn(2, 300), torch.empty(2, 3)
    tensors: dict[str, Tensor] = {"weight": weight}
    if why == "fp8":
        tensors = dict(zip(("numbers", "scales"), quantise_fp8(weight), strict=True))
    assert gated_gemv.multiply(x.to(device), tensors, lambda: other) is other
