"""Generate the chart's Grafana dashboards: `python k8s/dashboards.py`. A test compares, and checks that every metric exists."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "chart" / "dashboards"
SOURCE = {"type": "prometheus", "uid": "${source}"}
WIDTH, HEIGHT, COLUMNS = 8, 8, 3
CHOSEN = 'namespace=~"$namespace", model_name=~"$model"'


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One graph."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    """(PromQL, legend) of each series."""
    says: str = ""


def quantiles(metric: str) -> tuple[tuple[str, str], ...]:
    """Median and tails of a histogram."""
    rate = f"sum by (le) (rate({metric}_bucket{{{CHOSEN}}}[$__rate_interval]))"
    return tuple((f"histogram_quantile({part}, {rate})", name) for part, name in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99")))


def total(metric: str, *, by: str = "model_name") -> str:
    return f"sum by ({by}) (rate({metric}{{{CHOSEN}}}[$__rate_interval]))"


REQUESTS = (
    Panel(title="Requests answered", unit="reqps", queries=((total("manta_requests_total"), "{{model_name}}"),)),
    Panel(
        title="Requests failed",
        unit="reqps",
        queries=((total("manta_request_failures_total", by="model_name, code"), "{{model_name}} {{code}}"),),
        says="By error code sent to the client. Includes client errors, client_left, draining (refused by a front that is drained or "
        "stopped), and stopped (ended by a server that is stopped).",
    ),
    Panel(
        title="Invalid requests",
        unit="reqps",
        queries=(
            ('sum by (api, code) (rate(manta_invalid_requests_total{namespace=~"$namespace"}[$__rate_interval]))', "{{api}} {{code}}"),
        ),
        says="Refused for what they are, by API and error code: clients that send rubbish, a wrong key or an unknown model. Of all models.",
    ),
    Panel(
        title="Errors at Ray Serve's proxies",
        unit="reqps",
        queries=tuple(
            (
                f'sum by (error_code) (rate(ray_serve_num_{api}_error_requests_total{{namespace=~"$namespace"}}[$__rate_interval]))',
                f"{api} {{{{error_code}}}}",
            )
            for api in ("http", "grpc")
        ),
        says="Ray's own count, so it needs podMonitor. Errors that fronts return, and those of the proxies themselves while no front runs, "
        "which no metric of Manta has.",
    ),
    Panel(
        title="In progress and waiting",
        unit="short",
        queries=(
            (f"sum(manta_requests_in_progress{{{CHOSEN}}})", "in progress"),
            (f"sum(manta_requests_running{{{CHOSEN}}})", "running"),
            (f"sum(manta_requests_waiting{{{CHOSEN}}})", "waiting"),
        ),
    ),
    Panel(title="Time to first token", unit="s", queries=quantiles("manta_time_to_first_token_seconds")),
    Panel(title="Between tokens", unit="s", queries=quantiles("manta_inter_token_latency_seconds")),
    Panel(title="Whole request", unit="s", queries=quantiles("manta_request_seconds")),
    Panel(
        title="Where the time goes (mean)",
        unit="s",
        queries=tuple(
            (f"{total(f'manta_request_{part}_seconds_sum')} / {total(f'manta_request_{part}_seconds_count')}", f"{part} {{{{model_name}}}}")
            for part in ("queue", "prefill", "decode")
        ),
    ),
    Panel(title="Prompt tokens of a request", unit="short", queries=quantiles("manta_request_prompt_tokens")),
    Panel(title="Generated tokens of a request", unit="short", queries=quantiles("manta_request_generation_tokens")),
)

ENGINES = (
    Panel(
        title="Tokens per second",
        unit="short",
        queries=(
            (total("manta_generation_tokens_total"), "generated {{model_name}}"),
            (total("manta_prompt_tokens_total"), "of prompts {{model_name}}"),
            (total("manta_computed_tokens_total"), "computed {{model_name}}"),
        ),
        says="Computed tokens: prompt tokens that were not in a prefix cache, generated tokens, and recomputed tokens.",
    ),
    Panel(title="KV cache in use", unit="percentunit", queries=((f"max by (replica) (manta_kv_usage_ratio{{{CHOSEN}}})", "{{replica}}"),)),
    Panel(
        title="Prefix cache hits",
        unit="percentunit",
        queries=((f"{total('manta_prefix_cache_hits_total')} / {total('manta_prefix_cache_queries_total')}", "{{model_name}}"),),
    ),
    Panel(title="Step", unit="s", queries=((f"max by (replica) (manta_step_seconds{{{CHOSEN}}})", "{{replica}}"),)),
    Panel(
        title="Preemptions and lost ranks",
        unit="short",
        queries=(
            (total("manta_preemptions_total"), "preemptions {{model_name}}"),
            (total("manta_worker_losses_total"), "ranks lost {{model_name}}"),
        ),
    ),
    Panel(
        title="Ready",
        unit="short",
        queries=(
            (f"sum by (model_name) (manta_replica_ready{{{CHOSEN}}})", "replicas {{model_name}}"),
            ('sum(manta_front_ready{namespace=~"$namespace"})', "fronts"),
        ),
    ),
    Panel(
        title="Streams continued elsewhere",
        unit="short",
        queries=(('sum by (front) (rate(manta_resumes_total{namespace=~"$namespace"}[$__rate_interval]))', "{{front}}"),),
    ),
    Panel(
        title="Load of the busiest expert rank, over the mean",
        unit="short",
        queries=((f"max by (replica) (manta_expert_imbalance_ratio{{{CHOSEN}}})", "{{replica}}"),),
    ),
    Panel(
        title="KV blocks",
        unit="short",
        queries=((f"sum by (state) (manta_kv_blocks{{{CHOSEN}}})", "{{state}}"),),
    ),
)

DASHBOARDS = {"requests": ("Manta: requests", REQUESTS), "engines": ("Manta: engines", ENGINES)}


def dashboard(name: str) -> str:
    """One dashboard as JSON."""
    title, panels = DASHBOARDS[name]
    tree: dict[str, Any] = {
        "uid": f"manta-{name}",
        "title": title,
        "tags": ["manta"],
        "timezone": "",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), _variable("namespace", "namespace"), _variable("model", "model_name")]},
        "panels": [_panel(index, panel) for index, panel in enumerate(panels)],
    }
    return json.dumps(tree, indent=1) + "\n"


def _source() -> dict[str, Any]:
    return {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus", "hide": 0}


def _variable(name: str, label: str) -> dict[str, Any]:
    query = f"label_values(manta_requests_running, {label})"
    return {
        "name": name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(index: int, panel: Panel) -> dict[str, Any]:
    return {
        "id": index + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.says,
        "datasource": SOURCE,
        "gridPos": {"x": WIDTH * (index % COLUMNS), "y": HEIGHT * (index // COLUMNS), "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + number), "datasource": SOURCE, "expr": query, "legendFormat": legend}
            for number, (query, legend) in enumerate(panel.queries)
        ],
    }


if __name__ == "__main__":
    for each in DASHBOARDS:
        (FOLDER / f"{each}.json").write_text(dashboard(each))
