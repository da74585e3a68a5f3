"""From the names of a checkpoint to places in the model. The names are tables next to the layers they belong to."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from parallel.experts import RoutedExperts
from parallel.linear import Slot
from parallel.weight_format import StoredTensor

WeightNames = dict[str, tuple[str, str]]
"""Checkpoint module -> (module here, which of the parts that lie fused in it): ``"self_attn.q_proj": ("attention.qkv", "q")``."""


class WeightedLayer(Protocol):
    """A layer with weights: what loading needs of it. See `parallel.linear.Linear`."""

    @property
    def takes_pieces(self) -> bool:
        """Whether what is loaded lies in its final form at once, so that there is nothing to `finish`."""
        ...

    def slots(self) -> Iterator[Slot]: ...
    def allocate(self, device: torch.device) -> None: ...
    def load(self, part: str, tensor: str, stored: StoredTensor) -> int: ...
    def finish(self) -> None: ...


@dataclass(frozen=True)
class Binding:
    """One tensor of the checkpoint and the place it fills."""

    name: str
    layer: WeightedLayer
    slot: Slot

    @property
    def is_wanted(self) -> bool:
        """Whether this rank holds any of it; of routed experts it may hold none."""
        return not isinstance(self.layer, RoutedExperts) or self.layer.wants(self.slot.part)


def bind_weights(parent: nn.Module, names: Mapping[str, tuple[str, str]], prefix: str = "") -> Iterator[Binding]:
    """The bindings of ``parent``'s layers, checkpoint names starting with ``prefix``. Every slot must be in the table."""
    name_of = {place: name for name, place in names.items()}
    for path in dict.fromkeys(path for path, _ in names.values()):
        layer: WeightedLayer = parent.get_submodule(path)  # type: ignore[assignment]
        for slot in layer.slots():
            yield Binding(f"{prefix}{name_of[path, slot.part]}.{slot.tensor}", layer, slot)
