"""The batch runner: every line answered once, also after it was cut off."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from k8s.images import batch
from tests.k8s.chart import container, ready


class Server(ThreadingHTTPServer):
    """Echoes; says 503 to the first try of whatever asks for that."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["prompt"]
        status = 400 if prompt == "wrong" else 503 if prompt == "later" and "later" not in self.server.asked else 200
        self.server.asked.append(prompt)
        told = json.dumps({"text": prompt} if status == 200 else {"error": {"code": "no"}}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server: Server, folder: Path, prompts: list[str]) -> list[dict]:
    lines = [{"custom_id": str(index), "url": "/v1/completions", "body": {"prompt": prompt}} for index, prompt in enumerate(prompts)]
    (folder / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch.run(f"http://127.0.0.1:{server.server_port}", folder / "in", folder / "out", concurrency=3, timeout_s=10)
    return sorted((json.loads(line) for line in (folder / "out").read_text().splitlines()), key=lambda line: int(line["custom_id"]))


def test_every_request_is_answered_and_failures_are_told(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch.time, "sleep", lambda _: None)
    answers = ask(server, tmp_path, ["a", "wrong", "later", "b"])
    assert [answer["response"]["status_code"] for answer in answers] == [200, 400, 200, 200]
    assert [answer["error"] for answer in answers] == [None, {"code": "no"}, None, None]
    assert answers[2]["response"]["body"] == {"text": "later"}


def test_what_was_answered_before_it_was_cut_off_is_not_asked_again(server: Server, tmp_path: Path) -> None:
    first = json.dumps({"custom_id": "0", "response": {"status_code": 200, "body": {"text": "a"}}, "error": None})
    (tmp_path / "out").write_text(first + "\n" + first[:20])
    answers = ask(server, tmp_path, ["a", "b"])
    assert server.asked == ["b"]
    assert [answer["custom_id"] for answer in answers] == ["0", "1"]


def test_a_line_that_is_no_request_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").write_text('{"custom_id": "1", "url": "/v1/files", "body": {}}\n')
    with pytest.raises(ValueError, match="in:1: a request has custom_id"):
        list(batch.requests(tmp_path / "in", set()))


def test_the_job_runs_it_on_a_cluster_of_its_own_with_the_claim_mounted() -> None:
    job = ready("batch").one("RayJob")["spec"]
    assert job["entrypoint"].split()[1] == "/opt/manta/k8s/images/batch.py"
    head = ready("batch").pods()["head"]
    assert {"name": "batch", "mountPath": "/batch"} in container(head)["volumeMounts"]
    assert "RayService" not in ready("batch").kinds
