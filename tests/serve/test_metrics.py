"""/metrics: what is counted, and how the parts of a server make one page."""

import asyncio
from pathlib import Path
from typing import Literal

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from cluster.channel import Address
from cluster.config import RouterConfig
from cluster.directory import ReplicaRecord
from cluster.errors import SlowReader
from cluster.health import State
from cluster.resume import ResumePolicy
from engine.errors import DuplicateRequest, EmptyPrompt, QueueFull
from engine.executor import Capacity
from engine.plan import PhaseTimes
from engine.stats import EngineStats
from serve import metric_names as names
from serve.errors import (
    Draining,
    InvalidRequest,
    ModelNotFound,
    NotAuthenticated,
    RequestTooLarge,
    RouteNotFound,
    ServerStopped,
    TakenOver,
    UnsupportedMediaType,
)
from serve.metric_names import METRICS, page
from serve.metrics import Instruments, render, replica_snapshot
from serve.metrics_page import MetricsPage
from serve.request import ChatRequest, Message, TextEvent, TextToken, Usage
from serve.request_metrics import RequestMetrics

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


class Clock:
    now_s = 10.0

    def __call__(self) -> float:
        return self.now_s


def asked(model: str = "m") -> ChatRequest:
    return ChatRequest(request_id="r", model=model, messages=(Message(role="user", content="hi"),))


def tokens(count: int) -> tuple[TextToken, ...]:
    return tuple(TextToken(id=number, text="x", raw=b"x") for number in range(count))


def values(text: bytes) -> dict[tuple[str, ...], float]:
    """(sample name, label values in order of label names) to value."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def record(replica: str, **stats: int) -> ReplicaRecord:
    return ReplicaRecord(
        id=replica,
        model="m",
        state=State.READY,
        address=Address(node="n"),
        capacity=Capacity(num_blocks=10, block_tokens=16, max_context_tokens=128),
        stats=EngineStats(**stats),
    )


def test_the_page_of_names_is_what_the_table_says() -> None:
    assert PAGE.read_text() == page(), f"the table says something else now: {names.COMMAND}"


def test_no_two_metrics_have_one_name() -> None:
    every = [name for metric in METRICS for name in (metric.name, metric.alias) if name]
    assert len(every) == len(set(every))


def test_a_request_is_measured_from_its_arrival_to_its_end() -> None:
    clock, instruments = Clock(), Instruments("f1")
    watch = RequestMetrics(instruments, ["m"], clock=clock).begin(asked())
    clock.now_s += 0.5
    watch.event(TextEvent(choice=0, text="x", tokens=tokens(1)))
    clock.now_s += 0.25
    watch.event(TextEvent(choice=0, text="xx", tokens=tokens(2)))
    phase_times = PhaseTimes(queue_s=0.1, prefill_s=0.3, decode_s=0.25)
    usage = Usage(prompt_tokens=5, completion_tokens=3, cached_tokens=2)
    watch.event(TextEvent(choice=0, finish_reason="stop", usage=usage, phase_times=phase_times))
    watch.ended()
    said = values(render([instruments.snapshot()])[0])
    assert said["manta_requests_total", "stop", "f1", "m"] == 1
    assert said["manta_time_to_first_token_seconds_sum", "f1", "m"] == 0.5
    assert said["manta_inter_token_latency_seconds_count", "f1", "m"] == 2
    assert said["manta_inter_token_latency_seconds_sum", "f1", "m"] == 0.25
    assert said["manta_request_seconds_sum", "f1", "m"] == 0.75
    assert said["manta_request_queue_seconds_sum", "f1", "m"] == 0.1
    assert said["manta_request_inference_seconds_sum", "f1", "m"] == 0.55
    assert said["manta_prompt_tokens_total", "f1", "m"] == 5
    assert said["manta_prompt_tokens_cached_total", "f1", "m"] == 2
    assert said["manta_generation_tokens_total", "f1", "m"] == 3
    assert said["manta_requests_in_progress", "f1", "m"] == 0


def test_every_alias_says_what_its_metric_says() -> None:
    clock, instruments = Clock(), Instruments("f1")
    watch = RequestMetrics(instruments, ["m"], clock=clock).begin(asked())
    watch.event(TextEvent(choice=0, text="x", tokens=tokens(1), finish_reason="length", usage=Usage(prompt_tokens=1, completion_tokens=1)))
    watch.ended()
    said = values(render([instruments.snapshot(), replica_snapshot(record("r1", num_running=3, blocks_used=4, blocks_free=6))])[0])
    for metric in METRICS:
        own = {key[1:]: value for key, value in said.items() if key[0].startswith(metric.name) and key[0].count("_") >= 0}
        if metric.alias:
            suffixes = {
                key[0].removeprefix(metric.alias) for key in said if key[0].startswith(metric.alias + "_") or key[0] == metric.alias
            }
            for suffix in suffixes & {"", "_total", "_sum", "_count", "_bucket"}:
                theirs = {key[1:]: value for key, value in said.items() if key[0] == metric.alias + suffix}
                assert theirs == {key[1:]: value for key, value in said.items() if key[0] == metric.name + suffix}
                assert theirs.keys() <= own.keys()
    assert said["vllm:num_requests_running", "m", "r1"] == 3
    assert said["vllm:kv_cache_usage_perc", "m", "r1"] == 0.4
    assert said["vllm:request_success_total", "length", "f1", "m"] == 1


def test_a_failure_is_told_by_its_code_and_an_unknown_model_without_its_name() -> None:
    instruments = Instruments("f1")
    measuring = RequestMetrics(instruments, ["m"])
    measuring.begin(asked()).failed(InvalidRequest("no"))
    measuring.begin(asked()).failed(asyncio.CancelledError())
    measuring.begin(asked()).failed(ServerStopped())
    measuring.begin(asked("what a client wrote")).failed(InvalidRequest("no"))
    text = render([instruments.snapshot()])[0]
    said = values(text)
    assert said["manta_request_failures_total", "invalid_value", "f1", "m"] == 1
    assert said["manta_request_failures_total", "client_left", "f1", "m"] == 1
    assert said["manta_request_failures_total", "stopped", "f1", "m"] == 1
    assert said["manta_request_failures_total", "invalid_value", "f1", ""] == 1
    assert b"what a client wrote" not in text


def test_a_request_that_is_refused_before_it_begins_is_counted_only_as_failed() -> None:
    instruments = Instruments("f1")
    measuring = RequestMetrics(instruments, ["m"])
    measuring.refused(asked(), Draining())
    measuring.refused(asked("what a client wrote"), Draining())
    text = render([instruments.snapshot()])[0]
    assert b"what a client wrote" not in text
    counted = {key: value for key, value in values(text).items() if key[0].startswith("manta_request") and value}
    assert {key for key in counted if not key[0].endswith("_created")} == {
        ("manta_request_failures_total", "draining", "f1", "m"),
        ("manta_request_failures_total", "draining", "f1", ""),
    }


class Source:
    def __init__(self, *replicas: ReplicaRecord) -> None:
        self.replicas = replicas
        self.resumes = ResumePolicy(RouterConfig())
        self.resumes.counts.resumes["stalled"] = 2
        self.resumes.counts.tokens_replayed = 7


class Front:
    draining = False
    has_replicas = True

    def ready(self) -> bool:
        return self.has_replicas and not self.draining


class Others:
    def __init__(self, *snapshots) -> None:
        self._snapshots = snapshots

    async def peers(self):
        return self._snapshots


async def test_any_front_answers_for_all_fronts_and_replicas() -> None:
    mine, theirs = Instruments("f1"), Instruments("f2")
    for instruments in (mine, theirs):
        instruments.count(names.REQUESTS, model_name="m", finished_reason="stop")
    answers = MetricsPage(
        mine, [Source(record("r1", num_waiting=1)), Source(record("r2", num_waiting=4))], Others(theirs.snapshot()), Front()
    )
    text, content_type = await answers("")
    said = values(text)
    assert content_type.startswith("text/plain")
    assert {key: value for key, value in said.items() if key[0] == "manta_requests_total"} == {
        ("manta_requests_total", "stop", "f1", "m"): 1,
        ("manta_requests_total", "stop", "f2", "m"): 1,
    }
    assert said["manta_resumes_total", "f1", "stalled"] == 4, "of both models"
    assert said["manta_tokens_replayed_total", "f1"] == 14
    assert [said["manta_requests_waiting", "m", replica] for replica in ("r1", "r2")] == [1, 4]


async def test_the_page_can_be_had_as_openmetrics() -> None:
    answers = MetricsPage(Instruments("f1"), [Source(record("r1", num_steps=9))], Others(), Front())
    text, content_type = await answers("application/openmetrics-text;version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    families = {family.name: family for family in parse_openmetrics(text.decode())}
    assert families["manta_steps"].samples[0].value == 9


async def test_counting_again_does_not_count_twice() -> None:
    answers = MetricsPage(Instruments("f1"), [Source()], Others(), Front())
    await answers("")
    said = values((await answers(""))[0])
    assert said["manta_resumes_total", "f1", "stalled"] == 2


async def test_a_front_is_not_ready_while_it_drains_or_has_no_replicas_and_only_the_first_is_called_draining() -> None:
    front = Front()
    answers = MetricsPage(Instruments("f1"), [], Others(), front)

    async def said() -> tuple[float, float]:
        gauges = values((await answers(""))[0])
        return gauges["manta_front_ready", "f1"], gauges["manta_front_draining", "f1"]

    assert await said() == (1, 0)
    front.draining = True
    assert await said() == (0, 1)
    front.draining, front.has_replicas = False, False
    assert await said() == (0, 0)


INVALID = {
    UnsupportedMediaType("no"): "unsupported_media_type",
    InvalidRequest("no"): "invalid_value",
    ModelNotFound("x"): "model_not_found",
    RouteNotFound("no"): "not_found",
    NotAuthenticated(): "invalid_api_key",
    RequestTooLarge(limit_bytes=1): "request_too_large",
    EmptyPrompt(): "empty_prompt",
}


@pytest.mark.parametrize("api", ["http", "grpc"])
def test_a_request_that_is_itself_to_blame_is_counted_by_api_and_code(api: Literal["http", "grpc"]) -> None:
    instruments = Instruments("f1")
    measuring = RequestMetrics(instruments, ["m"])
    for error in INVALID:
        measuring.answered_with(api, error)
    said = values(render([instruments.snapshot()])[0])
    counted = {key[1:]: value for key, value in said.items() if key[0] == "manta_invalid_requests_total"}
    assert counted == {(api, code, "f1"): 1 for code in INVALID.values()}


def test_what_is_no_fault_of_the_request_is_not_counted_as_invalid() -> None:
    instruments = Instruments("f1")
    measuring = RequestMetrics(instruments, ["m"])
    for error in (
        Draining(),
        ServerStopped(),
        TakenOver(),
        DuplicateRequest("r"),
        QueueFull(limit=1),
        SlowReader(limit_tokens=1),
        OSError(),
    ):
        measuring.answered_with("http", error)
    assert not [key for key in values(render([instruments.snapshot()])[0]) if key[0] == "manta_invalid_requests_total"]
