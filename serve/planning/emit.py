"""Write a layout as settings: a file for `manta serve -c`, or values for the Helm chart."""

import re
from typing import Any

import yaml

from serve.planning.formats import BF16
from serve.planning.plan import Layout, PlanInputs
from serve.planning.released_models import NAME

CLUSTER = """\
# On a Ray cluster of these hosts: `ray start --head --block` on one, `ray start --block --address=HEAD:6379` on the others, on all of
# them with RAY_AUTH_MODE=token and one token; then `manta serve -c` or `manta up -c` this file on the head.
"""


def config_yaml(layout: Layout, inputs: PlanInputs) -> str:
    """A settings file for `manta serve` (sections as in `serve.config.ServeConfig`)."""
    tree = {
        "model": {"source": inputs.shape.name},
        "parallel": _parallel(layout),
        "replicas": {"count": layout.placement.replicas},
        **_settings(layout, inputs),
    }
    if inputs.fleet.hosts == 1:
        return _comment(layout, inputs) + _yaml(tree)
    return _comment(layout, inputs) + CLUSTER + _yaml({**tree, "ray": {"address": "auto"}})


def helm_yaml(layout: Layout, inputs: PlanInputs) -> str:
    """Values for the Helm chart: the model, and a worker group with its GPUs."""
    replicas, group = layout.placement.replicas, _label(inputs.fleet.gpu.name, "gpu")
    model = {
        "name": _label(inputs.shape.name.rstrip("/").rsplit("/", 1)[-1], "model"),
        "source": _source(inputs.shape.name),
        "parallel": _parallel(layout),
        "replicas": {"min": replicas, "max": replicas, "initial": replicas},
        "settings": _settings(layout, inputs),
        "workerGroup": group,
    }
    worker_group = {
        "name": group,
        "gpusPerHost": layout.placement.gpus_per_host,
        "hostsPerReplica": layout.placement.hosts_per_replica,
        "min": replicas,
        "max": replicas,
    }
    return _comment(layout, inputs) + _yaml({"models": [model], "workerGroups": [worker_group]})


def _parallel(layout: Layout) -> dict[str, int]:
    topology = layout.topology
    return {"tensor": topology.tp, "expert": topology.ep, "pipeline": topology.pp, "data": topology.dp}


def _settings(layout: Layout, inputs: PlanInputs) -> dict[str, Any]:
    """The settings that the memory plan assumes. A quantised checkpoint needs none for its format."""
    quantize = inputs.format.quantize
    dtype = "bfloat16" if inputs.dtype == "auto" and (inputs.format is BF16 or quantize) else inputs.dtype
    return {
        "engine": {
            "max_step_tokens": inputs.workload.step_tokens,
            "max_running": layout.running,
            **({"speculate": "draft"} if inputs.draft else {}),
        },
        "runner": {
            "dtype": dtype,
            **({"quantize": quantize} if quantize else {}),
            **({"kv_dtype": "fp8"} if inputs.workload.kv_element_bytes == 1 else {}),
            "max_context_tokens": inputs.workload.context_tokens,
            **({"redundant_experts": inputs.redundant_experts} if inputs.redundant_experts else {}),
            **({"draft_model": inputs.draft.name} if inputs.draft else {}),
        },
        "resources": {"gpus": 1.0, **_hosts(layout)},
    }


def _hosts(layout: Layout) -> dict[str, Any]:
    """Settings that spread a replica's ranks over hosts as planned."""
    if layout.placement.hosts_per_replica == 1:
        return {"one_host": True}
    return {"one_host": False, "ranks_per_host": layout.placement.gpus_per_host}


def _comment(layout: Layout, inputs: PlanInputs) -> str:
    lines = [
        f"{inputs.shape.name} in {inputs.format.name} on {inputs.fleet}, as `manta plan` laid it out:",
        f"{layout.placement.replicas} x {layout.topology}, room for {layout.total_kv_tokens:,} tokens of KV",
        *(f"NOT SERVED TODAY: {limit.sentence}" for limit in layout.limits),
    ]
    return "".join(f"# {line}\n" for line in lines)


def _yaml(tree: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(tree, sort_keys=False)
    return text


def _source(name: str) -> str:
    """Released models come from the Hugging Face hub; any other source stays as it was given."""
    return f"hf://{name}" if NAME.fullmatch(name) and "://" not in name else name


def _label(text: str, prefix: str) -> str:
    """A valid Kubernetes name: lower case, starts with a letter (RFC 1035)."""
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return label[:63].rstrip("-") if label[:1].isalpha() else f"{prefix}-{label}"[:63].rstrip("-")
