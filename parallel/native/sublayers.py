"""Sublayers of a decoder layer (norm and attention, norm and MLP) in one kernel call each. T tokens, S sequences, D model width.

With few tokens, calling each kernel from Python took longer than the kernels themselves. See csrc/sublayers.cpp.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.native.experts import ExpertsStruct, NativeExperts, check_held
from parallel.native.library import Native, address_of, num_threads
from parallel.native.linear import Packed


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("product", "weights", "scales", "bias")),
        *((name, ctypes.c_long) for name in ("inputs", "padded", "group", "outputs")),
    )


class _Norm(ctypes.Structure):
    _fields_ = (("weight", ctypes.c_void_p), ("eps", ctypes.c_double))


class _AttentionSublayer(ctypes.Structure):
    _fields_ = (
        ("norm", _Norm),
        ("qkv", _Matrix),
        ("output", _Matrix),
        ("heads", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("num_heads", "num_kv_heads", "head_dim", "block_tokens")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "write", "prefill", "decode")),
    )


class _Mlp(ctypes.Structure):
    _fields_ = (("up", _Matrix), ("down", _Matrix), ("gated", ctypes.c_void_p), ("few_rows", ctypes.c_long))


class _MlpSublayer(ctypes.Structure):
    _fields_ = (("norm", _Norm), ("mlp", _Mlp))


class _MoeSublayer(ctypes.Structure):
    _fields_ = (
        *(("norm", _Norm), ("router", _Matrix), ("shared_gate", _Matrix), ("shared", _Mlp), ("experts", ExpertsStruct)),
        *(("per_token", ctypes.c_long), ("renormalise", ctypes.c_long)),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "slots", "tables", "starts", "lengths")),
        *((name, ctypes.c_long) for name in ("num_tokens", "num_sequences", "num_decodes", "most_blocks")),
    )


@dataclass(frozen=True)
class PackedLinear:
    """A packed matrix with its bias and number of input features. ``bias`` is None if there is none or it is added elsewhere."""

    packed: Packed
    bias: Tensor | None
    num_inputs: int

    @property
    def num_weights(self) -> int:
        return self.packed.num_outputs * self.num_inputs


class StepBatch:
    """The inputs that all layers of a step share, contiguous: cos, sin (T, K / 2) float32; slots (T), starts (S + 1) and lengths (S) int64;
    tables (S, M) int32. The first ``num_decodes`` sequences have one token each."""

    def __init__(
        self, cos: Tensor, sin: Tensor, slots_T: Tensor, tables_SM: Tensor, starts: Tensor, lengths_S: Tensor, num_decodes: int
    ) -> None:
        self._held = (cos, sin, slots_T, tables_SM, starts, lengths_S)
        assert all(tensor.is_contiguous() for tensor in self._held)
        num_sequences, most_blocks = tables_SM.shape
        self._struct = _Batch(*(tensor.data_ptr() for tensor in self._held), len(slots_T), num_sequences, num_decodes, most_blocks)
        self.address = ctypes.addressof(self._struct)


class AttentionSublayer:
    """Norm, attention and output projection of one layer, with this layer's KV cache (N, B, G, K)."""

    def __init__(
        self,
        library: Native,
        *,
        norm: Tensor,
        eps: float,
        qkv: PackedLinear,
        output: PackedLinear,
        heads_G3: Tensor,
        num_heads: int,
        keys_NBGK: Tensor,
        values_NBGK: Tensor,
    ) -> None:
        """``heads_G3``: for each KV head its first query head, its number of query heads, and its own index."""
        self._held = (norm, qkv, output, heads_G3, keys_NBGK, values_NBGK)
        self.num_weights = qkv.num_weights + output.num_weights
        """Weights that each token is multiplied by."""
        _, block_tokens, num_kv_heads, head_dim = keys_NBGK.shape
        functions = (table[keys_NBGK.dtype] for table in (library.write_kv, library.prefill, library.decode))
        self._struct = _AttentionSublayer(
            _Norm(norm.data_ptr(), eps),
            _matrix(library, qkv),
            _matrix(library, output),
            heads_G3.data_ptr(),
            *(num_heads, num_kv_heads, head_dim, block_tokens),
            *(keys_NBGK.data_ptr(), values_NBGK.data_ptr(), *map(address_of, functions)),
        )
        self.address, self._call = ctypes.addressof(self._struct), library.attention_sublayer

    def __call__(self, batch: StepBatch, x_TD: Tensor, delta_TD: Tensor | None) -> Tensor:
        """``x_TD += delta_TD`` in place; returns attention of its norm, not yet summed over ranks. Both inputs are contiguous."""
        out_TD = torch.empty_like(x_TD)
        delta = None if delta_TD is None else delta_TD.data_ptr()
        self._call(self.address, batch.address, x_TD.data_ptr(), delta, out_TD.data_ptr(), num_threads())
        return out_TD


@dataclass(frozen=True)
class GatedMlp:
    """``down(silu(gate) * up)``; with more than ``few_rows`` rows, activation and products run in one fused pass."""

    up: PackedLinear
    down: PackedLinear
    few_rows: int

    @property
    def num_weights(self) -> int:
        return self.up.num_weights + self.down.num_weights


class _MlpSublayerBase:
    """Norm and MLP of one layer: base of `MlpSublayer` and `MoeSublayer`."""

    def __init__(self, struct: ctypes.Structure, call: "ctypes._NamedFuncPointer", num_weights: int, held: object) -> None:
        """``num_weights``: see `AttentionSublayer`."""
        self._struct, self._call, self.num_weights, self._held = struct, call, num_weights, held
        self.address = ctypes.addressof(struct)

    def __call__(self, x_TD: Tensor, delta_TD: Tensor) -> Tensor:
        """See `AttentionSublayer`.

        Raises:
            KeyError: a row chose an expert that is not held here.
        """
        out_TD = torch.empty_like(x_TD)
        missing = self._call(self.address, x_TD.data_ptr(), delta_TD.data_ptr(), out_TD.data_ptr(), x_TD.shape[0], num_threads())
        if missing is not None:  # only MoE kernels return something
            check_held(missing)
        return out_TD


class MlpSublayer(_MlpSublayerBase):
    """Norm and gated MLP of one layer."""

    def __init__(self, library: Native, *, norm: Tensor, eps: float, mlp: GatedMlp) -> None:
        struct = _MlpSublayer(_Norm(norm.data_ptr(), eps), _mlp(library, mlp))
        super().__init__(struct, library.mlp_sublayer, mlp.num_weights, (norm, mlp))


class MoeSublayer(_MlpSublayerBase):
    """Norm, router, all routed experts and the shared one of a layer that is complete on this rank. The router's softmax is the kernel's
    own, so routing weights may differ from torch's in the last bits."""

    def __init__(
        self,
        library: Native,
        *,
        norm: Tensor,
        eps: float,
        router: PackedLinear,
        experts_per_token: int,
        renormalise: bool,
        experts: NativeExperts,
        shared: GatedMlp,
        shared_gate: PackedLinear,
    ) -> None:
        matrices = _matrix(library, router), _matrix(library, shared_gate)
        struct = _MoeSublayer(_Norm(norm.data_ptr(), eps), *matrices, _mlp(library, shared), experts.struct, experts_per_token, renormalise)
        of_experts = 3 * experts.struct.width * experts.struct.inner_width * experts_per_token
        num_weights = router.num_weights + shared_gate.num_weights + shared.num_weights + of_experts
        super().__init__(struct, library.moe_sublayer, num_weights, (norm, router, shared_gate, shared, experts))


def _mlp(library: Native, mlp: GatedMlp) -> _Mlp:
    gated = address_of(library.experts[mlp.up.packed.kind])
    return _Mlp(_matrix(library, mlp.up), _matrix(library, mlp.down), gated, mlp.few_rows)


def _matrix(library: Native, product: PackedLinear) -> _Matrix:
    packed, bias = product.packed, product.bias
    assert bias is None or (bias.dtype == torch.float32 and bias.is_contiguous())
    return _Matrix(
        address_of(library.linear[packed.kind]),
        packed.numbers.data_ptr(),
        None if packed.scales is None else packed.scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        *(product.num_inputs, packed.padded, packed.group, packed.num_outputs),
    )
