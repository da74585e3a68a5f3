"""A rank's routed experts on a CUDA device: five launches for all of them, and nothing that waits for the device.

N rows, A experts per row, E experts, D model width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from parallel.cuda.elementwise import swiglu
from parallel.cuda.expert_sort import combine_rows, sort_by_expert
from parallel.cuda.grouped_gemm import expert_matrices, grouped_gemm


class GroupedExperts:
    """The matrices of the experts that a rank holds, plain or rounded; to be made anew when others are."""

    def __init__(self, num_experts: int, up: Mapping[int, Mapping[str, Tensor]], down: Mapping[int, Mapping[str, Tensor]]) -> None:
        """``up`` (2 I, D: gate, then up) and ``down`` (D, I) by the experts' numbers, each as its format's tensors."""
        device = next(tensor.device for tensor in next(iter(up.values())).values())
        self._kept = (up, down)  # the kernel has their addresses only
        self._up, self._down = (expert_matrices(list(experts.values()), device) for experts in (up, down))
        place_E = torch.full((num_experts + 1,), -1)  # the last for those elsewhere, whose number is -1
        place_E[list(up)] = torch.arange(len(up))
        self._place_E = None if list(up) == list(range(num_experts)) else place_E.to(device)
        """None: each has its number."""
        self._num_held = len(up)

    def __call__(self, x_ND: Tensor, expert_ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        """(N, D): the weighted sum of each row's experts that are held here."""
        per_row, num_assigned = expert_ids_NA.shape[1], expert_ids_NA.numel()
        if num_assigned == 0:
            return torch.zeros_like(x_ND)
        held_ids_NA = expert_ids_NA if self._place_E is None else self._place_E[expert_ids_NA]
        by_expert = sort_by_expert(held_ids_NA, self._num_held)
        inner = grouped_gemm(x_ND, self._up, by_expert, rows_per_source=per_row, num_assigned=num_assigned)
        activated = swiglu(inner)
        del inner  # the widest of all
        out = grouped_gemm(activated, self._down, by_expert, rows_per_source=1, num_assigned=num_assigned, weights=weights_NA.flatten())
        return combine_rows(out, held_ids_NA)
