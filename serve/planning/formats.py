"""How many bytes a matrix has in each weight format, by the share of it that a rank holds."""

from dataclasses import dataclass
from functools import cached_property

from parallel.axes import Share

ACTIVATION_BYTES = 2
"""Activations, KV, embeddings, norms, biases and routers are bfloat16 in every format."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A large matrix (out, in): so many bits per weight, and what its scales take."""

    name: str
    bits: int
    group: int | None = None
    """Input features that share a scale, per output feature. None: one scale for a whole row, or none at all."""
    scale_bits: int = 0
    """Of each scale together with its zero point."""
    multiplies_fp8: bool = False
    """Whether the matrix units multiply in fp8; else weights are widened to bfloat16 first."""

    @property
    def unit(self) -> int:
        """Features that stay on one rank together: a whole quantisation group."""
        return self.group or 1

    @cached_property
    def bytes_per_weight(self) -> float:
        return self.bits / 8

    def matrix_bytes(self, out_features: int, in_share: Share) -> int:
        """Of the rows and columns that one rank holds. A scale whose group two ranks share is held by both."""
        weights = out_features * len(in_share) * self.bits // 8
        return weights + out_features * self._scales(in_share) * self.scale_bits // 8

    def _scales(self, in_share: Share) -> int:
        """Per output feature."""
        if self.group is None:
            return 1 if len(in_share) else 0
        return sum(-(-span.stop // self.group) - span.start // self.group for span in in_share.spans if len(span))


BF16 = Format(name="bf16", bits=16)
FP8 = Format(name="fp8", bits=8, scale_bits=32, multiplies_fp8=True)
"""A float32 scale per output feature."""
INT8 = Format(name="int8", bits=8, group=128, scale_bits=16 + 8)
INT4 = Format(name="int4", bits=4, group=128, scale_bits=16 + 4)
"""As GPTQ and AWQ store it: a float16 scale and a zero point per group of 128."""

FORMATS = {format.name: format for format in (BF16, FP8, INT8, INT4)}
