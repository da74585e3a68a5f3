"""Presents checkpoints that are stored quantised as ordinary ones: matrices are decoded as they are read.

K input features, N outputs, G groups.

Several numbers are packed into a word of 32 bits, in the formats of AutoGPTQ and AutoAWQ:

    GPTQ   qweight (K / p, N), qzeros (G, N / p): p = 32 / bits numbers to a word, the first in its lowest bits; scales (G, N);
           g_idx (K), the group of each input feature
    AWQ    qweight (K, N / 8), qzeros (G, N / 8): to a word the outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight; scales (G, N)
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.checkpoint import FileTensor
from model.checkpoint_error import CheckpointError
from model.quantisation import WORD_BITS, Quantisation

WORDS, ZEROS, SCALES, GROUPS, BIAS = "qweight", "qzeros", "scales", "g_idx", "bias"
AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)
"""Bit positions in a word of eight adjacent outputs."""


@dataclass(frozen=True)
class QuantisedTensor:
    """A `parallel.weight_format.StoredTensor`: the matrix ``{module}.weight`` (N, K) in float32, which represents it exactly."""

    module: str
    quantisation: Quantisation
    words: FileTensor
    zeros: FileTensor
    scales: FileTensor
    groups: FileTensor | None
    bias: FileTensor | None
    """The zeros that AutoGPTQ stores as the bias of a matrix that has none in the model."""

    dtype = torch.float32
    piece_dim = 1
    """The rows of the files are input features."""
    piece_bytes = 2**23
    """Decoding needs about five times as much."""

    def __post_init__(self) -> None:
        """Check that the parts fit each other.

        Raises:
            CheckpointError: a part does not have the shape or dtype that fits the others.
        """
        if len(self.words.shape) != 2:
            raise _error(self.words, f"has the shape {list(self.words.shape)}, expected two dims")
        num_outputs, num_inputs = self.shape
        num_groups = self._num_groups
        integers, halves = (torch.int32,), (torch.float16, torch.bfloat16)
        _check(self.words, self.words.shape, integers)
        _check(self.zeros, (num_groups, -(-num_outputs // self._per_word)), integers)
        _check(self.scales, (num_groups, num_outputs), halves)
        if self.groups is not None:
            _check(self.groups, (num_inputs,), integers)
        if self.bias is not None:
            _check(self.bias, (num_outputs,), (*halves, torch.float32))

    @property
    def name(self) -> str:
        return f"{self.module}.weight"

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.words.shape
        return (columns, rows * self._per_word) if self._packs_inputs else (columns * self._per_word, rows)

    @property
    def num_bytes(self) -> int:
        parts = (self.words, self.zeros, self.scales, self.groups, self.bias)
        return sum(part.num_bytes for part in parts if part is not None)

    def read(self, *slices: slice) -> Tensor:
        """The given part as a CPU tensor. Reads whole words and groups, even if the part needs only some of their numbers.

        Raises:
            CheckpointError: a file cannot be read, or its content contradicts config.json.
        """
        outputs, inputs = (range(*part.indices(size)) for part, size in zip(slices or (slice(None),) * 2, self.shape, strict=True))
        if not outputs or not inputs:
            return torch.empty(len(outputs), len(inputs))
        if self.bias is not None and inputs.start == 0 and self.bias.read(_slice(outputs)).any():
            raise _error(self.bias, "is not zero, and this matrix has no bias in the model")
        groups_K = self._groups_of(inputs)
        first, last = int(groups_K.min()), int(groups_K.max())
        some = range(first, last + 1)
        numbers_KN = self._unpacked(self.words, inputs, outputs, dim=0 if self._packs_inputs else 1)
        scales_GN = self.scales.read(_slice(some), _slice(outputs)).float()
        groups_K -= first
        numbers_KN -= self._zeros_of(some, outputs)[groups_K]
        return numbers_KN.float().mul_(scales_GN[groups_K]).T.contiguous()

    @property
    def _packs_inputs(self) -> bool:
        return self.quantisation.method == "gptq"

    @property
    def _per_word(self) -> int:
        return WORD_BITS // self.quantisation.bits

    @property
    def _num_groups(self) -> int:
        num_inputs = self.shape[1]
        return -(-num_inputs // (self.quantisation.group_size or max(1, num_inputs)))

    def _groups_of(self, inputs: range) -> Tensor:
        """The group of each input feature, (K) int64."""
        in_order_K = torch.arange(inputs.start, inputs.stop) // (self.quantisation.group_size or self.shape[1])
        if self.groups is None:
            return in_order_K
        groups_K = self.groups.read(_slice(inputs)).long()
        if groups_K.min() < 0 or groups_K.max() >= self._num_groups:
            strange = int(groups_K[(groups_K < 0) | (groups_K >= self._num_groups)][0])
            raise _error(self.groups, f"names a group {strange}, and there are {self._num_groups}")
        if self.quantisation.in_order and not torch.equal(groups_K, in_order_K):
            raise _error(self.groups, "has groups out of order, and desc_act is false in config.json")
        return groups_K

    def _zeros_of(self, groups: range, outputs: range) -> Tensor:
        """The zeros of these groups, (G, N) int32."""
        zeros_GN = self._unpacked(self.zeros, groups, outputs, dim=1, add=self._one_each if self.quantisation.zeros_less_one else 0)
        if self.quantisation.symmetric and (zeros_GN != self.quantisation.zero).any():
            raise _error(self.zeros, f"has zeros that are not {self.quantisation.zero}, and sym is true in config.json")
        return zeros_GN

    @property
    def _one_each(self) -> int:
        """A word in which every number is 1. Words of zeros are stored minus this; a zero of 0 borrowed from the number above it."""
        return sum(1 << shift for shift in range(0, WORD_BITS, self.quantisation.bits))

    def _unpacked(self, stored: FileTensor, rows: range, columns: range, *, dim: int, add: int = 0) -> Tensor:
        """Numbers (rows, columns), int32, of a matrix that packs several into a word along ``dim``. Adds ``add`` to each word first."""
        per_word, wanted = self._per_word, (rows, columns)[dim]
        words = range(wanted.start // per_word, -(-wanted.stop // per_word))
        read = stored.read(_slice(words), _slice(columns)) if dim == 0 else stored.read(_slice(rows), _slice(words))
        shifts = torch.tensor(AWQ_SHIFTS if self.quantisation.method == "awq" else range(0, WORD_BITS, self.quantisation.bits)).int()
        fields = (read + add).unsqueeze(dim + 1) >> (shifts.unsqueeze(-1) if dim == 0 else shifts)
        return (
            fields.bitwise_and_((1 << self.quantisation.bits) - 1)
            .flatten(dim, dim + 1)
            .narrow(dim, wanted.start - words.start * per_word, len(wanted))
        )


def dequantised_tensors(
    tensors: Mapping[str, FileTensor], quantisation: Quantisation | None, wanted: Collection[str] = ()
) -> Mapping[str, FileTensor | QuantisedTensor]:
    """The tensors of a checkpoint, with quantised matrices under the names of ordinary ones.

    ``wanted``: names of the model's tensors. A stored bias that the model lacks belongs to its matrix.

    Raises:
        CheckpointError: a matrix lacks a part, has a part of another shape, or is present unquantised too; or no matrix is quantised.
    """
    if quantisation is None:
        return tensors
    plain: dict[str, FileTensor | QuantisedTensor] = dict(tensors)
    modules = [name.removesuffix(f".{WORDS}") for name in tensors if name.endswith(f".{WORDS}")]
    for module in modules:
        matrix = _matrix(module, tensors, quantisation, wanted)
        for part in (matrix.words, matrix.zeros, matrix.scales, matrix.groups, matrix.bias):
            if part is not None:
                del plain[part.name]
        if matrix.name in plain:
            raise _error(matrix.words, f"is present together with {matrix.name}")
        plain[matrix.name] = matrix
    if not modules:
        named = next(iter(tensors.values())).source.name if tensors else "the checkpoint"
        raise CheckpointError(f"{named}: config.json has a quantization_config, but no tensor is quantised", file=named)
    return plain


def _matrix(module: str, tensors: Mapping[str, FileTensor], quantisation: Quantisation, wanted: Collection[str]) -> QuantisedTensor:
    words = tensors[f"{module}.{WORDS}"]
    needed = [ZEROS, SCALES] if quantisation.in_order else [ZEROS, SCALES, GROUPS]
    for part in needed:
        if f"{module}.{part}" not in tensors:
            raise _error(words, f"is present without {module}.{part}")
    has_own_bias = f"{module}.{BIAS}" in wanted
    return QuantisedTensor(
        module=module,
        quantisation=quantisation,
        words=words,
        zeros=tensors[f"{module}.{ZEROS}"],
        scales=tensors[f"{module}.{SCALES}"],
        groups=tensors.get(f"{module}.{GROUPS}") if quantisation.method == "gptq" else None,
        bias=None if has_own_bias else tensors.get(f"{module}.{BIAS}"),
    )


def _check(part: FileTensor, shape: tuple[int, ...], dtypes: Collection[torch.dtype]) -> None:
    if part.shape != shape:
        raise _error(part, f"has the shape {list(part.shape)}, expected {list(shape)} beside its {WORDS}")
    if part.dtype not in dtypes:
        raise _error(part, f"has the dtype {part.dtype}, expected {' or '.join(map(str, dtypes))}")


def _error(part: FileTensor, what: str) -> CheckpointError:
    return CheckpointError(f"{part.source.name}: {part.name} {what}", file=part.source.name, tensor=part.name)


def _slice(span: range) -> slice:
    return slice(span.start, span.stop)
