"""Grouped GEMM of routed experts against one expert after the other."""

import pytest
import torch
from torch import Tensor

from parallel.experts import RoutedExperts
from parallel.groups import single_rank_groups
from parallel.quantised_format import QuantisedFormat
from parallel.weight_format import Dense, WeightFormat
from tests.parallel.memory_tensor import MemoryTensor


def products(x: Tensor, matrices: list[Tensor], held_ids_NA: Tensor, weights: Tensor | None, sources: int) -> Tensor:
    """The reference: every assignment by itself."""
    rows = []
    for number, expert in enumerate(held_ids_NA.flatten().tolist()):
        row = x[number // sources].float() @ matrices[expert].float().T if expert >= 0 else x.new_zeros(matrices[0].shape[0]).float()
        row = row.to(x.dtype)
        rows.append(row if weights is None else row * weights.flatten()[number])
    return torch.stack(rows) if rows else x.new_zeros((0, matrices[0].shape[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_rows", "num_experts", "chosen"), [(1, 4, 2), (9, 3, 3), (40, 5, 2), (150, 2, 1), (800, 2, 1)])
def test_each_assignment_gets_its_experts_product(
    num_rows: int, num_experts: int, chosen: int, dtype: torch.dtype, device: torch.device
) -> None:
    from parallel.cuda.expert_sort import sort_by_expert
    from parallel.cuda.grouped_gemm import expert_matrices, grouped_gemm

    torch.manual_seed(0)
    x = torch.randn(num_rows, 72, device=device).to(dtype)
    weights_of_experts = [torch.randn(88, 72, device=device).to(dtype) for _ in range(num_experts)]
    ids = torch.stack([torch.randperm(num_experts)[:chosen] for _ in range(num_rows)]).to(device)
    ids[::3, 0] = -1  # computed elsewhere
    weights = torch.rand(num_rows, chosen, device=device).to(dtype)
    by_expert = sort_by_expert(ids, num_experts)
    table = expert_matrices([{"weight": weight} for weight in weights_of_experts], device)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.float16 else {"atol": 1e-4, "rtol": 1e-4}
    for some_weights in (None, weights):
        found = grouped_gemm(x, table, by_expert, rows_per_source=chosen, num_assigned=ids.numel(), weights=some_weights)
        is_here = ids.flatten() >= 0
        torch.testing.assert_close(found[is_here], products(x, weights_of_experts, ids, some_weights, chosen)[is_here], **tolerance)


@pytest.mark.parametrize(("num_rows", "num_held"), [(0, 4), (1, 4), (5, 4), (300, 4), (5, 1), (700, 2), (2000, 64)])
def test_assignments_are_sorted_like_the_reference(num_rows: int, num_held: int, device: torch.device) -> None:
    from parallel.cuda.expert_sort import sort_by_expert, sort_reference

    ids = torch.randint(-1, num_held, (num_rows, 2), generator=torch.Generator().manual_seed(num_rows)).to(device)
    found, wanted = sort_by_expert(ids, num_held), sort_reference(ids, num_held)
    assert found.tile_rows == wanted.tile_rows
    assert torch.equal(found.expert_X, wanted.expert_X)
    assert torch.equal(found.assignment_Y, wanted.assignment_Y)


@pytest.mark.parametrize("num_rows", [0, 1, 5, 300, 1000])
def test_every_assignment_is_in_a_tile_of_its_expert(num_rows: int, device: torch.device) -> None:
    from parallel.cuda.expert_sort import sort_by_expert

    ids = torch.randint(-1, 4, (num_rows, 2), generator=torch.Generator().manual_seed(1)).to(device)
    by_expert = sort_by_expert(ids, 4)
    tiles = by_expert.assignment_Y.view(-1, by_expert.tile_rows)
    seen = []
    for expert, tile in zip(by_expert.expert_X.tolist(), tiles, strict=True):
        real = tile[tile < ids.numel()].tolist()
        seen += real
        assert all(ids.flatten()[number] == expert for number in real)
    assert sorted(seen) == [number for number, expert in enumerate(ids.flatten().tolist()) if expert >= 0]


@pytest.mark.parametrize(("num_rows", "width"), [(0, 8), (1, 8), (3, 1500)])
def test_what_is_computed_elsewhere_adds_nothing(num_rows: int, width: int, device: torch.device) -> None:
    from parallel.cuda.expert_sort import combine_rows

    torch.manual_seed(0)
    ids = torch.randint(-1, 4, (num_rows, 3)).to(device)
    y = torch.randn(num_rows, 3, width).to(device)
    wanted = torch.where(ids.unsqueeze(-1) >= 0, y, 0).sum(1)
    y[ids < 0] = torch.nan
    torch.testing.assert_close(combine_rows(y.view(num_rows * 3, width), ids), wanted)


FORMATS = [
    Dense(torch.float32),
    *(QuantisedFormat(kind, torch.float32) for kind in ("int8", "int4", "fp8")),
    pytest.param(QuantisedFormat("int4_zeros", torch.float32), marks=pytest.mark.slow),
]


@pytest.mark.usefixtures("exact_fp8")
@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 7, 60])
def test_grouped_experts_equal_one_after_the_other(num_rows: int, form: WeightFormat, device: torch.device) -> None:
    from parallel.cuda.grouped_experts import GroupedExperts

    torch.manual_seed(0)
    experts = RoutedExperts(num_experts=6, hidden_size=40, intermediate_size=24, groups=single_rank_groups(), format=form)
    experts.allocate(torch.device("cpu"))
    for slot in experts.slots():
        experts.load(slot.part, slot.tensor, MemoryTensor(slot.part, torch.randn(slot.shape)))
    experts.finish()
    del experts.held["2"]  # held elsewhere
    up, down = (
        {int(n): {key: value.to(device) for key, value in getattr(e, name).tensors.items()} for n, e in experts.held.items()}
        for name in ("up", "down")
    )
    x, weights = torch.randn(num_rows, 40), torch.rand(num_rows, 3)
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(num_rows)]) if num_rows else torch.empty(0, 3, dtype=torch.int64)
    ids = torch.where(ids == 2, -1, ids)
    wanted = experts._compute(x, ids, weights)
    found = GroupedExperts(6, up, down)(x.to(device), ids.to(device), weights.to(device))
    # What is rounded to FP8 between the products may fall to the other neighbour where sums differ in their last bit.
    tolerance = 2e-2 * float(wanted.abs().max()) if isinstance(form, QuantisedFormat) and form.kind == "fp8" and num_rows else 1e-4
    torch.testing.assert_close(found.cpu(), wanted, atol=tolerance, rtol=1e-4)
