"""A plan as JSON."""

from typing import Any

from serve.planning.plan import Layout, Plan


def as_json(plan: Plan) -> dict[str, Any]:
    """Every rank of every layout, and every refusal. Sizes in bytes, times in seconds; floors are null if the GPU's speed is unknown."""
    inputs = plan.inputs
    work, fleet = inputs.workload, inputs.fleet
    return {
        "model": inputs.shape.name,
        "dtype": inputs.dtype,
        "format": inputs.format.name,
        "gpu": {"name": fleet.gpu.name, "memory_bytes": fleet.gpu.memory_bytes},
        "gpus_per_host": fleet.gpus_per_host,
        "hosts": fleet.hosts,
        "context_tokens": work.context_tokens,
        "concurrency": work.concurrency,
        "max_step_tokens": work.step_tokens,
        "redundant_experts": inputs.redundant_experts,
        "draft_model": inputs.draft.name if inputs.draft else None,
        "layouts": [_layout(layout, plan.has_floors) for layout in plan.layouts],
        "invalid": [{**one.sizes, "reason": one.refusal.reason, "sentence": one.refusal.sentence} for one in plan.refused],
    }


def _layout(layout: Layout, with_floors: bool) -> dict[str, Any]:
    topology, placement = layout.topology, layout.placement
    return {
        "tp": topology.tp,
        "pp": topology.pp,
        "dp": topology.dp,
        "ep": topology.ep,
        "replicas": placement.replicas,
        "hosts_per_replica": placement.hosts_per_replica,
        "kv_tokens": layout.total_kv_tokens,
        "sequences_at_full_context": layout.at_full_context * placement.replicas,
        "floors": _floors(layout) if with_floors else None,
        "served_today": layout.is_served_today,
        "limits_today": [limit.sentence for limit in layout.limits],
        "ranks": [
            {
                "weights_bytes": rank.weights.num_bytes,
                "activation_bytes": rank.activation_bytes,
                "reserve_bytes": rank.reserve_bytes,
                "kv_bytes": rank.kv_budget_bytes,
                "kv_bytes_per_token": rank.kv_bytes_per_token,
                "draft_bytes": rank.draft_bytes,
                "draft_kv_bytes_per_token": rank.draft_kv_bytes_per_token,
            }
            for rank in layout.ranks
        ],
    }


def _floors(layout: Layout) -> dict[str, float]:
    return {
        "tokens_per_s": layout.total_tokens_per_s,
        "next_token_s": layout.floors.token_s,
        "first_token_s": layout.floors.first_token_s,
    }
