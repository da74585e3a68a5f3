"""Offline batches in OpenAI's format over HTTP. This is `manta batch` without its terminal output.

The output file is the only state: a request is done once its line is complete there. So a batch that was interrupted or killed can be
resumed, and no line is lost or written twice.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
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
    """The requests of a batch file.

    Raises:
        BatchError: a line is not a request, or two have the same ``custom_id``. Raised before anything is sent.
    """
    items: dict[str, Item] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                item = _item(line, f"{path}:{number}")
                if item.custom_id in items:
                    raise BatchError(f"{path}:{number}: custom_id {item.custom_id!r} is there twice")
                items[item.custom_id] = item
    return list(items.values())


def _item(line: bytes, where: str) -> Item:
    try:
        fields = json.loads(line.decode())
        json.dumps(fields, allow_nan=False, ensure_ascii=False).encode()  # Python parses NaN and lone surrogates, but cannot send them
    except (ValueError, RecursionError) as error:
        raise BatchError(f"{where}: not JSON: {error}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("custom_id"), str) or not isinstance(fields.get("body"), dict):
        raise BatchError(f"{where}: a line needs a custom_id, a url and a body")
    if fields.get("url") not in URLS or fields.get("method", "POST") != "POST":
        raise BatchError(f"{where}: the method must be POST and the url one of {', '.join(URLS)}")
    if fields["body"].get("stream"):
        raise BatchError(f"{where}: a batch cannot stream")
    return Item(custom_id=fields["custom_id"], url=fields["url"], body=fields["body"])


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An output line without an answer."""

    line: int
    """Line number in the output."""
    custom_id: str
    reason: str
    """The HTTP status and message, or the connection error."""


def finished(output: Path) -> dict[str, bool]:
    """``custom_id`` of each request with an output line, and whether the line holds an answer. Truncates a last line that is incomplete.

    Raises:
        BatchError: the file contains something other than batch answers.
    """
    done: dict[str, bool] = {}
    whole_bytes = 0
    for _, text, line in _whole_lines(output):
        done[line["custom_id"]] = _is_answered(line)
        whole_bytes += len(text)
    if output.exists() and whole_bytes < output.stat().st_size:
        os.truncate(output, whole_bytes)
    return done


def failures(output: Path) -> Iterator[Failure]:
    """The output lines without an answer, in file order."""
    for number, _, line in _whole_lines(output):
        if not _is_answered(line):
            yield Failure(line=number, custom_id=line["custom_id"], reason=_reason(line))


def forget_failures(output: Path, asked: Collection[str]) -> None:
    """Remove the failures of the requests ``asked`` (their ``custom_id``) from the file, so that they are sent again. All other lines stay.
    The file is replaced atomically."""
    if not any(failure.custom_id in asked for failure in failures(output)):
        return
    kept = output.with_name(f"{output.name}.kept")
    with kept.open("wb") as file:
        file.writelines(text for _, text, line in _whole_lines(output) if _is_answered(line) or line["custom_id"] not in asked)
        file.flush()
        os.fsync(file.fileno())
    kept.replace(output)


def _whole_lines(output: Path) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """(line number, raw bytes, parsed line) of each complete line."""
    if not output.exists():
        return
    if not output.is_file():
        raise BatchError(f"{output} is not a file; a batch is resumed from what its output contains")
    with output.open("rb") as texts:
        for number, text in enumerate(texts, 1):
            if not text.endswith(b"\n"):
                return
            try:
                line = json.loads(text)
                is_answer = isinstance(line["custom_id"], str) and {"response", "error"} <= line.keys()
            except (ValueError, KeyError, TypeError, RecursionError):
                is_answer = False
            if not is_answer:
                raise BatchError(f"{output}:{number} is no answer of a batch; give another output file")
            yield number, text, line


def _is_answered(line: dict[str, Any]) -> bool:
    status = _status(line)
    return line["error"] is None and status is not None and 200 <= status < 300


def _status(line: dict[str, Any]) -> int | None:
    response = line["response"]
    status = response.get("status_code") if isinstance(response, dict) else None
    return status if isinstance(status, int) else None


def _reason(line: dict[str, Any]) -> str:
    error, status = line["error"], _status(line)
    if error is not None:
        return str(error.get("message") or error) if isinstance(error, dict) else str(error)
    if status is None:
        return "neither an answer nor an error"
    body = line["response"].get("body")
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return f"{status}: {message}" if message else str(status)


class Sender:
    """Sends requests, with retries while the server is busy or unreachable."""

    def __init__(self, client: httpx.Client, *, attempts: int, sleep: Callable[[float], object]) -> None:
        self._client, self._attempts, self._sleep = client, attempts, sleep

    def answer(self, item: Item) -> dict[str, Any]:
        """The output line: a response of any status, or an error if there was no response."""
        for attempt in range(self._attempts - 1):
            try:
                response = self._client.post(item.url, json=item.body)
            except httpx.TransportError:
                self._sleep(min(2.0**attempt, MAX_WAIT_S))
            else:
                if response.status_code not in TRY_AGAIN:
                    return _line(item, response=_response(response))
                self._sleep(min(_retry_after_s(response, attempt), MAX_WAIT_S))
        try:
            return _line(item, response=_response(self._client.post(item.url, json=item.body)))
        except httpx.TransportError as error:
            return _line(item, error={"code": "no_response", "message": f"{type(error).__name__}: {error}"})


def _response(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = {"error": {"message": "the answer was not JSON", "type": "server_error", "param": None, "code": None}}
    return {"status_code": response.status_code, "request_id": response.headers.get("x-request-id", ""), "body": body}


def _line(item: Item, *, response: dict[str, Any] | None = None, error: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": item.custom_id, "response": response, "error": error}


def _retry_after_s(response: httpx.Response, attempt: int) -> float:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else 2.0**attempt


@dataclass(frozen=True, kw_only=True)
class Progress:
    done: int
    failed: int
    """Those of `done` whose line holds no answer, including those of earlier runs."""
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
    """Send the requests that have no output line yet, and append a line as each completes. Yields the progress after each.

    If the generator is closed or ``stop`` is set, nothing more is sent; requests in flight are abandoned, and the next run sends them
    again.
    """
    stop = stop or threading.Event()
    done = finished(output)
    left = iter([item for item in items if item.custom_id not in done])
    num_done, num_failed = sum(item.custom_id in done for item in items), sum(done.get(item.custom_id) is False for item in items)
    yield Progress(done=num_done, failed=num_failed, total=len(items))
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
                answered, running = wait(running, return_when=FIRST_COMPLETED)
                for answer in answered:
                    line = answer.result()
                    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                    file.flush()  # so that a kill can only cut off the last line
                    num_done += 1
                    num_failed += not _is_answered(line)
                    yield Progress(done=num_done, failed=num_failed, total=len(items))
            os.fsync(file.fileno())
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)


def wait_until_ready(client: httpx.Client, *, timeout_s: float, sleep: Callable[[float], object] = time.sleep) -> bool:
    """Whether /readyz returned 200 within the timeout, or 404: then the server is not Manta, and is used as it is."""
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            if client.get("/readyz").status_code in (200, 404):
                return True
        except httpx.TransportError:
            pass
        if time.monotonic() > end_s:
            return False
        sleep(0.5)


def refuses_key(client: httpx.Client) -> bool:
    """Whether the server would reject every request because of its key. Checked once, before any of them."""
    try:
        return client.get("/v1/models").status_code in (401, 403)
    except httpx.TransportError:
        return False
