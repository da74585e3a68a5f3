"""Maps the tensor names of a checkpoint to layers of the model. The name tables are next to the layers that they belong to."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from parallel.experts import RoutedExperts
from parallel.linear import Slot
from parallel.weight_format import StoredTensor

WeightNames = dict[str, tuple[str, str]]
"""Checkpoint module -> (module here, part of that module's fused tensor): ``"self_attn.q_proj": ("attention.qkv", "q")``."""


class WeightedLayer(Protocol):
    """What loading needs of a layer with weights. See `parallel.linear.Linear`."""

    @property
    def is_streaming(self) -> bool:
        """Whether weights are converted to their final form piece by piece, so that `finish` has nothing to do."""
        ...

    def slots(self) -> Iterator[Slot]: ...
    def allocate(self, device: torch.device) -> None: ...
    def load(self, part: str, tensor: str, stored: StoredTensor) -> int: ...
    def finish(self) -> None: ...


@dataclass(frozen=True)
class Binding:
    """One tensor of the checkpoint, and the slot that it fills."""

    name: str
    layer: WeightedLayer
    slot: Slot

    @property
    def is_wanted(self) -> bool:
        """Whether this rank needs any of it. It may hold no part of a routed expert."""
        return not isinstance(self.layer, RoutedExperts) or self.layer.wants(self.slot.part)


def bind_weights(parent: nn.Module, names: Mapping[str, tuple[str, str]], prefix: str = "") -> Iterator[Binding]:
    """The bindings of ``parent``'s layers, with ``prefix`` before the checkpoint names. Every slot must be in the table."""
    name_of = {slot: name for name, slot in names.items()}
    for path in dict.fromkeys(path for path, _ in names.values()):
        layer: WeightedLayer = parent.get_submodule(path)  # type: ignore[assignment]
        for slot in layer.slots():
            yield Binding(f"{prefix}{name_of[path, slot.part]}.{slot.tensor}", layer, slot)
