"""Errors of sublayer kernels; their results are compared in tests/model/test_native_layers.py."""

import pytest
import torch
from torch import Tensor

from parallel.native.experts import NativeExperts
from parallel.native.library import Native, native
from parallel.native.linear import Packed, pack
from parallel.native.sublayers import GatedMlp, MoeSublayer, PackedLinear

WIDTH, INNER, EXPERTS, ACTIVE = 64, 72, 4, 2


def test_a_row_with_an_expert_that_is_not_held_is_an_error() -> None:
    library = native()
    if library is None:
        pytest.skip("the kernels are not built here")
    wanted, refused = moe_sublayer_output(library, set(range(EXPERTS))), []
    for missing in range(EXPERTS):
        try:
            assert torch.equal(moe_sublayer_output(library, set(range(EXPERTS)) - {missing}), wanted)
        except KeyError as error:
            refused.append((missing, *error.args))
    assert refused == [(missing, f"expert {missing} is not held here") for missing, _ in refused]
    assert len(refused) == ACTIVE


def moe_sublayer_output(library: Native, held: set[int]) -> Tensor:
    """For one row."""
    random = torch.Generator().manual_seed(4)

    def matrix(outputs: int, inputs: int) -> Packed:
        return pack("fp32", torch.randn(outputs, inputs, generator=random) / 8, library.lanes)

    def product(outputs: int, inputs: int) -> PackedLinear:
        return PackedLinear(matrix(outputs, inputs), None, inputs)

    up = {number: matrix(2 * INNER, WIDTH) for number in range(EXPERTS)}
    down = {number: matrix(WIDTH, INNER) for number in range(EXPERTS)}
    sublayer = MoeSublayer(
        library,
        norm=torch.ones(WIDTH),
        eps=1e-6,
        router=product(EXPERTS, WIDTH),
        experts_per_token=ACTIVE,
        renormalise=True,
        experts=NativeExperts(library, EXPERTS, {number: up[number] for number in held}, {number: down[number] for number in held}),
        shared=GatedMlp(product(2 * INNER, WIDTH), product(WIDTH, INNER), 12),
        shared_gate=product(1, WIDTH),
    )
    return sublayer(torch.randn(1, WIDTH, generator=random), torch.randn(1, WIDTH, generator=random))
