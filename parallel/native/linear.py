"""Matrices packed as the kernels read them, and the product with them. T rows, K input features, N outputs.

Outputs lie in panels of ``2 * lanes``, the last one filled up with zeros; see csrc/linear.h for the order within.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from parallel.native.library import Native, native, num_threads
from parallel.pages import give_back, want_huge_pages
from parallel.rounding import LEVELS, round_rows, round_to_groups, turned, turned_back
from parallel.scale_groups import GROUP

Kind = Literal["bf16", "bf16_dot", "fp32", "int8", "int8_dot", "int4", "int4_dot"]
"""``bf16`` is multiplied in float32, ``int8`` and ``int4`` by rows as 16-bit integers, which is as exact. With ``_dot`` rows are rounded to
bfloat16 or to 8-bit integers, with a scale to a group as the weights, where the processor has such a product. ``int8_dot`` holds groups
turned (`parallel.rounding.turned`)."""
SHIFTS = {"int4": [4 * (k // 2) + 16 * (k % 2) for k in range(8)], "int4_dot": [8 * (k % 4) + 4 * (k // 4) for k in range(8)]}
"""Where in 32 bits eight neighbouring input features lie."""
PIECE_OUTPUTS = 1024
"""Packed at once: rounding holds some five times as much beside it as float32."""


@dataclass(frozen=True)
class Packed:
    """One matrix (N, K)."""

    kind: Kind
    numbers: Tensor
    """bf16, fp32: (panels, K, panel); bf16_dot and int8: (panels, padded K / 2, panel, 2); int8_dot: (panels, padded K / 4, panel, 4)
    uint8; int4, int4_dot: (panels, padded K / 8, panel) int32"""
    scales: Tensor | None
    """(panels, groups, panel) float16"""
    num_outputs: int

    @property
    def lanes(self) -> int:
        return self.numbers.shape[2] // 2

    @property
    def padded(self) -> int:
        """Input features, filled up to whole groups."""
        return self.numbers.shape[1] * {"bf16": 1, "fp32": 1, "bf16_dot": 2, "int8": 2, "int8_dot": 4, "int4": 8, "int4_dot": 8}[self.kind]

    @property
    def group(self) -> int:
        return 1 if self.scales is None else self.padded // self.scales.shape[1]


def pack(kind: Kind, weight_NK: Tensor, lanes: int, *, consume: bool = False) -> Packed:
    """Pack a matrix of any floating dtype; int8 and int4 round it to the nearest multiple of its group's scale.

    With ``consume`` its memory is given back on the way and must not be read again, so that no matrix lies there twice: the embedding
    of Qwen2-72B has 2.5 GB.
    """
    num_panels = -(-weight_NK.shape[0] // (2 * lanes))
    numbers = scales = None
    done = 0
    for piece in weight_NK.split(PIECE_OUTPUTS):  # whole panels, but for the last
        some, their_scales = _pack_piece(kind, piece, lanes)
        if numbers is None:
            numbers = _room_for(num_panels, some)
            scales = None if their_scales is None else _room_for(num_panels, their_scales)
        numbers[done : done + len(some)] = some
        if scales is not None and their_scales is not None:
            scales[done : done + len(some)] = their_scales
        done += len(some)
        if consume:
            give_back(piece)
    assert numbers is not None  # split gives one piece even of nothing
    return Packed(kind, numbers, scales, weight_NK.shape[0])


def with_lanes(packed: Packed, lanes: int) -> Packed:
    """The same matrix, to the bit, in panels of ``2 * lanes``: as a processor reads it whose vectors are wider or narrower."""
    before, num_panels = packed.lanes, -(-packed.num_outputs // (2 * lanes))

    def again(panels: Tensor, interleaved: bool) -> Tensor:
        """(panels, ..., panel, ...), the outputs of a panel always third."""
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
    """The matrix (N, padded K) in float32: the slow twin of what a kernel multiplies by."""
    return rows(packed, torch.arange(packed.num_outputs))


def rows(packed: Packed, outputs_T: Tensor) -> Tensor:
    """Rows (T, padded K) of the matrix in float32."""
    panel = 2 * packed.lanes
    panels_T, places_T = outputs_T // panel, outputs_T % panel
    if packed.kind == "fp32":
        rows_TK: Tensor = packed.numbers[panels_T, :, places_T]
        return rows_TK
    if packed.kind == "bf16":
        interleaved_T = (places_T % packed.lanes) * 2 + places_T // packed.lanes
        numbers_TK: Tensor = packed.numbers[panels_T, :, interleaved_T].float()
        return numbers_TK.contiguous()
    if packed.kind == "bf16_dot":
        pairs_TX: Tensor = packed.numbers[panels_T, :, places_T].flatten(1).float()
        return pairs_TX
    assert packed.scales is not None
    numbers_TX = packed.numbers[panels_T, :, places_T]
    if packed.kind == "int8_dot":
        numbers_TX = numbers_TX.int() - 128
    if packed.kind in SHIFTS:
        numbers_TX = (numbers_TX.unsqueeze(-1) >> torch.tensor(SHIFTS[packed.kind], dtype=torch.int32) & 15) - 8
    numbers = numbers_TX.flatten(1).float().unflatten(1, (-1, packed.group))
    rows_TGC: Tensor = numbers * packed.scales[panels_T, :, places_T].float().unsqueeze(-1)
    return (turn(rows_TGC, back=True) if packed.kind == "int8_dot" else rows_TGC).flatten(1)


def look_up(library: Native, packed: Packed, outputs_T: Tensor) -> Tensor:
    """`rows` by a kernel, to the same bits."""
    outputs_T = outputs_T.contiguous()
    if outputs_T.numel() and not 0 <= int(outputs_T.min()) <= int(outputs_T.max()) < packed.num_outputs:
        raise IndexError(f"an output of {outputs_T.tolist()} is not one of {packed.num_outputs}")
    rows_TK = torch.empty(outputs_T.shape[0], packed.padded)
    library.rows[packed.kind](
        packed.numbers.data_ptr(),
        None if packed.scales is None else packed.scales.data_ptr(),
        outputs_T.data_ptr(),
        rows_TK.data_ptr(),
        *(outputs_T.shape[0], packed.padded, packed.group, num_threads()),
    )
    return rows_TK


def rounded(kind: Kind, x_TK: Tensor) -> Tensor:
    """Rows in float32 as the kernels multiply them: their slow twin. (That ``int8`` and ``int4`` make them 16-bit integers is no more
    than float32 itself rounds.)"""
    match kind:
        case "bf16_dot":
            return x_TK.bfloat16().float()
        case "int8_dot":
            return round_rows(x_TK, GROUP["int8"], turn=True)
        case "int4_dot":
            return round_rows(x_TK, GROUP["int4"], turn=False)
    return x_TK.float()


def turn(x_xC: Tensor, *, back: bool = False) -> Tensor:
    """`parallel.rounding.turned` or `turned_back`, by a kernel where there is one."""
    library = native()
    if library is None or library.turn is None:
        return turned_back(x_xC) if back else turned(x_xC)
    x_xC = x_xC.clone(memory_format=torch.contiguous_format)
    library.turn(x_xC.data_ptr(), x_xC.numel() // GROUP["int8"], back, num_threads())
    return x_xC


def multiply(library: Native, x_TK: Tensor, packed: Packed, bias_N: Tensor | None) -> Tensor:
    """(T, N) in float32. A row's result is the same whatever rows stand beside it."""
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


def _room_for(num_panels: int, piece: Tensor) -> Tensor:
    room = torch.empty(num_panels, *piece.shape[1:], dtype=piece.dtype)
    want_huge_pages(room)
    return room


def _pack_piece(kind: Kind, weight_NK: Tensor, lanes: int) -> tuple[Tensor, Tensor | None]:
    panel = 2 * lanes
    num_panels = -(-weight_NK.shape[0] // panel)
    if kind == "fp32":
        padded = _filled(weight_NK.float(), num_panels * panel, weight_NK.shape[1])
        return padded.view(num_panels, panel, -1).transpose(1, 2).contiguous(), None
    if kind == "bf16":
        padded = _filled(weight_NK.bfloat16(), num_panels * panel, weight_NK.shape[1])
        halves = padded.view(num_panels, 2, lanes, -1)  # output lane in the low half of 32 bits, output lanes + lane in the high one
        return halves.permute(0, 3, 2, 1).reshape(num_panels, -1, panel), None
    if kind == "bf16_dot":
        padded = _filled(weight_NK.bfloat16(), num_panels * panel, -(-weight_NK.shape[1] // 2) * 2)
        return padded.view(num_panels, panel, -1, 2).transpose(1, 2).contiguous(), None
    bits: Literal["int8", "int4"] = "int8" if kind in ("int8", "int8_dot") else "int4"
    group = GROUP[bits]
    num_groups = -(-weight_NK.shape[1] // group)
    padded = _filled(weight_NK.float(), num_panels * panel, num_groups * group).view(num_panels, panel, num_groups, group)
    numbers, scales = round_to_groups(turn(padded) if kind == "int8_dot" else padded, LEVELS[bits])
    numbers = numbers.view(num_panels, panel, -1, {"int8": 2, "int8_dot": 4}.get(kind, 8)).transpose(1, 2)
    if kind == "int8_dot":
        numbers = (numbers.to(torch.int16) + 128).to(torch.uint8)
    if kind in SHIFTS:
        numbers = ((numbers.int() + 8) << torch.tensor(SHIFTS[kind], dtype=torch.int32)).sum(-1, dtype=torch.int32)
    return numbers.contiguous(), scales.transpose(1, 2).contiguous()


def _filled(weight_NK: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    """With zeros at the ends."""
    missing = (0, num_inputs - weight_NK.shape[1], 0, num_outputs - weight_NK.shape[0])
    return torch.nn.functional.pad(weight_NK, missing) if any(missing) else weight_NK
