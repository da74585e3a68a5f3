"""The sparse MLP of Qwen2-MoE. T tokens, D model width, E routed experts, A active experts per token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import MoeConfig
from model.layers import Mlp
from parallel.axes import whole
from parallel.dispatch import DispatchName, make_dispatch
from parallel.elementwise_kernels import routing_kernels_for
from parallel.expert_balance import even_capacity, place_experts
from parallel.expert_placement import ExpertPlacement, balanced_placement
from parallel.experts import RoutedExperts
from parallel.groups import ParallelGroups
from parallel.linear import Linear
from parallel.native.library import native
from parallel.packed_format import PackedFormat
from parallel.weight_format import Dense, WeightFormat


class ExpertRouter(nn.Module):
    """Chooses each token's experts and their weights. Replicated on every rank and never quantised."""

    def __init__(self, config: MoeConfig, hidden_size: int, dtype: torch.dtype, format: WeightFormat) -> None:
        super().__init__()
        self.experts_per_token, self.renormalise = config.experts_per_token, config.renormalise
        self.projection = _replicated(hidden_size, config.num_experts, dtype, format)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids (T, A), int64, and weights (T, A) in the model's dtype.

        The softmax is over all experts. With `norm_topk_prob` false, as in Qwen2's releases, a token's weights sum to less than one.
        """
        logits_TE = self.projection(x_TD)
        if (kernels := routing_kernels_for(logits_TE)) is not None:
            return kernels.choose(logits_TE, self.experts_per_token, renormalise=self.renormalise)
        probabilities_TE = logits_TE.softmax(-1, dtype=torch.float32)
        weights_TA, expert_ids_TA = probabilities_TE.topk(self.experts_per_token, dim=-1)
        if self.renormalise:
            weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True)
        return expert_ids_TA, weights_TA.to(x_TD.dtype)


class SparseMlp(nn.Module):
    """A few routed experts per token, plus one shared expert that every token uses, weighted by a gate of its own."""

    def __init__(
        self,
        config: MoeConfig,
        groups: ParallelGroups,
        *,
        hidden_size: int,
        format: WeightFormat,
        dtype: torch.dtype,
        dispatch: DispatchName,
        redundant_experts: int = 0,
    ) -> None:
        """``redundant_experts``: how many experts each ep position holds beyond its even share, so that busy experts have a second copy."""
        super().__init__()
        self.is_single_rank = groups.stage.size == 1
        """Whether this rank holds all of it and no other rank sends tokens to it."""
        placement = _first_placement(config.num_experts, groups.ep.size, redundant_experts)
        self.router = ExpertRouter(config, hidden_size, dtype, format)
        self.experts = RoutedExperts(
            num_experts=config.num_experts,
            hidden_size=hidden_size,
            intermediate_size=config.expert_intermediate_size,
            groups=groups,
            format=format,
            placement=placement,
            dispatch=make_dispatch(dispatch, groups, placement),
        )
        self.shared = Mlp(hidden_size=hidden_size, inner_size=config.shared_intermediate_size, tp=groups.tp, format=format, dtype=dtype)
        self.shared_gate = _replicated(hidden_size, 1, dtype, format)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D), complete on every rank."""
        expert_ids_TA, weights_TA = self.router(x_TD)
        routed_TD: Tensor = self.experts(x_TD, expert_ids_TA, weights_TA)
        gates_T1: Tensor = self.shared_gate(x_TD)
        shared_TD: Tensor = self.shared(x_TD)
        if (kernels := routing_kernels_for(x_TD)) is not None:
            return kernels.add_shared(routed_TD, gates_T1, shared_TD)
        return routed_TD + _sigmoid(gates_T1) * shared_TD


def _sigmoid(x_T1: Tensor) -> Tensor:
    """A sigmoid whose result for one token does not depend on how many tokens there are.

    On CPUs torch computes the last few elements of a sigmoid differently from the rest, so there it is a softmax over two.
    """
    if x_T1.device.type != "cpu":
        return F.sigmoid(x_T1)
    return torch.cat((x_T1, torch.zeros_like(x_T1)), dim=-1).softmax(-1)[:, :1]


def _first_placement(num_experts: int, ranks: int, redundant: int) -> ExpertPlacement:
    """Before any load has been measured all experts are assumed to be equally busy."""
    if not redundant:
        return balanced_placement(num_experts, ranks)
    return place_experts([1.0] * num_experts, even_capacity(num_experts, ranks, redundant))


def _replicated(in_size: int, out_size: int, dtype: torch.dtype, format: WeightFormat) -> Linear:
    """A linear layer that every rank holds whole, never quantised.

    Beside packed experts it is packed too: the rounding of torch's sums depends on the number of tokens, and a token that is recomputed
    after a failure must be routed to the same experts.
    """
    is_exact = isinstance(format, PackedFormat) and dtype == torch.float32 and native() is not None
    own: WeightFormat = PackedFormat("fp32", dtype) if is_exact else Dense(dtype, is_replicated=True)
    return Linear(in_share=whole(in_size), out_parts={"all": whole(out_size)}, bias=False, format=own, bias_dtype=dtype)
