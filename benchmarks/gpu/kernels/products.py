"""Check products with quantised matrices. T rows, N outputs, K inputs."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.kernels.checks import Checks, poisoned
from parallel.quantisation import quantise_fp8
from parallel.quantised_format import Kind, QuantisedFormat, unpack

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
            checks.timed(f"{kind} product of {rows}", *_in_turn(checks, x, tensors))


def _in_turn(checks: Checks, x: Tensor, tensors: dict[str, Tensor]) -> tuple[Callable[[], object], int]:
    """Products with enough copies of a matrix that none stays in the cache, and the bytes of all copies."""
    from parallel.cuda.quantised_matmul import multiply

    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    most = ROTATED_BYTES if checks.device.type == "cuda" else num_bytes
    copies = [{name: tensor.clone() for name, tensor in tensors.items()} for _ in range(-(-most // num_bytes))]
    return (lambda: [multiply(x, copy, None) for copy in copies]), num_bytes * len(copies)


def whole(tensors: dict[str, Tensor], num_inputs: int) -> Tensor:
    """The matrix (N, K) of a plain or quantised format in float64."""
    return tensors["weight"].double() if "weight" in tensors else unpack(tensors).double()[:, :num_inputs]


def as_multiplied(kind: Kind | None, x_TK: Tensor) -> Tensor:
    """The input rows in float64, rounded as for a product with such a matrix."""
    if kind != "fp8":
        return x_TK.double()
    numbers_TK, scales_T = quantise_fp8(x_TK)
    return numbers_TK.double() * scales_T.double().unsqueeze(-1)
