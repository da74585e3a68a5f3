"""Run a batch file on a dedicated cluster: the entry point of the chart's RayJob.

Input and output lines are those of OpenAI's batch files: {"custom_id", "url", "body"} to {"custom_id", "response": {"status_code",
"body"}, "error"}. Requests that the output already has are skipped, so an interrupted job can be resumed.
"""

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

Line = dict[str, Any]
URLS = ("/v1/chat/completions", "/v1/completions")
TRIES = 5
RETRIABLE = (429, 500, 502, 503)


def answer(base: str, line: Line, timeout_s: float) -> Line:
    """The output line of one request. Temporary failures are retried."""
    for attempt in range(TRIES):
        status, body = post(f"{base}{line['url']}", line["body"], timeout_s)
        if status not in RETRIABLE:
            break
        time.sleep(2.0**attempt)
    failed = body.get("error") if status != 200 else None
    return {"custom_id": line["custom_id"], "response": {"status_code": status, "body": body}, "error": failed}


def post(url: str, body: Line, timeout_s: float) -> tuple[int, Line]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as got:  # noqa: S310  (the cluster's own address)
            return got.status, json.load(got)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        return 503, {"error": {"message": str(error), "code": "unavailable"}}


def requests(file: Path, done: set[str]) -> Iterator[Line]:
    """Lines without an answer yet.

    Raises:
        ValueError: a line is not a request; the message has its number.
    """
    for number, text in enumerate(file.read_text().splitlines(), 1):
        if not text.strip():
            continue
        line = json.loads(text)
        if not isinstance(line, dict) or not {"custom_id", "url", "body"} <= line.keys() or line["url"] not in URLS:
            raise ValueError(f"{file.name}:{number}: a request has custom_id, body, and url, which is one of {', '.join(URLS)}")
        if line["custom_id"] not in done:
            yield line


def answered(file: Path) -> set[str]:
    """``custom_id`` of the lines that an earlier run wrote. Removes a last line that is incomplete."""
    if not file.exists():
        return set()
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    return {json.loads(line)["custom_id"] for line in whole.splitlines()}


def run(base: str, source: Path, target: Path, *, concurrency: int, timeout_s: float) -> int:
    """Answer all requests; returns the number that failed."""
    num_failed = 0
    with target.open("a") as out, ThreadPoolExecutor(concurrency) as pool:
        running: set[Future[Line]] = set()

        def take(finished: set[Future[Line]]) -> None:
            nonlocal num_failed
            for one in finished:
                line = one.result()
                num_failed += line["error"] is not None
                out.write(json.dumps(line) + "\n")
                out.flush()

        for line in requests(source, answered(target)):
            running.add(pool.submit(answer, base, line, timeout_s))
            if len(running) >= concurrency:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                take(finished)
        take(wait(running).done)
    return num_failed


def serve(config: Path, base: str, wait_s: float) -> None:
    """Deploy on this cluster, and wait until every model is ready."""
    subprocess.run(["serve", "deploy", str(config)], check=True)  # noqa: S603, S607  (Ray's own command, of the image)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{base}/readyz", timeout=5):  # noqa: S310
                return
        except (urllib.error.URLError, OSError):
            time.sleep(2)
    sys.exit(f"nothing is ready after {wait_s:g} s; look at `serve status`")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("input", type=Path)
    arguments.add_argument("output", type=Path)
    arguments.add_argument("--serve", type=Path, help="Serve config file to deploy first")
    arguments.add_argument("--http", default="http://127.0.0.1:8000")
    arguments.add_argument("--concurrency", type=int, default=64)
    arguments.add_argument("--timeout", type=float, default=3600.0, help="seconds for one request")
    arguments.add_argument("--wait", type=float, default=3600.0, help="seconds for the models to be loaded")
    given = arguments.parse_args()
    if given.serve:
        serve(given.serve, given.http, given.wait)
    num_failed = run(given.http, given.input, given.output, concurrency=given.concurrency, timeout_s=given.timeout)
    print(f"{given.output}: all answered, {num_failed} with an error")


if __name__ == "__main__":
    main()
