"""The Qwen2 decoder (arXiv 2407.10671): one rank's part of it. Place 10 of a request. Start with `Qwen2.forward`.

T tokens in the batch, R rows whose logits are needed, D model width, H query heads, G KV heads, K head width, V vocabulary, N blocks,
B tokens per block, X = H + 2 G heads of query, key and value together. The letters name logical dims: where a layer is split, this
rank computes only its own heads or features.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.attention.backend import AttentionBackend, AttentionConfig
from model.attention.choose import BackendName, choose_backend
from model.attention.native import NativeAttention
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import KvCache, KvLayout
from model.layers import Mlp, RmsNorm
from model.native_layers import NativeLayer, NativeLayers, native_layer
from model.rope import Rope, Rotation
from model.weight_names import Binding, WeightNames, bind_weights
from parallel.axes import HeadShare, head_share, whole
from parallel.dispatch import DispatchName
from parallel.embedding import VocabEmbedding, VocabHead
from parallel.groups import ParallelGroups
from parallel.linear import Linear
from parallel.native.screened import TopLogits
from parallel.pipeline import HiddenSender, is_first_stage, is_last_stage, receive_hidden, stage_layers
from parallel.weight_format import WeightFormat

ATTENTION_NAMES: WeightNames = {
    "input_layernorm": ("attention_norm", ""),
    "self_attn.q_proj": ("attention.qkv", "q"),
    "self_attn.k_proj": ("attention.qkv", "k"),
    "self_attn.v_proj": ("attention.qkv", "v"),
    "self_attn.o_proj": ("attention.output", "o"),
    "post_attention_layernorm": ("mlp_norm", ""),
}
"""Module in the checkpoint -> (module here, its part of the fused tensor there)."""
MLP_NAMES: WeightNames = {
    "mlp.gate_proj": ("mlp.up", "gate"),
    "mlp.up_proj": ("mlp.up", "up"),
    "mlp.down_proj": ("mlp.down", "down"),
}
EMBEDDING, NORM, HEAD = "embed_tokens", "norm", "lm_head"
DECODER = "model."
"""Prefix of all tensor names except the head's. Checkpoints of a bare decoder lack it."""


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions and biases on query, key and value."""

    def __init__(
        self,
        config: ModelConfig,
        groups: ParallelGroups,
        *,
        index_in_stage: int,
        heads: HeadShare,
        backend: AttentionBackend,
        format: WeightFormat,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        query, kv = heads.query.scaled(config.head_dim), heads.kv.scaled(config.head_dim)
        self.index_in_stage, self.backend, self.head_dim = index_in_stage, backend, config.head_dim
        self.num_heads, self.num_kv_heads = len(heads.query), len(heads.kv)
        self.qkv = Linear(
            in_share=whole(config.hidden_size),
            out_parts={"q": query, "k": kv, "v": kv},
            bias=config.qkv_bias,
            format=format,
            bias_dtype=dtype,
        )
        self.output = Linear(
            in_share=query,
            out_parts={"o": whole(config.hidden_size)},
            bias=False,
            format=format,
            bias_dtype=dtype,
            reduce=groups.tp,
        )

    def forward(self, x_TD: Tensor, rotation: Rotation, batch: ForwardBatch, cache: KvCache) -> Tensor:
        """(T, D), summed over the ranks of ``tp``. Writes the batch's keys and values to ``cache``."""
        heads_TXK = self.qkv(x_TD).view(-1, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        keys_NBGK, values_NBGK = cache.keys_NBGK[self.index_in_stage], cache.values_NBGK[self.index_in_stage]
        out_THK = self.backend.attend(heads_TXK, rotation, keys_NBGK, values_NBGK, batch)
        result: Tensor = self.output(out_THK.flatten(1))
        return result


class DecoderLayer(nn.Module):
    """Attention, then MLP, each preceded by a norm.

    The output of either is added to the residual stream in the same pass that computes the next norm.
    """

    def __init__(self, config: ModelConfig, attention: Attention, mlp: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.attention = attention
        self.mlp_norm = RmsNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = mlp

    def forward(
        self,
        x_TD: Tensor,
        delta_TD: Tensor | None,
        rotation: Rotation,
        batch: ForwardBatch,
        cache: KvCache,
        kept_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream, and the delta that is still to be added to it. Takes the same pair from the layer before.

        With ``kept_R`` the MLP runs for these tokens only and only their rows are returned: after the last attention no other token is
        needed.
        """
        x_TD, normed_TD = self.attention_norm.add(x_TD, delta_TD)
        delta_TD = self.attention(normed_TD, rotation, batch, cache)
        if kept_R is not None:
            x_TD, delta_TD = x_TD[kept_R], delta_TD[kept_R]
        x_TD, normed_TD = self.mlp_norm.add(x_TD, delta_TD)
        return x_TD, self.mlp(normed_TD)

    def native(self, cache: KvCache) -> NativeLayer | None:
        """This layer as fused CPU kernels, or None if they cannot compute all of it."""
        index = self.attention.index_in_stage
        return native_layer(
            backend=self.attention.backend,
            num_heads=self.attention.num_heads,
            attention_norm=self.attention_norm,
            qkv=self.attention.qkv,
            output=self.attention.output,
            mlp_norm=self.mlp_norm,
            mlp=self.mlp,
            keys_NBGK=cache.keys_NBGK[index],
            values_NBGK=cache.values_NBGK[index],
        )


class Qwen2(nn.Module):
    """One rank's part of the model: the layers of its stage, and of each layer its heads and features.

    The first stage has the embedding, the last stage the final norm and the head. Nothing is allocated before the weights are loaded
    (`model.load.load_model`).
    """

    def __init__(
        self,
        config: ModelConfig,
        groups: ParallelGroups,
        *,
        device: torch.device,
        dtype: torch.dtype,
        format: WeightFormat,
        table_format: WeightFormat | None = None,
        backend: BackendName,
        dispatch: DispatchName,
        redundant_experts: int = 0,
        block_tokens: int,
        kv_dtype: torch.dtype | None = None,
        kv_may_be_bfloat16: bool = False,
    ) -> None:
        """``format`` holds the large matrices of the layers, ``table_format`` the embedding and the head (None: not quantised).

        ``kv_dtype`` is the dtype of the KV cache. None: ``dtype``, or bfloat16 with ``kv_may_be_bfloat16`` if the attention backend
        supports it. ``block_tokens``: tokens per block of that cache. ``backend`` computes attention, ``dispatch`` sends tokens to their
        experts. ``redundant_experts``: see `model.moe.SparseMlp`.

        Raises:
            ValueError: the attention backend does not support this ``kv_dtype``, or does not run on this device.
        """
        super().__init__()
        self.config, self.groups, self.device, self.dtype = config, groups, device, dtype
        self.table_format = table_format
        self.format, self.dispatch, self.redundant_experts = format, dispatch, redundant_experts
        self.layer_indices = stage_layers(config.num_layers, groups.pp.size, groups.pp.rank)
        self.is_first, self.is_last = is_first_stage(groups.pp), is_last_stage(groups.pp)
        self.next_stage = HiddenSender(groups.pp)
        heads = head_share(config.num_heads, config.num_kv_heads, groups.tp.rank, groups.tp.size)
        self.attention_config = AttentionConfig(
            num_heads=len(heads.query),
            num_kv_heads=len(heads.kv),
            head_dim=config.head_dim,
            kv_of_query=heads.kv_of_query,
            block_tokens=block_tokens,
            is_causal=config.is_causal,
        )
        self.backend = choose_backend(device, self.attention_config, backend, dtype)
        if kv_dtype not in (None, dtype, *self.backend.kv_dtypes):
            raise ValueError(f"attention on {device} does not support a KV cache in {kv_dtype}; it computes in {dtype}")
        rounded = torch.bfloat16 if kv_may_be_bfloat16 and torch.bfloat16 in self.backend.kv_dtypes else dtype
        self.kv_layout = KvLayout(
            num_layers=len(self.layer_indices),
            num_kv_heads=len(heads.kv),
            head_dim=config.head_dim,
            block_tokens=block_tokens,
            dtype=kv_dtype or rounded,
        )
        self.rope = Rope(config.rope, config.head_dim, device)
        self.embedding = self._embedding() if self.is_first else None
        self.layers = nn.ModuleList(self._layer(index, index_in_stage, heads) for index_in_stage, index in enumerate(self.layer_indices))
        self.norm = RmsNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype) if self.is_last else None
        self._native_layers: tuple[KvCache, NativeLayers | None] | None = None
        self.head = self._head() if self.is_last else None

    def forward(self, batch: ForwardBatch, cache: KvCache) -> Tensor | None:
        """Logits (R, V) in the model's dtype on every rank of the last stage; None on the other stages.

        Writes the batch's keys and values to ``cache``. All ranks of the replica must call this in the same step. Ranks of one dp
        position pass the same batch, which may be empty while another position has tokens.
        """
        hidden_TD = self.hidden(batch, cache)
        return None if hidden_TD is None else self.logits(hidden_TD[batch.logit_rows_R])

    def hidden(self, batch: ForwardBatch, cache: KvCache, kept_R: Tensor | None = None) -> Tensor | None:
        """Hidden states (T, D) of all tokens after the last layer, on every rank of the last stage; None on the other stages.

        With ``kept_R`` (int64, at least one token) only the hidden states (R, D) of these tokens: for a prompt only the last token needs
        more than its keys and values, which saves most of the last layer. Otherwise the same rules as for `forward`, which is `hidden`
        followed by `logits`.
        """
        x_TD = self._embed_or_receive(batch)
        rotation = self.rope.rotation(batch.positions_T, self.dtype)
        self.backend.prepare(batch)
        kept_R = kept_R if self.is_last else None
        if isinstance(self.backend, NativeAttention) and (native_layers := self.native_layers(cache)) is not None:
            x_TD, delta_TD = native_layers(x_TD.contiguous(), self.backend.step_inputs(rotation, batch), kept_R)
        else:
            delta_TD, last = None, self.layers[-1]
            for layer in self.layers:
                x_TD, delta_TD = layer(x_TD, delta_TD, rotation, batch, cache, kept_R if layer is last else None)
        x_TD = x_TD if delta_TD is None else x_TD + delta_TD
        if self.is_last:
            return x_TD
        self.next_stage.send(x_TD)
        return None

    def normalise(self, hidden_RD: Tensor) -> Tensor:
        """Apply the final norm: the input of the head and of embeddings. Last stage only."""
        assert self.norm is not None
        normed_RD: Tensor = self.norm(hidden_RD)
        return normed_RD

    def logits(self, hidden_RD: Tensor, top_logits: TopLogits | None = None) -> Tensor:
        """Logits (R, V) of some of the rows that `hidden` returned. All ranks of the last stage must call this with the same rows.

        With ``top_logits`` only the logits that decide each row need to be exact; the others may be returned too low.
        """
        assert self.head is not None
        logits_RV: Tensor = self.head(self.normalise(hidden_RD), top_logits)
        return logits_RV

    def begin_top_logits(self) -> bool:
        """Whether the next call of `logits` can save work if it is told which logits decide each row. Call it once before each `logits`:
        it counts the steps of a pause."""
        return self.head is not None and self.head.screened is not None and self.head.screened.begin_step()

    def native_layers(self, cache: KvCache) -> NativeLayers | None:
        """All layers of this stage as fused CPU kernels, or None if some layer cannot be computed that way.

        They hold the addresses of the weights and the cache, which do not move.
        """
        if self._native_layers is None or self._native_layers[0] is not cache:
            layers = [layer.native(cache) for layer in self.layers if isinstance(layer, DecoderLayer)]
            native = [layer for layer in layers if layer is not None]
            self._native_layers = (cache, NativeLayers(native, self.groups.tp) if len(native) == len(self.layers) else None)
        return self._native_layers[1]

    @property
    def capture_obstacle(self) -> str | None:
        """Why a step with one token per sequence cannot be captured as a CUDA graph; None if it can."""
        if not self.backend.supports_capture:
            return f"attention by {type(self.backend).__name__} reads lengths on the host"
        if self.groups.pp.size > 1:
            return "pipeline stages wait for hidden states on the host"
        if self.config.moe is not None and self.groups.dp.size > 1:
            return "shards exchange the numbers of tokens for the experts on the host"
        if self.config.moe is not None and self.dispatch != "local":
            return "all-to-all dispatch reads on the host how many tokens go where"
        return None

    def bindings(self) -> Iterator[Binding]:
        """Every checkpoint tensor of this rank's stage, with the slot it fills."""
        prefix = "" if self.config.is_bare else DECODER
        if self.embedding is not None:
            yield from bind_weights(self, {EMBEDDING: ("embedding", "")}, prefix)
        for index, layer in zip(self.layer_indices, self.layers, strict=True):
            yield from bind_weights(layer, self.layer_weight_names(index), f"{prefix}layers.{index}.")
        if self.norm is not None and self.head is not None:
            yield from bind_weights(self, {NORM: ("norm", "")}, prefix)
            if not self.head.is_tied:
                yield from bind_weights(self, {prefix + EMBEDDING if self.config.tied_embeddings else HEAD: ("head.rows", "")})

    def layer_weight_names(self, index: int) -> WeightNames:
        return ATTENTION_NAMES | MLP_NAMES

    def make_mlp(self, index: int) -> nn.Module:
        return Mlp(
            hidden_size=self.config.hidden_size,
            inner_size=self.config.intermediate_size,
            tp=self.groups.tp,
            format=self.format,
            dtype=self.dtype,
        )

    def _embed_or_receive(self, batch: ForwardBatch) -> Tensor:
        if self.embedding is None:
            return receive_hidden((batch.num_tokens, self.config.hidden_size), self.groups.pp, dtype=self.dtype, device=self.device)
        x_TD: Tensor = self.embedding(batch.tokens_T)
        return x_TD

    def _layer(self, index: int, index_in_stage: int, heads: HeadShare) -> DecoderLayer:
        attention = Attention(
            self.config,
            self.groups,
            index_in_stage=index_in_stage,
            heads=heads,
            backend=self.backend,
            format=self.format,
            dtype=self.dtype,
        )
        return DecoderLayer(self.config, attention, self.make_mlp(index), self.dtype)

    def _embedding(self) -> VocabEmbedding:
        return VocabEmbedding(
            vocab_size=self.config.vocab_size,
            hidden_size=self.config.hidden_size,
            group=self.groups.tp,
            dtype=self.dtype,
            format=self.table_format,
        )

    def _head(self) -> VocabHead:
        """Tied to the embedding if this stage has it. The last of several stages holds a second copy of the same rows."""
        return VocabHead(
            vocab_size=self.config.vocab_size,
            hidden_size=self.config.hidden_size,
            group=self.groups.tp,
            dtype=self.dtype,
            tied=self.embedding if self.config.tied_embeddings else None,
            format=self.table_format,
        )
