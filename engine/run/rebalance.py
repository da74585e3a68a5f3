"""Moves experts between ranks, between two steps. L sparse layers of a stage, E experts.

Every rank computes the same placement by itself, because all have the same loads. Only loads and experts are communicated.
"""

import torch
from torch import Tensor

from engine.plan import Rebalance, RebalanceResult
from model.qwen2 import Qwen2
from parallel.collectives import all_gather, all_reduce
from parallel.expert_balance import imbalance, place_experts, relabelled
from parallel.experts import RoutedExperts

DECAY = 0.5
"""The weight of all earlier loads when a new measurement is added."""


class ExpertRebalancer:
    """The sparse layers of one rank, and the load of their experts. All ranks of the replica must make the same calls."""

    def __init__(self, model: Qwen2) -> None:
        self._groups, self._device = model.groups, model.device
        moe = model.config.moe if model.groups.ep.size > 1 else None
        self._num_experts = moe.num_experts if moe else 0
        self._layers = [module for module in model.modules() if isinstance(module, RoutedExperts)] if moe else []
        self.reset()

    def reset(self) -> None:
        """Discard everything that was counted so far: it was a warm-up."""
        self.discard_counts()
        self._loads_LE = torch.zeros(len(self._layers), self._num_experts, dtype=torch.float64)

    def discard_counts(self) -> None:
        """Discard what was counted since the last measurement: it was a capture. Earlier measurements still count."""
        for layer in self._layers:
            layer.reset_load()

    @torch.inference_mode()
    def run(self, order: Rebalance) -> RebalanceResult:
        """Measure the loads, and move experts where it is worth it. Returns the same on every rank."""
        if not self._num_experts:
            return RebalanceResult()
        self._loads_LE = self._loads_LE * DECAY + self._measure()
        before = after = 1.0
        num_moved = 0
        for layer, loads in zip(self._layers, self._loads_LE.tolist(), strict=True):
            found = imbalance(layer.placement, loads)
            num_moved += self._improve(layer, loads) if found > order.threshold else 0
            before, after = max(before, found), max(after, imbalance(layer.placement, loads))
        return self._of_all_stages(before, after, num_moved)

    def _measure(self) -> Tensor:
        """(L, E) on the CPU: tokens of the whole stage that were sent to each expert since the last measurement."""
        counted_LE = torch.zeros(len(self._layers), self._num_experts, dtype=torch.int64, device=self._device)
        for counted_E, layer in zip(counted_LE, self._layers, strict=True):
            if layer.load_E is not None and self._groups.tp.rank == 0:  # all ranks of a tp group have counted the same tokens
                counted_E.copy_(layer.load_E)
            layer.reset_load()
        return all_reduce(counted_LE, self._groups.stage).to("cpu", torch.float64)

    def _improve(self, layer: RoutedExperts, loads: list[float]) -> int:
        """Move a layer's experts if that lowers the load of its busiest position. Returns how many were moved."""
        target = relabelled(place_experts(loads, layer.num_held), layer.placement, layer.num_held)
        if imbalance(target, loads) >= imbalance(layer.placement, loads):
            return 0
        return layer.move_to(target)

    def _of_all_stages(self, before: float, after: float, num_moved: int) -> RebalanceResult:
        pp = self._groups.pp
        mine = torch.tensor([[len(self._layers), num_moved, before, after]], dtype=torch.float64, device=self._device)
        num_layers, moved, befores, afters = all_gather(mine, pp, dim=0).T.tolist()
        loads_LE = all_gather(self._loads_LE.to(self._device), pp, dim=0, sizes=[int(count) for count in num_layers])
        return RebalanceResult(
            loads=tuple(tuple(loads) for loads in loads_LE.tolist()),
            imbalance_before=max(befores),
            imbalance_after=max(afters),
            num_moved=int(sum(moved)),
        )
