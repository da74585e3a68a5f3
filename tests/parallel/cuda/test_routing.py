"""Top-k routing, and adding the shared expert, against plain torch."""

import pytest
import torch

DTYPES = [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "chosen"), [(1, 64, 8), (7, 60, 4), (3, 5, 5), (0, 8, 2)])
def test_the_most_probable_experts_are_chosen(
    tokens: int, experts: int, chosen: int, renormalise: bool, dtype: torch.dtype, device: torch.device
) -> None:
    from parallel.cuda.routing import CudaRouting

    logits = (torch.randn(tokens, experts, device=device) * 3).to(dtype)
    ids, weights = CudaRouting().choose(logits, chosen, renormalise=renormalise)
    probabilities = logits.softmax(-1, dtype=torch.float32)
    wanted, order = probabilities.sort(dim=-1, descending=True, stable=True)  # of equals the lower number first
    wanted = wanted[:, :chosen]
    if renormalise:
        wanted = wanted / wanted.sum(-1, keepdim=True)
    assert torch.equal(ids, order[:, :chosen])
    assert weights.dtype == dtype
    torch.testing.assert_close(weights, wanted.to(dtype))


def test_ties_are_taken_in_order(device: torch.device) -> None:
    from parallel.cuda.routing import CudaRouting

    ids, weights = CudaRouting().choose(torch.zeros(2, 6, device=device), 4, renormalise=False)
    assert ids.tolist() == [[0, 1, 2, 3]] * 2
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 6))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_with_nan_the_chosen_experts_are_still_distinct(broken: float, device: torch.device) -> None:
    from parallel.cuda.routing import CudaRouting

    logits = torch.randn(3, 6, device=device)
    logits[1, 4] = broken
    ids, weights = CudaRouting().choose(logits, 4, renormalise=False)
    assert all(len(set(row)) == 4 and set(row) <= set(range(6)) for row in ids.tolist())
    assert weights[1].isnan().any()
    assert not weights[[0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 40), (5, 1300), (0, 8)])
def test_the_shared_expert_is_added_with_its_gate(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    from parallel.cuda.routing import CudaRouting

    routed, shared = (torch.randn(tokens, width, device=device).to(dtype) for _ in range(2))
    gates = torch.randn(tokens, 1, device=device).to(dtype)
    torch.testing.assert_close(CudaRouting().add_shared(routed, gates, shared), routed + torch.sigmoid(gates) * shared)
