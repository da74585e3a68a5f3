"""How many bytes of tensors are alive at the worst moment of a computation."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts what operators inside the ``with`` allocate, views once with what they show; not the tensors given as ``known``."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._watch(tensor)
        self.peak = max(self.peak, self.now)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        if key not in self._holders:
            self.now += num_bytes
        self._holders[key] = self._holders.get(key, 0) + 1
        weakref.finalize(tensor, self._let_go, key, num_bytes)

    def _let_go(self, key: int, num_bytes: int) -> None:
        self._holders[key] -= 1
        if self._holders[key] == 0:
            del self._holders[key]
            self.now -= num_bytes


def tensors_of(module: torch.nn.Module) -> Iterable[Tensor]:
    """All that hang anywhere in a module, in dictionaries too."""
    for part in module.modules():
        for value in vars(part).values():
            yield from (found for found in (value.values() if isinstance(value, dict) else [value]) if isinstance(found, Tensor))
