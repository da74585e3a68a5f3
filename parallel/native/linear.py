"""Packed weight matrices for the CPU kernels, and products with them. T rows, K input features, N outputs.

Outputs are stored in panels of ``2 * lanes``, the last one zero-padded; see csrc/linear.h for the order within a panel.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from parallel import zero_points
from parallel.arena import Arena
from parallel.native.library import Native, native, num_threads
from parallel.quantisation import LEVELS, hadamard, hadamard_inverse, quantise_groups, quantise_rows
from parallel.scale_groups import ACTIVATION_GROUP_SIZE, GROUP_SIZE

Kind = Literal["bf16", "bf16_dot", "fp32", "int8", "int8_dot", "int4", "int4_dot", "int4_zeros", "int4_zeros_dot"]
"""``bf16`` is multiplied in float32; ``int8`` and ``int4`` by rows quantised to 16-bit integers with one scale per weight group,
which is as exact. The ``_dot`` kinds quantise rows to bfloat16, or to 8-bit integers with one scale per `ACTIVATION_GROUP_SIZE`
features, for processors with such dot products. ``int8_dot`` stores groups after a Hadamard transform
(`parallel.quantisation.hadamard`). Groups of ``int4_zeros`` have a zero point each (`parallel.zero_points`)."""
ZEROS: tuple[Kind, ...] = ("int4_zeros", "int4_zeros_dot")
_SHIFTS = [4 * (k // 2) + 16 * (k % 2) for k in range(8)]
_DOT_SHIFTS = [8 * (k % 4) + 4 * (k // 4) for k in range(8)]
SHIFTS: dict[Kind, list[int]] = {"int4": _SHIFTS, "int4_dot": _DOT_SHIFTS, "int4_zeros": _SHIFTS, "int4_zeros_dot": _DOT_SHIFTS}
"""Bit offsets of eight neighbouring input features within a 32-bit word."""
_STORAGE: dict[Kind, tuple[torch.dtype, int]] = {
    "bf16": (torch.bfloat16, 1), "bf16_dot": (torch.bfloat16, 2), "fp32": (torch.float32, 1), "int8": (torch.int8, 2),
    "int8_dot": (torch.uint8, 4), **dict.fromkeys(SHIFTS, (torch.int32, 8)),
}  # fmt: skip
"""Dtype of `Packed.numbers`, and how many consecutive input features are stored together per output."""
_ARENA = Arena()
PIECE_BYTES = 8 * 2**20
"""Float32 weights packed at a time, or one panel if that is larger: quantising needs about five times as much temporary memory."""
assert GROUP_SIZE == {"int8": ACTIVATION_GROUP_SIZE, "int4": ACTIVATION_GROUP_SIZE // 4, "int4_zeros": ACTIVATION_GROUP_SIZE}, (
    "kernels rely on it, see csrc/integers.h"
)

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Allocates a matrix: see `parallel.arena.Arena.allocate`."""


@dataclass(frozen=True)
class Packed:
    """One packed matrix (N, K)."""

    kind: Kind
    numbers: Tensor
    """bf16, fp32: (panels, K, panel); bf16_dot and int8: (panels, padded K / 2, panel, 2); int8_dot: (panels, padded K / 4, panel, 4)
    uint8; int4 and the like: (panels, padded K / 8, panel) int32"""
    scales: Tensor | None
    """(panels, groups, panel) float16; with zero points int32, see `parallel.zero_points`"""
    num_outputs: int

    @property
    def lanes(self) -> int:
        return self.numbers.shape[2] // 2

    @property
    def padded(self) -> int:
        """Input features, padded to whole groups."""
        return self.numbers.shape[1] * _STORAGE[self.kind][1]

    @property
    def group(self) -> int:
        return 1 if self.scales is None else self.padded // self.scales.shape[1]


def pack(kind: Kind, weight_NK: Tensor, lanes: int, allocate: Allocate = _ARENA.allocate) -> Packed:
    """Pack a matrix of any floating dtype, quantising it for the integer kinds."""
    num_outputs, num_inputs = weight_NK.shape
    packed = empty_packed(kind, num_outputs, num_inputs, lanes, allocate)
    pack_part(packed, 0, 0, weight_NK)
    return packed


def empty_packed(kind: Kind, num_outputs: int, num_inputs: int, lanes: int, allocate: Allocate = _ARENA.allocate) -> Packed:
    """An uninitialised packed matrix, to be filled by `pack_part`."""
    panel, bits, (dtype, together) = 2 * lanes, _bits(kind), _STORAGE[kind]
    num_panels = -(-num_outputs // panel)
    scales = None
    if bits is not None:
        num_groups = -(-num_inputs // GROUP_SIZE[bits])
        num_inputs, scales = (
            num_groups * GROUP_SIZE[bits],
            allocate((num_panels, num_groups, panel), torch.int32 if kind in ZEROS else torch.float16),
        )
    many = (together,) if together > 1 and kind not in SHIFTS else ()
    numbers = allocate((num_panels, -(-num_inputs // together), panel, *many), dtype)
    if num_outputs % panel:
        for tensor in (numbers, scales):
            if tensor is not None:
                tensor[-1].zero_()
    return Packed(kind, numbers, scales, num_outputs)


def pack_part(packed: Packed, first_output: int, first_input: int, weight_NK: Tensor) -> None:
    """Pack a part of the matrix, of any floating dtype. ``first_input`` must begin a group. Threads may pack different parts at once."""
    if weight_NK.numel() == 0:
        return
    panel = 2 * packed.lanes
    last_output = first_output + len(weight_NK)
    begin, end = -(-first_output // panel) * panel, last_output // panel * panel
    if begin > end:  # within a panel
        begin = end = last_output
    step = max(1, PIECE_BYTES // (panel * weight_NK.shape[1] * torch.float32.itemsize)) * panel
    for start in range(begin, end, step):
        stop = min(start + step, end)
        where = _part(packed, slice(start // panel, stop // panel), first_input, weight_NK.shape[1])
        _pack_into(where, weight_NK[start - first_output : stop - first_output])
    for start, edge_NK in ((first_output, weight_NK[: begin - first_output]), (end, weight_NK[end - first_output :])):
        if len(edge_NK):
            _put_edge(packed, start, first_input, edge_NK)


def copied_to_arena(packed: Packed) -> Packed:
    """A copy in the arena, where the matrices packed by this process are: adjacent, in huge pages."""

    def again(tensor: Tensor) -> Tensor:
        return _ARENA.allocate(tuple(tensor.shape), tensor.dtype).copy_(tensor)

    scales = None if packed.scales is None else again(packed.scales)
    return Packed(packed.kind, again(packed.numbers), scales, packed.num_outputs)


def with_lanes(packed: Packed, lanes: int) -> Packed:
    """The same matrix, bit for bit, repacked into panels of ``2 * lanes``, for a processor with wider or narrower vectors."""
    before, num_panels = packed.lanes, -(-packed.num_outputs // (2 * lanes))

    def again(panels: Tensor, interleaved: bool) -> Tensor:
        """(panels, ..., panel, ...): the outputs of a panel are the third dim."""
        outputs = panels.movedim(2, 1)
        if interleaved:
            outputs = outputs.unflatten(1, (before, 2)).transpose(1, 2).flatten(1, 2)
        outputs = outputs.flatten(0, 1)[: packed.num_outputs]
        filled = outputs.new_zeros(num_panels * 2 * lanes, *outputs.shape[1:])
        filled[: packed.num_outputs] = outputs
        found: Tensor = filled.unflatten(0, (num_panels, 2 * lanes))
        if interleaved:
            found = found.unflatten(1, (2, lanes)).transpose(1, 2).flatten(1, 2)
        return found.movedim(1, 2).contiguous()

    scales = None if packed.scales is None else again(packed.scales, interleaved=False)
    return Packed(packed.kind, again(packed.numbers, interleaved=packed.kind == "bf16"), scales, packed.num_outputs)


def unpack(packed: Packed) -> Tensor:
    """The matrix (N, padded K) dequantised to float32: the reference for what the kernels multiply by."""
    return rows(packed, torch.arange(packed.num_outputs))


def rows(packed: Packed, outputs_T: Tensor) -> Tensor:
    """Rows (T, padded K) of the matrix in float32."""
    panel = 2 * packed.lanes
    panels_T, columns_T = outputs_T // panel, outputs_T % panel
    if packed.kind == "fp32":
        rows_TK: Tensor = packed.numbers[panels_T, :, columns_T]
        return rows_TK
    if packed.kind == "bf16":
        numbers_TK: Tensor = packed.numbers[panels_T, :, _interleaved(columns_T, packed.lanes)].float()
        return numbers_TK.contiguous()
    if packed.kind == "bf16_dot":
        pairs_TX: Tensor = packed.numbers[panels_T, :, columns_T].flatten(1).float()
        return pairs_TX
    assert packed.scales is not None
    numbers_TX = packed.numbers[panels_T, :, columns_T]
    if packed.kind == "int8_dot":
        numbers_TX = numbers_TX.int() - 128
    if packed.kind in SHIFTS:
        numbers_TX = numbers_TX.unsqueeze(-1) >> torch.tensor(SHIFTS[packed.kind], dtype=torch.int32) & 15
    numbers_TGC, scales_TG = numbers_TX.flatten(1).unflatten(1, (-1, packed.group)), packed.scales[panels_T, :, columns_T]
    if packed.kind in ZEROS:
        scales_TG, zeros_TG = zero_points.unpack_words(scales_TG)
        numbers_TGC = numbers_TGC - zeros_TG.unsqueeze(-1)
    elif packed.kind in SHIFTS:
        numbers_TGC = numbers_TGC - 8
    rows_TGC: Tensor = numbers_TGC.float() * scales_TG.float().unsqueeze(-1)
    return (hadamard_groups(rows_TGC, inverse=True) if packed.kind == "int8_dot" else rows_TGC).flatten(1)


def gather_rows(library: Native, packed: Packed, outputs_T: Tensor) -> Tensor:
    """`rows` by a kernel, bit-identical."""
    rows_TK, num_found = gather_local_rows(library, packed, outputs_T, 0)
    if num_found < len(rows_TK):
        raise IndexError(f"an output of {outputs_T.tolist()} is not one of {packed.num_outputs}")
    return rows_TK


def gather_local_rows(library: Native, packed: Packed, outputs_T: Tensor, first: int) -> tuple[Tensor, int]:
    """As `gather_rows`, for a matrix that holds the outputs from ``first`` on: zeros for outputs not held, and how many were held."""
    outputs_T = outputs_T.contiguous()
    rows_TK = torch.empty(outputs_T.shape[0], packed.padded)
    num_found: int = library.rows[packed.kind](
        packed.numbers.data_ptr(),
        None if packed.scales is None else packed.scales.data_ptr(),
        outputs_T.data_ptr(),
        rows_TK.data_ptr(),
        *(outputs_T.shape[0], packed.padded, packed.group, first, packed.num_outputs, num_threads()),
    )
    return rows_TK, num_found


def rounded_rows(kind: Kind, x_TK: Tensor) -> Tensor:
    """Rows in float32 after the rounding that the kernels apply: their reference. (The 16-bit integers of ``int8`` and ``int4`` lose no
    more than float32 arithmetic does, and are not modelled.)"""
    match kind:
        case "bf16_dot":
            return x_TK.bfloat16().float()
        case "int8_dot":
            return quantise_rows(x_TK, ACTIVATION_GROUP_SIZE, rotate=True)
        case "int4_dot" | "int4_zeros_dot":
            return quantise_rows(x_TK, ACTIVATION_GROUP_SIZE, rotate=False)
    return x_TK.float()


def hadamard_groups(x_xC: Tensor, *, inverse: bool = False) -> Tensor:
    """`parallel.quantisation.hadamard` or `hadamard_inverse`, by a kernel where available."""
    library = native()
    if library is None or library.hadamard is None:
        return hadamard_inverse(x_xC) if inverse else hadamard(x_xC)
    x_xC = x_xC.clone(memory_format=torch.contiguous_format)
    library.hadamard(x_xC.data_ptr(), x_xC.numel() // GROUP_SIZE["int8"], inverse, num_threads())
    return x_xC


def multiply(library: Native, x_TK: Tensor, packed: Packed, bias_N: Tensor | None) -> Tensor:
    """(T, N) in float32. A row's result does not depend on the other rows of the batch."""
    x_TK = x_TK.float().contiguous()
    bias_N = None if bias_N is None else bias_N.float().contiguous()
    y_TN = torch.empty(x_TK.shape[0], packed.num_outputs)
    library.linear[packed.kind](
        x_TK.data_ptr(),
        packed.numbers.data_ptr(),
        None if packed.scales is None else packed.scales.data_ptr(),
        None if bias_N is None else bias_N.data_ptr(),
        y_TN.data_ptr(),
        *(x_TK.shape[0], x_TK.shape[1], packed.padded, packed.group, packed.num_outputs),
        num_threads(),
    )
    return y_TN


def _bits(kind: Kind) -> Literal["int8", "int4", "int4_zeros"] | None:
    """The quantised type of a kind's weights; None if they are not quantised."""
    if kind in ZEROS:
        return "int4_zeros"
    return "int8" if kind in ("int8", "int8_dot") else "int4" if kind in SHIFTS else None


def _part(packed: Packed, panels: slice, first_input: int, num_inputs: int) -> Packed:
    """A view of whole panels and some input features; the last group need not be full."""
    together, stop = _STORAGE[packed.kind][1], first_input + num_inputs
    numbers = packed.numbers[panels, first_input // together : -(-stop // together)]
    num_outputs = len(numbers) * 2 * packed.lanes
    if packed.scales is None:
        assert first_input % together == 0
        return Packed(packed.kind, numbers, None, num_outputs)
    group = packed.group
    assert first_input % group == 0
    numbers = packed.numbers[panels, first_input // together : -(-stop // group) * group // together]
    return Packed(packed.kind, numbers, packed.scales[panels, first_input // group : -(-stop // group)], num_outputs)


def _put_edge(packed: Packed, first_output: int, first_input: int, weight_NK: Tensor) -> None:
    """Pack a few outputs of one panel and leave its others unchanged."""
    panel = 2 * packed.lanes
    index, column = divmod(first_output, panel)
    columns = torch.arange(column, column + len(weight_NK))
    whole_NK = weight_NK[(torch.arange(panel) - column).clamp(0, len(weight_NK) - 1)]
    alone = pack(packed.kind, whole_NK, packed.lanes, _empty)  # temporary: in the arena it would leave a hole
    part = _part(packed, slice(index, index + 1), first_input, weight_NK.shape[1])
    if part.scales is not None and alone.scales is not None:
        part.scales[0][:, columns] = alone.scales[0][:, columns]
    if packed.kind == "bf16":
        columns = _interleaved(columns, packed.lanes)
    part.numbers[0][:, columns] = alone.numbers[0][:, columns]


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _interleaved(columns: Tensor, lanes: int) -> Tensor:
    """Positions of a panel's outputs in ``bf16``."""
    return (columns % lanes) * 2 + columns // lanes


def _pack_into(packed: Packed, weight_NK: Tensor) -> None:
    """Pack whole panels; input features are zero-padded."""
    kind, numbers, num_panels, lanes = packed.kind, packed.numbers, len(packed.numbers), packed.lanes
    padded = packed.padded if packed.scales is not None else -(-weight_NK.shape[1] // _STORAGE[kind][1]) * _STORAGE[kind][1]
    weight_NK = torch.nn.functional.pad(weight_NK, (0, padded - weight_NK.shape[1])) if padded > weight_NK.shape[1] else weight_NK
    panels = weight_NK.contiguous().unflatten(0, (num_panels, 2 * lanes))
    if kind == "fp32":
        numbers.copy_(panels.transpose(1, 2))
    elif kind == "bf16":  # output ``lane`` in the low half of a 32-bit word, output ``lanes + lane`` in the high half
        numbers.unflatten(2, (lanes, 2)).copy_(panels.unflatten(1, (2, lanes)).permute(0, 3, 2, 1))
    elif kind == "bf16_dot":  # two neighbouring features stay together: they are moved as one 32-bit word
        numbers.view(torch.int32).squeeze(-1).copy_(panels.bfloat16().view(torch.int32).transpose(1, 2))
    else:
        _round_into(packed, panels.float())


def _round_into(packed: Packed, panels: Tensor) -> None:
    """Quantise panels (panels, panel, K) of float32 into ``packed``."""
    bits = _bits(packed.kind)
    assert bits is not None
    assert packed.scales is not None
    grouped = panels.unflatten(2, (-1, packed.group))
    if bits == "int4_zeros":
        numbers, scales = zero_points.quantise_groups(grouped)
    else:
        numbers, scales = quantise_groups(hadamard_groups(grouped) if packed.kind == "int8_dot" else grouped, LEVELS[bits])
    numbers = numbers.flatten(2).unflatten(2, (-1, _STORAGE[packed.kind][1])).transpose(1, 2)
    if packed.kind == "int8_dot":
        numbers = numbers.to(torch.int16) + 128
    if packed.kind in SHIFTS:
        numbers = ((numbers.int() + (0 if packed.kind in ZEROS else 8)) << torch.tensor(SHIFTS[packed.kind], dtype=torch.int32)).sum(
            -1, dtype=torch.int32
        )
    packed.numbers.copy_(numbers)
    packed.scales.copy_(scales.transpose(1, 2))
