"""Fake CUDA graphs on a CPU: a function's tensor operations are recorded, and executed again on the same memory at a replay.

As on a device, a replay reads nothing from the host: numbers, lists and branches are those of the capture. A forbidden operation in a
capture raises `NotCapturable`. A replay raises `Gone` if a tensor that the capture read, but did not create, no longer exists. Tensors
created in the capture are overwritten before each replay, so that nothing can be left from an earlier one.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from engine.run.cuda_graphs import Compute, EagerCall, Piece, Replay

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal", "_unique2", "unique_consecutive"}
"""Operations of torch whose result, or its size, the host must know."""
BRINGS = {"lift_fresh", "_pin_memory"}
"""Operations that bring numbers from the host."""
HOST_METHODS = {"tolist", "numpy", "item", "cpu", "pin_memory", "from_numpy", "tensor", "__bool__", "__int__", "__float__", "__index__"}
EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class NotCapturable(Exception):
    """A capture read from the device, or uploaded something from the host."""


class Gone(Exception):
    """A replay reads a tensor that no longer exists."""


class RecordedGraphs:
    """An `engine.run.cuda_graphs.GraphRecorder`."""

    def __init__(self) -> None:
        self.num_replays = 0

    def capture(self, compute: Compute) -> Replay:
        compute()
        with ExitStack() as modes:
            recording = _begin(modes)
            compute()

        return self._replay_of(recording)

    def capture_piecewise(self, compute: Callable[[Callable[[EagerCall], None]], None]) -> list[Piece[EagerCall]]:
        compute(lambda _between: None)
        pieces: list[Piece[EagerCall]] = []
        with ExitStack() as modes:
            recording = _begin(modes)

            def cut(between: EagerCall) -> None:
                nonlocal recording
                modes.close()
                pieces.append((self._replay_of(recording), between))
                recording = _begin(modes)

            compute(cut)
        pieces.append((self._replay_of(recording), None))
        return pieces

    def _replay_of(self, recording: "_Recording") -> Replay:
        def replay() -> None:
            self.num_replays += 1
            recording.replay()

        return replay


class _External:
    """A tensor that existed before the capture. The capture holds no reference to it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._dtype, self._place = tensor.dtype, (tensor.storage_offset(), tensor.size(), tensor.stride())

    def get(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            raise Gone("a captured step reads a tensor that has been freed, or that another has taken the place of")
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._place)


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, torch.Tensor] = {}
        self._again: list[Callable[[], None]] = []

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITS | BRINGS or masks:
            raise NotCapturable(f"{function} in a capture")
        held = tree_map(self._hold, (args, kwargs))
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        out = function(*args, **kwargs)
        made = [tensor for tensor in _tensors(out) if tensor.untyped_storage().data_ptr() not in given]
        for tensor in made:
            self._made[tensor.untyped_storage().data_ptr()] = tensor
        writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in function._schema.arguments)
        if name not in EMPTY and (made or writes):
            self._again.append(lambda: self._do_again(function, held, _tensors(out) if made else []))
        return out

    def launch(self, run: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """An operation that torch does not see: a kernel or a collective."""
        held = tree_map(self._hold, (args, kwargs))

        def again() -> None:
            some, named = tree_map(_take, held)
            run(*some, **named)

        self._again.append(again)

    @torch.inference_mode()
    def replay(self) -> None:
        for tensor in self._made.values():
            _poison(tensor)
        for again in self._again:
            again()

    def _hold(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.untyped_storage().data_ptr() in self._made:
            return value
        return _External(value)

    @staticmethod
    def _do_again(function: Any, held: Any, into: list[torch.Tensor]) -> None:
        args, kwargs = tree_map(_take, held)
        for place, tensor in zip(into, _tensors(function(*args, **kwargs)), strict=bool(into)):
            place.copy_(tensor)


class _HostIsAway(TorchFunctionMode):
    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in HOST_METHODS:
            raise NotCapturable(f"{function.__name__} in a capture")
        return function(*args, **(kwargs or {}))


def _take(value: Any) -> Any:
    return value.get() if isinstance(value, _External) else value


def _tensors(tree: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    tree_map(lambda value: found.append(value) if isinstance(value, torch.Tensor) else None, tree)
    return found


def _poison(tensor: torch.Tensor) -> None:
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    if tensor.dtype.is_floating_point:
        whole.fill_(0xFF)  # NaN in every floating dtype
    else:
        whole.fill_(0x55)


_recordings: list[_Recording] = []
"""The recording in progress, if any."""


def kernel(run: Callable[..., None]) -> Callable[..., None]:
    """Run ``run`` as a device does: again at every replay, on what its tensors hold then. Its own operations are not recorded."""

    def inside(*args: Any, **kwargs: Any) -> None:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            run(*args, **kwargs)

    @wraps(run)
    def launched(*args: Any, **kwargs: Any) -> None:
        inside(*args, **kwargs)
        if _recordings:
            _recordings[-1].launch(inside, args, kwargs)

    return launched


def _begin(modes: ExitStack) -> _Recording:
    """Until the block is left. Our CPU kernels are not operations of torch and would not be replayed; a device does not have them."""
    recording = _Recording()
    modes.enter_context(patch("engine.run.sampling.kernels.native", lambda: None))
    for mode in (_under_way(recording), _HostIsAway(), recording):
        modes.enter_context(mode)
    return recording


@contextmanager
def _under_way(recording: _Recording) -> Iterator[None]:
    """Launches of Triton kernels are recorded too if its interpreter stands in for a device."""
    _recordings.append(recording)
    try:
        from triton.runtime.interpreter import InterpretedFunction

        with patch.object(InterpretedFunction, "run", kernel(InterpretedFunction.run)):
            yield
    except ImportError:
        yield
    finally:
        _recordings.pop()
