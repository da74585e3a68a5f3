"""All metrics: name, kind, labels, description, and the name under which dashboards made for vLLM look for it.

The instruments of `serve.metrics` and the page docs/metrics.md are made from this table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

COMMAND = "python -m serve.metric_names > docs/metrics.md"


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


FRONT = ("model_name", "front")
REPLICA = ("model_name", "replica")

SECONDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    320.0,
    640.0,
)
"""OpenTelemetry's boundaries for ``gen_ai.server.time_to_first_token``, extended to the times of long queues and answers."""
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0)
"""OpenTelemetry's boundaries for ``gen_ai.server.time_per_output_token``, extended at both ends."""
TOKENS = tuple(float(4**power) for power in range(11))
"""1 to 1,048,576, OpenTelemetry's boundaries for ``gen_ai.client.token.usage``."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric family. The samples of a counter end in ``_total``, those of a histogram in ``_bucket``, ``_sum`` and ``_count``."""

    name: str
    kind: Kind
    description: str
    labels: tuple[str, ...]
    alias: str | None = None
    """The name of the same metric in vLLM's server."""
    buckets: tuple[float, ...] = ()


def _front(name: str, description: str, *labels: str, alias: str | None = None) -> Metric:
    return Metric(name=name, kind=Kind.COUNTER, description=description, labels=(*FRONT, *labels), alias=alias)


def _times(name: str, description: str, alias: str | None = None, buckets: tuple[float, ...] = SECONDS) -> Metric:
    return Metric(name=name, kind=Kind.HISTOGRAM, description=description, labels=FRONT, alias=alias, buckets=buckets)


def _gauge(name: str, description: str, *labels: str, alias: str | None = None) -> Metric:
    return Metric(name=name, kind=Kind.GAUGE, description=description, labels=(*REPLICA, *labels), alias=alias)


def _count(name: str, description: str, alias: str | None = None) -> Metric:
    return Metric(name=name, kind=Kind.COUNTER, description=description, labels=REPLICA, alias=alias)


# --- measured by the fronts

REQUESTS = _front("manta_requests", "Completed requests, by finish reason.", "finished_reason", alias="vllm:request_success")
FAILURES = _front(
    "manta_request_failures",
    "Failed requests, by the error code that the client received; `draining` are those that a front refused because it was drained or "
    "its server was being stopped. Two are told apart only here: `client_left`, which is no failure of the server, and `stopped`, "
    "requests that were still running when a server that is being stopped ended them (their clients receive `draining`).",
    "code",
)
INVALID_REQUESTS = Metric(
    name="manta_invalid_requests",
    kind=Kind.COUNTER,
    description="Requests refused for what they are, by API (`http`, `grpc`) and the error code that the client received: not JSON or not "
    "protobuf, wrong types or values, too large, an unknown model or path, a missing key. Those of them that could be read, and so name a "
    "model, are in `manta_request_failures_total` too; the rest are only here. What does not get past Ray Serve's proxy (broken HTTP, "
    "an unknown gRPC method) is in no metric, neither Manta's nor Ray's; what the proxy answers itself because no front runs is in Ray's "
    "`ray_serve_num_http_error_requests_total` and `ray_serve_num_grpc_error_requests_total`, beside all errors that fronts return.",
    labels=("front", "api", "code"),
)
PROMPT_TOKENS = _front("manta_prompt_tokens", "Prompt tokens; each prompt is counted once.", alias="vllm:prompt_tokens")
GENERATION_TOKENS = _front("manta_generation_tokens", "Generated tokens sent to clients.", alias="vllm:generation_tokens")
CACHED_TOKENS = _front(
    "manta_prompt_tokens_cached", "Prompt tokens whose KV was found in a prefix cache.", alias="vllm:prompt_tokens_cached"
)
IN_PROGRESS = Metric(name="manta_requests_in_progress", kind=Kind.GAUGE, description="Requests that the front is processing.", labels=FRONT)
TIME_TO_FIRST_TOKEN = _times(
    "manta_time_to_first_token_seconds", "Time from a request's arrival to its first token.", "vllm:time_to_first_token_seconds"
)
INTER_TOKEN = _times(
    "manta_inter_token_latency_seconds",
    "Time between two tokens of a choice; if several arrive at once, the time is divided by their number.",
    "vllm:inter_token_latency_seconds",
    TOKEN_SECONDS,
)
TIME_PER_TOKEN = _times(
    "manta_time_per_output_token_seconds",
    "Per request: time from the first token to the end, divided by the number of tokens after the first.",
    "vllm:request_time_per_output_token_seconds",
    TOKEN_SECONDS,
)
REQUEST_SECONDS = _times("manta_request_seconds", "Time from a request's arrival to its end.", "vllm:e2e_request_latency_seconds")
QUEUE_SECONDS = _times("manta_request_queue_seconds", "Time that a request waited in an engine's queue.", "vllm:request_queue_time_seconds")
PREFILL_SECONDS = _times(
    "manta_request_prefill_seconds",
    "Time in the engine from a request's first step to its first token.",
    "vllm:request_prefill_time_seconds",
)
DECODE_SECONDS = _times(
    "manta_request_decode_seconds", "Time in the engine from a request's first token to its last.", "vllm:request_decode_time_seconds"
)
INFERENCE_SECONDS = _times("manta_request_inference_seconds", "Prefill time plus decode time.", "vllm:request_inference_time_seconds")
REQUEST_PROMPT_TOKENS = _times("manta_request_prompt_tokens", "Prompt tokens per request.", "vllm:request_prompt_tokens", TOKENS)
REQUEST_GENERATION_TOKENS = _times(
    "manta_request_generation_tokens", "Generated tokens per request.", "vllm:request_generation_tokens", TOKENS
)
FRONT_READY = Metric(
    name="manta_front_ready",
    kind=Kind.GAUGE,
    description="1 while `/readyz` says so: the front can have requests for some model computed, and does not refuse new ones.",
    labels=("front",),
)
FRONT_DRAINING = Metric(
    name="manta_front_draining",
    kind=Kind.GAUGE,
    description="1 while the front refuses new requests or is about to, because it is drained or the server is being stopped.",
    labels=("front",),
)
RESUMES = Metric(
    name="manta_resumes",
    kind=Kind.COUNTER,
    description="Choices resumed on another replica, or on the same one again, by the reason of the loss.",
    labels=("front", "reason"),
)
RESUMES_REFUSED = Metric(
    name="manta_resume_refused",
    kind=Kind.COUNTER,
    description="Choices that ended with an error instead of being resumed: poisoned, quarantined, or no attempts or budget left.",
    labels=("front", "reason"),
)
TOKENS_REPLAYED = Metric(
    name="manta_tokens_replayed",
    kind=Kind.COUNTER,
    description="Tokens that had already been sent and were recomputed for resumed choices.",
    labels=("front",),
)

# --- reported by the replicas' engines

RUNNING = _gauge("manta_requests_running", "Running choices (they hold KV blocks).", alias="vllm:num_requests_running")
WAITING = _gauge("manta_requests_waiting", "Choices waiting for KV blocks.", alias="vllm:num_requests_waiting")
KV_USED = _gauge("manta_kv_usage_ratio", "Fraction of KV blocks held by running choices, 0 to 1.", alias="vllm:kv_cache_usage_perc")
KV_BLOCKS = _gauge("manta_kv_blocks", "KV blocks by state: used, cached (evictable, found by prefix lookups until then), free.", "state")
PREFIX_QUERIES = _count("manta_prefix_cache_queries", "Tokens looked up in the prefix cache.", "vllm:prefix_cache_queries")
PREFIX_HITS = _count("manta_prefix_cache_hits", "Tokens found in the prefix cache.", "vllm:prefix_cache_hits")
PREEMPTIONS = _count("manta_preemptions", "Preemptions: a choice lost its KV blocks.", "vllm:num_preemptions")
STEPS = _count("manta_steps", "Steps (forward passes over the replica).")
STEP_SECONDS = _gauge("manta_step_seconds", "Duration of a step on the slowest sampling rank, smoothed over about 20 steps.")
COMPUTED_TOKENS = _count("manta_computed_tokens", "Tokens computed in steps, including recomputed ones.")
SAMPLED_TOKENS = _count("manta_sampled_tokens", "Sampled tokens.")
DRAFTED_TOKENS = _count(
    "manta_draft_tokens", "Draft tokens that were verified (speculative decoding).", "vllm:spec_decode_num_draft_tokens"
)
ACCEPTED_TOKENS = _count("manta_accepted_draft_tokens", "Accepted draft tokens.", "vllm:spec_decode_num_accepted_tokens")
WORKER_LOSSES = _count("manta_worker_losses", "Losses after which all ranks were restarted.")
EXPERT_MOVES = _count("manta_expert_moves", "Copies of routed experts moved between ranks.")
EXPERT_IMBALANCE = _gauge("manta_expert_imbalance_ratio", "Expert load of the busiest rank divided by the mean, in the worst layer.")
REPLICA_READY = _gauge("manta_replica_ready", "1 while the replica is ready.")
CACHE_CONFIG = _gauge(
    "manta_cache_config_info",
    "Always 1; the labels describe the KV cache.",
    "block_size",
    "num_gpu_blocks",
    "num_shards",
    "max_model_len",
    alias="vllm:cache_config_info",
)

METRICS = tuple(value for value in list(globals().values()) if isinstance(value, Metric))

ABOUT = f"""# Metrics

Written by `{COMMAND}`; a test compares. Do not edit.

`GET /metrics` returns the Prometheus text format, or OpenMetrics if the scraper asks for it. Any front answers for the whole
server: with the values of every front (label `front`) and of every replica's engine (label `replica`). So **scrape one address**;
a Service that balances over the fronts is fine, with one scrape per interval. Scraping every pod would count everything several
times. Each series belongs to one process, so `rate` and `sum` are correct across restarts and scaling:

```
sum(rate(manta_generation_tokens_total[1m]))                                                        tokens per second
histogram_quantile(0.99, sum by (le) (rate(manta_time_to_first_token_seconds_bucket[5m])))          p99 time to first token
sum(manta_requests_waiting)                                                                         queued
max(manta_kv_usage_ratio)                                                                           fullest KV cache
```

Values of other fronts and of replicas are at most about two seconds old. The column "vLLM name" is an alias: the same series under
vLLM's name, so that dashboards, KEDA scalers and the Gateway API's endpoint picker find it. Counters end in `_total`, histograms in
`_bucket`, `_sum` and `_count`. The label `model_name` is the name that clients use for the model. No label contains text written by
a client.
"""


def page() -> str:
    """The content of docs/metrics.md."""
    return "\n".join([ABOUT, *_section("Measured by the fronts", "front"), *_section("Reported by the replicas", "replica"), *_buckets()])


def _section(title: str, source: str) -> Iterator[str]:
    yield from (f"## {title}", "", "| Name | vLLM name | Kind | Labels | Meaning |", "|---|---|---|---|---|")
    for metric in METRICS:
        if source in metric.labels:
            suffix = "_total" if metric.kind is Kind.COUNTER else ""
            alias = f"`{metric.alias}{suffix}`" if metric.alias else ""
            labels = ", ".join(f"`{label}`" for label in metric.labels)
            yield f"| `{metric.name}{suffix}` | {alias} | {metric.kind} | {labels} | {metric.description} |"
    yield ""


def _buckets() -> Iterator[str]:
    yield from ("## Buckets", "")
    for name, buckets in (("Request times, s", SECONDS), ("Times between tokens, s", TOKEN_SECONDS), ("Tokens", TOKENS)):
        yield f"- {name}: {', '.join(f'{bucket:g}' if bucket < 1e5 else f'{bucket:.0f}' for bucket in buckets)}"
    yield ""


if __name__ == "__main__":
    print(page(), end="")
