"""All routed experts of a layer in one kernel call. N rows, A assignments sorted by expert, D model width, I inner width of an expert."""

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from parallel.native.library import Native, address_of, num_threads
from parallel.native.linear import Packed


def experts(
    library: Native, x_ND: Tensor, rows_A: Tensor | None, counts: Sequence[int], up: Sequence[Packed], down: Sequence[Packed]
) -> Tensor:
    """(A, D): ``down(silu(gate) * up)`` of each assignment, in order. The first ``counts[0]`` assignments use the first expert, and so on.

    ``rows_A`` (int64) is each assignment's row of ``x_ND``; None: assignment and row are the same. Threads share the pieces of all
    experts' matrices, so no thread waits for one expert with many rows.
    """
    x_ND = x_ND.float().contiguous()
    rows_A = None if rows_A is None else rows_A.contiguous()
    inner_width, width = up[0].num_outputs // 2, down[0].num_outputs
    out_AD = torch.empty(sum(counts), width)
    counts_E = np.array(counts, np.int64)
    up_E, up_scales_E = _addresses(up)
    down_E, down_scales_E = _addresses(down)
    library.experts[up[0].kind](
        *(x_ND.data_ptr(), x_ND.shape[0], None if rows_A is None else rows_A.data_ptr(), counts_E.ctypes.data, len(counts_E)),
        *(up_E.ctypes.data, up_scales_E.ctypes.data, down_E.ctypes.data, down_scales_E.ctypes.data, None, None, out_AD.data_ptr()),
        *(width, up[0].padded, inner_width, down[0].padded, up[0].group, num_threads()),
    )
    return out_AD


class ExpertsStruct(ctypes.Structure):
    """Mirrors struct ``Experts`` of csrc/sublayers.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("run", "up", "up_scales", "down", "down_scales")),
        *((name, ctypes.c_long) for name in ("count", "width", "outer", "inner_width", "inner", "group")),
    )


class NativeExperts:
    """The experts of one layer that this rank holds (at least one), as tables of addresses by expert number. Rebuild when experts move."""

    def __init__(self, library: Native, num_experts: int, up: Mapping[int, Packed], down: Mapping[int, Packed]) -> None:
        self._library, self._held = library, (dict(up), dict(down))
        self._tables = [
            addresses for matrices in (up, down) for addresses in _addresses([matrices.get(number) for number in range(num_experts)])
        ]
        some_up, some_down = next(iter(up.values())), next(iter(down.values()))
        self.struct = ExpertsStruct(
            address_of(library.experts[some_up.kind]),
            *(table.ctypes.data for table in self._tables),
            *(num_experts, some_down.num_outputs, some_up.padded, some_up.num_outputs // 2, some_down.padded, some_up.group),
        )
        self._at = ctypes.addressof(self.struct)

    def __call__(self, x_ND: Tensor, expert_ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        """(N, D): for each row the weighted sum of its experts, in the order of their numbers; a negative id adds nothing. x is float32.

        Raises:
            KeyError: an expert is not held here.
        """
        num_rows, num_assigned = expert_ids_NA.shape
        x_ND, expert_ids_NA, weights_NA = x_ND.contiguous(), expert_ids_NA.contiguous(), weights_NA.float().contiguous()
        out_ND = torch.empty(num_rows, self.struct.width)
        missing: int = self._library.weighted_experts(
            *(self._at, x_ND.data_ptr(), expert_ids_NA.data_ptr(), weights_NA.data_ptr(), out_ND.data_ptr()),
            *(num_rows, num_assigned, num_threads()),
        )
        check_held(missing)
        return out_ND


def check_held(missing: int) -> None:
    """Check the return value of a kernel that runs experts: the number of a missing expert, or -1.

    Raises:
        KeyError: an expert is missing.
    """
    if missing >= 0:
        raise KeyError(f"expert {missing} is not held here")


def _addresses(matrices: Sequence[Packed | None]) -> tuple[np.ndarray, np.ndarray]:
    numbers = [0 if packed is None else packed.numbers.data_ptr() for packed in matrices]
    scales = [0 if packed is None or packed.scales is None else packed.scales.data_ptr() for packed in matrices]
    return np.array(numbers, np.uint64), np.array(scales, np.uint64)
