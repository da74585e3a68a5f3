"""Bytes of a matrix in each weight format, depending on the share of it that a rank holds."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from engine.run.settings import QuantizeName
from model.quantisation import QuantisedKind
from parallel.axes import Share
from parallel.scale_groups import GROUP_SIZE, PADDED_TO

ACTIVATION_BYTES = 2
"""Activations, norms, biases and routers are bfloat16 (or float16) in every format; KV too, unless FP8 is requested."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """Storage format of a large matrix (out, in): bits per weight, and size of its scales."""

    name: str
    bits: int
    group: int | None = None
    """Number of input features that share a scale, per output feature. None: one scale per row, or none."""
    scale_bits: int = 0
    quantize: QuantizeName | None = None
    """Value of `manta serve --quantize` that leads to this format. None: no flag needed."""
    filled_to: int = 1
    """A rank's input features are zero-padded to a multiple of this; groups are counted from the rank's first feature."""
    table: "Format | None" = None
    """Format of embedding and head. None: bfloat16."""
    where_cut: "Format | None" = None
    """Format on ranks whose share boundaries cut through groups. None: this format too."""
    multiplies_fp8: bool = False
    """Whether the matrix units multiply in fp8; otherwise weights are converted to bfloat16 first."""

    @cached_property
    def bytes_per_weight(self) -> float:
        return self.bits / 8

    def matrix_bytes(self, out_features: int, in_share: Share) -> int:
        """Bytes of one rank's share of a matrix: ``out_features`` rows of the input features ``in_share``."""
        filled = -(-len(in_share) // self.filled_to) * self.filled_to
        return out_features * filled * self.bits // 8 + out_features * self._scales(in_share, filled) * self.scale_bits // 8

    def table_bytes(self, out_features: int, in_share: Share) -> int:
        """Like `matrix_bytes`, for rows of the vocabulary (embedding and head)."""
        return out_features * len(in_share) * ACTIVATION_BYTES if self.table is None else self.table.matrix_bytes(out_features, in_share)

    def _scales(self, in_share: Share, filled: int) -> int:
        """Number of scales per output feature."""
        if self.group is None:
            return 1 if len(in_share) else 0
        return filled // self.group


BF16 = Format(name="bfloat16", bits=16)
FLOAT16 = Format(name="float16", bits=16)
FP8 = Format(name="fp8", bits=8, scale_bits=32, quantize="fp8", multiplies_fp8=True)
"""A float32 scale per output feature. See `parallel.quantised_format`, also for INT8 and INT4."""
_INT8_MATRIX = Format(name="int8", bits=8, group=GROUP_SIZE["int8"], scale_bits=16, quantize="int8", filled_to=PADDED_TO["int8"])
INT8 = dataclasses.replace(_INT8_MATRIX, table=_INT8_MATRIX)
INT4 = Format(
    name="int4", bits=4, group=GROUP_SIZE["int4"], scale_bits=16, quantize="int4", filled_to=PADDED_TO["int4"], table=_INT8_MATRIX
)

STORED_FP8 = Format(name="fp8 as stored", bits=8, scale_bits=32, multiplies_fp8=True)
STORED_INT8 = dataclasses.replace(_INT8_MATRIX, name="int8 of a quantised checkpoint", quantize=None)
STORED_INT4 = dataclasses.replace(INT4, name="int4 of a quantised checkpoint", quantize=None, table=None)
STORED_INT4_ZEROS = Format(
    name="int4 with zeros of a quantised checkpoint",
    bits=4,
    group=GROUP_SIZE["int4_zeros"],
    scale_bits=32,
    filled_to=PADDED_TO["int4_zeros"],
    where_cut=STORED_INT8,
)
STORED_QUANTISED: dict[QuantisedKind, Format] = {"int8": STORED_INT8, "int4": STORED_INT4, "int4_zeros": STORED_INT4_ZEROS}
"""How matrices stored by GPTQ or AWQ are held (`model.quantisation.Quantisation.preferred_kind`). Embedding and head are not quantised."""

FORMATS = {format.name: format for format in (BF16, FP8, INT8, INT4)}
"""By the name that a plan shows: bfloat16, or a value of `--quantize`."""
