"""Decoder layers as fused CPU kernels: one sublayer per call, or all layers in one call if the batch is small.

The results equal those of `model.qwen2.DecoderLayer` bit by bit, without Python between kernels. T tokens, D model width, R tokens that
need more than keys and values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.attention.backend import AttentionBackend
from model.attention.native import NativeAttention
from model.layers import Mlp, RmsNorm
from model.moe import SparseMlp
from parallel.groups import Group
from parallel.linear import Linear
from parallel.native.layers import NativeDecoder
from parallel.native.library import Native, native
from parallel.native.sublayers import AttentionSublayer, GatedMlp, MlpSublayer, MoeSublayer, PackedLinear, StepBatch
from parallel.packed_format import FEW_ROWS, PackedFormat

FEW_TOKENS = 64
"""With more tokens, Python between the sublayers takes less than a hundredth of a step."""
FEW_PRODUCTS = 25 * 10**9
"""Half a second on a slow processor: signals are only handled between calls."""


class NativeLayer:
    """One decoder layer with its KV cache. An MLP that other ranks share in remains a module, called after the norm."""

    def __init__(
        self,
        attention: AttentionSublayer,
        output: Linear,
        mlp_sublayer: MlpSublayer | MoeSublayer | None,
        mlp_norm: RmsNorm,
        mlp: nn.Module,
    ) -> None:
        self._attention, self._output = attention, output
        self._mlp_sublayer, self._mlp_norm, self._mlp = mlp_sublayer, mlp_norm, mlp

    @property
    def sublayers(self) -> tuple[AttentionSublayer, MlpSublayer | MoeSublayer] | None:
        """None if a part is left to a module, or if a bias must be added after a sum over ranks."""
        summed = (self._output, self._mlp.down) if isinstance(self._mlp, Mlp) else (self._output,)
        return None if self._mlp_sublayer is None or any(linear.has_bias for linear in summed) else (self._attention, self._mlp_sublayer)

    def __call__(self, x_TD: Tensor, delta_TD: Tensor | None, batch: StepBatch, kept_R: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Like `DecoderLayer.forward`. ``x_TD`` and ``delta_TD`` are contiguous, and ``x_TD`` is overwritten."""
        delta_TD = self._output.summed(self._attention(batch, x_TD, delta_TD))
        if kept_R is not None:
            x_TD, delta_TD = x_TD[kept_R], delta_TD[kept_R]
        if self._mlp_sublayer is not None:
            result_TD = self._mlp_sublayer(x_TD, delta_TD)
            return x_TD, self._mlp.down.summed(result_TD) if isinstance(self._mlp, Mlp) else result_TD
        x_TD, normed_TD = self._mlp_norm.add(x_TD, delta_TD)
        return x_TD, self._mlp(normed_TD)


class NativeLayers:
    """All layers of a stage."""

    def __init__(self, layers: Sequence[NativeLayer], tp: Group) -> None:
        """``tp``: the ranks that hold the other parts of each layer."""
        self.layers = tuple(layers)
        self.fused = _fuse(self.layers, tp)
        """None if a layer has no `NativeLayer.sublayers`, or if ranks do not communicate through shared memory."""
        num_weights = self.fused.num_weights if self.fused is not None else 0
        self._few_tokens = min(FEW_TOKENS, FEW_PRODUCTS // max(num_weights, 1))

    def __call__(self, x_TD: Tensor, batch: StepBatch, kept_R: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The residual stream, which is overwritten, and the delta still to be added to it.

        ``kept_R`` as in `DecoderLayer.forward`, for the last layer.
        """
        if self.fused is not None and kept_R is None and 0 < len(x_TD) <= self._few_tokens:
            return x_TD, self.fused(batch, x_TD)
        delta_TD = None
        for layer in self.layers:
            x_TD, delta_TD = layer(x_TD, delta_TD, batch, kept_R if layer is self.layers[-1] else None)
        return x_TD, delta_TD


def _fuse(layers: Sequence[NativeLayer], tp: Group) -> NativeDecoder | None:
    library, sublayers = native(), [layer.sublayers for layer in layers if layer.sublayers is not None]
    exchange = tp.transport.shared_memory if tp.transport is not None else None
    if library is None or not sublayers or len(sublayers) < len(layers) or (exchange is None and tp.size > 1):
        return None
    return NativeDecoder(library, sublayers, exchange, tp.axis)


def native_layer(
    *,
    backend: AttentionBackend,
    num_heads: int,
    attention_norm: RmsNorm,
    qkv: Linear,
    output: Linear,
    mlp_norm: RmsNorm,
    mlp: nn.Module,
    keys_NBGK: Tensor,
    values_NBGK: Tensor,
) -> NativeLayer | None:
    """None if our kernels cannot compute some part of the layer in float32; the layer is then computed by its modules."""
    library = native()
    if library is None or not isinstance(backend, NativeAttention) or not backend.config.is_causal:
        return None
    into, out_of = _product(library, qkv), _product(library, output)
    if into is None or out_of is None or keys_NBGK.dtype not in library.prefill:
        return None
    assert attention_norm.weight is not None
    assert mlp_norm.weight is not None
    if attention_norm.weight.dtype != torch.float32 or mlp_norm.weight.dtype != torch.float32:
        return None
    attention = AttentionSublayer(
        library,
        norm=attention_norm.weight,
        eps=attention_norm.eps,
        qkv=into,
        output=out_of,
        heads_G3=backend.heads_G3,
        num_heads=num_heads,
        keys_NBGK=keys_NBGK,
        values_NBGK=values_NBGK,
    )
    return NativeLayer(attention, output, _mlp_sublayer(library, mlp_norm, mlp), mlp_norm, mlp)


def _mlp_sublayer(library: Native, norm: RmsNorm, mlp: nn.Module) -> MlpSublayer | MoeSublayer | None:
    assert norm.weight is not None
    if isinstance(mlp, SparseMlp):
        router, gate, shared = _product(library, mlp.router.projection), _product(library, mlp.shared_gate), _gated(library, mlp.shared)
        experts = mlp.experts.native_experts() if mlp.is_single_rank else None
        if router is None or gate is None or shared is None or experts is None:
            return None
        return MoeSublayer(
            library,
            norm=norm.weight,
            eps=norm.eps,
            router=router,
            experts_per_token=mlp.router.experts_per_token,
            renormalise=mlp.router.renormalise,
            experts=experts,
            shared=shared,
            shared_gate=gate,
        )
    gated = _gated(library, mlp) if isinstance(mlp, Mlp) else None
    return None if gated is None else MlpSublayer(library, norm=norm.weight, eps=norm.eps, mlp=gated)


def _gated(library: Native, mlp: Mlp) -> GatedMlp | None:
    up, down = _product(library, mlp.up), _product(library, mlp.down)
    return None if up is None or down is None else GatedMlp(up, down, FEW_ROWS)


def _product(library: Native, layer: Linear) -> PackedLinear | None:
    """The operands of the kernel. A bias is left out if the results are summed over ranks first."""
    if not isinstance(layer.format, PackedFormat) or layer.format.kind not in library.kinds:
        return None
    packed, bias = layer.format.packed(layer.tensors), layer.tensors.get("bias")
    if packed.lanes != library.lanes or packed.num_outputs == 0 or len(layer.in_share) == 0:
        return None
    bias = None if bias is None or layer.reduce is not None else bias.float().contiguous()
    return PackedLinear(packed, bias, len(layer.in_share))
