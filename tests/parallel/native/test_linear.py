"""Products by kernels against the packed matrix multiplied by torch."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from random import Random

import pytest
import torch
from torch import Tensor

from parallel.arena import Arena
from parallel.native import linear
from parallel.native.library import Native, native
from parallel.native.linear import (
    Kind,
    Packed,
    empty_packed,
    gather_local_rows,
    gather_rows,
    hadamard_groups,
    multiply,
    pack,
    pack_part,
    rounded_rows,
    rows,
    unpack,
    with_lanes,
)
from parallel.quantisation import hadamard, hadamard_inverse
from parallel.weight_format import PIECE_MULTIPLE
from tests.kernels_without_tiles import kernels_without_tiles

KINDS = (
    *("bf16", "bf16_dot", "fp32", "int8", "int8_dot", "int4", "int4_dot"),
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int4_zeros", "int4_zeros_dot")),
)
"""For the last see also test_zero_points.py."""
SHAPES = {"even": (256, 128), "narrow": (1, 64), "ragged": (307, 200), "deep": (72, 1500), "wide": (4500, 40)}
MOST_ROUNDING: dict[Kind, float] = {
    "bf16": 2.0**-8, "bf16_dot": 2.0**-8, "fp32": 0.0, "int8": 1 / 253, "int8_dot": 3 / 253, "int4": 0.126, "int4_dot": 0.126,
    "int4_zeros": 0.134, "int4_zeros_dot": 0.134,
}  # fmt: skip
"""Largest error of a weight, relative to the largest in its group. With a Hadamard transform the errors of all numbers add up in each."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def library(kind: Kind) -> Native:
    found = native()
    if found is None:
        pytest.skip("the kernels are not built here")
    if kind not in found.kinds:
        pytest.skip(f"this processor has no product of {kind}")
    return found


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_matrix_equals_the_matrix_up_to_rounding(kind: Kind, shape: tuple[int, int], lanes: int) -> None:
    weight = random(*shape)
    found = unpack(pack(kind, weight, lanes))[:, : shape[1]]
    assert (found - weight).abs().max() <= MOST_ROUNDING[kind] * weight.abs().max()
    if kind in ("bf16", "bf16_dot"):
        assert torch.equal(found, weight.bfloat16().float())


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_packed_in_any_order_make_the_same_matrix(kind: Kind, lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Random(kind)
    for num_outputs, num_inputs in ((2098, 200), (320, 385), (33, 128), (1, 1)):
        weight = random(num_outputs, num_inputs)
        wanted, found = pack(kind, weight, lanes), empty_packed(kind, num_outputs, num_inputs, lanes)
        monkeypatch.setattr("parallel.native.linear.PIECE_BYTES", 2**20)
        outputs = cuts(num_outputs, [*(draw.randint(0, num_outputs) for _ in range(6)), *(64 * draw.randint(0, 5) for _ in range(2))])
        inputs = cuts(num_inputs, [PIECE_MULTIPLE * draw.randint(0, 3) for _ in range(2)])
        parts = [(rows, columns) for rows in outputs for columns in inputs]
        draw.shuffle(parts)
        for (first, last), (begin, end) in parts:
            pack_part(found, first, begin, weight[first:last, begin:end])
        assert torch.equal(found.numbers, wanted.numbers)
        assert found.scales is None or wanted.scales is None or torch.equal(found.scales, wanted.scales)


@pytest.mark.parametrize("kind", KINDS)
def test_temporary_memory_while_packing_is_bounded(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_at_once, pack_into = [], linear._pack_into
    monkeypatch.setattr(
        linear, "_pack_into", lambda where, piece_NK: (packed_at_once.append(tuple(piece_NK.shape)), pack_into(where, piece_NK))
    )
    weight = random(300, 600)
    for bound, num_outputs in ((100 * 600 * 4, 96), (16 * 600 * 4, 16), (1, 16)):
        monkeypatch.setattr(linear, "PIECE_BYTES", bound)
        pack_part(empty_packed(kind, 300, 600, 8), 0, 0, weight)
        assert max(packed_at_once) == (num_outputs, 600)
        packed_at_once.clear()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_end_within_panels_leave_no_holes_in_the_arena(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, found = random(100, 256), empty_packed(kind, 100, 256, 8)
    monkeypatch.setattr(Arena, "_place", lambda *_: pytest.fail("room for what goes at once"))
    for first, last in ((0, 7), (7, 75), (75, 100)):
        pack_part(found, first, 0, weight[first:last])


def cuts(size: int, places: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(sorted({0, size, *(place for place in places if place < size)})))


@pytest.mark.parametrize("kind", KINDS)
def test_threads_can_pack_neighbouring_outputs_concurrently(kind: Kind) -> None:
    weight = random(16 * 64 + 5, 128)
    wanted, found = pack(kind, weight, 8), empty_packed(kind, len(weight), 128, 8)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda start: pack_part(found, start, 0, weight[start : start + 5]), range(0, len(weight), 5)))
    assert torch.equal(found.numbers, wanted.numbers)


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_packed_for_another_processor_is_repacked_exactly(kind: Kind, shape: tuple[int, int], lanes: int) -> None:
    weight = random(*shape)
    found, wanted = with_lanes(pack(kind, weight, 24 - lanes), lanes), pack(kind, weight, lanes)
    assert found.numbers.shape == wanted.numbers.shape
    assert torch.equal(unpack(found), unpack(wanted))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_packed_for_another_processor_has_the_same_product(library: Native, kind: Kind, shape: tuple[int, int]) -> None:
    weight, x = random(*shape), random(5, shape[1], seed=1)
    foreign = with_lanes(pack(kind, weight, 24 - library.lanes), library.lanes)
    assert torch.equal(multiply(library, x, foreign, None), multiply(library, x, pack(kind, weight, library.lanes), None))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7, 13, 33, 200])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_product_is_that_with_the_unpacked_matrix(library: Native, kind: Kind, shape: tuple[int, int], num_rows: int) -> None:
    packed = pack(kind, random(*shape), library.lanes)
    x, bias = random(num_rows, shape[1], seed=1), random(shape[0], seed=2)
    wanted = rounded_rows(kind, x).double() @ unpack(packed)[:, : shape[1]].double().T
    assert_near(multiply(library, x, packed, None), wanted, x, packed)
    assert_near(multiply(library, x, packed, bias), wanted + bias, x, packed)


def assert_near(found: Tensor, wanted: Tensor, x: Tensor, packed: Packed) -> None:
    """Each number to 2^-14 of the sum of its terms' magnitudes: float32 sums, and 16-bit x for integers."""
    size = x.double().abs() @ unpack(packed)[:, : x.shape[1]].double().abs().T
    assert ((found - wanted).abs() <= 2.0**-14 * size + 1e-6).all()


@pytest.mark.parametrize("kind", ["bf16_dot"])
def test_rows_are_rounded_to_the_nearest_bfloat16(library: Native, kind: Kind) -> None:
    packed, x = pack(kind, random(300, 333), library.lanes), random(20, 333, seed=1)
    assert torch.equal(multiply(library, x, packed, None), multiply(library, x.bfloat16().float(), packed, None))


@pytest.mark.parametrize("kind", ["int8_dot"])
def test_the_hadamard_kernel_is_bit_identical_to_the_reference(library: Native, kind: Kind) -> None:
    groups = random(1300, 7, 128)
    assert torch.equal(hadamard_groups(groups), hadamard(groups))
    assert torch.equal(hadamard_groups(groups, inverse=True), hadamard_inverse(groups))
    torch.testing.assert_close(hadamard_groups(hadamard_groups(groups), inverse=True), groups)


@pytest.mark.parametrize("kind", ["int8_dot"])
def test_an_outlier_costs_the_others_of_its_group_little(library: Native, kind: Kind) -> None:
    """Rounded with one scale, it would leave the others an error of 12 %."""
    weight, x = random(300, 256), random(20, 256, seed=1)
    weight[:, 77] = 0
    wanted = x @ weight.T
    x[:, 77] = 50
    found = multiply(library, x, pack(kind, weight, library.lanes), None)
    assert (found - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_bit_identical_in_any_batch(library: Native, kind: Kind) -> None:
    packed = pack(kind, random(307, 1500), library.lanes)
    x = random(200, 1500, seed=1)
    whole = multiply(library, x, packed, None)
    for start, stop in [*((7, 7 + count) for count in range(1, 34)), (100, 197)]:  # each of them is cut otherwise
        assert torch.equal(multiply(library, x[start:stop], packed, None), whole[start:stop])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["bf16_dot", "int8_dot", "int4_dot", "int4_zeros_dot"])
def test_amx_tiles_agree_with_vectors(library: Native, kind: Kind, shape: tuple[int, int]) -> None:
    """Bit for bit, but for bfloat16, of which they add up the products in another order."""
    other = kernels_without_tiles()
    packed, bias = pack(kind, random(*shape), library.lanes), random(shape[0], seed=2)
    for num_rows in (1, 5, 9, 16, 17, 32, 33, 100):
        x = random(num_rows, shape[1], seed=1)
        tiles, vectors = (multiply(each, x, packed, bias) for each in (library, other))
        assert torch.equal(tiles, vectors) if kind != "bf16_dot" else (tiles - vectors).norm() < 1e-5 * vectors.norm()


@pytest.mark.parametrize("num_rows", [1, 2, 4, 6, 8, 12, 33, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_uninitialised_output_memory_does_not_matter(library: Native, kind: Kind, num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [(pack(kind, random(307, width), library.lanes), random(num_rows, width, seed=1)) for width in (40, 1500)]
    wanted = [multiply(library, x, packed, None) for packed, x in cases]
    monkeypatch.setattr(torch, "empty", lambda *shape: torch.full(shape, torch.nan))
    for (packed, x), result in zip(cases, wanted, strict=True):
        assert torch.equal(multiply(library, x, packed, None), result)


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_no_bit(library: Native, kind: Kind) -> None:
    packed, x, before = pack(kind, random(300, 500), library.lanes), random(40, 500, seed=1), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(multiply(library, x, packed, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_numbers_neither_overflow_nor_vanish(library: Native, kind: Kind) -> None:
    weight = torch.ones(40, 256) * torch.tensor([1.0, -1.0]).repeat(20).unsqueeze(1)
    packed = pack(kind, weight, library.lanes)
    x = torch.stack([torch.full((256,), 1e30), torch.full((256,), 1e-30), torch.zeros(256)])
    torch.testing.assert_close(multiply(library, x, packed, None), x @ weight.T, rtol=4e-3 if kind.endswith("_dot") else 2e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_a_row_affects_only_that_row(library: Native, kind: Kind) -> None:
    packed, x = pack(kind, random(64, 128), library.lanes), random(8, 128, seed=1)
    healthy = multiply(library, x, packed, None)
    x[3, 5] = torch.nan
    found = multiply(library, x, packed, None)
    assert found[3].isnan().all()
    others = [row for row in range(8) if row != 3]
    assert torch.equal(found[others], healthy[others])


@pytest.mark.parametrize("kind", KINDS)
def test_single_rows_can_be_looked_up(kind: Kind) -> None:
    packed = pack(kind, random(307, 256), 8)
    wanted = torch.tensor([306, 0, 16, 15, 8, 306])
    assert torch.equal(rows(packed, wanted), unpack(packed)[wanted])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_lookup_kernel_is_bit_identical(library: Native, kind: Kind, shape: tuple[int, int]) -> None:
    packed = pack(kind, random(*shape), library.lanes)
    wanted = torch.cat((torch.arange(shape[0]), torch.tensor([0])))[-400:]
    assert torch.equal(gather_rows(library, packed, wanted), rows(packed, wanted))
    for missing in (-1, shape[0]):
        with pytest.raises(IndexError, match="is not one of"):
            gather_rows(library, packed, torch.tensor([missing]))
    found, num_found = gather_local_rows(library, packed, torch.cat((wanted, torch.tensor([-1, shape[0]]))) + 7, 7)
    assert num_found == len(wanted), "those of a table that begins with output 7"
    assert torch.equal(found[:-2], rows(packed, wanted))
    assert not found[-2:].any()
