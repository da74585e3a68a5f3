"""Check products with quantised matrices. T rows, N outputs, K inputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.kernels.checks import Checks, poisoned
from parallel.quantisation import quantise_fp8
from parallel.quantised_format import Kind, QuantisedFormat, unpack

GEMV_KINDS: tuple[Kind | None, ...] = (None, "int8", "int4", "int4_zeros")
"""FP8 is not multiplied by that kernel."""
ROTATED_BYTES = 256 << 20
"""Bytes of matrix copies that are read in turn, so that no run hits data in the L2 cache: four times an H200's cache."""


def rounded(checks: Checks) -> None:
    from parallel.cuda.quantised_matmul import multiply

    kinds: tuple[Kind, ...] = ("int8", "int4", "int4_zeros", "fp8") if checks.device.type == "cuda" else ("int8", "int4")
    for kind in kinds:  # (Triton's interpreter loses a carry in FP8)
        tensors = QuantisedFormat(kind, torch.float32).prepare({"weight": checks.random(checks.sizes.inner, checks.sizes.width).float()})
        matrix = whole(tensors, checks.sizes.width)
        for rows in checks.sizes.rows:
            x, bias = checks.random(rows, checks.sizes.width), checks.random(checks.sizes.inner)
            wide = as_multiplied(kind, x)
            with poisoned():
                found = multiply(x, tensors, bias)
            checks.judge(f"{kind} product of {rows}", found, wide @ matrix.T + bias.double())
            checks.timed(f"{kind} product of {rows}", *_in_turn(checks, tensors, lambda copy, x=x: multiply(x, copy, None)))


def few_rows(checks: Checks) -> None:
    """Products of one and two rows with every candidate tile of their kernel. Elsewhere it is used only if it was measured to be faster,
    and then on both sides of the comparison of steps."""
    from parallel.cuda import gemv

    for kind in GEMV_KINDS:
        for num_outputs, num_inputs in checks.sizes.matrices:
            tensors = matrix_of(checks, kind, num_outputs, num_inputs)
            matrix, bias = whole(tensors, num_inputs), checks.random(num_outputs)
            for rows, tiles in gemv.CANDIDATES.items():
                x = checks.random(rows, num_inputs)
                wanted = x.double() @ matrix.T + bias.double()
                for tile in tiles[: checks.sizes.tiles]:
                    checks.results.go_on()
                    name = f"{kind or 'plain'} {num_inputs} to {num_outputs} of {rows}, {tile.columns} {tile.num_warps} {tile.num_stages}"
                    with using(gemv, tile):
                        with poisoned():
                            found = gemv.multiply(x, tensors, bias, _not_otherwise)
                        checks.judge(name, found, wanted)
                        checks.timed(name, *_in_turn(checks, tensors, lambda copy, x=x: gemv.multiply(x, copy, None, _not_otherwise)))


def gated(checks: Checks) -> None:
    """Gate, up and SwiGLU in one kernel with every candidate tile, against float64, and to the bit against two kernels with the same tile;
    both are timed."""
    from parallel.cuda import gated_gemv, gemv
    from parallel.cuda.elementwise import swiglu

    width, inner = checks.sizes.width, checks.sizes.inner
    for kind in GEMV_KINDS:
        tensors = matrix_of(checks, kind, 2 * inner, width)
        for rows, tiles in gemv.CANDIDATES.items():
            x = checks.random(rows, width)
            gate, up = (x.double() @ whole(tensors, width).T).chunk(2, -1)

            def in_two(tensors: dict[str, Tensor], x: Tensor = x) -> Tensor:
                return swiglu(gemv.multiply(x, tensors, None, _not_otherwise))

            def in_one(tensors: dict[str, Tensor], x: Tensor = x) -> Tensor:
                return gated_gemv.multiply(x, tensors, _not_otherwise)

            for tile in tiles[: checks.sizes.tiles]:
                checks.results.go_on()
                name = f"gated {kind or 'plain'} of {rows}, {tile.columns} {tile.num_warps} {tile.num_stages}"
                with using(gemv, tile), using(gated_gemv, tile), patch.object(gated_gemv, "_is_enabled", True):
                    with poisoned():
                        found = in_one(tensors)
                    checks.judge(name, found, F.silu(gate) * up)
                    checks.expect(torch.equal(found, in_two(tensors)), f"{name} has other bits than two kernels")
                    checks.timed(f"{name}: in two kernels", *_in_turn(checks, tensors, in_two))
                    checks.timed(f"{name}: in one", *_in_turn(checks, tensors, in_one))


def _not_otherwise() -> Tensor:
    raise AssertionError("cuBLAS was used instead of the tile")


@contextmanager
def using(module: ModuleType, tile: object) -> Iterator[None]:
    """Within this context, products of the module use this tile."""
    with patch.object(module, "autotuner_for", lambda _device: SimpleNamespace(best=lambda *_product: tile)):
        yield


def matrix_of(checks: Checks, kind: Kind | None, num_outputs: int, num_inputs: int) -> dict[str, Tensor]:
    """A random matrix, plain (None) or quantised."""
    weight = checks.random(num_outputs, num_inputs) * 0.02
    return QuantisedFormat(kind, torch.float32).prepare({"weight": weight.float()}) if kind else {"weight": weight}


def _in_turn(
    checks: Checks, tensors: dict[str, Tensor], multiply: Callable[[dict[str, Tensor]], Tensor]
) -> tuple[Callable[[], object], int]:
    """Products with enough copies of a matrix that none stays in the cache, and the bytes of all copies."""
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    most = ROTATED_BYTES if checks.device.type == "cuda" else num_bytes
    copies = [{name: tensor.clone() for name, tensor in tensors.items()} for _ in range(-(-most // num_bytes))]
    return (lambda: [multiply(copy) for copy in copies]), num_bytes * len(copies)


def whole(tensors: dict[str, Tensor], num_inputs: int) -> Tensor:
    """The matrix (N, K) of a plain or quantised format in float64."""
    return tensors["weight"].double() if "weight" in tensors else unpack(tensors).double()[:, :num_inputs]


def as_multiplied(kind: Kind | None, x_TK: Tensor) -> Tensor:
    """The input rows in float64, rounded as for a product with such a matrix."""
    if kind != "fp8":
        return x_TK.double()
    numbers_TK, scales_T = quantise_fp8(x_TK)
    return numbers_TK.double() * scales_T.double().unsqueeze(-1)
