"""Merges a LoRA adapter (arXiv 2106.09685, as PEFT stores it) into a checkpoint: each part of a matrix that is read has its part of B A
added. N outputs, K input features, R ranks of the adapter.

Names in adapter_model.safetensors, each prefixed by ``base_model.model.`` and the module's name in the model:

    lora_A.weight (R, K), lora_B.weight (N, R)             a matrix: W + scale B A
    lora_embedding_A (R, V), lora_embedding_B (D, R)       an embedding (V, D): W + scale (B A)^T
    lora_magnitude_vector (N)                              DoRA (arXiv 2402.09353): the length to which each row of the sum is scaled
    token_adapter.trainable_tokens_delta (rows, D)         whole rows of an embedding, for the tokens named in its configuration
    base_layer.weight, base_layer.bias, weight, bias       replacements of the base's tensors

transformers 5 has the experts of a layer in one tensor, and so are their adapters, the second wrapped around the first:

    mlp.experts.base_layer.lora_A.weight (E R, D), lora_B.weight (2 I, R E)    gate and up; rank r of expert e is column r E + e of B
    mlp.experts.lora_A.weight (E R, I), lora_B.weight (D, R E)                 down
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch

from model.adapted_tensor import AdaptedTensor, LowRankFactor, LowRankProduct, ReadCache, ReplacedRows, non_finite, tensor_error
from model.adapter_config import AdapterConfig, AdapterError
from model.adapter_names import (
    ADAPTER_FILE,
    DECODER,
    EMBEDDING,
    EMBEDDING_A,
    EMBEDDING_B,
    HEAD,
    MAGNITUDE,
    PART,
    PREFIX,
    ROWS,
    A,
    B,
    unties_head,
)
from model.checkpoint import Checkpoint, FileTensor
from model.checkpoint_folder import small_files
from model.checkpoint_header import first_few
from model.dtypes import DTYPES
from model.terminal_safe import terminal_safe
from parallel.weight_format import StoredTensor

EXPERTS = re.compile(r"(.+\.experts)(?:\.base_layer)?")


class Adapter:
    """A LoRA adapter's files. Opening it reads and checks its configuration and header, but no weights.

    ``location`` is a path, or the URL of a remote folder, as for a checkpoint.

    Raises:
        AdapterError: it is of an unsupported kind, or incomplete.
        CheckpointError: its files are missing or damaged.
    """

    def __init__(self, location: Path | str) -> None:
        self.location = location
        self.config = AdapterConfig.from_folder(small_files(location))
        self._file = Checkpoint(location, single_file=ADAPTER_FILE)
        self._kept = ReadCache()
        try:
            self._parts, self._replacements, self._rows = self._sort_tensors()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<Adapter {self.location} [{len(self._parts)} modules | {len(self._replacements)} tensors in place of the base's]>"

    def close(self) -> None:
        """Close the file and drop what was cached."""
        self._file.close()
        self._kept.forget()

    def __enter__(self) -> "Adapter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def bytes_fetched(self) -> int:
        return self._file.bytes_fetched

    @property
    def unties_head(self) -> bool:
        """See `model.adapter_names.unties_head`."""
        return unties_head(self._file.tensors, self.config)

    def check_numbers(self) -> None:
        """Read all weights.

        Raises:
            CheckpointError: they cannot be read, or hold NaN or infinity.
        """
        for tensor in self._file.tensors.values():
            if not torch.isfinite(tensor.read()).all():
                raise non_finite(tensor)

    def apply(self, tensors: Mapping[str, StoredTensor], *, head_was_tied: bool = False) -> Mapping[str, StoredTensor]:
        """The tensors of a model, by name, with the adapter merged.

        ``head_was_tied``: the base's head is its embedding. If the adapter changes one without the other (`unties_head`), the
        head becomes a tensor of its own.

        Raises:
            AdapterError: a tensor of the adapter does not exist in this model, or has another shape there.
        """
        adapted: dict[str, StoredTensor] = dict(tensors)
        replacements, parts_of = self._replacements, self._parts
        if head_was_tied and self.unties_head and DECODER + EMBEDDING in tensors:
            adapted[HEAD] = adapted[DECODER + EMBEDDING]
        elif head_was_tied:  # the head stays tied, so the adapter's head is a copy of its embedding
            replacements = {name: replacement for name, replacement in replacements.items() if name != HEAD}
            parts_of = {module: parts for module, parts in parts_of.items() if f"{module}.weight" != HEAD}
        unmatched: list[str] = []
        replaced: dict[str, StoredTensor] = {}
        changed_in: dict[str, StoredTensor] = {}
        for name, replacement in replacements.items():
            if (target := _find(name, adapted)) is None:
                unmatched.append(replacement.name)
            else:
                self._check_shape(replacement, adapted[target].shape, target)
                self._put(replaced, AdaptedTensor(target, replacement, adapted[target].dtype))
        adapted |= replaced
        for module, parts in parts_of.items():
            if changed := list(self._changed(module, parts, adapted)):
                for tensor in changed:
                    self._put(changed_in, tensor)
            else:
                unmatched += [part.name for part in parts.values()]
        for module, rows in self._rows.items():
            if (target := _find(f"{module}.weight", adapted)) is None:
                unmatched.append(rows.name)
            else:
                self._put(changed_in, self._with_rows(target, module, rows, adapted[target]))
        if unmatched:
            do = "does" if len(unmatched) == 1 else "do"
            names = first_few([terminal_safe(name) for name in unmatched])
            self._refuse(f"{len(unmatched)} of its tensors {do} not exist there: {names}")
        return adapted | changed_in

    def _put(self, tensors: dict[str, StoredTensor], tensor: AdaptedTensor) -> None:
        """Add a tensor by its name. Two names in the adapter may mean the same tensor (see `DECODER`), which is an error."""
        if tensor.name in tensors:
            self._refuse(f"it changes {tensor.name} twice")
        tensors[tensor.name] = tensor

    def _sort_tensors(self) -> tuple[dict[str, dict[str, FileTensor]], dict[str, FileTensor], dict[str, FileTensor]]:
        """The adapter's tensors: parts of products by module, replacements by the base's names, and single rows by module."""
        parts: dict[str, dict[str, FileTensor]] = {}
        replacement: dict[str, FileTensor] = {}
        rows: dict[str, FileTensor] = {}
        for stored_name, tensor in self._file.tensors.items():
            if tensor.dtype not in DTYPES.values():
                raise tensor_error(tensor, f"has the dtype {tensor.dtype}, expected {' or '.join(map(str, DTYPES.values()))}")
            name = stored_name.removeprefix(PREFIX)
            if found := PART.fullmatch(name):
                parts.setdefault(found[1], {})[found[2]] = tensor
            elif name.endswith(ROWS):
                rows[name.removesuffix(ROWS)] = tensor
            else:
                replacement[name.replace(".base_layer.", ".")] = tensor
        if not parts and not replacement and not rows:
            raise AdapterError(f"the adapter {self.location} holds no tensors")
        for module, held in parts.items():
            self._check_whole(module, held)
        if not self.config.brings_biases and (biases := [name for name in replacement if name.endswith(".bias")]):
            raise AdapterError(
                f"the adapter {self.location} has biases, though bias is none in its configuration: "
                f"{first_few(list(map(terminal_safe, biases)))}"
            )
        return parts, replacement, rows

    def _check_whole(self, module: str, held: Mapping[str, FileTensor]) -> None:
        lengths = {MAGNITUDE} if self.config.has_magnitudes else set()
        if held.keys() not in ({A, B} | lengths, {EMBEDDING_A, EMBEDDING_B}):
            raise AdapterError(
                f"the adapter {self.location} is incomplete: {terminal_safe(module)} has {', '.join(sorted(held))}, "
                f"expected {', '.join(sorted({A, B} | lengths))}"
            )

    def _changed(self, module: str, parts: Mapping[str, FileTensor], tensors: Mapping[str, StoredTensor]) -> Iterator[AdaptedTensor]:
        """The matrices of the model that a module's parts change; none if this model has no such module."""
        if (target := _find(f"{module}.weight", tensors)) is not None:
            yield self._matrix(target, parts, tensors[target])
        elif (found := EXPERTS.fullmatch(module)) and parts.keys() == {A, B}:
            yield from self._experts(found[1], parts, tensors)

    def _matrix(self, target: str, parts: Mapping[str, FileTensor], base: StoredTensor) -> AdaptedTensor:
        self._check_matrix(target, base)
        outputs, inputs = (parts[EMBEDDING_A], parts[EMBEDDING_B]) if EMBEDDING_A in parts else (parts[B], parts[A])
        of_outputs, of_inputs = (0, 1) if EMBEDDING_A in parts else (1, 0)
        module = target.removesuffix(".weight")
        rank = self.config.rank_of(module)
        for part, rank_dim, size in ((outputs, of_outputs, base.shape[0]), (inputs, of_inputs, base.shape[-1])):
            self._check_shape(part, (size, rank) if rank_dim else (rank, size), target)
        if MAGNITUDE in parts:
            self._check_shape(parts[MAGNITUDE], base.shape[:1], target)
        every, scale = slice(0, rank), self.config.scale_of(module)
        product = LowRankProduct(LowRankFactor(outputs, of_outputs, every), LowRankFactor(inputs, of_inputs, every), scale, self._kept)
        return _with_product(target, base, product, parts.get(MAGNITUDE))

    def _with_rows(self, target: str, module: str, rows: FileTensor, base: StoredTensor) -> AdaptedTensor:
        self._check_matrix(target, base)
        numbers = dict(self.config.token_rows).get(module.rsplit(".", 1)[-1], ())
        self._check_shape(rows, (len(numbers), base.shape[-1]), target)
        if numbers and max(numbers) >= base.shape[0]:
            self._refuse(f"it has a row for token {max(numbers)}, and {target} has {base.shape[0]} rows")
        stored = base.stored if isinstance(base, AdaptedTensor) else base
        return AdaptedTensor(target, stored, base.dtype, rows=ReplacedRows(numbers, rows, self._kept))

    def _experts(self, experts: str, parts: Mapping[str, FileTensor], tensors: Mapping[str, StoredTensor]) -> Iterator[AdaptedTensor]:
        """All experts of a layer, from one tensor for A and one for B. The shapes tell which of the experts' matrices they change."""
        for fused, names in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            targets = list(_expert_names(experts, names, tensors))
            if not targets:
                continue
            (height, width), num_experts = tensors[targets[0]].shape, len(targets) // len(names)
            rank, scale = self.config.rank_of(f"{experts}.{fused}"), self.config.scale_of(f"{experts}.{fused}")
            if parts[A].shape != (num_experts * rank, width) or parts[B].shape != (len(names) * height, rank * num_experts):
                continue
            for number, target in enumerate(targets):
                expert, which = divmod(number, len(names))
                outputs = LowRankFactor(parts[B], 1, slice(expert, None, num_experts), first=which * height)
                inputs = LowRankFactor(parts[A], 0, slice(expert * rank, (expert + 1) * rank))
                yield _with_product(target, tensors[target], LowRankProduct(outputs, inputs, scale, self._kept))
            return

    def _check_matrix(self, target: str, base: StoredTensor) -> None:
        if len(base.shape) != 2:
            self._refuse(f"{target} is not a matrix")

    def _check_shape(self, found: FileTensor, wanted: tuple[int, ...], target: str) -> None:
        if found.shape == wanted:
            return
        shapes = f"{found.name} has the shape {list(found.shape)}, expected {list(wanted)} for {target}"
        if target.endswith((EMBEDDING, HEAD)) and found.shape[:1] != wanted[:1] and found.shape[1:] == wanted[1:]:
            shapes += (
                "; the vocabulary was resized in training: merge it with PEFT (merge_and_unload), save the model, and serve that folder"
            )
        self._refuse(shapes)

    def _refuse(self, what: str) -> None:
        trained_on = f", and says that it was trained on {terminal_safe(self.config.base)}" if self.config.base else ""
        raise AdapterError(f"the adapter {self.location} does not fit this model{trained_on}: {what}")


def _with_product(target: str, base: StoredTensor, product: LowRankProduct, magnitude_N: FileTensor | None = None) -> AdaptedTensor:
    stored = base.stored if isinstance(base, AdaptedTensor) else base  # replaced by the adapter: the sum is rounded only once
    return AdaptedTensor(target, stored, base.dtype, product, magnitude_N)


def _expert_names(experts: str, names: tuple[str, ...], tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """The names of the experts' matrices, expert by expert."""
    number = 0
    while (first := _find(f"{experts}.{number}.{names[0]}.weight", tensors)) is not None:
        yield from (first.replace(f".{names[0]}.", f".{name}.") for name in names)
        number += 1


def _find(name: str, tensors: Mapping[str, StoredTensor]) -> str | None:
    """The name of a tensor in this model, which may have a head where the adapter's had none, or the reverse."""
    return next((each for each in (name, DECODER + name, name.removeprefix(DECODER)) if each in tensors), None)
