"""Qwen2-MoE (arXiv 2407.10671, section 2.2.2): a Qwen2 whose MLPs are mixtures of experts."""

from torch import nn

from model.moe import SparseMlp
from model.qwen2 import ATTENTION_NAMES, Qwen2
from model.weight_names import WeightNames

SPARSE_MLP_NAMES: WeightNames = {
    "mlp.gate": ("mlp.router.projection", "all"),
    "mlp.shared_expert.gate_proj": ("mlp.shared.up", "gate"),
    "mlp.shared_expert.up_proj": ("mlp.shared.up", "up"),
    "mlp.shared_expert.down_proj": ("mlp.shared.down", "down"),
    "mlp.shared_expert_gate": ("mlp.shared_gate", "all"),
}
EXPERT_PARTS = ("gate", "up", "down")


def expert_names(num_experts: int) -> WeightNames:
    return {
        f"mlp.experts.{expert}.{part}_proj": ("mlp.experts", f"{expert}.{part}") for expert in range(num_experts) for part in EXPERT_PARTS
    }


class Qwen2Moe(Qwen2):
    """`MoeConfig.is_sparse` says which layers are sparse. Everything else is Qwen2."""

    def layer_weight_names(self, index: int) -> WeightNames:
        moe = self.config.moe
        if moe is None or not moe.is_sparse(index):
            return super().layer_weight_names(index)
        return ATTENTION_NAMES | SPARSE_MLP_NAMES | expert_names(moe.num_experts)

    def make_mlp(self, index: int) -> nn.Module:
        moe = self.config.moe
        if moe is None or not moe.is_sparse(index):
            return super().make_mlp(index)
        return SparseMlp(
            moe,
            self.groups,
            hidden_size=self.config.hidden_size,
            format=self.format,
            dtype=self.dtype,
            dispatch=self.dispatch,
            redundant_experts=self.redundant_experts,
        )
