"""`manta batch`: send a file of requests to a running server and write the answers to a file."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from engine.counted import counted
from serve.commands.settings import WRONG_USAGE, exit_if_no_key, exit_with_error

SOME_FAILED = 3
"""Exit code when every request has a line in the output, but some lines hold an error instead of an answer."""
INTERRUPTED = 130
REQUEST_TIMEOUT_S = 3600.0
READY_TIMEOUT_S = 60.0
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
MOST_NAMED = 8
"""At most this many failed lines are listed after a run; the rest are only counted."""


def batch(
    requests: Annotated[Path, typer.Argument(help="JSON lines in OpenAI's batch format: custom_id, method, url, body.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the answers, one JSON line each, in order of completion.")],
    url: Annotated[str, typer.Option("--url", help="URL of the server.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option("--api-key", help="API key; by default $MANTA_API_KEY.")] = None,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, max=1024, help="Maximum number of concurrent requests.")] = 32,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Retry requests that failed in an earlier run.")] = False,
) -> None:
    """Run a file of requests through a running server.

    The run can be resumed: after Ctrl-C or a kill, the same command continues where it stopped, and no line is lost or written twice.

    Exit codes: 0 if every request was answered; 3 if some failed (their output lines hold the error, and a summary is printed);
    1 if the batch could not run; 130 if it was interrupted.

    \b
      manta serve demo
      manta batch in.jsonl -o out.jsonl
      manta batch in.jsonl -o out.jsonl --retry-failed
    """
    import httpx

    from serve.batch import BatchError, finished, forget_failures, read_items, refuses_key, run_batch, wait_until_ready

    if not url.startswith(("http://", "https://")):
        exit_with_error(f"--url {url!r} is not a URL; write for example http://127.0.0.1:8000", code=WRONG_USAGE)
    url = url.rstrip("/").removesuffix("/v1")  # as the greeting of `manta serve` and OpenAI's clients have it
    key = api_key or os.environ.get("MANTA_API_KEY")
    if key:
        exit_if_no_key(key)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    stopped, shown = threading.Event(), None
    try:
        items = read_items(requests) or exit_with_error(f"{requests} holds no requests")
        finished(output)
        elsewhere = urlsplit(url).hostname not in LOOPBACK  # HTTP proxies do not apply to this machine
        with httpx.Client(base_url=url, headers=headers, timeout=REQUEST_TIMEOUT_S, limits=limits, trust_env=elsewhere) as client:
            if not wait_until_ready(client, timeout_s=0.0):
                typer.echo(f"waiting up to {READY_TIMEOUT_S:g} s for a server at {url}", err=True)
                if not wait_until_ready(client, timeout_s=READY_TIMEOUT_S):
                    exit_with_error(f"no server answers at {url}; start one with `manta serve`, or give --url")
            if refuses_key(client):
                exit_with_error(f"the server at {url} needs {'another' if key else 'an'} API key: --api-key, or MANTA_API_KEY")
            if retry_failed:
                forget_failures(output, {item.custom_id for item in items})
            with progress_of(len(items)) as bar:
                for shown in run_batch(items, output, client, concurrency=concurrency, stop=stopped):
                    bar(shown.done, shown.failed)
    except OSError as error:
        exit_with_error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except BatchError as error:
        exit_with_error(str(error))
    except KeyboardInterrupt:
        stopped.set()
        typer.echo("\ninterrupted; the same command goes on where this one was", err=True)
        os._exit(INTERRUPTED)  # do not wait for requests in flight
    assert shown is not None
    typer.echo(f"{shown.done - shown.failed} of {counted(shown.total, 'request')} answered in {output}", err=True)
    if shown.failed:
        exit_with_error(_failed(output, {item.custom_id for item in items}), code=SOME_FAILED)


def _failed(output: Path, asked: set[str]) -> str:
    """Message: how many requests failed, in which output lines, and why the first one did."""
    from serve.batch import failures

    failed = [failure for failure in failures(output) if failure.custom_id in asked]
    named = ", ".join(str(failure.line) for failure in failed[:MOST_NAMED]) + (", ..." if len(failed) > MOST_NAMED else "")
    which, (first, *others) = f"line{'s' if len(failed) > 1 else ''} {named} of {output}", failed
    why = f"{'the first, ' if others else ''}{first.custom_id}, {first.reason}"
    return f"{len(failed)} failed: {which} ({why}); --retry-failed asks again"


@contextmanager
def progress_of(total: int) -> Iterator[Callable[[int, int], None]]:
    """Progress on stderr: a bar, or without a terminal a line for each tenth. Yields a function of (requests done, of these failed)."""
    from serve.terminal import can_redraw

    if not can_redraw():
        yield _lines(total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("batch", total=total, failed=0)
        yield lambda done, failed: progress.update(task, completed=done, failed=failed)


def _lines(total: int) -> Callable[[int, int], None]:
    last_tenth = 0

    def report(done: int, failed: int) -> None:
        nonlocal last_tenth
        if total and 10 * done // total > last_tenth:
            last_tenth = 10 * done // total
            typer.echo(f"{done} of {total} done, {failed} failed", err=True)

    return report
