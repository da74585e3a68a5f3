"""Schemathesis: requests made from the OpenAPI document, of its form and not, are answered or refused as the client's mistake."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from serve.http.openapi import page
from tests.serve.bad_input.checks import says_little
from tests.serve.in_process import MODEL, fronts

MOST_TOKENS = 6
MOST_DIMENSIONS = 80
"""A few more than the model has."""
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
HANGS_AFTER_S = 60.0


def fuzz_http(folder: Path, cases: int, path: str | None = None) -> Counter[int]:
    """So many requests over all operations or one, most of them with bodies; the engine must live and be idle at the end."""
    schema = schemathesis.openapi.from_dict(json.loads(page()))
    operations = [operation.ok() for operation in schema.get_all_operations()]
    with_body = [operation for operation in operations if operation.method == "post"]
    assert len(with_body) >= 5
    if path is not None:
        operations = with_body = [operation for operation in with_body if operation.path == path]
        assert operations
    strategies = [operation.as_strategy(generation_mode=mode) for operation in with_body for mode in GenerationMode] * 4
    strategies += [operation.as_strategy(generation_mode=GenerationMode.POSITIVE) for operation in operations]
    strategy = st.one_of(strategies)
    seen: Counter[int] = Counter()

    def run(url: str) -> None:
        own_connections = httpx.Limits(max_keepalive_connections=0)  # making a case may take longer than a server keeps an idle one
        with httpx.Client(base_url=url, timeout=HANGS_AFTER_S, limits=own_connections) as client:

            @settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck), database=None, phases=[Phase.generate])
            @given(strategy, st.integers(0, 9))
            def one(case: Any, fate: int) -> None:
                if isinstance(case.body, dict):
                    _tame(case.body, known_model=fate > 0)
                answer = client.send(client.build_request(**_request(case, url)))
                assert answer.status_code < 500, (case.method, case.path, case.body, answer.text[:500])
                if answer.status_code >= 400:
                    says_little(answer.text)
                seen[answer.status_code] += 1

            one()

    async def all_of_them() -> None:
        async with fronts(folder, pooling="last") as running:
            await asyncio.to_thread(run, running.http)
            assert running.source.ready()
            async with asyncio.timeout(30):
                while not running.source.is_idle:  # noqa: ASYNC110 (an engine's thread tells nobody)
                    await asyncio.sleep(0.01)

    asyncio.run(all_of_them())
    print(f"{seen.total()} requests: {dict(sorted(seen.items()))}")
    return seen


def _tame(body: dict[str, Any], *, known_model: bool) -> None:
    """Most requests shall get as far as the engine, and none keep it for long: numbers of tokens that could be had are made small."""
    if known_model and isinstance(body.get("model"), str):
        body["model"] = MODEL
    said = [name for name in LENGTHS if type(body.get(name)) is int and body[name] > 0]
    for name in said:
        body[name] = min(body[name], MOST_TOKENS)
    if not said and "messages" in body and body.get("max_tokens") is None:
        body["max_tokens"] = MOST_TOKENS
    if not said and "input" in body and body.get("max_output_tokens") is None:
        body["max_output_tokens"] = MOST_TOKENS
    if type(body.get("dimensions")) is int and body["dimensions"] > 0:
        body["dimensions"] = 1 + body["dimensions"] % MOST_DIMENSIONS


def _request(case: Any, url: str) -> dict[str, Any]:
    """As Schemathesis would send it, over a client whose timeout covers the whole answer."""
    sent = case.as_transport_kwargs(base_url=url)
    content = sent.get("data") if "json" not in sent else json.dumps(sent["json"], allow_nan=True).encode(errors="surrogatepass")
    headers = {
        name: str(value) for name, value in dict(sent.get("headers") or {}).items() if str(value).isascii() and str(value).isprintable()
    }
    if "json" in sent:
        headers["content-type"] = "application/json"
    params = sent.get("params") or None
    return {"method": sent["method"], "url": sent["url"], "params": params, "content": content, "headers": headers}


def test_requests_made_from_the_document_do_not_break_the_http_front(tiny_folder: Path) -> None:
    seen = fuzz_http(tiny_folder, 200)
    assert seen[200] >= 10
    assert seen[400] >= 10


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_requests_made_from_the_document_do_not_break_the_http_front(tiny_folder: Path) -> None:
    assert fuzz_http(tiny_folder, 10_000).total() >= 10_000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_requests_for_vectors_do_not_break_the_http_front(tiny_folder: Path) -> None:
    seen = fuzz_http(tiny_folder, 2_000, "/v1/embeddings")
    assert min(seen[200], seen[400]) >= 100
