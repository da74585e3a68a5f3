"""Weight formats for CPUs: a plain checkpoint matrix is packed while it is loaded, as bfloat16 or quantised to 8 or 4 bits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.axes import IN, OUT
from parallel.native.experts import experts
from parallel.native.library import native
from parallel.native.linear import (
    Kind,
    Packed,
    copied_to_arena,
    empty_packed,
    gather_local_rows,
    gather_rows,
    multiply,
    pack_part,
    rounded_rows,
    rows,
    unpack,
    with_lanes,
)
from parallel.scale_groups import GROUP_SIZE
from parallel.weight_format import TensorSpec

_INT8, _INT4, _INT4_ZEROS = 1 + 2 / GROUP_SIZE["int8"], 1 / 2 + 2 / GROUP_SIZE["int4"], 1 / 2 + 4 / GROUP_SIZE["int4_zeros"]
BYTES: dict[Kind, float] = {
    "bf16": 2, "bf16_dot": 2, "fp32": 4, "int8": _INT8, "int8_dot": _INT8, "int4": _INT4, "int4_dot": _INT4,
    "int4_zeros": _INT4_ZEROS, "int4_zeros_dot": _INT4_ZEROS,
}  # fmt: skip
"""Bytes per weight, including its part of the group's float16 scale and zero point."""
ANY_LANES = 8
"""Lanes used where no kernel reads the panels."""
FEW_ROWS = 12
"""Rows that vectors compute at a time. With more rows, a fused gated MLP is faster: its intermediate results stay in cache."""


@dataclass(frozen=True)
class PackedFormat:
    """A plain matrix in the checkpoint, packed in memory. Products accumulate in float32 whatever the dtype of ``x``.

    - ``fp32``: only reordered, into the order in which the kernels read it.
    - ``bf16``: exact for weights stored in bfloat16; gives the float32 result at half the memory.
    - ``int8``, ``int4``: quantised in groups of 128 and 32 input features with one scale each (`parallel.scale_groups.GROUP_SIZE`). Groups
      are counted from this rank's first feature.
    - ``int4_zeros``: int4 in groups of 128 with a zero point each, for weights stored that way (`parallel.zero_points`).

    The ``_dot`` kinds quantise ``x`` as well, for processors that multiply such numbers natively: ``bf16_dot`` rounds it to bfloat16, the
    integer ones quantise groups of 128 of each row to 8 bits. ``int8_dot`` applies a Hadamard transform to both sides first
    (`parallel.quantisation.hadamard`), which reduces the error.
    """

    kind: Kind
    stored: torch.dtype
    """Dtype of the matrix in the checkpoint."""

    @property
    def bytes_per_weight(self) -> float:
        return BYTES[self.kind]

    @property
    def rounds_rows(self) -> bool:
        """Whether products round ``x`` to fewer bits than float32."""
        return self.kind in ("bf16_dot", "int8_dot", "int4_dot", "int4_zeros_dot")

    def specs(self) -> Mapping[str, TensorSpec]:
        return {"weight": TensorSpec((OUT, IN), self.stored)}

    def prepare(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors.pop("weight")
        prepared = self.allocate(*weight.shape)
        self.load_piece(prepared, 0, 0, weight)
        return prepared

    def allocate(self, num_outputs: int, num_inputs: int) -> dict[str, Tensor]:
        library = native()
        packed = empty_packed(self.kind, num_outputs, num_inputs, library.lanes if library else ANY_LANES)
        # Panels are padded, so they do not tell the number of outputs; it is kept as the length of `outputs`.
        prepared = {"numbers": packed.numbers, "outputs": torch.zeros(packed.num_outputs, dtype=torch.uint8)}
        return prepared if packed.scales is None else prepared | {"scales": packed.scales}

    def load_piece(self, tensors: Mapping[str, Tensor], first_output: int, first_input: int, piece_NK: Tensor) -> None:
        pack_part(self.packed(tensors), first_output, first_input, piece_NK)

    def received(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert tensors prepared on another host, whose processor may have wider or narrower vectors, and move them to the arena."""
        library, packed = native(), self.packed(tensors)
        packed = copied_to_arena(packed if library is None or packed.lanes == library.lanes else with_lanes(packed, library.lanes))
        return tensors | {"numbers": packed.numbers} | ({} if packed.scales is None else {"scales": packed.scales})

    def multiply(self, x: Tensor, tensors: Mapping[str, Tensor], bias: Tensor | None) -> Tensor:
        packed, dtype = self.packed(tensors), x.dtype
        library = native()
        if library is not None and self.kind in library.kinds and packed.lanes == library.lanes:
            y = multiply(library, x.reshape(-1, x.shape[-1]), packed, bias)
            return y.to(dtype).view(*x.shape[:-1], packed.num_outputs)
        y = F.linear(rounded_rows(self.kind, x), unpack(packed)[:, : x.shape[-1]], None if bias is None else bias.float())
        return y.to(dtype)

    def experts(
        self,
        x: Tensor,
        rows: Tensor | None,
        counts: Sequence[int],
        up: Sequence[Mapping[str, Tensor]],
        down: Sequence[Mapping[str, Tensor]],
    ) -> Tensor | None:
        """Run all assignments through their experts (see `parallel.native.experts`); None if there is no kernel for it."""
        library = native()
        ups, downs = [self.packed(tensors) for tensors in up], [self.packed(tensors) for tensors in down]
        if library is None or self.kind not in library.kinds or ups[0].lanes != library.lanes or ups[0].num_outputs == 0:
            return None
        return experts(library, x, rows, counts, ups, downs).to(x.dtype)

    def gated(self, x: Tensor, up: Mapping[str, Tensor], down: Mapping[str, Tensor]) -> Tensor | None:
        """``down(silu(gate) * up)`` of (T, in) fused, bit-identical to the unfused operations; None if impossible or not faster."""
        if x.dtype != torch.float32 or x.shape[0] <= FEW_ROWS:
            return None
        return self.experts(x, None, [x.shape[0]], [up], [down])

    def rows(self, outputs: Tensor, tensors: Mapping[str, Tensor], width: int) -> Tensor:
        packed, library = self.packed(tensors), native()
        if library is not None and self.kind in library.kinds and packed.lanes == library.lanes:
            found = gather_rows(library, packed, outputs.flatten())
        else:
            found = rows(packed, outputs.flatten())
        return found[:, :width].view(*outputs.shape, width)

    def local_rows(self, outputs_T: Tensor, tensors: Mapping[str, Tensor], width: int, first: int) -> Tensor | None:
        """`rows` of a table that holds the outputs from ``first`` on; zeros for those held elsewhere. None if there is no kernel for it."""
        packed, library = self.packed(tensors), native()
        if library is None or self.kind not in library.kinds or packed.lanes != library.lanes or outputs_T.dim() != 1:
            return None
        return gather_local_rows(library, packed, outputs_T, first)[0][:, :width]

    def packed(self, tensors: Mapping[str, Tensor]) -> Packed:
        return Packed(self.kind, tensors["numbers"], tensors.get("scales"), tensors["outputs"].shape[0])
