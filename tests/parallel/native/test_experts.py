"""All experts in one call against one after the other."""

import pytest
import torch

from parallel.native.elementwise import NativeElementwise
from parallel.native.experts import NativeExperts, experts
from parallel.native.library import native
from parallel.native.linear import Kind, multiply, pack
from parallel.packed_format import PackedFormat

KINDS = (
    *("bf16", "bf16_dot", "fp32", "int8", "int8_dot", "int4", "int4_dot"),
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int4_zeros", "int4_zeros_dot")),
)
COUNTS = {"one token each": [1, 1, 1], "few": [3, 1, 7], "one crowded": [1, 150, 2], "a single expert": [5]}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_experts_are_bit_identical_to_one_after_the_other(kind: Kind, counts: list[int]) -> None:
    library = native()
    if library is None:
        pytest.skip("the kernels are not built here")
    if kind not in library.kinds:
        pytest.skip(f"this processor has no product of {kind}")
    random = torch.Generator().manual_seed(1)
    up = [pack(kind, torch.randn(2 * 72, 200, generator=random), library.lanes) for _ in counts]
    down = [pack(kind, torch.randn(200, 72, generator=random), library.lanes) for _ in counts]
    x, rows = torch.randn(40, 200, generator=random), torch.randint(40, (sum(counts),), generator=random)
    wanted = []
    for number, part in enumerate(rows.split(counts)):
        inner = NativeElementwise(library).swiglu(multiply(library, x[part], up[number], None))
        wanted.append(multiply(library, inner, down[number], None))
    assert torch.equal(experts(library, x, rows, counts, up, down), torch.cat(wanted))


@pytest.mark.parametrize("num_rows", [13, 40, 200])
@pytest.mark.parametrize("inner", [72, 256, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_gated_mlp_is_bit_identical_to_separate_products(kind: Kind, inner: int, num_rows: int) -> None:
    library = native()
    if library is None:
        pytest.skip("the kernels are not built here")
    if kind not in library.kinds:
        pytest.skip(f"this processor has no product of {kind}")
    random, form = torch.Generator().manual_seed(2), PackedFormat(kind, torch.float32)
    up = form.prepare({"weight": torch.randn(2 * inner, 200, generator=random)})
    down = form.prepare({"weight": torch.randn(200, inner, generator=random)})
    x = torch.randn(num_rows, 200, generator=random)
    found = form.gated(x, up, down)
    assert found is not None
    assert torch.equal(found, form.multiply(NativeElementwise(library).swiglu(form.multiply(x, up, None)), down, None))
    assert form.gated(x[:3], up, down) is None, "not faster"
    assert form.gated(x.bfloat16(), up, down) is None, "what is between them would be rounded there"


@pytest.mark.parametrize("num_rows", [1, 5, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_all_experts_of_a_rank_give_each_row_the_sum_of_its_own(kind: Kind, num_rows: int) -> None:
    library = native()
    if library is None:
        pytest.skip("the kernels are not built here")
    if kind not in library.kinds:
        pytest.skip(f"this processor has no product of {kind}")
    random = torch.Generator().manual_seed(3)
    held = (0, 2, 3)  # 1 and 4 are elsewhere
    up = {number: pack(kind, torch.randn(2 * 72, 200, generator=random), library.lanes) for number in held}
    down = {number: pack(kind, torch.randn(200, 72, generator=random), library.lanes) for number in held}
    x, weights = torch.randn(num_rows, 200, generator=random), torch.rand(num_rows, 2, generator=random)
    ids = torch.tensor([[3, 0], [-1, 2], [-1, -1], [2, 3], [0, 2]]).repeat(14, 1)[:num_rows]
    wanted = torch.zeros(num_rows, 200)
    for row in range(num_rows):
        for expert, weight in zip(ids[row].tolist(), weights[row], strict=True):
            if expert >= 0:
                one = x[row : row + 1]
                inner = NativeElementwise(library).swiglu(multiply(library, one, up[expert], None))
                wanted[row] += weight * multiply(library, inner, down[expert], None)[0]
    all_experts = NativeExperts(library, 5, up, down)
    torch.testing.assert_close(all_experts(x, ids, weights), wanted, atol=1e-4, rtol=1e-5)
    for missing in (1, 5):
        with pytest.raises(KeyError, match=f"expert {missing} is not held here"):
            all_experts(x, ids.where(ids != ids[0, 0], missing), weights)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_experts_has_the_same_bits_alone_among_others_and_with_any_number_of_threads(kind: Kind) -> None:
    """With few rows, with many, and with more threads than share the columns of sums, experts take three different ways."""
    library = native()
    if library is None:
        pytest.skip("the kernels are not built here")
    if kind not in library.kinds:
        pytest.skip(f"this processor has no product of {kind}")
    random, width, inner = torch.Generator().manual_seed(5), 300, 200
    up = {number: pack(kind, torch.randn(2 * inner, width, generator=random), library.lanes) for number in range(3)}
    down = {number: pack(kind, torch.randn(width, inner, generator=random), library.lanes) for number in range(3)}
    all_experts = NativeExperts(library, 3, up, down)
    x, weights = torch.randn(400, width, generator=random), torch.rand(400, 2, generator=random)
    ids = torch.tensor([[2, 0], [1, 2], [-1, -1], [0, -1], [2, 1]]).repeat(80, 1)
    ids[300:] = torch.tensor([1, -1])  # so that the rows of an expert are several blocks
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            found.append(all_experts(x, ids, weights))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)
    for row in (0, 1, 2, 3, 4, 255, 256, 399):
        assert torch.equal(all_experts(x[row : row + 1], ids[row : row + 1], weights[row : row + 1])[0], found[0][row]), row
