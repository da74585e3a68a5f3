"""Batches: every request gets exactly one line, whatever interrupts."""

import json
import os
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from manta_client.endpoint import check_key
from manta_client.errors import InvalidKey
from typer.testing import CliRunner, Result

from serve.batch import BatchError, Item, failures, finished, forget_failures, read_items, run_batch
from serve.cli import app

CHAT = "/v1/chat/completions"


def items(count: int) -> list[Item]:
    return [Item(custom_id=f"r{index}", url=CHAT, body={"n": index}) for index in range(count)]


def echo(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json={"echo": json.loads(request.content)}, headers={"x-request-id": "q"})


def client(handler=echo) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(handler), base_url="http://manta")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_request_gets_its_answer(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    last = list(run_batch(items(20), output, client(), concurrency=4))[-1]
    assert (last.done, last.failed, last.total) == (20, 0, 20)
    answers = {line["custom_id"]: line for line in lines(output)}
    assert len(answers) == 20
    assert answers["r7"]["response"] == {"status_code": 200, "request_id": "q", "body": {"echo": {"n": 7}}}
    assert answers["r7"]["error"] is None


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"])
def test_every_url_that_openai_takes_is_asked_where_the_line_says(tmp_path: Path, url: str) -> None:
    requests, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text(json.dumps(GOOD | {"url": url}))
    list(run_batch(read_items(requests), output, client(lambda request: httpx.Response(200, json=request.url.path)), concurrency=1))
    assert lines(output)[0]["response"]["body"] == url


@pytest.mark.parametrize("after", [0, 1, 5, 19])
def test_a_run_that_is_left_early_is_gone_on_with(tmp_path: Path, after: int) -> None:
    output, sent = tmp_path / "out.jsonl", Counter[int]()

    def handler(request: httpx.Request) -> httpx.Response:
        sent[json.loads(request.content)["n"]] += 1
        return echo(request)

    run = run_batch(items(20), output, client(handler), concurrency=1)
    for _ in range(after + 1):
        next(run)
    run.close()
    assert len(finished(output)) == after
    list(run_batch(items(20), output, client(handler), concurrency=3))
    assert Counter(line["custom_id"] for line in lines(output)) == Counter(item.custom_id for item in items(20))


def test_a_line_torn_by_a_kill_is_written_again(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    list(run_batch(items(3), output, client(), concurrency=1))
    whole = output.read_bytes()
    for cut in (1, len(whole.splitlines(keepends=True)[-1]) - 1):
        output.write_bytes(whole[:-cut])
        list(run_batch(items(3), output, client(), concurrency=1))
        assert sorted(line["custom_id"] for line in lines(output)) == ["r0", "r1", "r2"]


def test_a_busy_server_is_asked_again_when_it_says(tmp_path: Path) -> None:
    refusals = iter([httpx.Response(429, headers={"retry-after": "0"}), httpx.Response(503, headers={"retry-after": "0"})])
    output = tmp_path / "out.jsonl"
    list(run_batch(items(1), output, client(lambda request: next(refusals, None) or echo(request)), concurrency=1))
    assert lines(output)[0]["response"]["status_code"] == 200


def test_a_refusal_is_an_answer_too(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    refusal = {"error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": "invalid_value"}}
    last = list(run_batch(items(1), output, client(lambda request: httpx.Response(400, json=refusal)), concurrency=1))[-1]
    assert (last.done, last.failed) == (1, 1)
    assert lines(output)[0]["response"]["body"] == refusal
    (failure,) = failures(output)
    assert (failure.line, failure.custom_id, failure.reason) == (1, "r0", "400: no")
    again = list(run_batch(items(1), output, client(), concurrency=1))[-1]
    assert (again.done, again.failed) == (1, 1), "a failure of an earlier run is one still"


def test_failures_that_are_forgotten_are_asked_again_and_no_answer_is_lost(tmp_path: Path) -> None:
    def refuses_odd(request: httpx.Request) -> httpx.Response:
        return httpx.Response(404, json={}) if json.loads(request.content)["n"] % 2 else echo(request)

    output = tmp_path / "out.jsonl"
    list(run_batch(items(6), output, client(refuses_odd), concurrency=1))
    answered = [line for line in lines(output) if line["response"]["status_code"] == 200]
    forget_failures(output, {item.custom_id for item in items(6)})
    assert lines(output) == answered
    last = list(run_batch(items(6), output, client(), concurrency=1))[-1]
    assert (last.done, last.failed) == (6, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_failures_of_requests_that_nobody_asks_again_stay(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    list(run_batch(items(4), output, client(lambda _: httpx.Response(404, json={})), concurrency=1))
    forget_failures(output, {"r1", "another batch's"})
    assert [failure.custom_id for failure in failures(output)] == ["r0", "r2", "r3"]
    before = output.read_bytes()
    forget_failures(output, {"r1"})
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("response", "error", "reason"),
    [
        (None, None, "neither an answer nor an error"),
        ({}, None, "neither an answer nor an error"),
        ("yes", None, "neither an answer nor an error"),
        ({"status_code": "200"}, None, "neither an answer nor an error"),
        ({"status_code": 500}, None, "500"),
        (None, {"code": "batch_expired", "message": "too late"}, "too late"),
        (None, {"code": "batch_expired"}, "{'code': 'batch_expired'}"),
        (None, "too late", "too late"),
    ],
)
def test_a_line_without_an_answer_is_a_failure_whoever_wrote_it(tmp_path: Path, response: object, error: object, reason: str) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text(json.dumps({"custom_id": "r0", "response": response, "error": error}) + "\n")
    assert [failure.reason for failure in failures(output)] == [reason]
    assert finished(output) == {"r0": False}
    forget_failures(output, {"r0"})
    assert output.read_text() == ""


def test_a_server_that_is_gone_is_told_in_the_line(tmp_path: Path) -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    output = tmp_path / "out.jsonl"
    list(run_batch(items(1), output, client(gone), concurrency=1, attempts=1))
    assert lines(output)[0]["response"] is None
    assert "refused" in lines(output)[0]["error"]["message"]


def test_nothing_is_sent_once_it_is_stopped(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    assert len(list(run_batch(items(5), tmp_path / "out.jsonl", client(), concurrency=2, stop=stop))) == 1


GOOD = {"custom_id": "a", "method": "POST", "url": CHAT, "body": {}}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        json.dumps({**GOOD, "custom_id": 5}),
        json.dumps({**GOOD, "url": "/v1/files"}),
        json.dumps({**GOOD, "method": "GET"}),
        json.dumps({**GOOD, "body": {"stream": True}}),
        json.dumps(GOOD) + "\n" + json.dumps(GOOD),
        json.dumps({**GOOD, "body": {"temperature": float("nan")}}),
        json.dumps({**GOOD, "body": {"prompt": "\ud800"}}),
        json.dumps({**GOOD, "custom_id": "\udfff"}),
        '{"custom_id": ' + 100_000 * "[",
    ],
)
def test_an_input_that_makes_no_sense_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(text)
    with pytest.raises(BatchError, match=r"in\.jsonl:[12]"):
        read_items(path)


def test_an_input_that_is_no_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"custom_id": "\xff"}')
    with pytest.raises(BatchError, match=r"in\.jsonl:2"):
        read_items(path)


UNNAMED = json.dumps({"custom_id": ["r0"], "response": None, "error": None})


@pytest.mark.parametrize(
    "text",
    ["my notes\n", json.dumps(GOOD) + "\n", "[]\n", UNNAMED + "\n"],
    ids=["notes", "the input itself", "a list", "a list as its name"],
)
def test_a_file_of_something_else_is_not_written_to(tmp_path: Path, text: str) -> None:
    output = tmp_path / "notes.txt"
    output.write_text(text)
    with pytest.raises(BatchError, match="another output file"):
        finished(output)
    assert output.read_text() == text


def test_an_output_that_cannot_be_read_again_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(BatchError, match="is not a file"):
        finished(pipe)


class Refusing(BaseHTTPRequestHandler):
    """A server that is ready, and answers every request but those that say "bad"."""

    def do_GET(self) -> None:
        self._answer(200, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self._answer(*((400, {"error": {"message": "bad it is"}}) if body.get("bad") else (200, {})))

    def _answer(self, status: int, body: dict) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def manta_batch(tmp_path: Path, url: str, bad: int, *more: str) -> Result:
    """Of twelve requests, of which the first ``bad`` are refused."""
    asked = [GOOD | {"custom_id": f"r{number}", "body": {"bad": number < bad}} for number in range(12)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    arguments = (str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--concurrency", "1", "--url", url)
    return CliRunner().invoke(app, ["batch", *arguments, *more])


def test_the_command_leaves_with_0_where_every_request_is_answered(tmp_path: Path, url: str) -> None:
    done = manta_batch(tmp_path, url, 0)
    assert done.exit_code == 0
    assert done.output.splitlines()[-1] == f"12 of 12 requests answered in {tmp_path}/out.jsonl"


def test_the_command_leaves_with_3_where_some_failed_and_says_last_which_and_why(tmp_path: Path, url: str) -> None:
    for run in ("the first", "one that finds every line there"):
        done = manta_batch(tmp_path, url, 2)
        assert done.exit_code == 3, run
        said = f"manta: 2 failed: lines 1, 2 of {tmp_path}/out.jsonl (the first, r0, 400: bad it is); --retry-failed asks again"
        assert done.output.splitlines()[-1] == said
    assert manta_batch(tmp_path, url, 0, "--retry-failed").exit_code == 0
    assert all(line["response"]["status_code"] == 200 for line in lines(tmp_path / "out.jsonl"))


def test_a_server_on_this_machine_is_not_asked_through_a_proxy(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert manta_batch(tmp_path, url, 0).exit_code == 0


def test_the_url_may_end_as_openais_does(tmp_path: Path, url: str) -> None:
    assert manta_batch(tmp_path, f"{url}/v1", 0).exit_code == 0


def test_a_server_of_another_kind_is_asked_without_waiting(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Refusing, "do_GET", lambda self: self._answer(404, {}))
    done = manta_batch(tmp_path, url, 0)
    assert done.exit_code == 0
    assert "waiting" not in done.output


def test_a_wrong_key_is_told_before_anything_is_asked(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Refusing, "do_GET", lambda self: self._answer(401 if self.path == "/v1/models" else 200, {}))
    assert "needs an API key: --api-key" in manta_batch(tmp_path, url, 0).output
    assert "needs another API key" in manta_batch(tmp_path, url, 0, "--api-key", "wrong").output
    assert not (tmp_path / "out.jsonl").exists()


def test_a_key_that_cannot_be_sent_is_told_as_the_client_library_does_and_not_shown(tmp_path: Path, url: str) -> None:
    key = "schl\N{LATIN SMALL LETTER U WITH DIAERESIS}ssel"
    done = manta_batch(tmp_path, url, 1, "--api-key", key)
    assert done.exit_code == 2
    with pytest.raises(InvalidKey) as raised:
        check_key(key)
    assert done.output.strip().endswith(str(raised.value))
    assert "ssel" not in done.output


def test_an_empty_input_is_not_waited_with(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("\n")
    done = CliRunner().invoke(app, ["batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")])
    assert (done.exit_code, done.output) == (1, f"manta: {tmp_path}/in.jsonl holds no requests\n")


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["batch", str(tmp_path / "none.jsonl"), "-o", str(tmp_path / "out.jsonl")])
    assert (done.exit_code, done.output) == (1, f"manta: {tmp_path}/none.jsonl: No such file or directory\n")


def test_of_many_failures_the_first_lines_are_named(tmp_path: Path, url: str) -> None:
    assert "12 failed: lines 1, 2, 3, 4, 5, 6, 7, 8, ... of" in manta_batch(tmp_path, url, 12).output


def test_what_is_no_url_is_not_waited_for(tmp_path: Path) -> None:
    done = manta_batch(tmp_path, "localhost:8000", 0)
    assert done.exit_code == 2
    assert "write for example http://127.0.0.1:8000" in done.output
