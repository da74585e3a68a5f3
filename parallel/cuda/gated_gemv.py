"""Gated GEMV: the gate and up matrices times one or two rows, and SwiGLU of both, in one kernel instead of two.

Enabled by `RunnerConfig.gated_gemv`, which is off because it has not run on a device yet. Without this module, `model.layers.Mlp` computes
the product (`parallel.cuda.gemv` or cuBLAS) and then SwiGLU (`parallel.cuda.elementwise`).

R rows, C outputs of a program, F = C / 2 inner features, I of them in all.
"""

from collections.abc import Callable, Mapping

import triton
import triton.language as tl
from torch import Tensor

from parallel.cuda.autotune import LIBRARY, Tile, autotuner_for
from parallel.cuda.dependent_launch import launch_dependents, pdl_options
from parallel.cuda.elementwise import silu
from parallel.cuda.gemv import CANDIDATES, column_sums, kind_and_numbers, lanes
from parallel.cuda.quick_launch import quick
from parallel.cuda.sizes import cdiv

_is_enabled = False


def enable(is_enabled: bool) -> None:
    """Turn gated GEMV on or off for this process's later launches (`RunnerConfig.gated_gemv`). Captured graphs are unchanged."""
    global _is_enabled
    _is_enabled = is_enabled


@quick
@triton.jit
def _gated_gemv_kernel(
    x, numbers, scales, out, in_size, stride, width,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some inner features of all rows; a feature's gate and up are neighbours in the tile."""
    launch_dependents(PDL)
    place_C = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_C = place_C // 2 + place_C % 2 * width
    sum_CR = column_sums(x, numbers, scales, column_C, place_C < 2 * width, in_size, stride, KIND, ROWS, LANES, PDL)
    dtype = out.dtype.element_ty
    pairs_FRP = tl.permute(tl.reshape(sum_CR.to(dtype).to(tl.float32), (COLUMNS // 2, 2, ROWS)), (0, 2, 1))
    gate_FR, up_FR = tl.split(pairs_FRP)
    feature_F1 = tl.program_id(0) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)[:, None]
    place_FR = out + tl.arange(0, ROWS)[None, :] * width + feature_F1
    tl.store(place_FR, (silu(gate_FR, dtype) * up_FR).to(dtype), mask=feature_F1 < width)


def multiply(x_TK: Tensor, tensors: Mapping[str, Tensor], otherwise: Callable[[], Tensor]) -> Tensor:
    """(T, I): ``silu(gate) * up`` of at most `parallel.weight_format.MAX_GEMV_ROWS` rows, where ``tensors`` hold the matrix (2 I, K) of
    gate, then up, as in `parallel.cuda.gemv.multiply`. Calls ``otherwise``, the two kernels, unless this one is enabled and was measured
    to be faster.

    The reference is `parallel.cuda.gemv.multiply`, then `parallel.cuda.elementwise.swiglu`: with the same tile, the bits are the same.
    """
    kind, numbers = kind_and_numbers(tensors)
    if not _is_enabled or kind == "fp8" or not numbers.shape[0]:
        return otherwise()
    (num_rows, in_size), (num_outputs, stride) = x_TK.shape, numbers.shape
    x_TK, width = x_TK.contiguous(), num_outputs // 2

    def launch(tile: Tile) -> Tensor:
        if tile == LIBRARY:
            return otherwise()
        out_TI = x_TK.new_empty((num_rows, width))
        _gated_gemv_kernel[(cdiv(num_outputs, tile.columns),)](
            x_TK, numbers, tensors.get("scales", numbers), out_TI, in_size, stride, width,
            KIND=kind, ROWS=num_rows, COLUMNS=tile.columns, LANES=lanes(tile),
            num_warps=tile.num_warps, **pdl_options(num_rows, x_TK),
        )  # fmt: skip
        return out_TI

    key = f"gated {kind} by {x_TK.dtype}, {in_size} to {width}, up to {num_rows} rows"
    return launch(autotuner_for(x_TK.device).best(key, (LIBRARY, *CANDIDATES[num_rows]), launch))
