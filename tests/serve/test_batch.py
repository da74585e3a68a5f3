"""Batches: every request gets exactly one line, whatever interrupts."""

import json
import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest

from serve.batch import BatchError, Item, finished_ids, read_items, run_batch

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
    assert len(finished_ids(output)) == after
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
    ],
)
def test_an_input_that_makes_no_sense_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(text)
    with pytest.raises(BatchError, match=r"in\.jsonl:[12]"):
        read_items(path)


def test_a_file_of_something_else_is_not_written_to(tmp_path: Path) -> None:
    output = tmp_path / "notes.txt"
    output.write_text("my notes\n")
    with pytest.raises(BatchError, match="another output file"):
        finished_ids(output)
    assert output.read_text() == "my notes\n"
