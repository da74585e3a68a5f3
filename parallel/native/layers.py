"""All decoder layers in one kernel call, with the all-reduces between their sublayers.

When a single token is decoded, the weights of each sublayer evict Python's own memory from the caches, which makes every call from
Python slow (50 to 70 us a layer). See csrc/sublayers.cpp.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.last_collective import kind_and_axis_numbers, page_address
from parallel.native.experts import check_held
from parallel.native.library import Native, address_of, num_threads
from parallel.native.shared_memory_collectives import SharedMemoryCollectives
from parallel.native.sublayers import AttentionSublayer, MlpSublayer, MoeSublayer, StepBatch
from parallel.topology import TopologyAxis


class _Layer(ctypes.Structure):
    _fields_ = (("attention", ctypes.c_void_p), ("mlp_sublayer", ctypes.c_void_p), ("is_sparse", ctypes.c_long))


class _AllReduce(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("all_reduce", "exchange", "page")),
        *((name, ctypes.c_int64) for name in ("kind", "axis")),
    )


class NativeDecoder:
    """All decoder layers of a stage. Each rank of a group holds a part of every sublayer, and the partial results are summed; sparse layers
    must be complete on one rank."""

    def __init__(
        self,
        library: Native,
        layers: Sequence[tuple[AttentionSublayer, MlpSublayer | MoeSublayer]],
        exchange: SharedMemoryCollectives | None = None,
        axis: TopologyAxis = "tp",
    ) -> None:
        """``exchange``: the collectives of the group along ``axis``; None for a single rank."""
        assert exchange is None or all(isinstance(mlp, MlpSublayer) for _, mlp in layers)
        self._call, self._held, self._exchange = library.layers, layers, exchange
        self.num_weights = sum(sublayer.num_weights for layer in layers for sublayer in layer)
        """Weights that each token is multiplied by."""
        rows = ((attention.address, mlp.address, isinstance(mlp, MoeSublayer)) for attention, mlp in layers)
        self._layers = (_Layer * len(layers))(*(_Layer(*row) for row in rows))
        self._all_reduce = _AllReduce(address_of(library.all_reduce[torch.float32]), None, None, *kind_and_axis_numbers("all_reduce", axis))

    def __call__(self, batch: StepBatch, x_TD: Tensor) -> Tensor:
        """Run ``x_TD`` (contiguous, overwritten) through all layers. Returns the last sublayer's output, still to be added to it.

        Raises:
            KeyError: a row chose an expert that is not held here.
            CollectiveFailed: as any all-reduce.
        """
        if self._exchange is not None:
            self._all_reduce.exchange, self._all_reduce.page = self._exchange.begin(), page_address()
        delta_TD = torch.empty_like(x_TD)
        outcome = self._call(
            *(self._layers, len(self._layers), ctypes.addressof(self._all_reduce), batch.address),
            *(x_TD.data_ptr(), delta_TD.data_ptr(), x_TD.shape[1], num_threads()),
        )
        if outcome < 0:
            check_held(-1 - outcome)
        elif self._exchange is not None:
            self._exchange.conclude(outcome)
        return delta_TD
