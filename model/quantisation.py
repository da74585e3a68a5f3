"""How a checkpoint's matrices are stored quantised: `quantization_config` in config.json.

Does not import torch, because planning reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from parallel.scale_groups import GROUP_SIZE

WORD_BITS = 32
"""Several numbers are packed into a word of this size."""
QuantisedKind = Literal["int8", "int4", "int4_zeros"]
"""Kinds of `parallel.packed_format` and `parallel.quantised_format`."""
SUPPORTED = "GPTQ in 4 or 8 bits and AWQ in 4 are"


class InvalidQuantisation(ValueError):
    """A field is missing or invalid. The message names it."""


class UnsupportedQuantisation(ValueError):
    """Well-formed, but stored in a way that is not supported. The message names the field."""


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How the matrices of the layers are stored, by GPTQ (arXiv 2210.17323) or AWQ (arXiv 2306.00978).

    They hold integers. A group of input features has one scale and one zero for each output; the weight is ``scale * (number - zero)``.
    """

    method: Literal["gptq", "awq"]
    bits: Literal[4, 8]
    group_size: int | None
    """Input features that share a scale. None: all of them."""
    symmetric: bool
    """Whether all zeros are the middle of the range."""
    in_order: bool
    """Whether groups consist of adjacent features; otherwise each feature names its group (`desc_act`)."""
    zeros_less_one: bool
    """Whether zeros are stored minus one."""

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Quantisation":
        """From the parsed JSON of `quantization_config`.

        Raises:
            InvalidQuantisation, UnsupportedQuantisation: see there.
        """
        method = _field(raw, "quant_method", str)
        if method not in ("gptq", "awq"):
            raise UnsupportedQuantisation(f"quant_method {method!r} is not supported; {SUPPORTED}")
        bits = _field(raw, "bits", int)
        if (method, bits) not in (("gptq", 4), ("gptq", 8), ("awq", 4)):
            raise UnsupportedQuantisation(f"bits {bits} with quant_method {method!r} is not supported; {SUPPORTED}")
        group_size = _field(raw, "group_size", int)
        if group_size != -1 and group_size < 1:
            raise InvalidQuantisation(
                f"group_size is {group_size}, expected a whole number of at least 1, or -1 for one group of all features"
            )
        return (_gptq if method == "gptq" else _awq)(raw, bits, None if group_size == -1 else group_size)

    @property
    def zero(self) -> int:
        """The zero of all groups, if it is symmetric."""
        return 1 << (self.bits - 1)

    def preferred_kind(self, alignment: int = 0) -> QuantisedKind:
        """The format in which a rank holds such matrices by default: 4 bits if that loses nothing.

        Number minus zero fits 4 bits only if the zero is the middle of the range. Otherwise each group keeps its zero, which requires
        that none of our groups crosses two of theirs. ``alignment``: every rank's share of the input features is a multiple of it
        (`model.share_alignment`).
        """

        def divides(group: int) -> bool:
            return self.group_size is None or (self.group_size % group == 0 and alignment % group == 0)

        if self.bits != 4 or not self.in_order:
            return "int8"
        if self.symmetric:
            return "int4" if self.group_size is None or self.group_size % GROUP_SIZE["int4"] == 0 else "int8"
        return "int4_zeros" if divides(GROUP_SIZE["int4_zeros"]) else "int8"


def _gptq(raw: Mapping[str, Any], bits: Any, group_size: int | None) -> Quantisation:
    layout = _field(raw, "checkpoint_format", str, _field(raw, "format", str, "gptq"))
    if layout not in ("gptq", "gptq_v2"):
        raise UnsupportedQuantisation(f"checkpoint_format {layout!r} is not supported; 'gptq' and 'gptq_v2' are")
    for field, meaning in (("is_marlin_format", "weights in the order of one kernel"), ("dynamic", "matrices quantised unlike each other")):
        if raw.get(field):
            raise UnsupportedQuantisation(f"{field}: {meaning} are not supported")
    if raw.get("pack_dtype", "int32") != "int32":
        raise UnsupportedQuantisation(f"pack_dtype {raw['pack_dtype']!r} is not supported; 'int32' is")
    return Quantisation(
        method="gptq",
        bits=bits,
        group_size=group_size,
        symmetric=_field(raw, "sym", bool),
        in_order=not _field(raw, "desc_act", bool),
        zeros_less_one=layout == "gptq",
    )


def _awq(raw: Mapping[str, Any], bits: Any, group_size: int | None) -> Quantisation:
    version = _field(raw, "version", str).lower()
    if version != "gemm":
        raise UnsupportedQuantisation(f"version {version!r} of AWQ is not supported; 'gemm' is")
    if not _field(raw, "zero_point", bool):
        raise UnsupportedQuantisation("zero_point is false, and AWQ without zeros is not supported")
    return Quantisation(method="awq", bits=bits, group_size=group_size, symmetric=False, in_order=True, zeros_less_one=False)


def _field(raw: Mapping[str, Any], name: str, kind: type[Any], absent: Any = None) -> Any:
    value = absent if raw.get(name) is None else raw[name]
    if value is None:
        raise InvalidQuantisation(f"{name} is missing")
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise InvalidQuantisation(f"{name} is {value!r}, expected a {kind.__name__}")
    return value
