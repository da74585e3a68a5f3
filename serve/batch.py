"""Offline batches in OpenAI's format, through a running server's HTTP front. What `manta batch` does, without the terminal.

The output file is the only state: a request counts as done when its line is there whole. So a batch that was interrupted, even
killed, goes on where it was, and no line is lost or written twice.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
TRY_AGAIN = frozenset({408, 429, 502, 503, 504})
MAX_WAIT_S = 60.0


class BatchError(ValueError):
    """The input or output file cannot be used; the message says which line and why."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One line of the input."""

    custom_id: str
    url: str
    body: dict[str, Any]


def read_items(path: Path) -> list[Item]:
    """
    Raises:
        BatchError: a line is no request, or two have the same ``custom_id``. Said before anything is sent.
    """
    items: dict[str, Item] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                item = _item(line, f"{path}:{number}")
                if item.custom_id in items:
                    raise BatchError(f"{path}:{number}: custom_id {item.custom_id!r} is there twice")
                items[item.custom_id] = item
    return list(items.values())


def _item(line: str, where: str) -> Item:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise BatchError(f"{where}: not JSON: {error}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("custom_id"), str) or not isinstance(fields.get("body"), dict):
        raise BatchError(f"{where}: a line needs a custom_id, a url and a body")
    if fields.get("url") not in URLS or fields.get("method", "POST") != "POST":
        raise BatchError(f"{where}: the method must be POST and the url one of {', '.join(URLS)}")
    if fields["body"].get("stream"):
        raise BatchError(f"{where}: a batch cannot stream")
    return Item(custom_id=fields["custom_id"], url=fields["url"], body=fields["body"])


def finished_ids(output: Path) -> set[str]:
    """Which requests have their line; a last line that was torn by a kill is cut off.

    Raises:
        BatchError: the file holds something else than answers of a batch.
    """
    if not output.exists():
        return set()
    done: set[str] = set()
    whole_bytes = 0
    with output.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                done.add(json.loads(line)["custom_id"])
            except (ValueError, KeyError, TypeError):
                raise BatchError(f"{output}:{number} is no answer of a batch; give another output file") from None
            whole_bytes += len(line)
    if whole_bytes < output.stat().st_size:
        os.truncate(output, whole_bytes)
    return done


class Sender:
    """Sends items one by one, and again while the server says that it is busy, or is not there."""

    def __init__(self, client: httpx.Client, *, attempts: int, sleep: Callable[[float], object]) -> None:
        self._client, self._attempts, self._sleep = client, attempts, sleep

    def answer(self, item: Item) -> dict[str, Any]:
        """The line of the output: a response of any status, or an error where there was none."""
        for attempt in range(self._attempts - 1):
            try:
                response = self._client.post(item.url, json=item.body)
            except httpx.TransportError:
                self._sleep(min(2.0**attempt, MAX_WAIT_S))
            else:
                if response.status_code not in TRY_AGAIN:
                    return _line(item, response=_told(response))
                self._sleep(min(_retry_after_s(response, attempt), MAX_WAIT_S))
        try:
            return _line(item, response=_told(self._client.post(item.url, json=item.body)))
        except httpx.TransportError as error:
            return _line(item, error={"code": "no_response", "message": f"{type(error).__name__}: {error}"})


def _told(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = {"error": {"message": "the answer was not JSON", "type": "server_error", "param": None, "code": None}}
    return {"status_code": response.status_code, "request_id": response.headers.get("x-request-id", ""), "body": body}


def _line(item: Item, *, response: dict[str, Any] | None = None, error: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": item.custom_id, "response": response, "error": error}


def _retry_after_s(response: httpx.Response, attempt: int) -> float:
    said = response.headers.get("retry-after", "")
    return float(said) if said.isdecimal() else 2.0**attempt


@dataclass(frozen=True, kw_only=True)
class Progress:
    done: int
    failed: int
    """Of `done`, those whose status is no 2xx."""
    total: int


def run_batch(
    items: list[Item],
    output: Path,
    client: httpx.Client,
    *,
    concurrency: int,
    attempts: int = 8,
    stop: threading.Event | None = None,
) -> Iterator[Progress]:
    """Answer what has no line yet, and append a line for each as soon as it is there. Yields after each.

    Leaving early, or setting ``stop``, sends nothing more; answers that are under way then are not waited for and will be asked
    for again by the next run.
    """
    stop = stop or threading.Event()
    done = finished_ids(output)
    left = iter([item for item in items if item.custom_id not in done])
    num_done, num_failed = sum(item.custom_id in done for item in items), 0
    yield Progress(done=num_done, failed=0, total=len(items))
    sender = Sender(client, attempts=attempts, sleep=stop.wait)
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="batch")
    running: set[Future[dict[str, Any]]] = set()
    try:
        with output.open("ab") as file:
            while not stop.is_set():
                while len(running) < concurrency and (item := next(left, None)) is not None:
                    running.add(pool.submit(sender.answer, item))
                if not running:
                    break
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for answer in finished:
                    line = answer.result()
                    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                    file.flush()  # a kill leaves it whole, or torn at the very end
                    num_done += 1
                    num_failed += line["error"] is not None or not 200 <= line["response"]["status_code"] < 300
                    yield Progress(done=num_done, failed=num_failed, total=len(items))
            os.fsync(file.fileno())
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def wait_until_ready(client: httpx.Client, *, timeout_s: float, sleep: Callable[[float], object] = time.sleep) -> bool:
    """Whether /readyz said yes in time."""
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            if client.get("/readyz").status_code == 200:
                return True
        except httpx.TransportError:
            pass
        if time.monotonic() > end_s:
            return False
        sleep(0.5)
