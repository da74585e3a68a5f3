"""A rank's routed experts on a CUDA device: five launches for all of them, without synchronising with the device.

N rows, A experts per row, E experts, D model width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from parallel.cuda.elementwise import swiglu
from parallel.cuda.expert_sort import combine_rows, sort_by_expert
from parallel.cuda.grouped_gemm import expert_matrices, grouped_gemm


class GroupedExperts:
    """The experts that a rank holds, plain or quantised. Rebuild when experts move."""

    def __init__(self, num_experts: int, up: Mapping[int, Mapping[str, Tensor]], down: Mapping[int, Mapping[str, Tensor]]) -> None:
        """``up`` (2 I, D: gate, then up) and ``down`` (D, I) by expert number, each as its format's tensors."""
        device = next(tensor.device for tensor in next(iter(up.values())).values())
        self._kept = (up, down)  # keeps the tensors alive: kernels use their addresses
        self._up, self._down = (expert_matrices(list(experts.values()), device) for experts in (up, down))
        place_E = torch.full((num_experts + 1,), -1)  # the last entry is for id -1, computed elsewhere
        place_E[list(up)] = torch.arange(len(up))
        self._place_E = None if list(up) == list(range(num_experts)) else place_E.to(device)
        """Index of each expert among those held; None if it equals its number."""
        self._num_held = len(up)

    def __call__(self, x_ND: Tensor, expert_ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        """(N, D): for each row the weighted sum of its experts held here."""
        per_row, num_assigned = expert_ids_NA.shape[1], expert_ids_NA.numel()
        if num_assigned == 0:
            return torch.zeros_like(x_ND)
        held_ids_NA = expert_ids_NA if self._place_E is None else self._place_E[expert_ids_NA]
        by_expert = sort_by_expert(held_ids_NA, self._num_held)
        inner = grouped_gemm(x_ND, self._up, by_expert, rows_per_source=per_row, num_assigned=num_assigned)
        activated = swiglu(inner)
        del inner  # the largest intermediate: free it early
        out = grouped_gemm(activated, self._down, by_expert, rows_per_source=1, num_assigned=num_assigned, weights=weights_NA.flatten())
        return combine_rows(out, held_ids_NA)
