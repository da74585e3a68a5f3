"""The int4 kernels with zero points, each shape once; more are slow tests beside those of the other kinds."""

import pytest
import torch
from torch import Tensor

from parallel.native.elementwise import NativeElementwise
from parallel.native.experts import experts
from parallel.native.library import Native, native
from parallel.native.linear import Kind, gather_rows, multiply, pack, rounded_rows, rows, unpack, with_lanes

KINDS: tuple[Kind, ...] = ("int4_zeros", "int4_zeros_dot")


@pytest.fixture
def library(kind: Kind) -> Native:
    found = native()
    if found is None:
        pytest.skip("the kernels are not built here")
    if kind not in found.kinds:
        pytest.skip(f"this processor has no product of {kind}")
    return found


def stored(num_outputs: int, num_inputs: int) -> Tensor:
    """As in AWQ: numbers from 0 to 15 minus a zero point, times a scale, for each 128 inputs."""
    groups = (num_outputs, -(-num_inputs // 128), 1)
    scales, zeros = (torch.rand(groups) * 0.1 + 0.01).half().float(), torch.randint(0, 16, groups)
    numbers = torch.randint(0, 16, (*groups[:2], 128)) - zeros
    return (numbers * scales).flatten(1)[:, :num_inputs].contiguous()


@pytest.mark.parametrize("shape", [(307, 200), (72, 1500)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_product_equals_that_with_the_stored_matrix(library: Native, kind: Kind, shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    weight, bias, x = stored(*shape), torch.randn(shape[0]), torch.randn(34, shape[1])
    packed = pack(kind, weight, library.lanes)
    assert torch.equal(unpack(packed)[:, : shape[1]], weight), "nothing is lost"
    some = torch.tensor([shape[0] - 1, 0, 16, 15])
    assert torch.equal(gather_rows(library, packed, some), rows(packed, some))
    assert torch.equal(unpack(with_lanes(packed, 24 - library.lanes)), unpack(packed))
    wanted = rounded_rows(kind, x).double() @ weight.double().T + bias
    size = x.double().abs() @ weight.double().abs().T + 1
    whole = multiply(library, x, packed, bias)
    assert ((whole - wanted).abs() <= 2.0**-14 * size).all()
    for count in (1, 2, 3, 5, 8, 13):  # each is cut otherwise
        assert torch.equal(multiply(library, x[7 : 7 + count], packed, bias), whole[7 : 7 + count])


@pytest.mark.parametrize("kind", KINDS)
def test_fused_experts_are_bit_identical_to_one_after_the_other(library: Native, kind: Kind) -> None:
    torch.manual_seed(2)
    counts = [3, 30]
    up, down = ([pack(kind, stored(*shape), library.lanes) for _ in counts] for shape in ((2 * 72, 200), (200, 72)))
    x, wanted = torch.randn(sum(counts), 200), []
    for part, its_up, its_down in zip(x.split(counts), up, down, strict=True):
        wanted.append(multiply(library, NativeElementwise(library).swiglu(multiply(library, part, its_up, None)), its_down, None))
    assert torch.equal(experts(library, x, None, counts, up, down), torch.cat(wanted))
