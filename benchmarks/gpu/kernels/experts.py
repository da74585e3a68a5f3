"""Check routed experts, plain and quantised, and the routing."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.kernels.checks import Checks, poisoned
from benchmarks.gpu.kernels.products import as_multiplied, whole
from parallel.quantised_format import Kind, QuantisedFormat

FP8_EXPERTS_MOST = 5e-2
"""Maximum relative error: where an intermediate activation rounds to another bfloat16 neighbour, FP8 may round it by one more step."""


def experts(checks: Checks) -> None:
    kinds: tuple[Kind | None, ...] = (None, "int8", "int4_zeros", "fp8") if checks.device.type == "cuda" else (None, "int8")
    for kind in kinds:
        _experts_of(checks, kind)


def _experts_of(checks: Checks, kind: Kind | None) -> None:
    """Plain ones, or rounded."""
    from parallel.cuda.grouped_experts import GroupedExperts

    num_experts, chosen, inner = checks.sizes.experts
    width, prefix = checks.sizes.width, f"{kind} " if kind else ""
    up, down = ([_matrix(checks, kind, *shape) for _ in range(num_experts)] for shape in ((2 * inner, width), (width, inner)))
    grouped = GroupedExperts(num_experts, dict(enumerate(up)), dict(enumerate(down)))
    most = FP8_EXPERTS_MOST if kind == "fp8" else None
    for rows in checks.sizes.rows:
        checks.results.go_on()
        x, weights = checks.random(rows, width), torch.rand(rows, chosen, device=checks.device).to(checks.dtype)
        ids = torch.stack([torch.randperm(num_experts, device=checks.device)[:chosen] for _ in range(rows)])
        with poisoned():
            found = grouped(x, ids, weights)
        wanted = torch.zeros(rows, width, dtype=torch.float64, device=checks.device)
        for expert in range(num_experts):
            at, place = (ids == expert).nonzero(as_tuple=True)
            if len(at):
                gate, wide = (as_multiplied(kind, x[at]) @ whole(up[expert], width).T).chunk(2, -1)
                y = as_multiplied(kind, (F.silu(gate) * wide).to(checks.dtype)) @ whole(down[expert], inner).T
                wanted.index_add_(0, at, y * weights[at, place].double().unsqueeze(-1))
        checks.judge(f"{prefix}experts of {rows}", found, wanted, most)
        num_bytes = ids.unique().numel() * sum(tensor.nbytes for matrix in (up[0], down[0]) for tensor in matrix.values())
        checks.timed(f"{prefix}experts of {rows}", lambda x=x, ids=ids, weights=weights: grouped(x, ids, weights), num_bytes)


def _matrix(checks: Checks, kind: Kind | None, num_outputs: int, num_inputs: int) -> dict[str, Tensor]:
    weight = checks.random(num_outputs, num_inputs) * 0.02
    return QuantisedFormat(kind, torch.float32).prepare({"weight": weight.float()}) if kind else {"weight": weight}


def routing(checks: Checks) -> None:
    from parallel.cuda.routing import CudaRouting

    num_experts, chosen, _ = checks.sizes.experts
    for rows in checks.sizes.rows:
        logits, gates = checks.random(rows, num_experts), checks.random(rows, 1)
        routed, shared = checks.random(rows, checks.sizes.width), checks.random(rows, checks.sizes.width)
        with poisoned():
            ids, weights = CudaRouting().choose(logits, chosen, renormalise=False)
            added = CudaRouting().add_shared(routed, gates, shared)
        wanted, order = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
        different = int((ids != order[:, :chosen]).sum())
        checks.results.add("kernels", f"experts chosen of {rows} rows that differ", float(different), "experts")
        checks.expect(not different, f"{different} of {ids.numel()} experts differ")
        checks.judge(f"weights of experts of {rows}", weights, wanted[:, :chosen])
        checks.judge(f"shared expert of {rows}", added, routed.double() + gates.double().sigmoid() * shared.double())
