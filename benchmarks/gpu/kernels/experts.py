"""Check routed experts, plain and quantised, and the routing."""

from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.kernels.checks import Checks, poisoned
from benchmarks.gpu.kernels.products import as_multiplied, matrix_of, using, whole
from parallel.quantised_format import Kind

if TYPE_CHECKING:
    from parallel.cuda.autotune import Tile  # triton

ALL_KINDS: tuple[Kind | None, ...] = (None, "int8", "int4_zeros", "fp8")
FP8_EXPERTS_MOST = 5e-2
"""Maximum relative error: where an intermediate activation rounds to another bfloat16 neighbour, FP8 may round it by one more step."""


def experts(checks: Checks) -> None:
    for kind in ALL_KINDS if checks.device.type == "cuda" else (None, "int8"):
        _experts_of(checks, kind)


def _experts_of(checks: Checks, kind: Kind | None) -> None:
    """Plain ones, or rounded."""
    some = _Experts(checks, kind)
    for rows in checks.sizes.rows:
        checks.results.go_on()
        x, ids, weights = some.inputs(rows)
        with poisoned():
            found = some.grouped(x, ids, weights)
        checks.judge(f"{some.prefix}experts of {rows}", found, some.wanted(x, ids, weights), some.most)
        num_bytes = ids.unique().numel() * sum(tensor.nbytes for matrix in (some.up[0], some.down[0]) for tensor in matrix.values())
        run = partial(some.grouped, x, ids, weights)
        checks.timed(f"{some.prefix}experts of {rows}", run, num_bytes)


def expert_tiles(checks: Checks) -> None:
    """Every candidate tile of the experts' kernel, plain and in FP8. Elsewhere the others than the first are used only once measured, and
    then on both sides of the comparison of steps."""
    from parallel.cuda import grouped_gemm

    for kind in (None, "fp8") if checks.device.type == "cuda" else (None,):
        some = _Experts(checks, kind)
        for rows in checks.sizes.rows_of_tiles:
            x, ids, weights = some.inputs(rows)
            wanted = some.wanted(x, ids, weights)
            for tile in some.tiles(ids)[: checks.sizes.tiles]:
                checks.results.go_on()
                with using(grouped_gemm, tile), poisoned():
                    found = some.grouped(x, ids, weights)
                name = f"{some.prefix}experts of {rows}, tile {tile.rows} {tile.columns} {tile.num_warps} {tile.num_stages}"
                checks.judge(name, found, wanted, some.most)


class _Experts:
    """Random experts of a kind."""

    def __init__(self, checks: Checks, kind: Kind | None) -> None:
        from parallel.cuda.grouped_experts import GroupedExperts

        self._checks, self._kind = checks, kind
        num_experts, _, inner = checks.sizes.experts
        width, self.prefix = checks.sizes.width, f"{kind} " if kind else ""
        self.up, self.down = (
            [matrix_of(checks, kind, *shape) for _ in range(num_experts)] for shape in ((2 * inner, width), (width, inner))
        )
        self.grouped = GroupedExperts(num_experts, dict(enumerate(self.up)), dict(enumerate(self.down)))
        self.most = FP8_EXPERTS_MOST if kind == "fp8" else None

    def inputs(self, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random rows, the experts of each, and their weights."""
        checks, (num_experts, chosen, _) = self._checks, self._checks.sizes.experts
        x, weights = checks.random(num_rows, checks.sizes.width), torch.rand(num_rows, chosen, device=checks.device).to(checks.dtype)
        return x, torch.rand(num_rows, num_experts, device=checks.device).argsort(-1)[:, :chosen].contiguous(), weights

    def tiles(self, ids: Tensor) -> "tuple[Tile, ...]":
        """The candidates for so many assignments."""
        from parallel.cuda.expert_sort import tile_rows_for
        from parallel.cuda.grouped_gemm import TILES

        return TILES[tile_rows_for(ids.numel(), len(self.up))]

    def wanted(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """In float64."""
        checks, (num_experts, _, inner) = self._checks, self._checks.sizes.experts
        wanted = torch.zeros(x.shape, dtype=torch.float64, device=checks.device)
        for expert in range(num_experts):
            at, place = (ids == expert).nonzero(as_tuple=True)
            if len(at):
                gate, wide = (as_multiplied(self._kind, x[at]) @ whole(self.up[expert], x.shape[1]).T).chunk(2, -1)
                y = as_multiplied(self._kind, (F.silu(gate) * wide).to(checks.dtype)) @ whole(self.down[expert], inner).T
                wanted.index_add_(0, at, y * weights[at, place].double().unsqueeze(-1))
        return wanted


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
