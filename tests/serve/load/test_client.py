"""The load generator against a server whose every answer is known."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from manta_client.endpoint import check_key
from manta_client.errors import InvalidKey
from typer.testing import CliRunner

from serve.cli import app
from serve.load.client import Answer, Target, find_model, run
from serve.load.report import Objective, as_json, lines_of, summarise
from serve.load.workloads import Conversation, Turn


class Server:
    """Answers every chat with four words, or with what `fail` says, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.fail: int | None = None
        self.events: list[str] | None = None
        self.content_type = "text/event-stream"
        self.left = 0

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        if self.fail is not None:
            return web.json_response({"error": {"message": "too much"}}, status=self.fail)
        response = web.StreamResponse(headers={"content-type": self.content_type})
        await response.prepare(request)
        if self.events is not None:
            await response.write("".join(f"data: {event}\n\n" for event in self.events).encode())
            return response
        try:
            for word in ("one ", "two ", "three ", "four"):
                await response.write(f"data: {json.dumps({'choices': [{'delta': {'content': word}}]})}\n\n".encode())
                await asyncio.sleep(0.001)
            usage = {"prompt_tokens": 7, "completion_tokens": 4}
            await response.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())
        except ConnectionResetError:
            self.left += 1
        return response

    async def models(self, _request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "known"}]})


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, str]]:
    served, routes = Server(), web.Application()
    routes.router.add_post("/v1/chat/completions", served.chat)
    routes.router.add_get("/v1/models", served.models)
    runner = web.AppRunner(routes, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    yield served, f"http://127.0.0.1:{port}/v1"
    await runner.cleanup()


def ask(*prompts: str, at_s: float = 0.0, **more: object) -> Conversation:
    return Conversation(at_s=at_s, turns=tuple(Turn(prompt=prompt, max_tokens=8, **more) for prompt in prompts))  # type: ignore[arg-type]


async def answers_of(url: str, conversations: list[Conversation], **more: object) -> list[Answer]:
    return await run(Target(url=url, model="known", **more), conversations, lambda answer: None)  # type: ignore[arg-type]


async def test_each_piece_of_text_is_noted_with_its_time(server: tuple[Server, str]) -> None:
    (answer,) = await answers_of(server[1], [ask("hello", at_s=0.05)], extra={"ignore_eos": True})
    assert (answer.ending, answer.text, answer.prompt_tokens, answer.output_tokens) == ("done", "one two three four", 7, 4)
    assert answer.due_s == 0.05 <= answer.sent_s <= answer.token_s[0]
    assert answer.token_s == sorted(answer.token_s)
    assert len(answer.token_s) == 4
    assert server[0].asked[0]["ignore_eos"] is True


async def test_a_conversation_sends_its_history_along(server: tuple[Server, str]) -> None:
    first, second = await answers_of(server[1], [ask("hello", "more")])
    contents = [message["content"] for message in server[0].asked[1]["messages"]]
    assert contents == ["hello", "one two three four", "more"]
    assert second.due_s == first.end_s


async def test_a_client_that_goes_away_counts_as_cancelled(server: tuple[Server, str]) -> None:
    (answer,) = await answers_of(server[1], [ask("hello", cancel_after_tokens=2)])
    assert (answer.ending, len(answer.token_s)) == ("cancelled", 2)


async def test_a_refusal_is_quoted_and_breaks_no_other_request(server: tuple[Server, str]) -> None:
    server[0].fail = 429
    answers = await answers_of(server[1], [ask("a"), ask("b", "c")])
    assert [answer.ending for answer in answers] == ["failed", "failed"]
    summary = summarise(answers, Objective(ttft_s=1, itl_s=1))
    assert summary.failed == 2
    assert "429" in next(iter(summary.errors))
    assert any("2 failed: 429" in line for line in lines_of(summary, Objective(ttft_s=1, itl_s=1)))


async def test_a_server_that_is_not_there_is_named(server: tuple[Server, str]) -> None:
    assert await find_model(server[1], None) == "known"
    with pytest.raises(ValueError, match="names no model"):
        await find_model("http://127.0.0.1:9/v1", None)


ONE = '{"choices": [{"delta": {"content": "one"}}]}'
FINISHED = '{"choices": [{"delta": {}, "finish_reason": "stop"}]}'


@pytest.mark.parametrize(
    ("events", "ending", "error"),
    [
        ([ONE, FINISHED], "done", ""),
        (['{"choices": null, "usage": null}', ONE, '{"usage": {"total_tokens": 3}}', "[DONE]"], "done", ""),
        (['{"choices": [{"delta": {"content": null, "reasoning_content": "hm"}}]}', "[DONE]"], "done", ""),
        ([json.dumps({"choices": [{"delta": {"content": "x" * 500_000}}]}), "[DONE]"], "done", ""),
        ([ONE], "failed", "ended before [DONE]"),
        ([ONE, '{"error": {"message": "no memory"}}'], "failed", "no memory"),
        (["oops"], "failed", "no JSON object: b'oops'"),
        (["[1]"], "failed", "no JSON object: b'[1]'"),
    ],
)
async def test_streams_of_other_servers_are_read_or_count_as_failed(server: tuple[Server, str], events, ending, error) -> None:
    server[0].events = events
    (answer,) = await answers_of(server[1], [ask("hello")])
    assert (answer.ending, error in answer.error) == (ending, True)
    assert len(answer.token_s) == (ending == "done" or ONE in events)


async def test_a_server_that_does_not_stream_is_said_to(server: tuple[Server, str]) -> None:
    server[0].content_type, server[0].events = "application/json", []
    (answer,) = await answers_of(server[1], [ask("hello")])
    assert answer.error == "the server answers with application/json and not with a stream"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (web.json_response({"error": "no"}, status=401), "answers 401: it needs an API key"),
        (web.json_response([]), "names no model"),
        (web.Response(text="<html>"), "names no model"),
        (web.json_response({"data": None}), "names no model"),
    ],
)
async def test_what_lists_no_model_is_said_in_words(answer: web.Response, said: str) -> None:
    async def models(_request: web.Request) -> web.Response:
        return answer

    served = web.Application()
    served.router.add_get("/v1/models", models)
    async with TestServer(served) as there:
        with pytest.raises(ValueError, match=said):
            await find_model(str(there.make_url("/v1")), None)


def test_where_results_cannot_be_written_nothing_is_measured(tmp_path: Path) -> None:
    for flag in ("--json", "--plot"):
        done = CliRunner().invoke(app, ["bench", "serve", "http://127.0.0.1:9/v1", flag, str(tmp_path / "no" / "file.png")])
        assert done.exit_code == 1
        assert "cannot be written" in done.stderr or "matplotlib" in done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--rate", "nan"], "--rate and --scale must be above 0 and finite"),
        (["--slo-ttft", "nan"], "--slo-ttft and --slo-itl must be above 0, got nan and 0.1"),
        (["--slo-itl", "0"], "--slo-ttft and --slo-itl must be above 0, got 1 and 0"),
        (["--api", "words"], "--api is 'words'; it is chat or completions"),
        (["-w", "W99"], "no workload is called 'W99'"),
        (["host:8000"], "'host:8000' is not the URL of an API; write for example http://127.0.0.1:8000/v1"),
    ],
)
def test_a_wrong_value_is_told_before_anything_is_asked(given: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["bench", "serve", *given])
    assert done.exit_code == 2
    assert said in done.stderr


@pytest.mark.parametrize("key", ["schl\N{LATIN SMALL LETTER U WITH DIAERESIS}ssel", "two\nlines"])
def test_a_key_that_cannot_be_sent_is_told_in_the_words_of_the_other_commands(key: str) -> None:
    done = CliRunner().invoke(app, ["bench", "serve", "http://127.0.0.1:9/v1", "--model", "m", "--key", key])
    with pytest.raises(InvalidKey) as raised:
        check_key(key)
    assert (done.exit_code, done.stderr) == (2, f"manta: {raised.value}\n")


def answer(*token_s: float, due_s: float = 0.0) -> Answer:
    return Answer(due_s=due_s, sent_s=due_s, token_s=list(token_s), end_s=token_s[-1], ending="done", output_tokens=len(token_s))


def test_waiting_is_counted_from_when_a_request_was_due() -> None:
    late = answer(3.0, 3.5, due_s=1.0)
    late.sent_s = 2.5
    summary = summarise([late], Objective(ttft_s=1.0, itl_s=1.0))
    assert summary.ttft_s["p50"] == 2.0
    assert (summary.late_s, summary.good) == (1.5, 0)


def test_goodput_counts_those_that_kept_both_promises() -> None:
    good, slow_start, slow_gaps = answer(0.5, 0.6, 0.7), answer(2.0, 2.1), answer(0.5, 1.5, 4.0)
    summary = summarise([good, slow_start, slow_gaps], Objective(ttft_s=1.0, itl_s=0.2))
    assert (summary.good, summary.goodput_per_s) == (1, 0.25)
    assert summary.itl_s["p99"] == pytest.approx(2.5, abs=0.1)
    assert as_json(summary, [good])["summary"]["output_tokens"] == 8  # type: ignore[index]


def test_one_pause_in_each_stream_shows_although_most_gaps_are_short() -> None:
    streams = [answer(*(index * 0.01 for index in range(200)), 2.0 + pause) for pause in (0.5, 0.6, 0.9)]
    summary = summarise(streams, Objective(ttft_s=1.0, itl_s=0.2))
    assert summary.itl_s["p99"] == pytest.approx(0.01)
    assert summary.pause_s["p50"] == pytest.approx(0.61)
    assert summary.pause_s["p100"] == pytest.approx(0.91)
    assert summarise([answer(0.5)], Objective(ttft_s=1.0, itl_s=0.2)).pause_s == {}, "one token has no gap"
